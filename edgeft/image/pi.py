"""What a Raspberry Pi's firmware reads: its own files, config.txt for system A and tryboot.txt for system B.

Sources: Raspberry Pi's documentation of config.txt (`os_prefix`, `upstream_kernel`, `initramfs`) and of the bootloader
(`reboot "0 tryboot"`: the next start, and only that one, reads tryboot.txt instead). None of it can be checked without
a board: QEMU loads the kernel itself and runs no firmware.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeft.export.files import Entry
from edgeft.image.kinds import Kind

_FIRMWARE, _TREES = "firmware", "dtb"


def sources(kind: Kind) -> dict[str, str]:
    """What is taken out of the Debian root: folder -> paths there."""
    return {
        f"{_FIRMWARE}/": "usr/lib/raspi-firmware/*",
        f"{_TREES}/": f"usr/lib/linux-image-*/broadcom/{kind.device_trees}",
    }


def boot_files(kernel: Path, initrd: Path, firmware: Path, lines: Mapping[str, str]) -> dict[str, Entry]:
    """The FAT partition. `lines` has the kernel's command line of "a" and "b"; `firmware` is a folder with `sources`."""
    files = {path.name: Entry(content=path) for path in (firmware / _FIRMWARE).iterdir() if path.is_file()}
    for slot, line in lines.items():
        files[f"{slot}/vmlinuz"] = Entry(content=kernel)
        files[f"{slot}/initrd.img"] = Entry(content=initrd)
        files[f"{slot}/cmdline.txt"] = Entry(content=f"{line}\n".encode())
        for tree in (firmware / _TREES).iterdir():
            files[f"{slot}/{tree.name}"] = Entry(content=tree)
    files["config.txt"] = Entry(content=_config("a"))
    files["tryboot.txt"] = Entry(content=_config("b"))
    return files


def _config(slot: str) -> bytes:
    lines = [
        f"# System {slot.upper()}.",
        f"os_prefix={slot}/",
        "arm_64bit=1",
        "# Debian's kernel: device trees have their upstream names.",
        "upstream_kernel=1",
        "kernel=vmlinuz",
        "initramfs initrd.img followkernel",
        "enable_uart=1",
        "# No screen is served: the least memory for the GPU.",
        "gpu_mem=16",
    ]
    return ("\n".join(lines) + "\n").encode()
