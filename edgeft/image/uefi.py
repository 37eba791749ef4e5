"""What a UEFI machine starts: systemd-boot on the FAT partition, with two systems A and B whose tries it counts.

Sources: the Boot Loader Specification (entries, `+3` in a file's name), systemd-boot(7), and systemd 252's sorting
(src/boot/efi/boot.c): an entry without tries left comes last, so no `default` may be set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeft.export.files import Entry
from edgeft.image.kinds import Kind

TRIES = 3


def sources(kind: Kind) -> dict[str, str]:
    """What is taken out of the Debian root: name on the FAT partition -> path there."""
    return {kind.removable: kind.loader}


def boot_files(kernel: Path, initrd: Path, firmware: Path, lines: Mapping[str, str]) -> dict[str, Entry]:
    """The FAT partition. `lines` has the kernel's command line of "a" and "b"; `firmware` is a folder with `sources`."""
    files = {
        path.relative_to(firmware).as_posix(): Entry(content=path)
        for path in firmware.rglob("*")
        if path.is_file()
    }
    files["loader/loader.conf"] = Entry(content=b"timeout 0\neditor no\nauto-entries no\nauto-firmware no\n")
    for number, (slot, line) in enumerate(sorted(lines.items()), 1):
        entry = [
            f"title edgeft, system {slot.upper()}",
            f"sort-key edgeft-{number}",
            f"linux /edgeft/{slot}/vmlinuz",
            f"initrd /edgeft/{slot}/initrd.img",
            f"options {line}",
        ]
        files[f"loader/entries/edgeft-{slot}+{TRIES}.conf"] = Entry(
            content=("\n".join(entry) + "\n").encode()
        )
        files[f"edgeft/{slot}/vmlinuz"] = Entry(content=kernel)
        files[f"edgeft/{slot}/initrd.img"] = Entry(content=initrd)
    return files
