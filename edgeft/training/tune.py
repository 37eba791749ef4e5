"""Trains on through the rounding of a quantized file, and writes that file with the codes it ended with."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import StageError
from edgeft.training import loop
from edgeft.training.model import ComputeDtype, pick_dtype
from edgeft.training.modules import resolve
from edgeft.training.rows import Row
from edgeft.training.settings import Outcome, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What is trained. Documented where a recipe sets it: `edgeft.stages.tune.Tune`."""

    rank: int
    alpha: float
    rslora: bool
    learn_scales: bool


def tune(
    *,
    checkpoint: Path,
    plain: Path,
    file: Path,
    rows: Sequence[Row],
    heldout: Sequence[Row],
    settings: Settings,
    options: TuneOptions,
    device: str,
    compute_dtype: ComputeDtype,
    end_of_turn: int,
    out: Path,
) -> Outcome:
    """Train the layers of decoder blocks through the rounding of `file`'s blocks; write `out/model.gguf` and `out/curve.jsonl`.

    `checkpoint` holds the weights before quantization, `plain` is its 16-bit GGUF and `file` what the quantizer made of
    it. The result is `file` with other codes and, with `learn_scales`, other float16 numbers in the blocks of those layers:
    same size, same types. Layers whose type cannot be rounded weight by weight stay as they are. Continues an interrupted
    run from its last checkpoint under `out`.

    Raises StageError when no layer can be trained, when training breaks, and when the file would not hold the very weights
    that were trained last.
    """
    import torch

    from edgeft.grid import formats, model, placement, rounded

    done = out / "outcome.json"
    if done.is_file() and (out / "model.gguf").is_file():
        return Outcome(**json.loads(done.read_text(encoding="utf-8")))
    known = placement.placement(checkpoint, plain)
    dtype = pick_dtype(compute_dtype, device=device)
    bare = model.load(
        checkpoint, file, plain, device=device, placement=known, hold=False,
        compute_dtype="bfloat16" if dtype is torch.bfloat16 else "float32",
    )  # fmt: skip
    layers = resolve(bare).names
    able = [n for n in layers if formats.of(bare.get_submodule(n).kind).rounding is not None]
    if not able:
        kinds = sorted({bare.get_submodule(n).kind for n in layers})
        raise StageError(
            f"no layer of {file.name} can be trained through its rounding: they are {', '.join(kinds)}"
        )
    if left := len(layers) - len(able):
        log.warning(
            "%d of %d layers stay as they were quantized: their types have no levels to round to",
            left,
            len(layers),
        )
    latents = dict(zip(able, model.matrices(plain, able, known, _stored(plain)), strict=True))
    tuned = rounded.attach(
        bare, latents, rank=options.rank, alpha=options.alpha, rslora=options.rslora,
        learn_scales=options.learn_scales, seed=settings.seed,
    )  # fmt: skip
    log.info("%d layers learn through their rounding, %d rows", len(able), len(rows))
    outcome = loop.train(tuned, rows, heldout, settings=settings, end_of_turn=end_of_turn, out=out)
    _take_best(tuned, out / "adapter")
    model.write_rows(file, out / "model.gguf", rounded.packed(tuned), known)
    _write(done, asdict(outcome))
    # What was learnt is in the file; apart from these latents the adapter means nothing.
    shutil.rmtree(out / "adapter")
    return outcome


def _stored(plain: Path) -> Any:
    """The type in which the 16-bit file holds matrices."""
    import torch

    from edgeft.llamacpp import header

    kinds = {t.type for t in header.read(plain).tensors if len(t.shape) > 1}
    for kind, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16)):
        if kind in kinds:
            return dtype
    return torch.float16


def _take_best(tuned: Any, adapter: Path) -> None:
    """Put the kept weights back, and see that each found its place."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    missed = set_peft_model_state_dict(tuned, weights).unexpected_keys
    if missed:
        raise StageError(f"the trained {missed[0]} belongs to no layer")


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
