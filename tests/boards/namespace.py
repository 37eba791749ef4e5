"""A board made of namespaces: its own users, processes, mounts and network, a Debian for arm64, and its own sshd.

Programs for arm64 are run by qemu-user, which the board's own user namespace registers (binfmt_misc belongs to the user namespace since
Linux 6.7): the rest of the machine does not see it. The only way to the board is one veth pair; the board has no default
route. The Debian is made once a machine, into edgeft's cache, with mmdebstrap and this machine's apt sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeft import resources
from edgeft.store import write_atomically
from edgeft.tool import die_with_parent

QEMU = "/usr/bin/qemu-aarch64-static"
PACKAGES = "python3,python3-cryptography,openssh-server,openssh-sftp-server,sudo"
NEEDED = {
    "mmdebstrap": "mmdebstrap", QEMU: "qemu-user-static", "unshare": "util-linux", "ip": "iproute2", "ssh": "openssh-client",
    "ssh-keygen": "openssh-client", "tar": "tar",
}  # fmt: skip
ELF = r":edgeft-arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:"
"""Type, class, byte order, version, machine 183 of an ELF header (ELF for the Arm 64-bit Architecture), executables and libraries alike."""

REGISTER = f"""
read -r go
mount --make-rprivate /
mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
printf '%s' '{ELF}{QEMU}:FPC' >/proc/sys/fs/binfmt_misc/register
"""
"""F: the emulator is opened now and found in every root; C: sudo keeps its right to become root."""
BOOT = (
    REGISTER
    + r"""
root=$1
mount --bind "$root" "$root"
mount -t tmpfs -o mode=755 dev "$root/dev"
for d in null zero full random urandom tty; do : >"$root/dev/$d"; mount --bind "/dev/$d" "$root/dev/$d"; done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 run "$root/run"
mkdir "$root/run/sshd"
hostname edgeft-board
ip link set lo up
ip address add "$2/30" dev board
ip link set board up
# The shell stays as the namespace's first process, which collects what others leave behind.
chroot "$root" /usr/sbin/sshd -D -e &
wait $!
"""
)
RESTART = """#!/bin/sh
# What /etc/edgeft/agent.json names, since no systemd runs here: end the old server of this model, start the new one.
set -eu
if read -r old 2>/dev/null <"/run/edgeft-$1.pid"; then
    kill "$old" 2>/dev/null || true
    n=0
    while [ -d "/proc/$old" ] && [ $n -lt 50 ]; do n=$((n + 1)); sleep 0.1; done
fi
set -a
. "/etc/edgeft/$1.env"
setsid /usr/lib/edgeft/serve "$1" >"/var/log/edgeft-$1.log" 2>&1 </dev/null &
echo $! >"/run/edgeft-$1.pid"
"""


@dataclass(frozen=True)
class Board:
    """A running board."""

    root: Path
    """Its files, as this machine sees them."""
    address: str
    key: Path
    known: Path
    pid: int
    """The first process's number on this machine."""

    def url(self, user: str = "root") -> str:
        return f"ssh://{user}@{self.address}"

    @property
    def options(self) -> list[str]:
        return [f"IdentityFile={self.key}", "IdentitiesOnly=yes", f"UserKnownHostsFile={self.known}"]

    @property
    def flags(self) -> list[str]:
        """The same for edgeft's command line."""
        return [word for option in self.options for word in ("--ssh-option", option)]

    def run(self, script: str) -> str:
        """A script on the board, without ssh."""
        return subprocess.run(
            ["nsenter", "--target", str(self.pid), "--all", "chroot", self.root, "sh", "-c", script],
            check=True, text=True, capture_output=True, timeout=120,
        ).stdout  # fmt: skip


@contextmanager
def running(folder: Path) -> Iterator[Board]:
    """A new board whose files lie in `folder`, while the block lasts. Skips the test where none can be made."""
    if os.geteuid():
        pytest.skip("a board of namespaces needs root, for its network")
    if missing := sorted({p for tool, p in NEEDED.items() if not shutil.which(tool)}):
        pytest.skip(f"a board of namespaces needs: apt install {' '.join(missing)}")
    root = folder / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", root, "--exclude=./dev/*", "-xf", _debian()], check=True)
    here, there = _addresses()
    key, known = _keys(folder, root, there)
    _users(root, key)
    (root / "etc/hosts").write_text("127.0.0.1 localhost edgeft-board\n")
    (root / "etc/edgeft").mkdir()
    (root / "etc/edgeft/agent.json").write_text(
        '{"restart": ["/usr/local/sbin/restart-edgeft", "{name}"], "start_seconds": 90}\n'
    )
    (root / "usr/local/sbin/restart-edgeft").write_text(RESTART)
    (root / "usr/local/sbin/restart-edgeft").chmod(0o755)
    log = folder / "log"
    with _namespaces(["--net", "--uts", "--ipc"], BOOT, [os.fspath(root), there], log) as process:
        _cable(process.pid, here)
        process.stdin.write(b"go\n")
        process.stdin.close()
        _wait(process, log)
        yield Board(root=root, address=there, key=key, known=known, pid=_first(process.pid))


def _debian() -> Path:
    """The root file system as a tar, made now if the cache has none: five minutes, for its scripts run under emulation."""
    made = resources.cache() / "test-board" / "debian-12-arm64.tar"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    aside, log = made.with_suffix(f".{os.getpid()}.new.tar"), made.with_suffix(".log")
    command = [
        "mmdebstrap", "--arch=arm64", "--variant=essential", "--mode=root", "--skip=check/qemu", f"--include={PACKAGES}",
        '--aptopt=Apt::Install-Recommends "false"', "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/locale/*", "bookworm", os.fspath(aside),
    ]  # fmt: skip
    try:
        with _namespaces([], REGISTER + 'exec "$@"', command, log) as process:
            process.stdin.write(b"go\n")
            process.stdin.close()
            if process.wait(1200):
                pytest.skip(f"no Debian for the board could be made: {log.read_text()[-500:]}")
        aside.rename(made)
    finally:
        aside.unlink(missing_ok=True)
    return made


@contextmanager
def _namespaces(
    more: list[str], script: str, arguments: list[str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A shell script in new namespaces that waits for a line on its input; all of its processes end with the block."""
    command = [
        "unshare",
        "--user",
        "--mount",
        "--pid",
        *more,
        "--fork",
        "--mount-proc",
        "--kill-child",
        "sh",
        "-euc",
        script,
        "sh",
        *arguments,
    ]
    with (
        log.open("wb") as said,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            preexec_fn=die_with_parent,  # noqa: PLW1509  as edgeft.tool does
        ) as process,  # fmt: skip
    ):
        try:
            mine, deadline = Path("/proc/self/ns/user").readlink(), time.monotonic() + 10
            while Path(f"/proc/{process.pid}/ns/user").readlink() == mine and time.monotonic() < deadline:
                time.sleep(0.01)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536")
            yield process
        finally:
            process.kill()


def _addresses() -> tuple[str, str]:
    """Both ends of the cable, in a network of four addresses of this process's own."""
    start = f"10.213.{os.getpid() >> 6 & 255}.{os.getpid() & 63}".rpartition(".")
    return tuple(f"{start[0]}.{int(start[2]) * 4 + i}" for i in (1, 2))


def _cable(pid: int, here: str) -> None:
    name = f"edgeft{pid % 10**6}"
    for command in (
        f"ip link add {name} type veth peer name board netns {pid}", f"ip address add {here}/30 dev {name}",
        f"ip link set {name} up",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True)


def _first(pid: int) -> int:
    """The child of unshare, which is the first process of the board."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while "Server listening" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.skip(f"a board of namespaces does not start here: {log.read_text()[-500:]}")
        time.sleep(0.1)


def _keys(folder: Path, root: Path, there: str) -> tuple[Path, Path]:
    """The key that the board lets in, and the file with the board's own host key."""
    for path in (folder / "key", folder / "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    for old in (root / "etc/ssh").glob("ssh_host_*"):
        old.unlink()
    for suffix in ("", ".pub"):
        shutil.copy(folder / f"host{suffix}", root / f"etc/ssh/ssh_host_ed25519_key{suffix}")
    public = " ".join((folder / "host.pub").read_text().split()[:2])
    write_atomically(folder / "known", f"{there} {public}\n")
    return folder / "key", folder / "known"


def _users(root: Path, key: Path) -> None:
    """root; pi, who may do everything without a password; guest, who may do nothing."""
    with (root / "etc/passwd").open("a") as passwd, (root / "etc/shadow").open("a") as shadow:
        for number, name in ((1000, "pi"), (1001, "guest")):
            passwd.write(f"{name}:x:{number}:{number}::/home/{name}:/bin/sh\n")
            shadow.write(f"{name}:*:19000:0:99999:7:::\n")
    (root / "etc/sudoers.d/pi").write_text("pi ALL=(ALL) NOPASSWD: ALL\n")
    (root / "etc/sudoers.d/pi").chmod(0o440)
    for number, home in ((0, root / "root"), (1000, root / "home/pi"), (1001, root / "home/guest")):
        (home / ".ssh").mkdir(parents=True, exist_ok=True)
        shutil.copy(key.with_suffix(".pub"), home / ".ssh/authorized_keys")
        for path in (home, home / ".ssh", home / ".ssh/authorized_keys"):
            os.chown(path, number, number)
            path.chmod(0o600 if path.is_file() else 0o700)
