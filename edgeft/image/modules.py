"""Which of a kernel's modules stay in an image: those that a box without a screen can need, and what they depend on.

Debian's kernel brings 4,000 modules; most drive sound, pictures, toys and file systems of others. Patterns say what is
wanted, modules.dep (depmod's, kmod) what that needs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from edgeft import tool
from edgeft.errors import StageError

DEPMOD = tool.Tool(name="depmod", hint="sudo apt install kmod")
KEPT = (
    "arch/*", "block/*", "crypto/*", "lib/*", "mm/*", "virt/lib/*",
    # File systems: the root, the data, the boot partition, a USB stick.
    *(f"fs/{name}/*" for name in ("ext4", "jbd2", "fat", "exfat", "squashfs", "overlayfs", "fuse", "efivarfs", "autofs",
                                  "configfs", "pstore")),
    "fs/mbcache.ko", "fs/nls/nls_cp437.ko", "fs/nls/nls_ascii.ko", "fs/nls/nls_iso8859-1.ko", "fs/nls/nls_utf8.ko",
    # Network: wired cards, USB adapters, the packet filter.
    *(f"drivers/net/ethernet/{name}/*" for name in (
        "intel", "realtek", "broadcom", "marvell", "atheros", "aquantia", "amazon", "google", "microsoft", "amd", "nvidia",
        "stmicro", "freescale", "cadence", "hisilicon/hns", "ti", "allwinner", "rockchip", "microchip", "dlink", "via",
    )),
    "drivers/net/usb/*", "drivers/net/phy/*", "drivers/net/mdio/*", "drivers/net/pcs/*", "drivers/net/virtio_net.ko", "drivers/net/mii.ko", "drivers/net/tun.ko",
    "drivers/net/hyperv/*", "drivers/net/vmxnet3/*", "drivers/net/xen-netfront.ko", "drivers/net/wireguard/*",
    "net/core/*", "net/ipv4/*", "net/ipv6/*", "net/packet/*", "net/unix/*", "net/netfilter/*", "net/sched/sch_fq*", "net/802/*",
    "net/llc/*", "net/bridge/*", "net/8021q/*", "net/dns_resolver/*", "net/vmw_vsock/*",
    # Disks.
    "drivers/ata/*", "drivers/nvme/host/*", "drivers/nvme/common/*", "drivers/mmc/*", "drivers/usb/storage/*", "drivers/ufs/*",
    "drivers/scsi/sd_mod.ko", "drivers/scsi/scsi_*.ko", "drivers/scsi/virtio_scsi.ko", "drivers/scsi/sg.ko",
    "drivers/scsi/hv_*", "drivers/scsi/vmw_*", "drivers/block/virtio_blk.ko", "drivers/block/loop.ko",
    "drivers/block/xen-blkfront.ko", "drivers/md/dm-mod.ko", "drivers/md/dm-verity.ko", "drivers/cdrom/*",
    # Buses, clocks, power, sensors, watchdogs: a Pi's and a mini PC's. `depmod` finds what they need.
    *(f"drivers/{name}/*" for name in (
        "virtio", "watchdog", "rtc", "clk", "regulator", "reset", "mailbox", "firmware", "soc", "pinctrl", "gpio", "phy",
        "pci", "bus", "dma", "iommu", "nvmem", "thermal", "hwmon", "cpufreq", "devfreq", "acpi", "power", "powercap", "perf",
        "hwtracing/none", "mfd", "i2c", "spi", "tty/serial", "char/hw_random", "char/ipmi", "idle", "pwm", "leds", "ptp", "pps",
        "memory", "interconnect", "opp", "irqchip", "hv", "edac", "extcon", "crypto", "remoteproc", "rpmsg",
    )),
    "drivers/usb/core/*", "drivers/usb/common/*", "drivers/usb/host/*", "drivers/usb/dwc2/*", "drivers/usb/dwc3/*",
    "drivers/usb/chipidea/*", "drivers/usb/phy/*", "drivers/usb/roles/*", "drivers/usb/typec/*", "drivers/usb/serial/*",
    "drivers/usb/class/cdc-acm.ko", "drivers/hid/hid.ko", "drivers/hid/hid-generic.ko", "drivers/hid/usbhid/*",
    "drivers/misc/eeprom/*", "drivers/misc/mei/*", "drivers/char/virtio_console.ko", "drivers/char/nvram.ko",
    "drivers/platform/x86/wmi*.ko", "drivers/platform/x86/intel/*", "drivers/firmware/*",
)  # fmt: skip
"""Patterns for paths below /lib/modules/VERSION/kernel; `*` also matches slashes."""
NEVER = ("drivers/net/wireless/*", "drivers/usb/gadget/*", "drivers/hwmon/pmbus/*", "drivers/net/ethernet/broadcom/bnx2x/*",
         "drivers/net/ethernet/intel/ice/*", "drivers/net/ethernet/intel/i40e/*", "drivers/net/ethernet/broadcom/bnxt/*",
         "drivers/net/ethernet/amd/pds_core/*", "drivers/crypto/qat/*", "drivers/crypto/cavium/*",
         "drivers/crypto/marvell/*", "drivers/crypto/chelsio/*", "drivers/net/usb/hso.ko",
         "arch/*/kvm/*", "lib/test*", "lib/*test.ko", "lib/*kunit*", "net/netfilter/ipset/*", "net/netfilter/ipvs/*")  # fmt: skip
"""Wanted by the patterns, and big: servers' cards, tests. They stay when something that stays needs them."""


def version(root: Path) -> str:
    """The one kernel in a root file system. Raises StageError when there is none, or more."""
    found = sorted(path.name for path in (root / "usr/lib/modules").glob("*") if path.is_dir())
    if len(found) != 1:
        raise StageError(
            f"the root file system has {len(found)} kernels ({', '.join(found)}), an image needs one"
        )
    return found[0]


def prune(root: Path, *, more: Sequence[str] = ()) -> tuple[int, int]:
    """Delete every module that neither KEPT nor `more` (patterns) wants, and none that a wanted one needs; then index what is
    left. Returns how many modules stayed and how many went."""
    kernel = version(root)
    DEPMOD("-b", root, kernel)
    folder = root / "usr/lib/modules" / kernel
    needs = dependencies((folder / "modules.dep").read_text(encoding="utf-8"))
    stay = closure([name for name in needs if wanted(name, more)], needs)
    for name in needs.keys() - stay:
        (folder / name).unlink()
    for path in sorted((folder / "kernel").rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    DEPMOD("-b", root, kernel)
    return len(stay), len(needs) - len(stay)


def wanted(name: str, more: Iterable[str] = ()) -> bool:
    """Whether a module stays for its own sake; `name` as in modules.dep: kernel/fs/ext4/ext4.ko."""
    inside = name.removeprefix("kernel/")
    if any(fnmatch.fnmatchcase(inside, pattern) for pattern in more):
        return True
    return any(fnmatch.fnmatchcase(inside, p) for p in KEPT) and not any(
        fnmatch.fnmatchcase(inside, p) for p in NEVER
    )


def dependencies(text: str) -> dict[str, list[str]]:
    """modules.dep: each module with those it needs, in the order in which `modprobe` loads them last to first."""
    found = {}
    for line in text.splitlines():
        name, _, needs = line.partition(":")
        found[name] = needs.split()
    return found


def closure(names: Iterable[str], needs: Mapping[str, Sequence[str]]) -> set[str]:
    """The modules and all that they need. modules.dep lists every dependency of each, so one step is enough."""
    return {other for name in names for other in (name, *needs[name])}


def load_order(root: Path, names: Iterable[str]) -> list[str]:
    """Paths below the root of the named modules in an order in which insmod takes them: needs before their users.

    Names are as modprobe takes them (dash or underscore). One that the kernel has built in, or does not have, is left out.
    """
    kernel = version(root)
    folder = root / "usr/lib/modules" / kernel
    needs = dependencies((folder / "modules.dep").read_text(encoding="utf-8"))
    by_name = {_plain(path): path for path in needs}
    order: dict[str, None] = {}
    for name in names:
        if path := by_name.get(_plain(name)):
            # modules.dep has the nearest first; what is needed most deeply stands last.
            for found in (*reversed(needs[path]), path):
                order[found] = None
    return [f"usr/lib/modules/{kernel}/{path}" for path in order]


def _plain(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".ko").replace("-", "_")
