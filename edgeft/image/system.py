"""The system inside an image: Debian's packages, edgeft's files, and what makes both boot, as root, kernel and initramfs.

Built on any machine for any architecture: nothing is mounted, and no program of the target runs. The root is a read-only
squashfs; what a device changes lies on its data partition, which is /var (docs/images.md).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeft import progress, tool
from edgeft.errors import StageError
from edgeft.export.files import Files, write_folder
from edgeft.image import accounts, initramfs, modules, rootfs, settings, tree
from edgeft.image.settings import VAR

__all__ = ["CMDLINE", "TOOLS", "VAR", "System", "Wanted", "build", "packages"]

SYSTEMCTL = tool.Tool(name="systemctl", hint="sudo apt install systemd")
SYSUSERS = tool.Tool(name="systemd-sysusers", hint="sudo apt install systemd")
TOOLS = (rootfs.TOOL, modules.DEPMOD, tree.MKSQUASHFS, SYSTEMCTL, SYSUSERS)
"""Programs of this machine without which no image can be made."""
COMMON = (
    "base-files", "base-passwd", "systemd-sysv", "udev", "dbus", "kmod", "busybox-static", "coreutils", "dash", "grep", "sed",
    "libc-bin", "login", "util-linux", "mount", "e2fsprogs", "fdisk", "python3", "python3-cryptography",
)  # fmt: skip
SSH = ("openssh-server", "sudo", "procps")
"""Added when somebody has a key. Without one nobody can log in, so nothing listens."""
CMDLINE = "ro panic=10"
"""What every kernel command line holds beside root=: a kernel that stops starts again."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    arch: str
    """Debian's name: amd64 or arm64."""
    model: str
    """The model's name, as in edgeft-NAME.service."""
    files: Files
    """What edgeft adds to the read-only root: programs, units, the trusted root of updates."""
    enable: tuple[str, ...]
    """Units that start with the system."""
    packages: tuple[str, ...] = ()
    """Debian packages beyond the common ones, by their names: boot loader, firmware."""
    boot_files: Mapping[str, str] = field(default_factory=dict)
    """What the boot partition takes out of the root: name there -> path or pattern. A name that ends in a slash is a
    folder for all that match."""
    modules: tuple[str, ...] = ()
    """Modules that the initramfs loads beyond its common ones."""
    keep_modules: tuple[str, ...] = ()
    """Patterns of kernel modules that stay beside the usual ones (modules.KEPT)."""
    hostname: str = "edgeft"
    ssh_keys: tuple[str, ...] = ()
    """Public keys of those who may log in as `edgeft`. They own the device: sudo asks them nothing."""


@dataclass(frozen=True, kw_only=True)
class System:
    root: Path
    """The squashfs."""
    kernel: Path
    initrd: Path
    boot: Path
    """Folder of what `boot_files` asked for, by the names given there."""
    packages: list[dict[str, str]]
    """name, version, architecture and sha256 of every Debian package in it."""
    kernel_version: str
    cmdline: str
    sizes: dict[str, int]
    """Bytes of root, kernel and initrd, and how many modules are in the root (`modules`) of those Debian has (`of_modules`)."""


def packages(wanted: Wanted) -> list[str]:
    """The Debian packages an image is asked for; what they depend on comes with them."""
    more = SSH if wanted.ssh_keys else ()
    return sorted({*COMMON, f"linux-image-{wanted.arch}", *wanted.packages, *more})


def build(wanted: Wanted, out: Path) -> System:
    """Make root.squashfs, vmlinuz, initrd.img and boot/ in the folder `out`: the same bytes from the same packages and files.

    Raises SetupError without the tools or an archive, ToolError when one fails, StageError when the packages lack something.
    """
    base = rootfs.fetch(wanted.arch, packages(wanted))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".root-", dir=out) as above:
        root = Path(above) / "root"
        progress.report("unpack Debian")
        tree.unpack(base.tar, root)
        progress.report("choose the kernel's modules")
        stayed, gone = modules.prune(root, more=wanted.keep_modules)
        configure(root, wanted)
        kernel, boot = out / "vmlinuz", out / "boot"
        _move(_one(root, "boot/vmlinuz-*"), kernel)
        _take(root, wanted.boot_files, boot)
        progress.report("pack the initramfs")
        initrd = out / "initrd.img"
        initramfs.build(root, initrd, more=wanted.modules)
        version = modules.version(root)
        _drop(root)
        progress.report("pack the root file system")
        squashed = out / "root.squashfs"
        tree.squash(root, squashed)
    return System(
        root=squashed, kernel=kernel, initrd=initrd, boot=boot, packages=base.packages, kernel_version=version, cmdline=CMDLINE,
        sizes={**{p.name: p.stat().st_size for p in (squashed, kernel, initrd)}, "modules": stayed, "of_modules": stayed + gone},
    )  # fmt: skip


def configure(root: Path, wanted: Wanted) -> None:
    """Do in the folder `root` what maintainer scripts would do on the device, with programs of this machine alone."""
    accounts.write(root, ssh=bool(wanted.ssh_keys))
    for name in wanted.files:
        if (root / name).exists() and not (root / name).is_file():
            raise StageError(f"/{name} is no file in Debian's packages, so it cannot be replaced")
    enable = (*settings.ENABLED, *(("ssh.service",) if wanted.ssh_keys else ()), *wanted.enable)
    files = {**settings.files(wanted.model, wanted.hostname, wanted.ssh_keys), **wanted.files}
    for name in files:
        (root / name).unlink(missing_ok=True)
    write_folder(root, files)
    for name, target in settings.links(wanted.model).items():
        if name not in files:
            _link(root / name, target)
    presets = root / "etc/systemd/system-preset/00-edgeft.preset"
    presets.parent.mkdir(parents=True, exist_ok=True)
    presets.write_bytes(settings.preset(enable))
    SYSUSERS(f"--root={root}")
    accounts.settle(root)
    SYSTEMCTL(f"--root={root}", "preset-all")
    # Presets count this link as a unit that is to be disabled.
    _link(root / "etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")
    for unit in enable:
        if not any(
            (root / folder / unit).exists() for folder in ("etc/systemd/system", "usr/lib/systemd/system")
        ):
            raise StageError(f"{unit} is to start with the system, and nothing in it has that name")


def _link(path: Path, target: str) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _one(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise StageError(f"the packages hold {len(found)} files {pattern}, one was expected")
    return found[0]


def _take(root: Path, wanted: Mapping[str, str], boot: Path) -> None:
    """Copy what the boot partition needs out of the root. Raises StageError for a pattern that nothing matches."""
    shutil.rmtree(boot, ignore_errors=True)
    boot.mkdir()
    for name, pattern in sorted(wanted.items()):
        found = [path for path in sorted(root.glob(pattern)) if path.is_file()]
        if not found or (len(found) > 1 and not name.endswith("/")):
            raise StageError(
                f"the packages hold {len(found)} files {pattern}, wanted for {name} on the boot partition"
            )
        for path in found:
            to = boot / name / path.name if name.endswith("/") else boot / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)


_DROPPED: Sequence[str] = (
    "boot/*", "initrd.img*", "vmlinuz*", "usr/lib/linux-image-*", "usr/lib/raspi-firmware", "usr/lib/systemd/boot", "usr/share/doc/*/examples",
)  # fmt: skip
"""Needed to make the image, not by what runs from it."""


def _drop(root: Path) -> None:
    for pattern in _DROPPED:
        for path in sorted(root.glob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _move(path: Path, to: Path) -> None:
    shutil.move(path, to)
    to.chmod(0o644)
