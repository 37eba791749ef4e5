"""systemd units that only an image needs: which start counts as a good one, and the emulator's way in.

An image starts one of two systems, A or B. The boot loader counts how often it tried one; a start counts as good, and is no
longer counted, once the model has answered a question in it (systemd's Automatic Boot Assessment).
"""

from __future__ import annotations

from edgeft.export.files import Entry
from edgeft.export.service import PROGRAMS, UNITS

FORWARD = 8090
"""The port that the emulator is forwarded to."""
CREDENTIAL = "edgeft.forward"
"""What the emulator hands in (systemd.system-credentials(7)); on a board nobody does."""
PATIENCE_S = 900
"""How long a model may take until its first answer, before this start counts as a failed one."""
_COUNTED = "/sys/firmware/efi/efivars/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""Set by systemd-boot while it counts (systemd's boot loader interface)."""
ENABLED = ("edgeft-answers.service", "edgeft-forward.socket")


def of_image(model: str, port: int) -> dict[str, Entry]:
    """The units, and the script behind the first. `model` is the model's name, `port` the one it listens on."""
    return {
        f"{PROGRAMS}/answers": Entry(content=_script(), mode=0o755),
        f"{UNITS}/edgeft-answers.service": Entry(content=_answers(model)),
        f"{UNITS}/edgeft-forward.socket": Entry(content=_socket()),
        f"{UNITS}/edgeft-forward.service": Entry(content=_forward(port)),
    }


def _script() -> bytes:
    lines = [
        "#!/bin/sh",
        "# answers NAME SECONDS: ends well when the model has answered. If it does not in time, this start is a failed one:",
        "# restart, as long as the boot loader has a try left for either system. (Uptime, as boards have no clock.)",
        "set -u",
        "now() { read -r up _ </proc/uptime; echo ${up%.*}; }",
        "end=$(($(now) + $2))",
        f'until /{PROGRAMS}/edgeft-update health "$1"; do',
        '    [ "$(now)" -lt "$end" ] || break',
        "    sleep 5",
        "done",
        '[ "$(now)" -ge "$end" ] || exit 0',
        'echo "edgeft: $1 did not answer within $2 s, so this start counts as failed" >&2',
        "for entry in /boot/loader/entries/*+[1-9]*.conf; do",
        '    [ ! -e "$entry" ] || systemctl reboot',
        "done",
        "exit 1",
    ]
    return ("\n".join(lines) + "\n").encode()


def _answers(model: str) -> bytes:
    lines = [
        "[Unit]",
        f"Description=Wait for the first answer of {model}; the start is a good one then",
        "# Only while the boot loader counts.",
        f"ConditionPathExists={_COUNTED}",
        "# Where the boot loader's entries lie, one of which systemd-bless-boot renames.",
        f"Wants=edgeft-{model}.service boot.mount",
        f"After=edgeft-{model}.service boot.mount",
        "Before=boot-complete.target",
        "",
        "[Service]",
        "Type=oneshot",
        "RemainAfterExit=yes",
        "TimeoutStartSec=infinity",
        f"ExecStart=/{PROGRAMS}/answers {model} {PATIENCE_S}",
        "",
        "[Install]",
        "RequiredBy=boot-complete.target",
    ]
    return ("\n".join(lines) + "\n").encode()


def _socket() -> bytes:
    lines = [
        "[Unit]",
        "Description=Port for an emulator, which reaches nothing that listens on loopback",
        "# Handed in by whoever owns the machine from below: a hypervisor, or the kernel's command line.",
        f"ConditionCredential={CREDENTIAL}",
        "",
        "[Socket]",
        f"ListenStream=0.0.0.0:{FORWARD}",
        "",
        "[Install]",
        "WantedBy=sockets.target",
    ]
    return ("\n".join(lines) + "\n").encode()


def _forward(port: int) -> bytes:
    lines = [
        "[Unit]",
        "Description=Forward the emulator's port to the model's",
        "Requires=edgeft-forward.socket",
        "After=edgeft-forward.socket",
        "",
        "[Service]",
        f"ExecStart=/lib/systemd/systemd-socket-proxyd 127.0.0.1:{port}",
        "DynamicUser=yes",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
    ]
    return ("\n".join(lines) + "\n").encode()
