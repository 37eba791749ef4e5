"""Every target that ships, and the sentences that refuse a wrong one."""

from __future__ import annotations

import pytest

from edgeft.errors import RecipeError
from edgeft.recipe import load
from edgeft.resources import folder
from edgeft.stages.device import STAGE

SHIPPED = sorted(folder("targets").glob("*.toml"))
WANTED = {
    "pi-4-4gb",
    "pi-4-8gb",
    "pi-5-8gb",
    "pi-5-16gb",
    "jetson-orin-nano-8gb",
    "n100-mini-pc",
    "rtx-3060-box",
    "laptop",
}


def test_the_promised_targets_ship():
    assert {p.stem for p in SHIPPED} >= WANTED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_target_is_read_and_leaves_room_for_a_model(path):
    tables = load(path, per_target=True)
    device = next(p for s, p in tables.rows if s is STAGE)
    assert device.name == path.stem
    assert tables.description
    assert 2000 < device.board().available_mb < device.ram_mb
    assert {s.id for s, _ in tables.rows} >= {"device", "export/bundle"}


def test_only_the_pi_4_lacks_dotprod():
    for path in SHIPPED:
        device = next(p for s, p in load(path, per_target=True).rows if s is STAGE)
        if device.arch == "arm64":
            assert ("dotprod" in device.board().features) == (not path.stem.startswith("pi-4"))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('isa = "armv8-a+crc"', 'isa = "cortex-a72"', "starts with no known level"),
        ('isa = "armv8-a+crc"', 'isa = "x86-64-v3"', "is not of arch = 'arm64'"),
        ("os_reserve_mb = 900", "os_reserve_mb = 5000", "leaves no memory for a model"),
        ("effective_gb_s = [2.8, 3.5]", "effective_gb_s = [3.5, 2.8]", "must rise"),
        ("effective_gb_s = [2.8, 3.5]", "effective_gb_s = [2.8, 35.0]", "at most 12.8"),
        ("threads = 4", "thread = 4", "did you mean 'threads'"),
    ],
)
def test_a_wrong_target_file_is_refused(tmp_path, old, new, sentence):
    text = (folder("targets") / "pi-4-4gb.toml").read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=sentence):
        load(tmp_path / "mine.toml", per_target=True)
