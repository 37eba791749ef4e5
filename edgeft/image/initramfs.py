"""The first file system of a boot: finds the root and the data partition, mounts both, and hands over to systemd.

A static busybox of the target and a script, instead of a distribution's initramfs, which only the target itself could
make. Every failure ends in a sentence on the console and a reboot, never in a shell: that is what lets a boot loader that
counts attempts go back to the other root.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgeft.errors import StageError
from edgeft.export.files import EPOCH
from edgeft.image import modules

DATA_LABEL = "edgeft-data"
COMMON = (
    "crc32c_generic", "crc32c-intel",  # ext4's checksum, which the kernel would ask modprobe for
    "squashfs", "ext4",
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "ahci", "ata_piix", "nvme",
    "xhci-pci", "ehci-pci", "usb-storage", "uas", "mmc_block", "sdhci-pci", "sdhci-acpi",
    "sdhci-iproc", "bcm2835", "dwc2", "pcie-brcmstb", "reset-raspberrypi",
)  # fmt: skip
"""Loaded in this order on every machine; what a kernel does not have is left out."""
PROGRAMS = ("usr/sbin/blkid", "usr/sbin/e2fsck")
"""From the target's Debian, with their libraries: busybox knows neither PARTLABEL nor how to check ext4."""
MACHINE_ID = "lib/edgeft/machine-id"
"""Below the data partition's root."""

_SCRIPT = f"""\
#!/bin/busybox sh
# Finds root= (a squashfs) and edgeft.data= (ext4, becomes /var), mounts them, starts the system. Whatever fails: say it, reboot.
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

fail() {{
    echo "edgeft: $*; restarting in 10 s" >/dev/console
    sync
    sleep 10
    reboot -f
    sleep 60
}}

# The device that a name means. $2: where there are several, the one on this disk.
find_device() {{
    case $1 in
    /dev/*) [ -b "$1" ] && echo "$1"; return ;;
    *=*) ;;
    *) return ;;
    esac
    several=$(blkid -c /dev/null -t "$1" -o device) || return
    for one in $several; do
        [ "$(disk_of "$one")" = "$2" ] && echo "$one" && return
    done
    set -- $several
    echo "$1"
}}

disk_of() {{
    path=$(readlink -f "/sys/class/block/${{1##*/}}")
    [ ! -e "$path/partition" ] || path=${{path%/*}}
    echo "${{path##*/}}"
}}

wait_for() {{
    for turn in $(seq 150); do
        found=$(find_device "$@")
        [ -n "$found" ] && return
        usleep 200000
    done
    fail "no device is $1"
}}

root= data=LABEL={DATA_LABEL} init=/sbin/init
for word in $(cat /proc/cmdline); do
    case $word in
    root=*) root=${{word#root=}} ;;
    edgeft.data=*) data=${{word#edgeft.data=}} ;;
    init=*) init=${{word#init=}} ;;
    esac
done
[ -n "$root" ] || fail "root= is missing on the kernel's command line"

while read -r module; do
    insmod "$module" 2>/dev/null
done </modules
wait_for "$root" ""
root=$found
mount -t squashfs -o ro "$root" /root || fail "the root file system on $root cannot be mounted"
wait_for "$data" "$(disk_of "$root")"
data=$found
# 0: clean, 1: repaired, 2: repaired, restart wished. From 4 on it wants answers, and nobody is there to give them.
e2fsck -p "$data"
[ $? -lt 4 ] || e2fsck -y "$data"
[ $? -lt 4 ] || fail "the file system on $data is beyond repair"
mount -t ext4 -o rw,noatime,nosuid,nodev "$data" /root/var || fail "the data on $data cannot be mounted"

id=/root/var/{MACHINE_ID}
mkdir -p "${{id%/*}}"
[ -f "$id" ] || : >"$id"
if [ "$(wc -c <"$id")" != 33 ]; then
    tr -d - </proc/sys/kernel/random/uuid >"$id.new" && sync && mv "$id.new" "$id" && sync
fi
mount --bind "$id" /root/etc/machine-id || fail "the data on $data cannot be written"
umount /proc
umount /sys
mount --move /dev /root/dev
[ -x "/root/$init" ] || [ -h "/root/$init" ] || fail "there is no $init on $root"
exec switch_root /root "$init"
"""


def build(root: Path, out: Path, *, more: Sequence[str] = ()) -> int:
    """Write the initramfs for the system in the folder `root` to `out`: a cpio archive (newc), zstd-compressed, the same bytes
    from the same files. `more`: modules loaded after COMMON. Returns its size in bytes.

    Raises StageError when the system lacks busybox or one of PROGRAMS.
    """
    files: dict[str, tuple[int, bytes]] = {"init": (stat.S_IFREG | 0o755, _SCRIPT.encode())}
    order = modules.load_order(root, (*COMMON, *more))
    programs = ["usr/bin/busybox", *(found for name in PROGRAMS for found in needed(root, name))]
    for name in (*order, *programs):
        real = _real(root, name)
        files[_place(name)] = (stat.S_IFREG | (0o644 if name in order else 0o755), real.read_bytes())
    files["modules"] = (stat.S_IFREG | 0o644, "".join(f"/{_place(name)}\n" for name in order).encode())
    files["etc/e2fsck.conf"] = (stat.S_IFREG | 0o644, b"[options]\nbroken_system_clock = true\n")
    files["lib64"] = (stat.S_IFLNK | 0o777, b"usr/lib64")
    files["lib"] = (stat.S_IFLNK | 0o777, b"usr/lib")
    for name in ("proc", "sys", "dev", "root", "tmp", "run", "usr/lib", "usr/lib64"):
        files[name] = (stat.S_IFDIR | 0o755, b"")
    # The kernel wants a console before the script can mount devtmpfs.
    files["dev/console"] = (stat.S_IFCHR | 0o600, b"")
    archive = _pack(archive_of(files))
    out.write_bytes(archive)
    return len(archive)


def needed(root: Path, program: str) -> list[str]:
    """A dynamic program with its loader and all libraries it needs, as paths below the root. Raises StageError for one that
    is missing."""
    found: dict[str, None] = {}
    left = [program]
    while left:
        name = left.pop()
        if name in found:
            continue
        found[name] = None
        interpreter, libraries = _asks_for(_real(root, name).read_bytes())
        left += [_library(root, library) for library in libraries]
        left += [interpreter] if interpreter else []
    return list(found)


def archive_of(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive in the kernel's `newc` form (Documentation/driver-api/early-userspace/buffer-format.rst), with parent
    folders, sorted; every file is root's and has one time. Name -> (mode with type, contents or link's target)."""
    for name in list(files):
        for parent in list(Path(name).parents)[:-1]:
            files.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
    parts = []
    for number, (name, (mode, content)) in enumerate(sorted(files.items()), 1):
        parts.append(_record(name, number, mode, content, device=(5, 1) if stat.S_ISCHR(mode) else (0, 0)))
    parts.append(_record("TRAILER!!!", 0, 0, b""))
    return b"".join(parts)


def _record(name: str, number: int, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    links = 2 if stat.S_ISDIR(mode) else 1
    time = EPOCH if mode else 0
    fields = (number, mode, 0, 0, links, time, len(content), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4)


def _pack(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=19, threads=0).compress(data)


def _place(name: str) -> str:
    """Where a file of the root lies in the initramfs: never below a link, which the kernel unpacks no earlier than its target."""
    if name == "usr/bin/busybox":
        return "bin/busybox"
    return f"usr/{name}" if name.startswith("lib") else name


def _asks_for(data: bytes) -> tuple[str, list[str]]:
    """The loader of a 64-bit little-endian ELF file, and its DT_NEEDED (elf(5))."""
    offset, count = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<H", data, 56)[0]
    heads = [struct.unpack_from("<IIQQQQ", data, offset + 56 * i) for i in range(count)]
    interpreter, entries = "", []
    for kind, _, at, _, _, length in heads:
        if kind == 3:  # PT_INTERP
            interpreter = data[at : at + length].rstrip(b"\0").decode().lstrip("/")
        elif kind == 2:  # PT_DYNAMIC
            entries = [struct.unpack_from("<QQ", data, at + 16 * i) for i in range(length // 16)]
    strings = next((value for tag, value in entries if tag == 5), 0)  # DT_STRTAB, an address
    base = next((at - address for kind, _, at, address, _, length in heads
                 if kind == 1 and address <= strings < address + length), 0)  # fmt: skip
    starts = [strings + base + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return interpreter, [data[start : data.index(b"\0", start)].decode() for start in starts]


def _library(root: Path, name: str) -> str:
    for folder in _folders(root):
        if (root / folder / name).exists():
            return f"{folder}/{name}"
    raise StageError(f"a program of the initramfs needs {name}, which the root file system does not have")


def _folders(root: Path) -> Iterable[str]:
    """Where a dynamic loader without a cache looks on Debian."""
    for triplet in sorted((root / "usr/lib").glob("*-linux-gnu*")):
        yield f"usr/lib/{triplet.name}"
    yield "usr/lib"


def _real(root: Path, name: str) -> Path:
    """A file of the root, links followed inside it."""
    path = root / name
    for _ in range(10):
        if not path.is_symlink():
            break
        target = path.readlink()
        path = root / str(target).lstrip("/") if target.is_absolute() else path.parent / target
    if not path.is_file():
        raise StageError(f"the root file system has no /{name}")
    return path
