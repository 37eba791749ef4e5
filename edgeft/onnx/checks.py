"""Exact questions about a written GenAI folder, answered from its bytes and from the checkpoint it was made from.

Each answer is a sentence, and each can be no. The certificate's own checks (parity/checks) ask on, with the runtime open.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeft.errors import StageError
from edgeft.onnx import build, graph, pack
from edgeft.onnx.session import read_config

Facts = dict[str, Any]
Answer = tuple[str, str]
"""What is wrong, or "", and what was compared."""


def folder(checkpoint: Path, out: Path) -> list[Facts]:
    """The checks of folder `out`, ready for JSON, in the form of a certificate's (parity/checks/check.py)."""
    model = graph.load(out)
    at = _At(
        checkpoint=checkpoint, out=out, graph=model.graph, opsets={o.domain: o.version for o in model.opset_import},
        weights=graph.Weights(out, model.graph), genai=read_config(out),
        config=json.loads((checkpoint / "config.json").read_text(encoding="utf-8")),
    )  # fmt: skip
    return [
        {"step": "quantized", "name": name, "codes": codes, "ok": not wrong, "said": wrong or right}
        for name, codes, ask in _QUESTIONS
        for wrong, right in [ask(at)]
    ]


def insist(found: Sequence[Mapping[str, Any]]) -> None:
    """Raise StageError with what is wrong."""
    if wrong := [f"{one['name']}: {one['said']}" for one in found if one["ok"] is False]:
        raise StageError(
            "the ONNX folder is not sound: " + "; ".join(wrong), hint="nothing was kept; please report it"
        )


class _At:
    """What the questions are asked of."""

    def __init__(self, **given: Any) -> None:
        self.checkpoint: Path = given["checkpoint"]
        self.out: Path = given["out"]
        self.graph: Any = given["graph"]
        self.opsets: dict[str, int] = given["opsets"]
        self.weights: graph.Weights = given["weights"]
        self.genai: dict[str, Any] = given["genai"]
        self.config: dict[str, Any] = given["config"]
        self.decoder: dict[str, Any] = self.genai["model"]["decoder"]


def _valid(at: _At) -> Answer:
    """onnx.checker on the file by its path, as a model over 2 GB needs.

    ONNX Runtime has operators of its own in ONNX's domain (SimplifiedLayerNormalization), which the checker would refuse
    to look at: for it they are put into ONNX Runtime's, in a copy of the graph.
    """
    import onnx

    copy, own = graph.load(at.out), Counter[str]()
    for node in copy.graph.node:
        if not node.domain and not onnx.defs.has(node.op_type, ""):
            node.domain = "com.microsoft"
            own[node.op_type] += 1
    path = at.out / "checked.onnx"
    try:
        path.write_bytes(copy.SerializeToString())
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as e:
        return f"onnx.checker refuses {graph.MODEL}: {str(e).strip().splitlines()[0]}", ""
    finally:
        path.unlink(missing_ok=True)
    said = ", ".join(f"{name} ×{n}" for name, n in own.items())
    return "", f"onnx.checker {onnx.__version__} accepts {len(copy.graph.node)} nodes" + (
        f" ({said} as operators of ONNX Runtime)" if own else ""
    )


def _known(at: _At) -> Answer:
    """Every operator, in the version that the graph names, is one of the installed ONNX Runtime's."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    since: dict[tuple[str, str], int] = {}
    newest: dict[str, int] = {}
    for schema in state.get_all_operator_schema():
        key = (schema.domain, schema.name)
        since[key] = min(schema.since_version, since.get(key, schema.since_version))
        newest[schema.domain] = max(schema.since_version, newest.get(schema.domain, 0))
    for domain, version in at.opsets.items():
        if version > newest.get(domain, 0):
            wanted, has = f"{domain or 'ai.onnx'} {version}", newest.get(domain, "none of it")
            return f"the graph wants {wanted}; ONNX Runtime {onnxruntime.__version__} has {has}", ""
    for node in at.graph.node:
        first = since.get((node.domain, node.op_type))
        if first is None or first > at.opsets.get(node.domain, 0):
            return f"{node.name}: ONNX Runtime {onnxruntime.__version__} knows no {node.op_type} there", ""
    said = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(at.opsets.items()))
    return "", f"ONNX Runtime {onnxruntime.__version__} knows every operator ({said})"


def _ports(at: _At) -> Answer:
    """Inputs and outputs are those that genai_config.json names, one cache for each layer, logits for each word."""
    layers = int(at.config["num_hidden_layers"])
    wanted: dict[str, set[str]] = {"inputs": set(), "outputs": set()}
    for side, names in wanted.items():
        for name in at.decoder[side].values():
            names |= {name % i for i in range(layers)} if "%d" in name else {name}
    given = {
        "inputs": {v.name for v in at.graph.input}, "outputs": {v.name for v in at.graph.output},
    }  # fmt: skip
    for side, names in wanted.items():
        if odd := sorted(names ^ given[side]):
            where = "the graph" if odd[0] in given[side] else "genai_config.json"
            return f"{side}: only {where} has {odd[0]!r}", ""
    if int(at.decoder["num_hidden_layers"]) != layers:
        return f"genai_config.json has {at.decoder['num_hidden_layers']} layers, the checkpoint {layers}", ""
    return "", f"{len(given['inputs'])} inputs and {len(given['outputs'])} outputs, {layers} layers"


def _rows(at: _At) -> Answer:
    """As many words as the checkpoint has rows, at both ends of the graph and in genai_config.json."""
    wanted, found = int(at.config["vocab_size"]), {"genai_config.json": int(at.genai["model"]["vocab_size"])}
    logits = next(v for v in at.graph.output if v.name == at.decoder["outputs"]["logits"])
    found["the logits"] = int(logits.type.tensor_type.shape.dim[-1].dim_value)
    head = next((n for n in at.graph.node if logits.name in n.output and n.op_type == "MatMulNBits"), None)
    if head is not None:
        found["the output matrix"] = int(graph.attribute(head, "N"))
    for where, rows in found.items():
        if rows != wanted:
            return f"{where}: {rows} rows, and the checkpoint has {wanted}", ""
    return "", f"{wanted} rows"


def _finite(at: _At) -> Answer:
    """Every number is one, and no block's scale is zero."""
    import numpy as np

    scales = {n.input[2] for n in at.graph.node if n.op_type in ("MatMulNBits", "GatherBlockQuantized")}
    looked = 0
    for name in at.weights.by_name:
        numbers = at.weights.read(name)
        if numbers.dtype.kind != "f":
            continue
        looked += 1
        if not np.isfinite(numbers).all():
            return f"{name} holds a number that is not finite", ""
        if name in scales and not numbers.all():
            return f"{name} holds a scale of zero", ""
    return "", f"all numbers of {looked} tensors are finite"


def _whole(at: _At) -> Answer:
    """Every tensor has its bytes, no two share any, and there is no other file of weights."""
    places = sorted(
        (int(said["offset"]), int(said["length"]), t.name)
        for t in at.graph.initializer
        if (said := {e.key: e.value for e in t.external_data})
    )
    end = 0
    for offset, length, name in places:
        if offset < end:
            return f"{name} begins inside the tensor before it", ""
        end = offset + length
    size = (at.out / graph.DATA).stat().st_size
    if size != end:
        return f"{graph.DATA} has {size} bytes, its tensors end at {end}", ""
    if odd := {p.name for p in at.out.iterdir() if ".onnx" in p.name} - {graph.MODEL, graph.DATA}:
        return f"{min(odd)} belongs to no graph", ""
    return "", f"{len(places)} tensors in {size / 1e6:,.1f} MB, none shares a byte"


def _packed(at: _At) -> Answer:
    """Codes, scales and zero points have the shapes that the operator's attributes ask for."""
    views = {n.output[0]: n.input[0] for n in at.graph.node if n.op_type == "Reshape"}
    seen = 0
    for node in at.graph.node:
        if node.op_type == "MatMul" and node.input[1] in at.weights and node.name != pack.HEAD:
            return f"{node.name} is not packed: edgeft does not know this architecture's products", ""
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        seen += 1
        bits, block = int(graph.attribute(node, "bits", 4)), int(graph.attribute(node, "block_size"))
        given = [views.get(name, name) for name in node.input]
        codes, *rest = given[1:] if node.op_type == "MatMulNBits" else [given[0], *given[2:]]
        rows, blocks = at.weights.shape(rest[0])
        if node.op_type == "MatMulNBits":
            rows, blocks = int(graph.attribute(node, "N")), -(-int(graph.attribute(node, "K")) // block)
        wanted = {codes: rows * blocks * block * bits // 8, rest[0]: rows * blocks}
        if len(rest) > 1:
            wanted[rest[1]] = rows * -(-blocks * bits // 8)
        for name, count in wanted.items():
            if name not in at.weights or math.prod(at.weights.shape(name)) != count:
                shape = at.weights.shape(name) if name in at.weights else "no"
                return f"{node.name}: {name} has {shape} numbers where {count} belong", ""
    return "", f"{seen} packed products have the codes, scales and zero points of their widths"


def _settings(at: _At) -> Answer:
    """Ends, padding, context and sampling are the checkpoint's."""
    wanted = build.settled(at.checkpoint)
    wanted["model"]["context_length"] = int(at.config.get("max_position_embeddings") or 0)
    wanted["search"]["max_length"] = wanted["model"]["context_length"]
    for place, values in wanted.items():
        for key, value in values.items():
            if at.genai[place].get(key) != value:
                return (
                    f"genai_config.json says {key} = {at.genai[place].get(key)}, the checkpoint {value}", ""
                )  # fmt: skip
    said = (f"{key} {value}" for values in wanted.values() for key, value in values.items())
    return "", ", ".join(said)


def _papers(at: _At) -> Answer:
    """No licence and no notice got lost."""
    papers = sorted(p for p in at.checkpoint.iterdir() if p.is_file() and build.PAPERS.match(p.name))
    for paper in papers:
        copy = at.out / paper.name
        if not copy.is_file() or copy.read_bytes() != paper.read_bytes():
            return f"{paper.name} of the checkpoint is not in the folder", ""
    return "", ", ".join(p.name for p in papers) or "the checkpoint has no licence file of its own"


def _paths(at: _At) -> Answer:
    """Nothing tells on which machine it was made."""
    for path in sorted(at.out.rglob("*")):
        if not path.is_file() or path.name == graph.DATA or path.name == "tokenizer.json":
            continue
        content = path.read_bytes()
        for place in _places(at):
            if place.encode() in content:
                return f"{path.name} names a folder of this machine: {place}", ""
    return "", "no file names a folder of this machine"


def _places(at: _At) -> Iterator[str]:
    """Folders that must not be named: the checkpoint's and the result's, and the store above them."""
    for path in (at.checkpoint.resolve(), at.out.resolve()):
        yield str(path)
        yield str(path.parent)
    if str(Path.home()) != "/":
        yield f"{Path.home()}/"


_QUESTIONS: tuple[tuple[str, tuple[str, ...], Callable[[_At], Answer]], ...] = (
    ("graph", ("C-32",), _valid),
    ("operators", ("C-32",), _known),
    ("inputs and outputs", ("C-34",), _ports),
    ("rows", ("C-14", "C-15"), _rows),
    ("finite numbers", ("C-35",), _finite),
    ("stored whole", ("C-13",), _whole),
    ("packed shapes", ("C-39",), _packed),
    ("generation settings", ("C-21", "C-22"), _settings),
    ("licence files", (), _papers),
    ("machine paths", (), _paths),
)
