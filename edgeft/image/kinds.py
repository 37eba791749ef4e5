"""Which boards get an image of their own, what each one's firmware wants, and why some boards get none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeft.errors import SetupError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One way to start: whose firmware, which kernel, which partition table."""

    name: str
    """As targets spell it in `[device] image`."""
    arch: str
    """Debian's name of the architecture: arm64 or amd64."""
    firmware: str
    """ "uefi" or "pi"."""
    packages: tuple[str, ...]
    """Debian packages beyond those that every image has: boot loader or firmware."""
    modules: tuple[str, ...] = ()
    """What the initramfs must load to reach the disk."""
    console: tuple[str, ...] = ()
    """Where the kernel writes; the last one is also the system's console."""
    loader: str = ""
    """UEFI: the boot loader's file in the root file system."""
    removable: str = ""
    """UEFI: the name that firmware starts from any disk, without an entry of its own (UEFI 2.10, 3.5.1.1)."""
    device_trees: str = ""
    """Pi: which of the kernel's device trees, as a glob below its `broadcom` folder."""

    @property
    def gpt(self) -> bool:
        """A Raspberry Pi 3's boot ROM reads no GPT."""
        return self.firmware == "uefi"


_DISKS = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "ahci", "nvme", "usb-storage", "uas", "xhci-pci",
          "ehci-pci", "mmc_block", "sdhci-acpi", "sdhci-pci")  # fmt: skip
_PI_DISKS = ("mmc_block", "sdhci-iproc", "bcm2835", "dwc2", "usb-storage", "uas", "sd_mod", "xhci-pci", "pcie-brcmstb",
             "reset-raspberrypi", "gpio-raspberrypi-exp", "raspberrypi-hwmon", "bcm2835-wdt")  # fmt: skip

_ALL = (
    Kind(
        name="arm64-uefi", arch="arm64", firmware="uefi", packages=("systemd-boot", "systemd-boot-efi"),
        modules=_DISKS, console=("tty0", "ttyAMA0"), loader="usr/lib/systemd/boot/efi/systemd-bootaa64.efi",
        removable="EFI/BOOT/BOOTAA64.EFI",
    ),
    Kind(
        name="amd64-uefi", arch="amd64", firmware="uefi", packages=("systemd-boot", "systemd-boot-efi"),
        modules=_DISKS, console=("tty0", "ttyS0"), loader="usr/lib/systemd/boot/efi/systemd-bootx64.efi",
        removable="EFI/BOOT/BOOTX64.EFI",
    ),
    Kind(
        name="pi-3", arch="arm64", firmware="pi", packages=("raspi-firmware",),
        modules=_PI_DISKS, console=("tty0", "ttyS1,115200"),
        device_trees="bcm2837-rpi-*.dtb",
    ),
    Kind(
        name="pi-4", arch="arm64", firmware="pi", packages=("raspi-firmware",),
        modules=_PI_DISKS, console=("tty0", "ttyS1,115200"),
        device_trees="bcm2711-rpi-*.dtb",
    ),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}

_ELSEWHERE = 'take [[export]] kind = "deb" (a service), "oci" (a container) or "bundle" (a folder and a script) on {system}'
NONE: Mapping[str, tuple[str, str]] = {
    "pi-5": (
        "there is no image for a Raspberry Pi 5: Debian 12's kernel (6.1) has no device tree for its processor (BCM2712)",
        _ELSEWHERE.format(system="Raspberry Pi OS"),
    ),
    "jetson": (
        "there is no image for a Jetson: its boot chain, kernel and CUDA are NVIDIA's and come with JetPack alone",
        'take [[export]] kind = "bundle" (a folder and a script) or "ollama" on JetPack, where CUDA is',
    ),
}
"""Boards for which none can be made honestly: why, and what to take instead."""
NAMES = (*KINDS, *NONE)


def of(name: str, target: str) -> Kind:
    """The kind of image that a target names in `[device] image`.

    Raises SetupError where there is none for that board, and says what to take instead.
    """
    if name in KINDS:
        return KINDS[name]
    if name in NONE:
        why, instead = NONE[name]
        raise SetupError(why, hint=instead)
    raise SetupError(
        f"the target {target!r} does not say how it starts, so no image can be made for it",
        hint=f"[device] image = one of {', '.join(KINDS)}; or {_ELSEWHERE.format(system='the system it has')}",
    )
