"""The image's stage on a tiny model: what goes into the root, what onto the data partition, the same bytes twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeft.errors import DataError
from edgeft.image import disk, system
from edgeft.stages import export_image
from edgeft.stages.export_image import Image

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
pytestmark = pytest.mark.skipif(
    not all(shutil.which(name, path=PATH) for name in ("mkfs.vfat", "mcopy", "debugfs")),
    reason="needs dosfstools, mtools and e2fsprogs",
)
KEY = "0123456789abcdef0123"


@pytest.fixture
def wanted(monkeypatch):
    """What the system was asked for, instead of a system: Debian is another test's."""
    asked = []

    def build(given, out):
        asked.append(given)
        (out / "boot/firmware").mkdir(parents=True)
        (out / "boot/dtb").mkdir()
        for name in (
            "root",
            "vmlinuz",
            "initrd.img",
            "boot/firmware/start4.elf",
            "boot/dtb/bcm2711-rpi-4-b.dtb",
        ):
            (out / name).write_bytes(name.encode() * 1000)
        return system.System(
            root=out / "root", kernel=out / "vmlinuz", initrd=out / "initrd.img", boot=out / "boot",
            packages=[{"name": "base-files", "version": "12", "architecture": "arm64", "sha256": "00"}],
            kernel_version="6.1.0", cmdline="ro panic=10", sizes={"root": 4000},
        )  # fmt: skip

    monkeypatch.setattr(system, "build", build)
    return asked


def unpacked(done, tmp_path):
    """The data partition of a finished image."""
    manifest = json.loads((done.out / "image.json").read_text())
    disk.unpack(done.out / "image.img.zst", tmp_path / "raw")
    part = manifest["partitions"][3]
    with (tmp_path / "raw").open("rb") as raw, (tmp_path / "data").open("wb") as data:
        raw.seek(part["start"])
        data.write(raw.read(part["size"]))
    return manifest, tmp_path / "data"


def read(data, path):
    command = [shutil.which("debugfs", path=PATH), "-R", f"cat {path}", str(data)]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.slow
def test_two_builds_are_equal_and_name_no_place_of_this_machine(job, wanted, tmp_path):
    first, second = job("image one", Image()), job("image two", Image())
    facts = [export_image.run(done) for done in (first, second)]
    for name in ("image.img.zst", "image.sha256", "image.json"):
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()
        assert str(tmp_path.parent).encode() not in (first.out / name).read_bytes()
    assert sorted(p.name for p in first.out.iterdir()) == ["image.img.zst", "image.json", "image.sha256"]
    assert (first.out / "image.sha256").read_text() == f"{facts[0]['sha256']}  image.img.zst\n"
    disk.unpack(first.out / "image.img.zst", tmp_path / "raw")
    assert os.fsencode(first.out) not in (tmp_path / "raw").read_bytes()


def test_programs_are_in_the_root_and_the_model_and_its_settings_on_the_data_partition(job, wanted, tmp_path):
    done = job("layout", Image())
    export_image.run(done)
    manifest, data = unpacked(done, tmp_path)
    (asked,) = wanted
    assert {"usr/lib/edgeft/llama-server", "usr/lib/edgeft/serve"} <= set(asked.files)
    assert not [name for name in asked.files if "gguf" in name or name.endswith(".env") or "trust" in name]
    assert "edgeft-tiny-model.service" in asked.enable and "edgeft-answers.service" in asked.enable
    assert all(any(f"system/{unit}" in name for name in asked.files) for unit in asked.enable)
    home = "/lib/edgeft/models/tiny-model"
    model = (done.inputs["quantize/gguf"].path / "model.gguf").read_bytes()
    assert read(data, f"{home}/versions/0/model.gguf") == model
    assert b"EDGEFT_HOST=127.0.0.1\n" in read(data, "/lib/edgeft/settings/tiny-model.env")
    assert read(data, "/lib/edgeft/api-key") == b""
    assert manifest["api_key"] == "made by the board" and manifest["packages"] and not manifest["updates"]


@pytest.mark.slow
def test_the_network_a_key_a_login_and_updates_are_there_when_they_are_asked_for(job, wanted, tmp_path):
    (tmp_path / "key").write_text(f"{KEY}\n")
    (tmp_path / "logins").write_text("# mine\nssh-ed25519 AAAA me\n")
    (tmp_path / "root.json").write_text("{}")
    params = Image(
        lan=True, api_key=tmp_path / "key", authorized_keys=tmp_path / "logins", trust=tmp_path / "root.json"
    )
    done = job("open", params)
    export_image.run(done)
    manifest, data = unpacked(done, tmp_path)
    (asked,) = wanted
    assert (
        asked.ssh_keys == ("ssh-ed25519 AAAA me",)
        and asked.files["etc/edgeft/trust/root.json"].content == b"{}"
    )
    assert b"EDGEFT_HOST=0.0.0.0\n" in read(data, "/lib/edgeft/settings/tiny-model.env")
    assert read(data, "/lib/edgeft/api-key").strip() == KEY.encode()
    assert manifest["updates"] and KEY not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("field", "text", "sentence"),
    [
        ("api_key", "short\n", "holds no key"),
        ("api_key", "two words that are long enough\n", "holds no key"),
        ("authorized_keys", "# nobody\n", "no public key"),
        ("authorized_keys", "-----BEGIN OPENSSH PRIVATE KEY-----\n", "no public key"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(job, wanted, tmp_path, field, text, sentence):
    path = Path(tmp_path / "file")
    path.write_text(text)
    with pytest.raises(DataError, match=sentence):
        export_image.run(job(f"wrong {field} {len(text)}", Image(**{field: path})))
