"""What each step of a build will take, from the shape of its base: the `estimate` hooks of the stages.

A base that is not on this machine yet has no known shape; then nothing is predicted, and the prediction is made again
as soon as the base step is done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from edgeft.checkpoint.truncate import WHOLE_BELOW
from edgeft.fit import training as sizes
from edgeft.fit.base_shape import base_shape
from edgeft.fit.quant import Placed, place
from edgeft.fit.shape import ModelShape, shape_of
from edgeft.parity.checks.exact import FLOAT32_BELOW
from edgeft.resources import cache as cache_folder
from edgeft.stage import Artifact, Needs, Params, Step

Artifacts = Mapping[str, Artifact]

_KNOWN: dict[str, ModelShape] = {}
"""Shapes found so far, by key of the base step: reading a header once is enough."""

PYTHON_MB = 900
"""An interpreter with torch and transformers loaded (measured 2026-11, CPU build of torch 2.13)."""


def shape_for(step: Step, artifacts: Artifacts) -> ModelShape | None:
    """The shape of the base that a step stands on, or None when nothing of it is on this machine yet."""
    base = step.find("base")
    if base is None:
        return None
    made = artifacts.get(base.key)
    known = _KNOWN.get(base.key)
    if known is None:
        known = base_shape(base.params, made.path if made else None)
        if known is None and (config := glimpse(base)) and config.is_dir():
            known = shape_of(config)
        if known:
            _KNOWN[base.key] = known
    return known


def glimpse(base: Step) -> Path | None:
    """Where a hub base's config.json is kept before its weights are downloaded; None for any other base."""
    repo, revision = getattr(base.params, "repo", ""), getattr(base.params, "revision", "")
    return cache_folder() / "hub" / f"{repo.replace('/', '--')}@{revision}" if repo else None


def base(step: Step, artifacts: Artifacts) -> Needs:
    """A 16-bit checkpoint; a GGUF is dequantized in float32 first."""
    shape = shape_for(step, artifacts)
    if shape is None:
        return Needs()
    checkpoint = sizes.checkpoint_mb(shape)
    return Needs(
        disk_mb=checkpoint, ram_mb=PYTHON_MB + 3 * checkpoint if _is_gguf(step.params) else PYTHON_MB
    )


def preflight(step: Step, artifacts: Artifacts) -> Needs:
    """The base, or its first layers, in float32: once as a checkpoint in memory, once as a file for a while."""
    shape, p = shape_for(step, artifacts), step.params
    if shape is None:
        return Needs()
    kept = shape.parameters
    if kept > WHOLE_BELOW:
        kept -= round(shape.linear_parameters * (1 - min(1, p.layers / shape.layers)))  # type: ignore[attr-defined]
    return Needs(disk_mb=4 * kept // 10**6, ram_mb=PYTHON_MB + 8 * kept // 10**6)


def train(step: Step, artifacts: Artifacts) -> Needs:
    """The adapter with its checkpoints; memory for one step on the GPU, or on the CPU without one.

    Rows are taken to be as long as the longest one once the data is there, as long as the recipe allows before;
    answers, for which alone logits are computed, as half of that. On a CPU the packed weights are held dequantized.
    """
    return _training(step, step.params, artifacts)


def tune(step: Step, artifacts: Artifacts) -> Needs:
    """As the training before it in 16 bits, with the file's blocks beside the weights, and a second file."""
    train, shape, quantize = step.find("train"), shape_for(step, artifacts), step.find("quantize/gguf")
    if train is None or shape is None or quantize is None:
        return Needs()
    wider = train.params.model_copy(update={"rank": step.params.rank})  # type: ignore[attr-defined]
    need = _training(step, wider, artifacts)
    file = sizes.gguf_mb(shape, quantize.params.type)  # type: ignore[attr-defined]
    disk = need.disk_mb + file
    if need.vram_mb:
        return Needs(disk_mb=disk, ram_mb=need.ram_mb, vram_mb=need.vram_mb + file)
    return Needs(disk_mb=disk, ram_mb=need.ram_mb + file)


def _training(step: Step, p: Params, artifacts: Artifacts) -> Needs:
    """What training with the parameters `p` of a `[train]` table takes."""
    shape, data, grid = shape_for(step, artifacts), step.find("data"), step.find("quantize/grid")
    if shape is None or data is None:
        return Needs()
    made = artifacts.get(data.key)
    tokens = int(made.facts["max_length"]) if made else int(data.params.max_tokens)  # type: ignore[attr-defined]
    cuda = _has_gpu()
    wanted = p.gradient_checkpointing  # type: ignore[attr-defined]
    packed = sizes.packed_bytes(shape, grid.params.type) if cuda and grid else None  # type: ignore[attr-defined]
    need = sizes.training(
        shape, method="qlora" if cuda and p.method == "qlora" else "lora", rank=p.rank, batch=p.batch_size, tokens=tokens,  # type: ignore[attr-defined]
        logit_tokens=-(-tokens // 2), packed=packed,
        device="cuda" if cuda else "cpu", weight_bytes=2 if cuda else 4, optimizer_bits=8 if cuda else 32,
        checkpointing=(cuda or shape.parameters >= 10**9) if wanted == "auto" else bool(wanted),
    )  # fmt: skip
    disk = sizes.training_mb(shape, p.rank, optimizer_bits=8 if cuda else 32)  # type: ignore[attr-defined]
    if cuda:
        return Needs(disk_mb=disk, ram_mb=sizes.host_ram_mb(shape), vram_mb=need.total)
    return Needs(disk_mb=disk, ram_mb=need.total)


def merge(step: Step, artifacts: Artifacts) -> Needs:
    """A second 16-bit checkpoint, written shard by shard, and loaded to be measured.

    Where QLoRA's merge has a choice, the dequantized base and the merge that is not taken are there for a while as
    well. Dequantizing takes 50 bytes a number of the largest matrix on a CPU.
    """
    shape, train, p = shape_for(step, artifacts), step.find("train"), step.params
    if shape is None or train is None:
        return Needs()
    base = p.base if train.params.method == "qlora" else "original"  # type: ignore[attr-defined]
    disk = {"original": 1, "dequantized": 2, "auto": 3}[base] * sizes.checkpoint_mb(shape)
    loaded = shape.parameters * (4 if shape.parameters < FLOAT32_BELOW else 2) // 10**6
    if _has_gpu():
        return Needs(disk_mb=disk, ram_mb=sizes.host_ram_mb(shape), vram_mb=loaded + sizes.RUNTIME_MB["cuda"])
    largest = 50 * max((m.rows * m.columns for m in shape.linears), default=0) // 10**6
    return Needs(disk_mb=disk, ram_mb=PYTHON_MB + max(loaded, largest))


def gguf(step: Step, artifacts: Artifacts) -> Needs:
    """A 16-bit GGUF file; in memory the checkpoint that it is compared with, in float32 unless it is large.

    llama.cpp maps the file, so that it needs no memory of its own.
    """
    shape = shape_for(step, artifacts)
    if shape is None:
        return Needs()
    size = sizes.gguf_mb(shape, "F16")
    return Needs(disk_mb=size, ram_mb=PYTHON_MB + (2 * size if shape.parameters < FLOAT32_BELOW else size))


def quantized(step: Step, artifacts: Artifacts) -> Needs:
    """A file of the type the step names. The 16-bit file is mapped and read once, tensor by tensor."""
    shape = shape_for(step, artifacts)
    if shape is None:
        return Needs()
    size = sizes.gguf_mb(shape, step.params.type)  # type: ignore[attr-defined]
    return Needs(disk_mb=size, ram_mb=PYTHON_MB)


def reference(step: Step, artifacts: Artifacts) -> Needs:
    """Log-probabilities of every scored token, 16 bits each."""
    shape, p = shape_for(step, artifacts), step.params
    if shape is None:
        return Needs()
    disk = sizes.reference_mb(shape, windows=p.windows + p.general_windows, context=p.n_ctx)  # type: ignore[attr-defined]
    return Needs(disk_mb=disk, ram_mb=0 if _has_gpu() else PYTHON_MB + 2 * sizes.checkpoint_mb(shape))


def packed(step: Step, artifacts: Artifacts) -> Needs:
    """The adapter as a 16-bit GGUF file; the base beside it is a second name of a file that is there."""
    return Needs(disk_mb=round(adapter_gguf_mb(step, artifacts) + 1), ram_mb=PYTHON_MB)


def adapter_gguf_mb(step: Step, artifacts: Artifacts) -> float:
    """The adapter that is loaded beside the file, 16 bits a number; 0 where it is merged, and where nothing is known."""
    shape, train = shape_for(step, artifacts), step.find("train")
    if shape is None or train is None or getattr(train.params, "method", "") != "grid-adapter":
        return 0.0
    return 2 * sizes.adapter_parameters(shape, train.params.rank) / 1e6  # type: ignore[attr-defined]


def placed(shape: ModelShape, label: str) -> list[Placed]:
    """The linear maps of the layers with the types that a file of this label gives them."""
    return [p for p in place(shape, label, imatrix=True) if p.matrix in shape.linears]


def bundle(step: Step, artifacts: Artifacts) -> Needs:
    """The packed file."""
    shape, source = shape_for(step, artifacts), step.find("quantize/gguf")
    if shape is None or source is None:
        return Needs()
    size = sizes.bundle_mb(shape, source.params.type)  # type: ignore[attr-defined]
    return Needs(disk_mb=size + round(adapter_gguf_mb(step, artifacts)))


def _is_gguf(params: Params) -> bool:
    path = getattr(params, "path", None)
    return bool(getattr(params, "package", "")) or (path is not None and Path(path).suffix == ".gguf")


@cache
def _has_gpu() -> bool:
    """Whether training will run on an NVIDIA GPU, without importing torch: its driver's device file is there."""
    wanted = os.environ.get("EDGEFT_DEVICE", "")
    return wanted == "cuda" or (wanted != "cpu" and Path("/dev/nvidia0").exists())
