"""Quantize to an AWQ folder for vLLM, SGLang and transformers, calibrated on training text."""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgeft import estimates
from edgeft.errors import RecipeError, StageError
from edgeft.parity.checks.exact import FLOAT32_BELOW
from edgeft.stage import Artifact, Facts, Job, Needs, Params, Stage, Step, Where

if TYPE_CHECKING:
    from edgeft.awq import Quantized
    from edgeft.parity.checks.check import Check

log = logging.getLogger(__name__)


class QuantizeAwq(Params):
    group: Literal["auto", 128, 64, 32] = "auto"
    """How many weights of a row share a scale. auto: the largest size that divides every row."""
    layout: Literal["compressed-tensors", "gemm"] = "compressed-tensors"
    """How the same numbers lie in the file. compressed-tensors: vLLM, transformers, and SGLang for most widths. gemm: vLLM,
    and SGLang for all widths; transformers needs gptqmodel for it."""
    chunks: int = Field(32, ge=1, le=10_000)
    """Windows of 512 training tokens that scales and roundings are chosen on."""
    own_chunks: int = Field(16, ge=0, le=10_000)
    """As many windows beside them that the base writes by itself: what keeps drift outside the training's subject down."""

    def label(self) -> str:
        size = "" if self.group == "auto" else f"-g{self.group}"
        return f"awq{size}" + ("-gemm" if self.layout == "gemm" else "")


def run(job: Job[QuantizeAwq]) -> Facts:
    from edgeft import awq
    from edgeft.parity import calibration_text
    from edgeft.training.model import pick_device

    p, checkpoint, out, device = (
        job.params,
        job.inputs["merge"].path / "model",
        job.out / "model",
        pick_device(),
    )
    windows, text = calibration_text.mixed(
        job.inputs["data"].path, job.inputs["base"].path / "model", job.out, chunks=p.chunks, own=p.own_chunks, device=device
    )  # fmt: skip
    made = awq.quantize(checkpoint, out, windows, awq.Settings(group=p.group, layout=p.layout, device=device))
    loaders = awq.loaders(made.layout, made.shapes)
    for loader in loaders:
        if not loader.ok:
            log.warning("%s does not load this folder: %s", loader.name, loader.said)
    kinds = {f"4 bit, groups of {made.group}": len(made.shapes), **made.kept}
    counts = ", ".join(f"{name} ×{n}" for name, n in kinds.items())
    return {
        "summary": f"{made.bytes / 1e6:,.1f} MB, {made.bits_per_weight:.2f} bits per weight: {counts}",
        "type": f"AWQ g{made.group}" + (" gemm" if made.layout == "gemm" else ""), "format": "awq",
        "bytes": made.bytes, "bits_per_weight": made.bits_per_weight, "types": kinds,
        "group": made.group, "layout": made.layout, "chunks": len(windows) - p.own_chunks, "own_chunks": p.own_chunks,
        "tokens": sum(map(len, windows)),
        "pairs": made.pairs, "unscaled": list(made.unscaled), "loaders": [loader.facts() for loader in loaders],
        "checks": [c.facts() for c in (text, _scaled(made), _unpacked(out))],
    }  # fmt: skip


def check(step: Step, done: Mapping[str, Artifact]) -> None:
    """Refuse widths that no group divides before the training, as soon as the base is on this machine. Raises RecipeError."""
    from edgeft.awq import groups

    base, p = step.find("base"), step.params
    assert isinstance(p, QuantizeAwq)
    if base is None or base.key not in done:
        return
    shapes = _shapes(done[base.key].path / "model")
    try:
        if experts := next((name for name in shapes if ".experts." in name), None):
            raise StageError(
                f"{experts} belongs to a mixture of experts, for which AWQ is not done here",
                hint=groups.INSTEAD,
            )
        groups.choose(shapes, p.group)
    except StageError as e:
        raise RecipeError(f'[[quantize]] kind = "awq": {e}', hint=e.hint) from None


def estimate(step: Step, done: Mapping[str, Artifact]) -> Needs:
    """Four bits and a half a weight of the layers, 16 bits for the rest; in memory a block in float32 and what its inputs gave,
    or before that the base while it writes."""
    shape = estimates.shape_for(step, done)
    if shape is None:
        return Needs()
    assert isinstance(step.params, QuantizeAwq)
    inside = sum(m.rows * m.columns for m in shape.linears)
    disk = (inside * 4.5 / 8 + (shape.parameters - inside) * 2) / 1e6
    whole = shape.parameters * (4 if shape.parameters < FLOAT32_BELOW else 2) if step.params.own_chunks else 0
    block = inside / max(shape.layers, 1) * 16
    return Needs(disk_mb=round(disk), ram_mb=estimates.PYTHON_MB + round(max(whole, block) / 1e6))


def _scaled(made: Quantized) -> Check:
    from edgeft.awq.quantize import SAME
    from edgeft.parity.checks.check import Check

    if made.scaled_off is None:
        return Check(
            step="quantized", name="scaling", codes=(), ok=None, said="no layer's inputs could be scaled"
        )
    said = (
        f"{made.pairs} scalings folded into norms and layers move no logit by more than {made.scaled_off:.1g} of the logits' "
        f"spread in float32, before anything is rounded (limit {SAME:g})"
    )
    return Check(step="quantized", name="scaling", codes=(), ok=made.scaled_off < SAME, said=said)


def _unpacked(folder: Path) -> Check:
    """Whether the library that defines the layout reads the written bytes as edgeft does."""
    from importlib.util import find_spec

    import torch

    from edgeft.awq import weights
    from edgeft.parity.checks.check import Check

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["quantization_config"]["quant_method"] != "compressed-tensors":
        said, ok = "nothing that edgeft installs reads AWQ's gemm layout", None
    elif find_spec("compressed_tensors") is None:
        said, ok = "compressed-tensors is not installed (pip install 'edgeft[awq]')", None
    else:
        ours = weights.dequantized(folder)
        found = [(name, torch.equal(theirs, ours[name])) for name, theirs in weights.by_library(folder)]
        wrong = [name for name, same in found if not same]
        ok = bool(found) and not wrong
        said = f"compressed-tensors unpacks all {len(found)} layers to the same bits" if ok else (
            f"compressed-tensors unpacks {len(wrong)} of {len(found)} layers otherwise, {wrong[:1]} first"
        )  # fmt: skip
    return Check(step="quantized", name="unpacking", codes=(), ok=ok, said=said)


def _shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices inside numbered blocks, from the headers of safetensors files alone."""
    found: dict[str, tuple[int, int]] = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header: dict[str, Any] = json.loads(f.read(length))
        for name, entry in header.items():
            shape = entry.get("shape", [])
            if len(shape) == 2 and re.search(r"\.\d+\..*\.weight$", name):
                found[name] = (shape[0], shape[1])
    return found


STAGE = Stage(
    name="quantize", kind="awq", params=QuantizeAwq, run=run, needs=("base", "data", "merge"), makes=("model/config.json",),
    extra="train", listed=True, resumable=True, check=check, estimate=estimate, replaces=("quantize/served",),
    when=Where(table="train", key="method", values=("qlora", "lora")),
)  # fmt: skip
