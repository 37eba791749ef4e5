"""The first file system: an archive the kernel reads, programs with all they need, modules in an order that loads."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
import zstandard

from edgeft.errors import StageError
from edgeft.image import initramfs, modules, settings

CPIO = pytest.mark.skipif(not shutil.which("cpio"), reason="needs cpio")
KERNEL = "usr/lib/modules/6.1.0-1-test"
DEP = """\
kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/lib/crc16.ko:
kernel/fs/mbcache.ko:
kernel/fs/jbd2/jbd2.ko:
kernel/drivers/usb/storage/usb-storage.ko: kernel/drivers/scsi/scsi_mod.ko kernel/drivers/scsi/scsi_common.ko
kernel/drivers/scsi/scsi_mod.ko: kernel/drivers/scsi/scsi_common.ko
kernel/drivers/scsi/scsi_common.ko:
kernel/drivers/gpu/drm/drm.ko:
kernel/drivers/net/wireless/ath.ko: kernel/drivers/gpu/drm/drm.ko
"""


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / KERNEL
    for line in DEP.splitlines():
        file = folder / line.partition(":")[0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(line.encode())
    (folder / "modules.dep").write_text(DEP)
    return tmp_path


def test_modules_are_loaded_after_what_they_need_and_once(root):
    order = [
        path.rpartition("/")[2]
        for path in modules.load_order(root, ["usb_storage", "ext4", "sd_mod", "ext4"])
    ]
    assert order == [
        "scsi_common.ko",
        "scsi_mod.ko",
        "usb-storage.ko",
        "jbd2.ko",
        "mbcache.ko",
        "crc16.ko",
        "ext4.ko",
    ]


def test_what_a_box_without_a_screen_can_need_stays_with_all_it_needs():
    needs = modules.dependencies(DEP)
    stay = modules.closure([name for name in needs if modules.wanted(name)], needs)
    assert stay == {name for name in needs if "gpu" not in name and "wireless" not in name}
    more = [name for name in needs if modules.wanted(name, ["drivers/net/wireless/*"])]
    assert "kernel/drivers/gpu/drm/drm.ko" in modules.closure(more, needs)


@pytest.mark.parametrize(("name", "stays"), [
    ("drivers/net/virtio_net.ko", True), ("drivers/net/ethernet/broadcom/genet/genet.ko", True),
    ("drivers/net/usb/smsc95xx.ko", True), ("fs/nls/nls_ascii.ko", True), ("drivers/watchdog/bcm2835_wdt.ko", True),
    ("drivers/net/ethernet/mellanox/mlx5/core/mlx5_core.ko", False), ("drivers/net/can/vcan.ko", False),
    ("lib/test_bpf.ko", False), ("fs/btrfs/btrfs.ko", False), ("arch/x86/kvm/kvm.ko", False),
])  # fmt: skip
def test_a_headless_boxs_drivers_stay_and_a_servers_do_not(name, stays):
    assert modules.wanted(f"kernel/{name}") is stays


def test_two_kernels_are_refused(root):
    (root / "usr/lib/modules/6.1.0-2-test").mkdir()
    with pytest.raises(StageError, match="2 kernels"):
        modules.version(root)


@CPIO
def test_the_archive_is_one_that_cpio_unpacks(tmp_path):
    data = initramfs.archive_of({
        "init": (stat.S_IFREG | 0o755, b"#!/bin/sh\n"), "usr/lib/x.so": (stat.S_IFREG | 0o644, b"12345"),
        "lib": (stat.S_IFLNK | 0o777, b"usr/lib"), "dev/console": (stat.S_IFCHR | 0o600, b""),
    })  # fmt: skip
    listed = subprocess.run(["cpio", "-tvn"], input=data, capture_output=True, check=True).stdout.decode()
    lines = [line.split() for line in listed.splitlines()]
    assert [line[-1] for line in lines] == [
        "dev",
        "dev/console",
        "init",
        "usr/lib",
        "usr",
        "usr/lib",
        "usr/lib/x.so",
    ]
    assert all(line[2:4] == ["0", "0"] for line in lines) and lines[1][0] == "crw-------"
    subprocess.run(["cpio", "-id", "--quiet", "init", "usr/lib/x.so"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "usr/lib/x.so").read_bytes() == b"12345" and (tmp_path / "init").stat().st_mode & 0o111


def test_a_program_brings_the_libraries_that_its_own_loader_finds(tmp_path):
    from pathlib import Path

    found = {name.rpartition("/")[2] for name in initramfs.needed(Path("/"), "usr/sbin/e2fsck")}
    said = subprocess.run(["ldd", "/usr/sbin/e2fsck"], capture_output=True, text=True, check=True).stdout
    asked = {line.split()[0].rpartition("/")[2] for line in said.splitlines() if "vdso" not in line}
    assert found == {"e2fsck", *asked}


@CPIO
def test_the_same_root_gives_the_same_bytes_and_every_module_in_the_list_is_inside(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(initramfs, "PROGRAMS", ())
    (root / "usr/bin").mkdir()
    (root / "usr/bin/busybox").write_bytes(b"\x7fELF\x02\x01" + bytes(58))
    sizes = [initramfs.build(root, tmp_path / name) for name in ("a", "b")]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() and sizes[0] == sizes[1]
    archive = zstandard.decompress((tmp_path / "a").read_bytes(), max_output_size=1 << 24)
    listed = subprocess.run(
        ["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True
    ).stdout.decode()
    text = subprocess.run(
        ["cpio", "-i", "--to-stdout", "--quiet", "modules"], input=archive, capture_output=True, check=True
    ).stdout.decode()
    assert text.split() and {line.lstrip("/") for line in text.split()} <= set(listed.split())


def test_a_root_without_the_programs_is_refused(root, tmp_path):
    with pytest.raises(StageError, match="has no /usr/"):
        initramfs.build(root, tmp_path / "x")


@pytest.mark.parametrize("script", [initramfs._SCRIPT, settings._GROW], ids=["init", "grow"])
def test_scripts_are_shell_and_never_open_one(tmp_path, script):
    (tmp_path / "s").write_text(script)
    subprocess.run(["dash", "-n", tmp_path / "s"], check=True)
    assert "exec sh" not in script and "/bin/sh\n" not in script.split("\n", 1)[1]
