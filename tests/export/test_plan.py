"""A target file names its exports; what cannot run on the target is refused before anything is built."""

from __future__ import annotations

import re

import pytest

from edgeft import staging
from edgeft.errors import RecipeError, SetupError
from edgeft.plan import plan
from edgeft.recipe import load
from edgeft.resources import folder

KINDS = ("bundle", "deb", "oci", "ollama")
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
[[quantize]]
kind = "gguf"
type = "Q4_K_M"
"""


def steps(tmp_path, target, exports):
    text = (folder("targets") / f"{target}.toml").read_text()
    board, found, _ = re.split(r"^(\[\[?export\])", text, maxsplit=1, flags=re.MULTILINE)
    assert found
    (tmp_path / "board.toml").write_text(board + exports)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(sha="0" * 64))
    return plan(load(tmp_path / "recipe.toml"), load(tmp_path / "board.toml", per_target=True))


def exports(steps):
    return [s for s in steps if s.stage.name == "export"]


def test_one_target_can_have_every_export_and_each_packs_every_file(tmp_path):
    listed = "".join(f'[[export]]\nkind = "{kind}"\n' for kind in KINDS)
    found = exports(steps(tmp_path, "pi-5-8gb", listed))
    assert {(s.stage.kind, s.variant) for s in found} == {(k, v) for k in KINDS for v in ("q8_0", "q4_k_m")}
    assert all(set(s.inputs) == set(staging.NEEDS) for s in found)


def test_the_programs_of_the_target_are_part_of_the_key_only_where_they_ship(tmp_path):
    listed = "".join(f'[[export]]\nkind = "{kind}"\n' for kind in KINDS)
    tools = {s.stage.kind: s.identity["tools"] for s in exports(steps(tmp_path, "pi-5-8gb", listed))}
    assert {kind for kind, pins in tools.items() if staging.RUNTIMES.name in pins} == {"deb", "oci"}
    assert len(staging.RUNTIMES.pin) == 16


@pytest.mark.parametrize("target", ["jetson-orin-nano-8gb", "rtx-3060-box"])
def test_a_board_whose_gpu_nothing_here_compiles_for_is_refused_before_the_training(
    tmp_path, monkeypatch, target
):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    for kind, said in (
        ("deb", "so llama.cpp's .*cuda.* cannot be compiled"),
        ("oci", "and this format has no system"),
    ):
        step = exports(steps(tmp_path, target, f'[export]\nkind = "{kind}"'))[0]
        with pytest.raises(SetupError, match=said) as error:
            step.stage.check(step, {})
        assert error.value.hint.startswith('take [export] kind = "bundle"')


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('kind = "debb"', "choose from bundle, deb, image, oci, ollama"),
        ('kind = "deb"\nversion = "1-2"', "export.version"),
        ('kind = "deb"\nmaintainer = "me"', "export.maintainer"),
        ('kind = "oci"\ntag = "a b"', "export.tag"),
        ('kind = "ollama"\nlevel = 3', "export.level: there is no such key"),
    ],
)
def test_a_mistake_in_an_export_table_is_named(tmp_path, table, said):
    with pytest.raises(RecipeError, match=said):
        steps(tmp_path, "pi-5-8gb", f"[export]\n{table}")
