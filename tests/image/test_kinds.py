"""Which boards get an image: every target says how it starts, and what cannot be made is refused before anything runs."""

from __future__ import annotations

import pytest

from edgeft import staging
from edgeft.errors import RecipeError, SetupError
from edgeft.image import disk
from edgeft.image.kinds import KINDS, NAMES
from edgeft.plan import plan
from edgeft.recipe import load
from edgeft.resources import folder
from edgeft.stages.device import STAGE as DEVICE

RECIPE = """
[base]
package = "p"
version = "1"
file = "f.gguf"
sha256 = "{sha}"
[data]
source = "rows.jsonl"
[[quantize]]
kind = "gguf"
type = "Q8_0"
"""


def image_step(tmp_path, target):
    text = (folder("targets") / f"{target}.toml").read_text()
    if 'kind = "image"' not in text:
        text = text.replace("\n[export]", "\n[[export]]").replace('kind = "bundle"', 'kind = "image"')
    (tmp_path / "board.toml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(sha="0" * 64))
    steps = plan(load(tmp_path / "recipe.toml"), load(tmp_path / "board.toml", per_target=True))
    return next(s for s in steps if s.stage.id == "export/image")


@pytest.mark.parametrize("path", sorted(folder("targets").glob("*.toml")), ids=lambda p: p.stem)
def test_every_target_that_ships_says_how_its_board_starts(path):
    device = next(p for s, p in load(path, per_target=True).rows if s is DEVICE)
    assert device.image in NAMES


@pytest.mark.parametrize(
    ("target", "why", "instead"),
    [
        ("pi-5-8gb", "no device tree for its processor", "Raspberry Pi OS"),
        ("jetson-orin-nano-8gb", "come with JetPack alone", '"bundle"'),
        ("rtx-3060-box", "driver of NVIDIA's", '"deb" or "bundle"'),
    ],
)
def test_a_board_without_an_honest_image_is_refused_with_what_to_take_instead(tmp_path, target, why, instead):
    step = image_step(tmp_path, target)
    with pytest.raises(SetupError, match=why) as error:
        step.stage.check(step, {})
    assert instead in error.value.hint


@pytest.mark.parametrize("target", ["pi-4-4gb", "n100-mini-pc", "arm64-uefi", "amd64-uefi"])
def test_a_board_with_an_image_passes_and_what_it_takes_is_predicted(tmp_path, monkeypatch, target):
    monkeypatch.setattr(staging, "runnable", lambda *_: None)
    step = image_step(tmp_path, target)
    step.stage.check(step, {})
    assert step.stage.estimate(step, {}).disk_mb >= 900


def test_a_target_that_does_not_say_how_it_starts_gets_no_image_and_one_that_says_nonsense_is_refused(
    tmp_path,
):
    text = (folder("targets") / "n100-mini-pc.toml").read_text()
    for new, sentence in (('"grub"', "'grub' is none of"), ('"pi-4"', "is for arch = 'arm64'")):
        (tmp_path / "mine.toml").write_text(text.replace('"amd64-uefi"', new))
        with pytest.raises(RecipeError, match=sentence):
            load(tmp_path / "mine.toml", per_target=True)
    from edgeft.image import kinds

    with pytest.raises(SetupError, match="does not say how it starts") as error:
        kinds.of("", "mine")
    assert "[device] image" in error.value.hint


def test_a_and_b_differ_in_their_root_alone_and_no_loader_entry_is_the_default():
    for kind in KINDS.values():
        a, b = (disk.command_line(kind, slot, "ro") for slot in "ab")
        assert a != b and a.split()[1:] == b.split()[1:]
    from pathlib import Path

    from edgeft.image import uefi

    files = uefi.boot_files(Path("k"), Path("i"), Path("none"), {"a": "root=a", "b": "root=b"})
    assert b"default" not in files["loader/loader.conf"].content  # it would win over the counted tries
    assert {n for n in files if "entries" in n} == {f"loader/entries/edgeft-{s}+3.conf" for s in "ab"}
