"""Users, groups and how they are let in: passwd, group, shadow and PAM, as Debian's maintainer scripts leave them.

systemd-sysusers adds the rest from the packages' own lists. No account has a password; root has no way in at all.
"""

from __future__ import annotations

from pathlib import Path

from edgeft.export.files import Entry

_MASTER = "usr/share/base-passwd"
_OWN_USERS = (
    "sshd:x:101:65534::/run/sshd:/usr/sbin/nologin",
    "edgeft:x:1000:1000:the owner:/var/home/edgeft:/bin/sh",
)
_OWN_GROUPS = ("edgeft:x:1000:",)
_UDEV_GROUPS = ("input:x:102:", "sgx:x:103:", "kvm:x:104:", "render:x:105:")
"""udev's package makes them; its rules give devices to them, a GPU's among them."""
_DAY = 18262
"""2020-01-01 in days: when every password that is none was last changed."""


def files() -> dict[str, Entry]:
    """PAM's common parts, which pam-auth-update would write: whoever comes with a key is let in, no password opens anything."""
    parts = {
        "auth": ("auth requisite pam_deny.so",),
        "account": ("account required pam_unix.so",),
        "password": ("password requisite pam_deny.so",),
        "session": ("session required pam_unix.so",),
        "session-noninteractive": ("session required pam_unix.so",),
    }
    return {
        f"etc/pam.d/common-{name}": Entry(content=("\n".join(lines) + "\n").encode())
        for name, lines in parts.items()
    }


def write(root: Path, *, ssh: bool) -> None:
    """passwd, group and shadow from Debian's master lists (base-passwd), and with `ssh` the server's user and the owner."""
    users = (root / _MASTER / "passwd.master").read_text(encoding="utf-8").splitlines()
    groups = (root / _MASTER / "group.master").read_text(encoding="utf-8").splitlines()
    groups += _UDEV_GROUPS
    if ssh:
        users += _OWN_USERS
        groups = [f"{line}edgeft" if line.startswith("adm:") else line for line in (*groups, *_OWN_GROUPS)]
    users = [line.replace(":*:", ":x:", 1) for line in users]
    groups = [line.replace(":*:", ":x:", 1) for line in groups]
    shadow = [f"{line.split(':')[0]}:!*:{_DAY}:0:99999:7:::" for line in users]
    _put(root / "etc/passwd", users, 0o644)
    _put(root / "etc/group", groups, 0o644)
    _put(root / "etc/shadow", shadow, 0o600)
    _put(root / "etc/gshadow", [f"{line.split(':')[0]}:!*::" for line in groups], 0o600)


def settle(root: Path) -> None:
    """After systemd-sysusers: its accounts' passwords were never changed today, and its backups go."""
    lines = [line.split(":") for line in (root / "etc/shadow").read_text(encoding="utf-8").splitlines()]
    _put(root / "etc/shadow", [":".join([*line[:2], str(_DAY), *line[3:]]) for line in lines], 0o600)
    for leftover in ("passwd-", "group-", "shadow-", "gshadow-", ".pwd.lock"):
        (root / "etc" / leftover).unlink(missing_ok=True)


def _put(path: Path, lines: list[str], mode: int) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(mode)
