"""Which emulated machine starts which kind of image: program, processor, firmware, and where Debian puts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import SetupError
from edgeft.image.kinds import Kind
from edgeft.tool import Tool


@dataclass(frozen=True, kw_only=True)
class Machine:
    program: Tool
    machine: str
    """What follows -machine."""
    processors: Mapping[str, str]
    """First word of a target's `isa` -> what follows -cpu; "" for the others."""
    disk: tuple[str, ...]
    """The disk whose drive is called `disk`."""
    network: tuple[str, ...]
    """The card on the net that is called `net`."""
    firmware: tuple[tuple[str, str], ...] = ()
    """Pairs of UEFI code and variables, the first that is there is taken; none: the kernel is handed in."""
    package: str = ""
    """Debian package of the firmware."""
    fixed_mb: int = 0
    """The memory that the machine has, where that cannot be chosen."""
    power_button: bool = True


_FOLDER = Path("/usr/share")
_DISK = ("-device", "virtio-blk-pci,drive=disk,bootindex=0")
_NETWORK = ("-device", "virtio-net-pci,netdev=net,romfile=")
_ARM = Tool(name="qemu-system-aarch64", hint="sudo apt install qemu-system-arm")
_PC = Tool(name="qemu-system-x86_64", hint="sudo apt install qemu-system-x86")
MACHINES: Mapping[str, Machine] = {
    "arm64-uefi": Machine(
        program=_ARM, machine="virt", processors={"armv8-a": "cortex-a72", "armv8.2-a": "cortex-a76", "": "max"},
        firmware=(("AAVMF/AAVMF_CODE.fd", "AAVMF/AAVMF_VARS.fd"),), package="qemu-efi-aarch64",
        disk=_DISK, network=_NETWORK,
    ),
    "amd64-uefi": Machine(
        program=_PC, machine="q35", processors={"": "max"},
        firmware=(("OVMF/OVMF_CODE_4M.fd", "OVMF/OVMF_VARS_4M.fd"), ("OVMF/OVMF_CODE.fd", "OVMF/OVMF_VARS.fd")),
        package="ovmf", disk=_DISK, network=_NETWORK,
    ),
    "pi-3": Machine(
        program=_ARM, machine="raspi3b", processors={"": ""}, disk=(), network=("-device", "usb-net,netdev=net"),
        fixed_mb=1024, power_button=False,
    ),
}  # fmt: skip


def of(kind: Kind) -> Machine:
    """The machine for a kind of image. Raises SetupError where no emulator has that board."""
    if kind.name in MACHINES:
        return MACHINES[kind.name]
    raise SetupError(
        f"no emulator here has the board of a {kind.name} image (QEMU got a Raspberry Pi 4 with version 9.0, untried)",
        hint="the system is the one of pi-3, which can be booted; the firmware's part only a board can show",
    )


def processor(machine: Machine, isa: str) -> str:
    """What follows -cpu for a target; "" where the machine decides."""
    return machine.processors.get(isa.split("+")[0], machine.processors[""])


def firmware(machine: Machine) -> tuple[Path, Path] | None:
    """UEFI's code and its empty variables; None for a machine without. Raises SetupError when they are not installed."""
    for code, variables in machine.firmware:
        if (_FOLDER / code).is_file() and (_FOLDER / variables).is_file():
            return _FOLDER / code, _FOLDER / variables
    if machine.firmware:
        raise SetupError(
            f"the firmware {_FOLDER / machine.firmware[0][0]} is not there",
            hint=f"sudo apt install {machine.package}",
        )
    return None
