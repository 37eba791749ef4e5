"""The emulated machine: its command line, and the sentences where something is missing. No machine is started here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeft.commands import booting
from edgeft.emulator import boot, machines
from edgeft.errors import DataError, EdgeftError, SetupError
from edgeft.image.kinds import KINDS

MANIFEST = {
    "format": 1, "name": "tiny", "image": "amd64-uefi", "target": {"isa": "x86-64-v3"},
    "serves": {"host": "127.0.0.1", "port": 8080}, "predicted": {"memory_mb": {"total": 250.0}},
}  # fmt: skip


def command(spec, machine, **more):
    return boot._command(machine, spec, Path("a,b.img"), [], Path("c"), 4711, snapshot=True, **more)


@pytest.fixture(autouse=True)
def qemu(monkeypatch):
    """QEMU looks installed; nothing here starts it."""
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")


@pytest.mark.parametrize(("host", "inside"), [("127.0.0.1", 8090), ("0.0.0.0", 8080)])
def test_the_machine_reaches_nothing_and_is_reached_through_one_port_on_loopback(host, inside):
    spec = boot.read_spec({**MANIFEST, "serves": {"host": host, "port": 8080}})
    found = command(spec, machines.of(spec.kind))
    net = found[found.index("-netdev") + 1]
    assert net == f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:4711-:{inside}"
    assert found[found.index("-accel") + 1] == "tcg"
    drive = next(word for word in found if "format=raw" in word)
    assert drive.startswith("file=a,,b.img,") and "snapshot=on" in drive


def test_the_processor_is_the_targets_and_the_memory_what_the_model_needs():
    spec = boot.read_spec({**MANIFEST, "image": "arm64-uefi", "target": {"isa": "armv8.2-a+dotprod+fp16"},
                           "predicted": {"memory_mb": {"total": 3000.0}}})  # fmt: skip
    found = command(spec, machines.of(spec.kind))
    assert found[found.index("-cpu") + 1] == "cortex-a76"
    assert 3750 < int(found[found.index("-m") + 1]) < 5000
    assert boot.read_spec(MANIFEST, memory_mb=777).memory_mb == 777
    pi = boot.read_spec({**MANIFEST, "image": "pi-3"})
    found = command(pi, machines.of(pi.kind))
    assert "raspi3b" in found and "-m" not in found and "usb-net,netdev=net" in found


def test_a_missing_emulator_or_firmware_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "_FOLDER", tmp_path)
    for kind, package in (("arm64-uefi", "qemu-efi-aarch64"), ("amd64-uefi", "ovmf")):
        with pytest.raises(SetupError, match="is not there") as error:
            machines.firmware(machines.of(KINDS[kind]))
        assert f"apt install {package}" in error.value.hint
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with (
        pytest.raises(SetupError, match="qemu-system-x86_64 is not installed") as error,
        boot.booted(tmp_path / "raw", boot.read_spec(MANIFEST)),
    ):
        pass
    assert "apt install qemu-system-x86" in error.value.hint


def test_a_board_that_no_emulator_has_is_refused():
    with pytest.raises(SetupError, match="no emulator here has the board of a pi-4 image"):
        machines.of(KINDS["pi-4"])


def test_an_image_without_its_manifest_is_refused(tmp_path):
    image = tmp_path / "image.img.zst"
    with pytest.raises(EdgeftError, match="does not exist"):
        booting.boot(image, tmp_path, booting.Asked())
    image.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read") as error:
        booting.boot(image, tmp_path, booting.Asked())
    assert "beside the image" in error.value.hint
    (tmp_path / "image.json").write_text(json.dumps({"format": 7}))
    with pytest.raises(DataError, match="is not the manifest"):
        booting.boot(image, tmp_path, booting.Asked())
