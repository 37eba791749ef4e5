"""The update file: what is in it, that it is the same bytes twice, and that the agent of a device installs it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import pytest

from edgeft import bundle
from edgeft.agent import archive, delta, description
from edgeft.agent.errors import AgentError, Damaged
from edgeft.errors import DataError, SetupError, StageError
from edgeft.export import deb
from edgeft.export.files import plain
from edgeft.updates import custody, make, older
from edgeft.updates.make import Wanted
from tests.agent.device import RUN, Device, answer
from tests.updates.conftest import no_passphrase, write_gguf
from tests.updates.test_delta import blocks, nudged

NAME = "tiny"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two trainings of one model, another model, and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    weights = blocks("Q4_K", 300)
    for name, data in (("one", weights), ("two", nudged(weights, 0.05)), ("other", blocks("Q4_K", 300, 7))):
        write_gguf(folder / f"{name}.gguf", {"general.name": name}, {"w": ("Q4_K", 256, data)})
    for name, seed in (("a", 1), ("b", 2)):
        write_gguf(
            folder / f"{name}.gguf",
            {"general.type": "adapter"},
            {"w.lora_a": ("F16", 8, blocks("F16", 64, seed))},
        )
    return SimpleNamespace(**{path.stem: path for path in folder.glob("*.gguf")})


def contents(model, adapter=None):
    """A version's files, as an exporter has them."""
    files = {"model.gguf": model, "run.sh": RUN, "settings.json": b"{}", "notices/base/LICENSE": b"Apache"}
    return files | ({"adapter.gguf": adapter} if adapter else {})


def made(keys, folder, files, *, old=None, board=None, **wanted):
    return make.make(
        files, Wanted(name=NAME, **wanted), keys, no_passphrase, folder=folder, old=old, board=board
    )


def said(path):
    with archive.open_update(path) as opened:
        return json.loads(opened.text("payload/update.json"))


def test_a_full_update_holds_every_file_and_the_chain_of_roots(keys, tmp_path, models):
    custody.rotate(keys, "targets", no_passphrase)
    one = made(keys, tmp_path, contents(models.one), label="1.0")
    assert (one.path, one.sequence, one.kind, one.base) == (tmp_path / "tiny-1.edgeft", 1, "full", {})
    with tarfile.open(one.path) as tar:
        names = tar.getnames()
        assert tar.extractfile("payload/files/model.gguf").read() == models.one.read_bytes()
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    assert names == [
        "metadata/1.root.json", "metadata/2.root.json", "metadata/targets.json", "payload/update.json",
        "payload/files/model.gguf", "payload/files/notices/base/LICENSE", "payload/files/run.sh", "payload/files/settings.json",
    ]  # fmt: skip
    text = said(one.path)
    assert text["files"]["run.sh"]["executable"] and "executable" not in text["files"]["model.gguf"]
    assert (text["name"], text["label"], text["sequence"]) == (NAME, "1.0", 1)


def test_the_same_inputs_give_the_same_bytes(keys, tmp_path, models):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made(keys, tmp_path / name, contents(models.two), old={"model.gguf": models.one})
    assert (tmp_path / "a/tiny-1.edgeft").read_bytes() == (tmp_path / "b/tiny-1.edgeft").read_bytes()


def test_nothing_of_this_machine_is_in_the_file(keys, tmp_path, models):
    whole = made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one}).path.read_bytes()
    assert str(tmp_path).encode() not in whole and b"PRIVATE KEY" not in whole


def test_auto_takes_the_smallest_that_applies(keys, tmp_path, models):
    full = made(keys, tmp_path, contents(models.one))
    near = made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one})
    far = made(keys, tmp_path, contents(models.other), old={"model.gguf": models.one})
    only = made(
        keys,
        tmp_path,
        contents(models.one, models.b),
        old={"model.gguf": models.one, "adapter.gguf": models.a},
    )
    board = made(keys, tmp_path, contents(models.one, models.a), board=said(full.path)["files"]["model.gguf"] and {
        "model.gguf": said(full.path)["files"]["model.gguf"]["sha256"]})  # fmt: skip
    assert [u.kind for u in (full, near, far, only, board)] == ["full", "delta", "full", "adapter", "adapter"]
    assert [u.sequence for u in (full, near, far, only, board)] == [1, 2, 3, 4, 5]
    assert near.bytes < full.bytes / 2 and only.bytes < full.bytes / 2
    assert (
        only.how["model.gguf"] == "base"
        and only.how["adapter.gguf"] == "whole"
        and set(only.base) == {"model.gguf"}
    )
    assert far.base == {} and far.how["model.gguf"] == "whole"
    both = made(
        keys,
        tmp_path,
        contents(models.two, models.b),
        old={"model.gguf": models.one, "adapter.gguf": models.b},
    )
    assert (both.kind, both.how["model.gguf"], both.how["adapter.gguf"]) == ("delta", "delta", "base")


def test_a_kind_that_was_asked_for_is_made_or_refused(keys, tmp_path, models):
    old = {"model.gguf": models.one}
    assert made(keys, tmp_path, contents(models.one), old=old, kind="full").how["model.gguf"] == "whole"
    assert made(keys, tmp_path, contents(models.other), old=old, kind="delta").kind == "delta"
    for files, given, kind, why in (
        (contents(models.one), old, "adapter", "its training is part of the model"),
        (contents(models.two, models.a), old, "adapter", "another one than on the device"),
        (contents(models.one, models.a), None, "adapter", "not known what is on the device"),
        (contents(models.one), None, "delta", "not at hand"),
    ):
        with pytest.raises(DataError, match=why):
            made(keys, tmp_path, files, old=given, kind=kind)


def test_a_number_is_never_given_to_two_contents(keys, tmp_path, models):
    assert made(keys, tmp_path, contents(models.one)).sequence == 1
    assert made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one}).sequence == 2
    assert made(keys, tmp_path, contents(models.two)).sequence == 2  # whole, for other devices
    with pytest.raises(SetupError, match="given to other contents"):
        made(keys, tmp_path, contents(models.other), sequence=2)
    assert made(keys, tmp_path, contents(models.other), sequence=7).path.name == "tiny-7.edgeft"
    assert made(keys, tmp_path, contents(models.one), above=40).sequence == 41


def test_names_that_a_tar_cannot_hold_get_numbers(keys, tmp_path, models):
    names = ["notices/data/" + "a long name (with all that) " * 5, "notices/data/Übersicht.txt"]
    one = made(keys, tmp_path, {**contents(models.one), **dict.fromkeys(names, b"x")})
    assert all(said(one.path)["files"][name]["target"].startswith("numbered/") for name in names)


def test_what_no_device_would_take_never_gets_its_name(keys, tmp_path, models):
    for files in (
        {"model.gguf": models.one},
        {**contents(models.one), "../x": b""},
        {**contents(models.one), ".hidden": b""},
    ):
        with pytest.raises(StageError, match="cannot be used"):
            made(keys, tmp_path, files)
    assert not list(tmp_path.glob("*.edgeft")) and not list(tmp_path.glob(".*"))
    assert not (keys / "issued.json").exists()


@pytest.fixture
def device(keys, tmp_path, models):
    files = {"model.gguf": models.one.read_bytes(), "run.sh": RUN}
    found = Device(
        tmp_path / "device", SimpleNamespace(chain=[(keys / "metadata/1.root.json").read_bytes()])
    ).make(files)
    found.start()
    yield found
    found.stop()


@pytest.mark.slow
def test_a_device_goes_from_the_factory_through_delta_adapter_and_full(keys, tmp_path, models, device):
    first = made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one})
    before = older.read([first_whole(models, tmp_path), first.path], tmp_path / "scratch")
    second = made(keys, tmp_path, contents(models.two, models.a), old=before.files, above=before.sequence)
    wrong = device.run("install", second.path)
    assert wrong.returncode == 5, wrong.stderr  # it builds on the first, which is not there yet
    assert device.run("install", first.path).returncode == 0
    custody.rotate(keys, "targets", no_passphrase)
    custody.rotate(keys, "root", no_passphrase)
    third = made(keys, tmp_path, contents(models.one))
    assert [u.kind for u in (first, second, third)] == ["delta", "adapter", "full"]
    for one, files in ((second, [models.two, models.a]), (third, [models.one])):
        done = device.run("install", one.path)
        assert done.returncode == 0, done.stdout + done.stderr
        there = dict(zip(("model.gguf", "adapter.gguf"), [path.read_bytes() for path in files], strict=False))
        assert device.asks() == answer(there)
        assert device.state()["sequence"] == one.sequence
    assert device.run("install", second.path).returncode == 3  # the key that signed it was replaced


@pytest.mark.slow
def test_a_device_refuses_what_others_signed_and_what_was_changed(keys, tmp_path, models, device):
    stranger = custody.new(tmp_path / "stranger").folder
    theirs = made(stranger, tmp_path, contents(models.two))
    assert device.run("install", theirs.path).returncode == 3
    mine = made(keys, tmp_path, contents(models.two))
    whole = mine.path.read_bytes()
    for old, new, code in (
        (b'"sequence": 1', b'"sequence": 9', 4), (b"Apache", b"Bpache", 4), (b'"version":1}', b'"version":2}', 3),
    ):  # fmt: skip
        assert old in whole
        mine.path.write_bytes(new.join(whole.rsplit(old, 1)))
        done = device.run("install", mine.path)
        assert done.returncode == code, done.stderr
    assert device.asks() == answer({"model.gguf": models.one.read_bytes()})


def first_whole(models, folder):
    place = folder / "factory"
    place.mkdir()
    shutil.copy(models.one, place / "model.gguf")
    return place


def test_the_version_on_the_device_is_read_out_of_all_that_may_have_been_kept(keys, tmp_path, models):
    files = {"model.gguf": models.one, "run.sh": RUN}
    bundle.write_bundle(tmp_path / "bundle.tar.zst", files, {"format": 1})
    sources = [
        tmp_path / "bundle.tar.zst",
        models.one,
        made(keys, tmp_path, contents(models.one)).path,
        first_whole(models, tmp_path),
    ]
    if shutil.which("dpkg-deb"):
        package = deb.Package(
            name="edgeft-tiny", version="1.0", architecture="all", maintainer="a <a@b>", summary="s", description=("d",),
            files=plain(files, "usr/share/edgeft/tiny"),
        )  # fmt: skip
        deb.build(package, tmp_path / "model.deb")
        sources.append(tmp_path / "model.deb")
    for i, source in enumerate(sources):
        found = older.read([source], tmp_path / f"scratch{i}")
        assert found.files["model.gguf"].read_bytes() == models.one.read_bytes(), source
        assert found.sequence == (1 if source.suffix == ".edgeft" else 0)


def test_what_cannot_be_the_version_on_the_device_is_refused(keys, tmp_path, models):
    near = made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one})
    (tmp_path / "junk").write_bytes(b"junk" * 500)
    (tmp_path / "empty").mkdir()
    for i, (sources, why) in enumerate((
        ([near.path], "does not hold it whole"), ([models.other, near.path], "for the base with sha256|for a base of"),
        ([tmp_path / "junk"], "no update, bundle"), ([tmp_path / "empty"], "holds no model.gguf"), ([tmp_path / "x"], "does not exist"),
    )):  # fmt: skip
        with pytest.raises(DataError, match=why):
            older.read(sources, tmp_path / f"s{i}")
    found = older.read([models.one, near.path], tmp_path / "good")
    assert found.files["model.gguf"].read_bytes() == models.two.read_bytes() and found.name == NAME


@pytest.mark.slow
def test_every_byte_of_the_file_is_covered_by_a_signature_or_refused(keys, tmp_path, models):
    """Flip bits all over an update: what a device would act on is what was signed, or nothing."""
    one = made(keys, tmp_path, contents(models.two), old={"model.gguf": models.one})
    whole = one.path.read_bytes()
    good = description.read(read_all(one.path, keys)["update.json"])
    refused = 0
    for at in range(0, len(whole), max(1, len(whole) // 400)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            found = read_all(tmp_path / "damaged", keys)
        except (AgentError, DataError):
            refused += 1
            continue
        assert description.read(found["update.json"]) == good
        delta.apply(models.one, io.BytesIO(found["delta/model.gguf"]), tmp_path / "result")
        assert (tmp_path / "result").read_bytes() == models.two.read_bytes()
    assert refused > 300


def read_all(path, keys):
    """The payload, as far as a device takes it."""
    from edgeft.updates import metadata

    with archive.open_update(path) as opened:
        listed = metadata.verified_targets(opened.targets, custody.roots(keys)[-1][1]).targets
        if opened.payloads != set(listed):
            raise Damaged("its list and its contents differ")
        for name, file in listed.items():
            opened.check(f"payload/{name}", length=file.length, sha256=file.hashes["sha256"])
        return {name: opened.open(f"payload/{name}").read() for name in listed}
