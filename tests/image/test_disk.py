"""The disk is the same bytes twice, other programs read it, and it says nothing of the machine it was made on."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edgeft.errors import SetupError, ToolError
from edgeft.export.files import Entry
from edgeft.image import disk, filesystems, partitions
from edgeft.image.kinds import KINDS
from edgeft.image.partitions import MIB, Partition

TOOLS = ("mkfs.vfat", "mcopy", "mke2fs", "debugfs")
pytestmark = pytest.mark.skipif(
    not all(shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") for name in TOOLS),
    reason="needs dosfstools, mtools and e2fsprogs",
)
MODEL = "lib/edgeft/models/tiny/versions/0"


def tool(*command):
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    done = subprocess.run(
        [shutil.which(command[0], path=path), *map(str, command[1:])], capture_output=True, check=True
    )
    return done.stdout.decode() + done.stderr.decode()


def make(folder, kind="amd64-uefi"):
    """A disk with made-up contents, made in `folder`; what lies where."""
    folder.mkdir(exist_ok=True)
    noise = random.Random(0)
    for name in ("root", "kernel", "initrd", "model"):
        (folder / name).write_bytes(noise.randbytes(MIB + 77))
    firmware = folder / "boot"
    for name in ("EFI/BOOT/BOOTX64.EFI", "firmware/start4.elf", "dtb/bcm2711-rpi-4-b.dtb"):
        if name.startswith("EFI") == (KINDS[kind].firmware == "uefi"):
            (firmware / name).parent.mkdir(parents=True, exist_ok=True)
            (firmware / name).write_bytes(name.encode())
    contents = disk.Contents(
        kind=KINDS[kind], root=folder / "root", kernel=folder / "kernel", initrd=folder / "initrd", firmware=firmware,
        options="ro panic=10",
        data={f"{MODEL}/model.gguf": Entry(content=folder / "model"), f"{MODEL}/run.sh": Entry(content=b"#!/bin/sh\n", mode=0o755),
              "lib/edgeft/api-key": Entry(content=b"secret\n", mode=0o600)},
        folders={"lib/edgeft": 0o711, "log": 0o755}, links={"lib/edgeft/models/tiny/current": "versions/0"},
    )  # fmt: skip
    return disk.assemble(contents, folder / "disk.img")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "one"
    return folder, make(folder)


def part(folder, layout, number, out):
    """One partition as a file of its own."""
    found = layout[number - 1]
    with (folder / "disk.img").open("rb") as raw, out.open("wb") as file:
        raw.seek(found["start"])
        file.write(raw.read(found["size"]))
    return out


@pytest.mark.slow
def test_two_disks_from_other_folders_at_other_times_are_the_same_bytes(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.sleep(1.1)  # ext4 counts seconds
    old = os.umask(0o077)
    try:
        make(tmp_path / "another folder")
    finally:
        os.umask(old)
    first, second = (f / "disk.img" for f in (folder, tmp_path / "another folder"))
    assert tool("cmp", first, second) == ""


def test_nothing_on_the_disk_names_the_machine_it_was_made_on(made):
    folder, _ = made
    everything = (folder / "disk.img").read_bytes()
    for word in (str(folder), os.fspath(Path.home()) + "/", "/tmp/", "http"):
        assert word.encode() not in everything, word


@pytest.mark.slow
def test_packing_finds_the_second_system_and_unpacking_gives_the_disk_back(made, tmp_path):
    folder, layout = made
    sizes = disk.pack(folder / "disk.img", tmp_path / "image.zst")
    contents = sum(p["used"] for p in layout if p["name"] == "edgeft-a") + 3 * MIB
    assert (
        contents < sizes["bytes"] < contents + MIB
    )  # root once, kernel, initrd and model; neither A nor they twice
    disk.unpack(tmp_path / "image.zst", tmp_path / "again")
    assert tool("cmp", folder / "disk.img", tmp_path / "again") == ""
    assert (tmp_path / "again").stat().st_blocks * 512 < sizes["raw_bytes"] / 3  # holes stay holes


def test_the_tables_are_what_sfdisk_reads(made, tmp_path):
    folder, layout = made
    assert "No errors detected" in tool("sfdisk", "--verify", folder / "disk.img")
    listed = tool("sfdisk", "--dump", folder / "disk.img")
    for p in layout:
        assert (
            f"start={p['start'] // 512:>12}, size={p['size'] // 512:>12}" in listed
            and f'name="{p["name"]}"' in listed
        )
    pi = make(tmp_path / "pi", "pi-4")
    listed = tool("sfdisk", "--dump", tmp_path / "pi" / "disk.img")
    assert "label: dos" in listed and "type=c" in listed
    assert [f"start={p['start'] // 512:>12}" in listed for p in pi] == [True] * 4
    signature = listed.split("label-id: 0x")[1][:8]
    assert f"PARTUUID={signature}-03" in disk.command_line(KINDS["pi-4"], "b", "ro")


def test_the_data_partition_holds_the_model_as_root_owns_it(made, tmp_path):
    folder, layout = made
    data = part(folder, layout, 4, tmp_path / "data")
    assert tool("debugfs", "-R", f"cat /{MODEL}/run.sh", data).startswith("#!/bin/sh\n")
    listed = [line.split() for line in tool("debugfs", "-R", "ls -l /lib/edgeft", data).splitlines()]
    rows = {row[-1]: row for row in listed if len(row) > 8}
    assert rows["api-key"][1] == "100600" and rows["models"][1] == "40755" and rows["."][1] == "40711"
    assert {(row[3], row[4]) for row in rows.values()} == {("0", "0")}
    stat = tool("debugfs", "-R", "stat /lib/edgeft/models/tiny/current", data)
    assert 'Fast link dest: "versions/0"' in stat


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("amd64-uefi", ["EFI/BOOT/BOOTX64.EFI", "loader/entries/edgeft-a+3.conf", "edgeft/b/vmlinuz"]),
        ("pi-4", ["start4.elf", "config.txt", "tryboot.txt", "a/cmdline.txt", "b/bcm2711-rpi-4-b.dtb"]),
    ],
)
def test_the_firmware_finds_two_systems(kind, names, tmp_path):
    layout = make(tmp_path / "disk", kind)
    boot = part(tmp_path / "disk", layout, 1, tmp_path / "fat")
    there = tool("mdir", "-/", "-b", "-i", boot, "::")
    for name in names:
        assert f"::/{name}\n" in there
    text = tool("mcopy", "-i", boot, f"::/{names[1]}", "-")
    assert (
        ("root=PARTLABEL=edgeft-a ro panic=10" in text)
        if kind == "amd64-uefi"
        else ("os_prefix=a/\n" in text)
    )


def test_partitions_that_do_not_fit_a_table_are_refused():
    with pytest.raises(ValueError, match="no whole number of MiB"):
        partitions.gpt([Partition(name="x", size=MIB + 1)])
    with pytest.raises(ValueError, match="room for 4"):
        partitions.mbr([Partition(name=str(i), size=MIB) for i in range(5)], "x")


def test_what_does_not_fit_ends_the_build(tmp_path):
    big = {"big": Entry(content=bytes(40 * MIB))}
    with pytest.raises(ToolError):
        filesystems.fat(tmp_path / "fat", big, size=34 * MIB, label="X")
    with pytest.raises(ToolError, match="debugfs could not fill"):
        filesystems.ext4(tmp_path / "ext4", {"big": Entry(content=random.randbytes(9 * MIB))}, size=8 * MIB, label="x",
                         folders={}, links={})  # fmt: skip


def test_a_machine_without_the_tools_is_told_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *a, **k: None)
    for one, package in zip(filesystems.TOOLS, ("dosfstools", "mtools", "e2fsprogs"), strict=False):
        with pytest.raises(SetupError, match=one.name) as error:
            one.find()
        assert f"apt install {package}" in error.value.hint
