"""The service that serves a model on a device: its systemd units, its settings file, and the script that starts it.

On loopback by default. Another address is one line in the settings file, and then a key is demanded: the script refuses
to listen without one, and the key is made on the device, at its first start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from edgeft.bundle import Settings
from edgeft.export import agent
from edgeft.export.files import Entry

PROGRAMS = "usr/lib/edgeft"
UNITS = "usr/lib/systemd/system"
KEY = "var/lib/edgeft/api-key"
TRUST = "etc/edgeft/trust/root.json"
PYTHON = "ConditionPathExists=/usr/bin/python3"
"""A model is served where there is no Python too; only updates need it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
VULKAN_GROUPS = ("render", "video")
"""Whose the GPU's nodes are on Debian, where the driver is not NVIDIA's. A group that a system does not have fails the start."""
LOG_MB = 16
"""What the journal of all models together may occupy on the disk, and as much in memory before there is one."""


def models_folder(name: str) -> str:
    return f"usr/share/edgeft/{name}"


def versions_folder(name: str) -> str:
    """Where updates put a model's versions, the current one among them (edgeft/agent/versions.py)."""
    return f"var/lib/edgeft/models/{name}"


def memory_limit_mb(predicted_mb: float, available_mb: float) -> int:
    """MemoryMax of the service, MB of 10^6 bytes: a quarter more than predicted, never more than the board leaves.

    The planner's promise is 5 %; the rest is for the page cache of a file that is being read, which counts here too.
    """
    return math.ceil(min(1.25 * predicted_mb, max(available_mb, predicted_mb)))


def enabled(name: str) -> tuple[str, ...]:
    """The units that `systemctl enable` makes start at boot; they bring the others with them."""
    return (f"edgeft-{name}.service",)


def shared(trust: bytes = b"") -> dict[str, Entry]:
    """What all models of a device share: the start script, the update agent and its units, the key's unit, the journal's
    bound, and `trust`, the root metadata of whoever may sign updates; without it the device takes none."""
    wrapper = f'#!/bin/sh\nexec /{agent.PATH} "$@"\n'
    return {
        f"{PROGRAMS}/serve": Entry(content=_start_script(), mode=0o755),
        f"{PROGRAMS}/recover": Entry(content=_recover_script(), mode=0o755),
        agent.PATH: Entry(content=agent.zipapp(), mode=0o755),
        agent.WRAPPER: Entry(content=wrapper.encode(), mode=0o755),
        f"{UNITS}/edgeft-key.service": Entry(content=_key_unit()),
        f"{UNITS}/edgeft-recover.service": Entry(content=_recover_unit()),
        f"{UNITS}/edgeft-health@.service": Entry(content=_health_unit()),
        f"{UNITS}/edgeft-health@.timer": Entry(content=_health_timer()),
        "usr/lib/systemd/journald@edgeft.conf.d/edgeft.conf": Entry(content=_journal()),
        **({TRUST: Entry(content=trust)} if trust else {}),
    }


def of_model(s: Settings, *, memory_max_mb: int, groups: Sequence[str] = ()) -> dict[str, Entry]:
    """The unit of one model and its settings file. `groups`: to which its devices belong."""
    return {
        f"{UNITS}/edgeft-{s.name}.service": Entry(content=_unit(s, memory_max_mb, groups)),
        f"etc/edgeft/{s.name}.env": Entry(content=_environment(s)),
    }


def readme(s: Settings, *, board: str, numbers: Mapping[str, str]) -> bytes:
    """README for the person at the device."""
    name = f"edgeft-{s.name}"
    lines = [
        f"{name}: a fine-tuned language model for {board}, served by llama-server as a systemd service",
        "",
        f"  address            http://{s.host}:{s.port} (OpenAI API and, where the server has one, a chat page)",
        f"  state              systemctl status {name}",
        f"  log                journalctl --namespace=edgeft -u {name}",
        f"  settings           /etc/edgeft/{s.name}.env, then systemctl restart {name}",
        f"  open to the network   EDGEFT_HOST=0.0.0.0 there; clients then send the key in /{KEY}, which root can read",
        "  licences, origin   here and in /" + models_folder(s.name),
        "",
        "What to expect (predicted from the board's published figures, not measured on yours)",
        *(f"  {key}: {value}" for key, value in numbers.items()),
        "",
    ]
    return "\n".join(lines).encode()


def _unit(s: Settings, memory_max_mb: int, groups: Sequence[str]) -> bytes:
    devices = (
        ("# The GPU's nodes stay visible, so no PrivateDevices.", "DevicePolicy=closed", "DeviceAllow=char-nvidia* rw",
         "DeviceAllow=char-drm rw")
        if s.gpu
        else ("PrivateDevices=yes",)
    )  # fmt: skip
    lines = [
        "[Unit]",
        f"Description=Language model {s.name} (llama-server)",
        "Requires=edgeft-key.service",
        f"Wants=edgeft-recover.service edgeft-health@{s.name}.timer",
        "After=edgeft-key.service edgeft-recover.service network.target",
        "StartLimitIntervalSec=300",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        f"EnvironmentFile=-/etc/edgeft/{s.name}.env",
        f"LoadCredential=api-key:/{KEY}",
        f"ExecStart=/{PROGRAMS}/serve {s.name}",
        "Restart=on-failure",
        "RestartSec=5",
        "# 78: the settings ask for what is refused; trying again changes nothing.",
        "RestartPreventExitStatus=78",
        "# The planner's prediction and a quarter.",
        f"MemoryMax={memory_max_mb * 10**6}",
        "MemorySwapMax=0",
        "TasksMax=256",
        "OOMPolicy=kill",
        "OOMScoreAdjust=500",
        f"# A journal of its own, at most {LOG_MB} MB of disk.",
        "LogNamespace=edgeft",
        "LogRateLimitIntervalSec=30",
        "LogRateLimitBurst=300",
        "DynamicUser=yes",
        "UMask=0077",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        *devices,
        *([f"SupplementaryGroups={' '.join(groups)}"] if groups else []),
        "NoNewPrivileges=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "CapabilityBoundingSet=",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return ("\n".join(lines) + "\n").encode()


def _environment(s: Settings) -> bytes:
    lines = [
        f"# Settings of edgeft-{s.name}.service; systemctl restart edgeft-{s.name} makes them valid.",
        f"# Loopback answers this machine alone. Any other address is open to the network and needs the key in /{KEY},",
        "# which clients send as: Authorization: Bearer KEY",
        f"EDGEFT_HOST={s.host}",
        f"EDGEFT_PORT={s.port}",
        "# More options of llama-server, without quotation marks.",
        "EDGEFT_OPTIONS=",
    ]
    return ("\n".join(lines) + "\n").encode()


def _start_script() -> bytes:
    lines = [
        "#!/bin/sh",
        "# serve NAME: starts llama-server on the device's model, as /etc/edgeft/NAME.env says: on the version that an update",
        "# has left in /var/lib/edgeft/models/NAME/current, and on the one that the package installed where there is none.",
        "set -euf",
        "here=/var/lib/edgeft/models/$1/current",
        '[ -e "$here/run.sh" ] || here=/usr/share/edgeft/$1',
        "# The folder itself, not the link: all files come from one version, whenever the link is switched.",
        'here=$(CDPATH= cd -P -- "$here" && pwd -P)',
        "host=${EDGEFT_HOST:-127.0.0.1}",
        f"web=/{PROGRAMS}/web",
        '[ -d "$web" ] && web="--path $web" || web=',
        "# The target's threads, but never more than there are cores: one that waits for another's turn holds all of them up.",
        """threads=$(sed -n 's/^ *"threads": *\\([0-9]*\\).*/\\1/p' "$here/settings.json" 2>/dev/null || :)""",
        "cores=$(nproc 2>/dev/null || echo 9999)",
        '[ "${threads:-0}" -le "$cores" ] && fewer= || fewer="--threads $cores --threads-batch $cores"',
        "# Host and port come last and win over the options.",
        'set -- $web $fewer ${EDGEFT_OPTIONS:-} --host "$host" --port "${EDGEFT_PORT:-8080}"',
        'case "$host" in',
        f"{'|'.join(LOOPBACK)}) ;;",
        "*)",
        f"    key=${{CREDENTIALS_DIRECTORY:-/{KEY.rpartition('/')[0]}}}/api-key",
        '    if [ ! -s "$key" ]; then',
        '        echo "edgeft: no key in $key, so nothing listens on $host; EDGEFT_HOST=127.0.0.1 needs none" >&2',
        "        exit 78",
        "    fi",
        '    set -- "$@" --api-key-file "$key"',
        "    ;;",
        "esac",
        f'LLAMA_SERVER=/{PROGRAMS}/llama-server exec "$here/run.sh" "$@"',
    ]
    return ("\n".join(lines) + "\n").encode()


def _key_unit() -> bytes:
    make = f'umask 077; od -An -N24 -tx1 /dev/urandom | tr -d " \\\\n" >/{KEY}.new; mv /{KEY}.new /{KEY}'
    lines = [
        "[Unit]",
        "Description=API key for edgeft's language models, made once on this device",
        f"ConditionPathExists=!/{KEY}",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "StateDirectory=edgeft",
        "StateDirectoryMode=0711",
        f"ExecStart=/bin/sh -ec '{make}'",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateNetwork=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
    ]
    return ("\n".join(lines) + "\n").encode()


def _recover_script() -> bytes:
    lines = [
        "#!/bin/sh",
        "# Has the update agent put right what a power loss left, if it left anything: on a slow board, a model that is whole is",
        "# not to wait for Python.",
        "set -eu",
        f'repair="exec /{agent.PATH} recover"',
        "cd /var/lib/edgeft/models",
        "for model in *; do",
        '    [ -d "$model" ] || continue',
        '    [ -e "$model/current/model.gguf" ] || [ -e "/usr/share/edgeft/$model/model.gguf" -a ! -L "$model/current" ] || $repair',
        '    [ ! -e "$model/state.json" ] || grep -q \'"trial": null\' "$model/state.json" || $repair',
        '    for left in "$model"/*.tmp "$model"/versions/*.tmp; do',
        '        [ ! -e "$left" -a ! -L "$left" ] || $repair',
        "    done",
        "done",
    ]
    return ("\n".join(lines) + "\n").encode()


def _recover_unit() -> bytes:
    lines = [
        "[Unit]",
        "Description=Puts right what a power loss left of an update, before the models are served",
        PYTHON,
        "ConditionPathExists=/var/lib/edgeft/models",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        f"ExecStart=/{PROGRAMS}/recover",
        "TimeoutStartSec=10min",
        "ProtectSystem=strict",
        "ReadWritePaths=/var/lib/edgeft",
        "ProtectHome=yes",
        "PrivateNetwork=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
    ]
    return ("\n".join(lines) + "\n").encode()


def _health_unit() -> bytes:
    lines = [
        "[Unit]",
        "Description=Asks the language model %i a question, and restarts it when it does not answer",
        PYTHON,
        "",
        "[Service]",
        "Type=oneshot",
        f"ExecStart=/{agent.PATH} health %i",
        "TimeoutStartSec=30min",
        "Nice=10",
        "LogNamespace=edgeft",
        "ProtectSystem=strict",
        "ReadWritePaths=/var/lib/edgeft",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
    ]
    return ("\n".join(lines) + "\n").encode()


def _health_timer() -> bytes:
    lines = [
        "[Unit]",
        "Description=When the language model %i is asked a question",
        "# Stopped with the service by whoever stops it; a service that failed keeps its timer, which revives it.",
        "PartOf=edgeft-%i.service",
        PYTHON,
        "",
        "[Timer]",
        "OnActiveSec=10min",
        "OnUnitInactiveSec=10min",
    ]
    return ("\n".join(lines) + "\n").encode()


def _journal() -> bytes:
    lines = [
        "[Journal]",
        f"SystemMaxUse={LOG_MB}M",
        f"RuntimeMaxUse={LOG_MB}M",
        "SystemMaxFileSize=4M",
        "MaxRetentionSec=1month",
    ]
    return ("\n".join(lines) + "\n").encode()
