"""An update file is only what it should be: nothing in it reaches outside, fills the memory, or hides."""

from __future__ import annotations

import io
import json
import os
import tarfile

import pytest

from edgeft.agent import description
from edgeft.agent.archive import open_update
from edgeft.agent.errors import Damaged
from tests.agent.device import RUN, Keys, described, update

PARTS = {"model.gguf": b"m" * 3000, "run.sh": RUN}


@pytest.fixture(scope="module")
def keys():
    return Keys()


def header(name, kind=tarfile.REGTYPE, size=0, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def test_members_are_known_by_place_and_size_and_read_to_the_byte(keys, tmp_path):
    with open_update(update(tmp_path / "u", keys, 3, PARTS)) as file:
        assert [version for version, _ in file.roots] == [1]
        assert file.payloads == {"update.json", "files/model.gguf", "files/run.sh"}
        assert file.open("payload/files/model.gguf").read() == b"m" * 3000
        assert description.read(file.text("payload/update.json")).sequence == 3


@pytest.mark.parametrize(
    "bad",
    [
        header("payload/../../etc/passwd"),
        header("/etc/passwd"),
        header("payload//x"),
        header("payload/./x"),
        header("payload/x", tarfile.SYMTYPE, link="/etc"),
        header("payload/x", tarfile.LNKTYPE, link="payload/update.json"),
        header("payload/x", tarfile.CHRTYPE),
        header("payload/x", tarfile.FIFOTYPE),
        header("payload/x", tarfile.DIRTYPE),
        header("payload/x", tarfile.GNUTYPE_SPARSE),
        header("payload/update.json"),
        header("etc/cron.d/x"),
        header("metadata/timestamp.json"),
        header("metadata/0.root.json"),
        header("payload/x", size=1 << 40),
        header("payload/" + "n" * 120),
    ],
    ids=lambda info: f"{info.name[:24]} {info.type!r}",
)
def test_a_member_that_leads_out_or_is_no_plain_file_is_refused(keys, tmp_path, bad):
    with pytest.raises(Damaged), open_update(update(tmp_path / "u", keys, 3, PARTS, add=[bad])):
        pass


def test_a_long_header_takes_no_memory(keys, tmp_path):
    """tarfile reads an extended header whole, however long it says it is."""
    raw = header("x", tarfile.XHDTYPE, size=1 << 33).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "u"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(1 << 34)  # sparse: nothing of it is on the disk
    with pytest.raises(Damaged, match="no plain file"), open_update(path):
        pass


@pytest.mark.parametrize("size", [0, 100, 511, 512, 4000])
def test_a_file_that_is_cut_off_is_refused(keys, tmp_path, size):
    path = update(tmp_path / "u", keys, 3, PARTS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Damaged, match=r"cut off|no update file"), open_update(path):
        pass


def test_what_lies_between_and_after_the_members_is_not_taken(keys, tmp_path):
    path = update(tmp_path / "u", keys, 3, PARTS)
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Damaged, match="after its end"), open_update(path):
        pass
    at = whole.index(b"m" * 3000) + 3000
    path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    with pytest.raises(Damaged, match="damaged after"), open_update(path):
        pass


def test_folders_devices_and_other_archives_are_no_update_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("hello " * 1000)
    with tarfile.open(tmp_path / "xz", "w:xz") as tar:
        tar.addfile(header("x", size=3), io.BytesIO(b"abc"))
    (tmp_path / "empty").touch()
    for name in ("text", "xz", "empty", "missing", "."):
        with pytest.raises(Damaged), open_update(tmp_path / name):
            pass
    with tarfile.open(tmp_path / "plain", "w", format=tarfile.GNU_FORMAT):
        pass
    with open_update(tmp_path / "plain") as file, pytest.raises(Damaged, match=r"no metadata/targets\.json"):
        _ = file.targets


def test_metadata_that_is_too_large_is_not_read(tmp_path):
    with tarfile.open(tmp_path / "u", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(header("metadata/targets.json", size=(1 << 20) + 1), io.BytesIO(bytes((1 << 20) + 1)))
    with open_update(tmp_path / "u") as file, pytest.raises(Damaged, match="larger"):
        _ = file.targets


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2), ("name", "../x"), ("name", "A"), ("name", 3), ("sequence", 0), ("sequence", True), ("sequence", "7"),
        ("files", {}), ("files", []), ("files", {"run.sh": {}}), ("canaries", [{}]), ("canaries", [{"prompt": ""}]),
        ("canaries", [{"prompt": "x", "max_tokens": 10**9}]), ("canaries", ["x"]), ("base", 3),
    ],
)  # fmt: skip
def test_a_description_that_cannot_be_followed_is_refused(key, value):
    about = described(7, {**PARTS, "adapter.gguf": ("base", b"a")})
    assert description.read(json.dumps(about).encode()).sequence == 7
    about[key] = value
    if (key, value) == ("base", 3):  # what a delta needs
        about["files"]["adapter.gguf"] |= {"how": "delta", "target": "x"}
    with pytest.raises(Damaged, match="cannot be followed"):
        description.read(json.dumps(about).encode())


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../b", "a//b", ".hidden", "a/.b", "", "a\\b", "a\nb", "a\u202eb", "ü" * 150, "run.sh/x", "update.json"])  # fmt: skip
def test_no_file_of_a_version_has_a_name_that_leads_elsewhere(name):
    about = described(7, {**PARTS, name: b"x"})
    with pytest.raises(Damaged, match="cannot be followed"):
        description.read(json.dumps(about).encode())


def test_names_that_licences_have_are_taken():
    names = (
        "notices/base/LICENSE",
        "notices/data/README (1).md",
        "data/card.json",
        "USE_POLICY.md",
        "Übersicht.txt",
    )
    about = described(7, {**PARTS, **dict.fromkeys(names, b"x")})
    assert set(names) < set(description.read(json.dumps(about).encode()).files)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"[" * 100000, b'{"format": 1}', b"null"])
def test_a_description_that_is_no_such_thing_is_refused(text):
    with pytest.raises(Damaged, match="cannot be followed"):
        description.read(text)
