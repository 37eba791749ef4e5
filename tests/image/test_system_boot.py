"""The real system: Debian's packages, built twice, looked into, and started without what it needs.

Downloads about 100 MB at the first run (rootfs.py keeps them). `pytest -m boot tests/image/test_system_boot.py`
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from urllib.parse import urlsplit

import pytest

from edgeft.export.files import Entry
from edgeft.image import initramfs, modules, rootfs, system, tree

pytestmark = pytest.mark.boot
UNIT = b"[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
WANTED = system.Wanted(
    arch="amd64", model="m", files={"usr/lib/systemd/system/edgeft-m.service": Entry(content=UNIT)},
    enable=("edgeft-m.service",),
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    return system.build(WANTED, folder / "a"), folder


@pytest.fixture(scope="module")
def inside(built):
    """The squashfs, unpacked."""
    made, folder = built
    subprocess.run(
        ["unsquashfs", "-q", "-n", "-d", folder / "root", made.root], check=True, capture_output=True
    )
    return folder / "root"


def test_two_builds_are_the_same_bytes(built):
    first, folder = built
    second = system.build(WANTED, folder / "b")
    for name in ("root", "kernel", "initrd"):
        assert getattr(first, name).read_bytes() == getattr(second, name).read_bytes(), name


def test_no_address_and_no_name_of_the_build_machine_is_inside(inside):
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=False
    ).stdout
    hosts = {urlsplit(word).netloc for word in (*listed.split(), *os.environ.get(rootfs.MIRROR, "").split())}
    # Documentation may name Debian's own archive; what configures something may not.
    for path in (
        *(inside / "etc").rglob("*"),
        *(inside / "var").rglob("*"),
        *(inside / "usr/lib/edgeft").rglob("*"),
    ):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            assert not any(host.encode() in data for host in hosts - {""}), path
            assert not re.search(rb"(?<![\w-])" + os.uname().nodename.encode() + rb"(?![\w-])", data) or (
                len(os.uname().nodename) < 6
            ), path
    assert (inside / "etc/resolv.conf").read_text().startswith("#")


def test_every_package_is_named_with_version_and_hash(built):
    made, _ = built
    names = {package["name"] for package in made.packages}
    assert {"systemd", "libc6", "busybox-static", "python3-cryptography"} <= names
    assert all(re.fullmatch(r"[0-9a-f]{64}", p["sha256"]) and p["version"] for p in made.packages)


def test_the_root_is_small_and_has_what_a_headless_box_needs(built, inside):
    made, _ = built
    assert made.sizes["root.squashfs"] < 90e6 and made.sizes["initrd.img"] < 8e6
    names = {path.name for path in (inside / "usr/lib/modules").rglob("*.ko")}
    assert {
        "virtio_net.ko",
        "r8169.ko",
        "igc.ko",
        "nvme.ko",
        "usb-storage.ko",
        "vfat.ko",
        "overlay.ko",
        "nls_ascii.ko",
    } <= names
    assert not {"drm.ko", "snd.ko", "iwlwifi.ko"} & names
    assert not list(inside.glob("usr/bin/apt*")) and not list((inside / "boot").iterdir())


def test_modules_are_loaded_after_those_that_they_themselves_name(tmp_path):
    root = tmp_path / "root"
    tree.unpack(rootfs.fetch("amd64", system.packages(WANTED)).tar, root)
    modules.prune(root)
    order = modules.load_order(root, initramfs.COMMON)
    ready: set[str] = set()
    for path in order:
        said = subprocess.run(
            ["modinfo", "-F", "depends", root / path], capture_output=True, text=True, check=True
        ).stdout
        needs = {name.replace("-", "_") for name in said.strip().split(",")} - {""}
        assert needs <= ready, path
        ready.add(path.rpartition("/")[2].removesuffix(".ko").replace("-", "_"))
    assert {"ext4", "squashfs", "virtio_blk", "nvme", "ahci", "usb_storage", "sd_mod", "sdhci_pci"} <= ready


def start(made: system.System, *more: str, line: str) -> str:
    """What the kernel and the initramfs say on a machine without a network, until it restarts."""
    return subprocess.run(
        ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "512", "-nographic", "-monitor", "none",
         "-nic", "none", "-no-reboot", "-kernel", made.kernel, "-initrd", made.initrd, *more,
         "-append", f"console=ttyS0 {made.cmdline} {line}"],
        capture_output=True, text=True, timeout=400, check=True, stdin=subprocess.DEVNULL,
    ).stdout  # fmt: skip


QEMU = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")


@QEMU
def test_a_start_without_a_root_says_so_and_restarts(built):
    """Never a shell: the boot loader counts the starts and goes back to the other system."""
    said = start(built[0], line="")
    assert "edgeft: root= is missing on the kernel's command line; restarting in 10 s" in said
    assert "reboot: Restarting system" in said


@QEMU
@pytest.mark.parametrize(
    ("controller", "device", "disk"),
    [
        ((), "nvme,serial=x", "/dev/nvme0n1"),
        (("-device", "qemu-xhci"), "usb-storage", "/dev/sda"),
        ((), "ide-hd,bus=ide.0", "/dev/sda"),
    ],
    ids=["nvme", "usb", "sata"],
)
def test_the_root_is_found_on_every_kind_of_disk_and_data_beyond_repair_restarts(
    built, controller, device, disk
):
    """The root itself stands in for the broken data."""
    drive = f"if=none,id=d,format=raw,readonly=on,file={built[0].root}"
    if device.startswith("ide"):  # which takes no read-only disk
        drive = drive.replace("readonly=on", "snapshot=on")
    said = start(
        built[0],
        *controller,
        "-drive",
        drive,
        "-device",
        f"{device},drive=d",
        line=f"root={disk} edgeft.data={disk}",
    )
    assert f"edgeft: the file system on {disk} is beyond repair; restarting in 10 s" in said, said[-2000:]
    assert "reboot: Restarting system" in said
