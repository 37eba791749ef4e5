"""Each check of a written folder: it holds for what was built, and says what is wrong when that is broken."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeft.errors import StageError
from edgeft.onnx import checks, graph
from edgeft.onnx.inside import inside

pytest.importorskip(
    "onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'edgeft[onnx]'"
)


pytestmark = pytest.mark.slow


def edit(path: Path, change) -> None:
    """Change a JSON file."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def redraw(folder: Path, change) -> None:
    """Change the graph."""
    model = graph.load(folder)
    change(model)
    graph.save(model, folder)


def overwrite(folder: Path, ending: str, value: float) -> None:
    """Change the first number of the first tensor whose name ends so."""
    weights = graph.Weights(folder, graph.load(folder).graph)
    name = next(n for n in weights.by_name if n.endswith(ending))
    said = {e.key: e.value for e in weights.by_name[name].external_data}
    numbers = np.memmap(folder / graph.DATA, weights.read(name).dtype, "r+", int(said["offset"]), (1,))
    numbers[0] = value
    numbers.flush()


def genai(key: str, value: object, place: str = "model"):
    return lambda f: edit(f / "genai_config.json", lambda found: found[place].update({key: value}))


def node(model, kind: str):
    return next(n for n in model.graph.node if n.op_type == kind)


def attribute(kind: str, name: str, value: int):
    def change(model) -> None:
        next(a for a in node(model, kind).attribute if a.name == name).i = value

    return lambda f: redraw(f, change)


BROKEN = {
    "an operator nobody has": (
        lambda f: redraw(f, lambda m: setattr(node(m, "MatMulNBits"), "op_type", "MatMulNoBits")), "operators", "knows no MatMulNoBits",
    ),
    "an opset from the future": (
        lambda f: redraw(f, lambda m: setattr(m.opset_import[0], "version", 99)), "operators", "wants .* 99; ONNX Runtime",
    ),
    "a node that reads nothing": (
        lambda f: redraw(f, lambda m: node(m, "MatMulNBits").input.__setitem__(0, "nowhere")), "graph", "onnx.checker refuses",
    ),
    "a cache less": (lambda f: redraw(f, lambda m: m.graph.input.pop()), "inputs and outputs", "only genai_config.json has"),
    "fewer words": (genai("vocab_size", 320), "rows", "genai_config.json: 320 rows, and the checkpoint has 384"),
    "an output matrix of fewer rows": (
        lambda f: redraw(f, lambda m: setattr(next(a for a in m.graph.node[-1].attribute if a.name == "N"), "i", 300)),
        "rows", "the output matrix: 300 rows",
    ),
    "a scale that is not a number": (lambda f: overwrite(f, "weight_scales", np.nan), "finite numbers", "not finite"),
    "a scale of zero": (lambda f: overwrite(f, "weight_scales", 0.0), "finite numbers", "a scale of zero"),
    "a norm that overflows": (lambda f: overwrite(f, "layernorm.weight", np.inf), "finite numbers", "not finite"),
    "a file that is cut off": (
        lambda f: (f / graph.DATA).write_bytes((f / graph.DATA).read_bytes() + b"..."), "stored whole", "its tensors end at",
    ),
    "a second graph": (lambda f: (f / "other.onnx").write_text(""), "stored whole", "other.onnx belongs to no graph"),
    "another block size": (attribute("MatMulNBits", "block_size", 16), "packed shapes", "numbers where .* belong"),
    "a width that is not its own": (attribute("MatMulNBits", "K", 640), "packed shapes", "numbers where .* belong"),
    "answers that never end": (genai("eos_token_id", 7), "generation settings", "eos_token_id = 7, the checkpoint"),
    "another context": (genai("context_length", 64), "generation settings", "context_length = 64, the checkpoint 512"),
    "other sampling": (
        genai("repetition_penalty", 1.0, "search"), "generation settings", r"repetition_penalty = 1.0, the checkpoint 1.2",
    ),
    "a licence that got lost": (lambda f: (f / "LICENSE").unlink(), "licence files", "LICENSE of the checkpoint is not"),
}  # fmt: skip


def test_every_check_holds_for_what_was_built(tiny, built):
    found = checks.folder(tiny, built)
    assert [one["name"] for one in found if not one["ok"]] == []
    assert len(found) == 10
    checks.insist(found)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_found_and_named(fault, tiny, built, tmp_path):
    breaking, name, said = BROKEN[fault]
    shutil.copytree(built, tmp_path / "model")
    breaking(tmp_path / "model")
    found = {one["name"]: one for one in checks.folder(tiny, tmp_path / "model")}
    assert found[name]["ok"] is False
    assert re.search(said, found[name]["said"]), found[name]["said"]
    with pytest.raises(StageError, match=f"not sound: .*{name}"):
        checks.insist(list(found.values()))


def test_a_folder_of_this_machine_is_not_named(tiny, built, tmp_path):
    shutil.copytree(built, tmp_path / "model")
    edit(tmp_path / "model" / "tokenizer_config.json", lambda f: f.update(name_or_path=str(tiny)))
    found = {one["name"]: one for one in checks.folder(tiny, tmp_path / "model")}
    assert found["machine paths"]["said"].startswith("tokenizer_config.json names a folder of this machine")


def test_a_product_that_was_not_packed_is_found(tiny, tmp_path):
    from edgeft.onnx.build import _builder
    from tests.onnx_genai.conftest import settings

    _builder(tiny, tmp_path, json.loads((tiny / "config.json").read_text()), settings())
    found = {one["name"]: one for one in checks.folder(tiny, tmp_path)}
    assert "is not packed" in found["packed shapes"]["said"]


def test_what_is_inside_is_counted_from_the_files(built):
    held = inside(built)
    assert held.types == {"FLOAT": 5, "int4": 8, "int8": 3}
    assert held.bytes == sum(p.stat().st_size for p in built.iterdir())
    assert 5 < held.bits_per_weight < 8.5
