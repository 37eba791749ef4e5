"""A 16-bit checkpoint to an AWQ folder, one decoder block after the other.

For each block, on what the quantized blocks before it give: find the pairs that scaling may go through, search scales and
ranges on the calibration text, round, write the block down. Each block's file is a place to go on from after a crash.

Memory: one block in float32, H of its widest input (in x in), and the calibration text's activations in main memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft import progress
from edgeft.awq import folding, groups, layouts, rounding, scaling, stream, writing
from edgeft.awq.layouts import Codes
from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

SAME = 1e-3
"""Of the logits' own spread: how far the scaled model, not yet rounded, may be from the checkpoint in float32."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to quantize; the defaults are what docs/awq.md measured as best."""

    group: int | Literal["auto"] = "auto"
    layout: str = "compressed-tensors"
    device: str = "cpu"
    """Where blocks are computed: cpu, or cuda:0."""
    method: Literal["full", "awq", "nearest"] = "full"
    """nearest: no calibration text is used. awq: scales and clipped ranges. full: each column's error is then made good by
    the columns after it (GPTQ). The first two are there to be compared with."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What was made, for people and for the certificate."""

    group: int
    layout: str
    pairs: int
    """Pairs of layers that a scaling goes through."""
    unscaled: tuple[str, ...]
    """Linear layers that are 4 bit, but whose inputs nothing can scale."""
    parameters: int
    """Of the whole model, a tied head counted once."""
    weight_bytes: int
    """Of the weight files."""
    bytes: int
    """Of all files in the folder."""
    kept: Mapping[str, int]
    """How many tensors stay as they are, by format."""
    scaled_off: float | None
    """Largest change of a logit by scaling alone, in units of the logits' standard deviation; None: nothing was scaled."""
    shapes: Mapping[str, tuple[int, int]]
    """[out, in] of the 4-bit layers."""

    @property
    def bits_per_weight(self) -> float:
        """All weight files' bits, scales and the 16-bit embedding included, over all parameters."""
        return 8 * self.weight_bytes / self.parameters


def quantize(checkpoint: Path, out: Path, windows: Sequence[Sequence[int]], settings: Settings) -> Quantized:
    """Write the checkpoint as an AWQ folder to `out`, calibrated on `windows` of token ids, all of one length.

    `out` may hold the blocks of a run that was interrupted; they are taken as they are. Raises StageError for what cannot be
    quantized, and when scaling alone changed the model.
    """
    import torch

    layout, found, device = layouts.of(settings.layout), stream.Checkpoint(checkpoint), settings.device
    shapes = _shapes(found)
    group = groups.choose(shapes, settings.group)
    work = _Work(group=group, settings=settings, dtypes=_dtypes(found))
    parts = out / "blocks"
    parts.mkdir(parents=True, exist_ok=True)
    pairs = 0
    unscaled: list[str] = []
    with torch.inference_mode():
        hidden, beside = found.inputs(windows, device)
        proof = [hidden[0], hidden[0]]
        for number in range(len(found.blocks)):
            progress.report("quantize", number, len(found.blocks), unit="blocks")
            name, block = found.block(number, device)
            around = _to(beside[number], device)
            part = parts / f"{number:04}.safetensors"
            if not part.is_file():
                codes, record, proof = _block(name, block, hidden, around, work, proof)
                writing.write_part(part, name, block, codes, layout, work.dtypes, record, proof)
            record, proof = writing.read_part(part, name, block, layout)
            pairs += record["pairs"]
            unscaled += [f"{name}.{n}" for n in record["unscaled"]]
            hidden = [stream.run(block, h.to(device), around).cpu() for h in hidden]
            found.release(number)
        off = _off(found, proof, device) if pairs else None
    writing.assemble(found, parts, out, layout.config(group, _linears_outside(found)))
    return Quantized(
        group=group, layout=layout.name, shapes=shapes, pairs=pairs, unscaled=tuple(unscaled), scaled_off=off,
        parameters=_parameters(found), kept=_kept(found),
        weight_bytes=sum(f.stat().st_size for f in out.glob("*.safetensors")),
        bytes=sum(f.stat().st_size for f in out.iterdir()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Work:
    group: int
    settings: Settings
    dtypes: Mapping[str, torch.dtype]
    """Of every tensor of the checkpoint: what is not quantized keeps its format."""


def _block(
    name: str, block: Any, hidden: Sequence[torch.Tensor], beside: Mapping[str, Any], work: _Work,
    proof: Sequence[torch.Tensor],
) -> tuple[dict[str, Codes], dict[str, Any], list[torch.Tensor]]:  # fmt: skip
    """Scale a block and round its linear layers; returns their codes, what was found, and `proof` one block on: what comes
    out of the blocks as in the checkpoint, and as scaled."""
    import torch

    device, group = next(block.parameters()).device, work.group
    names = list(folding.linears(block))
    dtypes = {
        n: torch.bfloat16 if work.dtypes[f"{name}.{n}.weight"] == torch.bfloat16 else torch.float16
        for n in names
    }
    weight = {n: block.get_submodule(n).weight for n in names}
    if work.settings.method == "nearest":
        codes = {n: rounding.nearest(weight[n].data, group, dtypes[n]) for n in names}
        return codes, {"pairs": 0, "unscaled": []}, list(proof)
    first = hidden[0].to(device)
    together = folding.readers(block, first, beside)
    if missing := set(names) - {n for found in together for n in found}:
        raise StageError(
            f"{name}.{min(missing)} was not used on the calibration text, so nothing is known of its inputs",
            hint=groups.INSTEAD,
        )
    pairs = folding.pairs(block, first, beside)
    plain = stream.run(block, proof[0].to(device), beside).cpu()
    seen = scaling.observe(block, together, hidden, beside)
    for pair in pairs:
        scales = scaling.search(block, pair, seen, group, dtypes[pair.readers[0]])
        scales = folding.apply(block, pair, scales, work.dtypes[f"{name}.{pair.maker}.weight"])
        scaling.rescale(seen, pair, scales)
    scaled = stream.run(block, proof[1].to(device), beside).cpu()
    to_codes = rounding.compensated if work.settings.method == "full" else rounding.with_clipping
    codes = {n: to_codes(weight[n].data, seen[n].products, group, dtypes[n]) for n in names}
    return codes, {"pairs": len(pairs), "unscaled": folding.unscaled(together, pairs)}, [plain, scaled]


def _off(found: stream.Checkpoint, proof: Sequence[torch.Tensor], device: str) -> float:
    """How far the scaled model's logits are from the checkpoint's, over their standard deviation. Raises StageError."""
    plain, scaled = (found.head(h, device) for h in proof)
    off = float((plain - scaled).abs().max() / plain.std())
    if not off < SAME:
        raise StageError(
            f"scaling alone changed the model: its logits moved by {off:.2g} of their spread, at most {SAME:g} is rounding",
            hint='take [[quantize]] kind = "gguf", and please report this model',
        )
    return off


def _shapes(found: stream.Checkpoint) -> dict[str, tuple[int, int]]:
    """[out, in] of all linear layers in the blocks. Raises StageError for blocks that are not made of such."""
    shapes: dict[str, tuple[int, int]] = {}
    for number, block in enumerate(found.blocks):
        mine = {id(m.weight) for m in folding.linears(block).values()}
        for name, p in block.named_parameters():
            if p.ndim > 1 and id(p) not in mine:
                raise StageError(
                    f"{found.prefix}.{number}.{name} {tuple(p.shape)} is no linear layer's weight (experts of a mixture, a "
                    "convolution): AWQ is not done here for such models",
                    hint=groups.INSTEAD,
                )
        shapes |= {
            f"{found.prefix}.{number}.{n}": (int(m.weight.shape[0]), int(m.weight.shape[1]))
            for n, m in folding.linears(block).items()
        }
    if not shapes:
        raise StageError("the model's blocks have no linear layers")
    return shapes


def _linears_outside(found: stream.Checkpoint) -> list[str]:
    """Linear layers that stay 16 bit: the head."""
    import torch

    return [
        name for name, m in found.model.named_modules()
        if isinstance(m, torch.nn.Linear) and not name.startswith(f"{found.prefix}.")
    ]  # fmt: skip


def _dtypes(found: stream.Checkpoint) -> dict[str, torch.dtype]:
    import torch

    formats = {"F16": torch.float16, "BF16": torch.bfloat16}
    return {name: formats.get(entry.dtype, torch.float32) for name, entry in found.entries.items()}


def _kept(found: stream.Checkpoint) -> dict[str, int]:
    quantized = {
        f"{found.prefix}.{i}.{n}.weight" for i, b in enumerate(found.blocks) for n in folding.linears(b)
    }
    kinds: dict[str, int] = {}
    for name, entry in found.entries.items():
        if name not in quantized:
            kinds[entry.dtype] = kinds.get(entry.dtype, 0) + 1
    return kinds


def _parameters(found: stream.Checkpoint) -> int:
    import math

    names = {n for n in found.entries if not (found.tied and n == f"{found.head_name}.weight")}
    return sum(math.prod(found.entries[n].shape) for n in names)


def _to(value: Any, device: str) -> Any:
    """The same with every tensor in it on `device`."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(v, device) for v in value)
    return value
