"""The service that serves a model on a device: its systemd units, its settings file, and the script that starts it.

On loopback by default. Another address is one line in the settings file, and then a key is demanded: the script refuses
to listen without one, and the key is made on the device, at its first start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from edgeft.bundle import Settings
from edgeft.export.files import Entry

PROGRAMS = "usr/lib/edgeft"
UNITS = "usr/lib/systemd/system"
KEY = "var/lib/edgeft/api-key"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOG_MB = 16
"""What the journal of all models together may occupy on the disk, and as much in memory before there is one."""


def models_folder(name: str) -> str:
    return f"usr/share/edgeft/{name}"


def memory_limit_mb(predicted_mb: float, available_mb: float) -> int:
    """MemoryMax of the service, MB of 10^6 bytes: a quarter more than predicted, never more than the board leaves.

    The planner's promise is 5 %; the rest is for the page cache of a file that is being read, which counts here too.
    """
    return math.ceil(min(1.25 * predicted_mb, max(available_mb, predicted_mb)))


def shared() -> dict[str, Entry]:
    """What all models of a device share: the start script, the key's unit, the journal's bound."""
    return {
        f"{PROGRAMS}/serve": Entry(content=_start_script(), mode=0o755),
        f"{UNITS}/edgeft-key.service": Entry(content=_key_unit()),
        "usr/lib/systemd/journald@edgeft.conf.d/edgeft.conf": Entry(content=_journal()),
    }


def of_model(s: Settings, *, memory_max_mb: int) -> dict[str, Entry]:
    """The unit of one model and its settings file."""
    return {
        f"{UNITS}/edgeft-{s.name}.service": Entry(content=_unit(s, memory_max_mb)),
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


def _unit(s: Settings, memory_max_mb: int) -> bytes:
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
        "After=edgeft-key.service network.target",
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
        "# serve NAME: starts llama-server on the model in /usr/share/edgeft/NAME, as /etc/edgeft/NAME.env says.",
        "set -euf",
        "here=/usr/share/edgeft/$1",
        "host=${EDGEFT_HOST:-127.0.0.1}",
        "# Host and port come last and win over the options.",
        'set -- ${EDGEFT_OPTIONS:-} --host "$host" --port "${EDGEFT_PORT:-8080}"',
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
        "StateDirectoryMode=0700",
        f"ExecStart=/bin/sh -ec '{make}'",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateNetwork=yes",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
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
