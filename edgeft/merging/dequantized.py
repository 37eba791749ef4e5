"""The base as QLoRA saw it: a checkpoint whose NF4 layers hold the numbers that training computed with.

Merging into it gives the trained model, up to one rounding; merging into the original weights adds
q = W - dequant(NF4(W)), which the adapter never saw (C-11). How large q is beside the adapter's own change is
measured here as well.

Memory: one tensor at a time, about 50 bytes a number on a CPU (bitsandbytes' share), as loading the base takes too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft import progress
from edgeft.errors import StageError
from edgeft.merging import adapter, shards
from edgeft.merging.fold import BLOCK, SHORT, Dtype, copy_rest
from edgeft.merging.shards import Entry

if TYPE_CHECKING:
    import torch

    from edgeft.training.dequantized import Layer
    from edgeft.training.model import ComputeDtype


@dataclass(frozen=True, kw_only=True)
class Noise:
    """||W - dequant(NF4(W))|| / ||adapter's change||, Frobenius norms, over the adapted layers."""

    median: float
    max: float
    worst: str
    """The layer with the largest."""


def write(
    base: Path, out: Path, *, compute_dtype: ComputeDtype, device: str = "auto", dtype: Dtype = "auto"
) -> dict[str, float]:
    """Write the checkpoint `base` to `out` as `load_base(method="qlora")` sees it with this compute dtype and device.

    NF4 layers keep their tensor's dtype, or get `dtype`; all else is copied bit for bit, files included.
    Returns ||W - dequant(NF4(W))||, the Frobenius norm, of each of them by module name.
    Raises StageError when one of them has not exactly one weight in the checkpoint, or the base is quantized.
    """
    import torch

    from edgeft.training.model import pick_device

    entries, metadata = shards.read_checkpoint(base)
    where = pick_device(device)
    held = _held(base, entries, compute_dtype, where)
    plan = {name: e.dtype for name, e in entries.items()}
    if dtype != "auto":
        plan |= dict.fromkeys(held, SHORT[dtype])
    lost: dict[str, float] = {}

    def body(name: str) -> Iterator[bytes]:
        layer = held.get(name)
        if layer is None:
            yield from shards.pieces(entries[name])
            return
        progress.report("dequantize the base", len(lost), len(held), unit="layers")
        values, lost[layer.name] = _dequantized(entries[name], layer, where)
        for block in torch.split(values, _rows(entries[name])):
            yield shards.raw_bytes(block.to(shards.torch_dtype(plan[name])).cpu())

    out.mkdir(parents=True, exist_ok=True)
    for file in sorted({entry.file for entry in entries.values()}):
        mine = {name: (plan[name], e.shape) for name, e in entries.items() if e.file == file}
        shards.write(out / file.name, mine, metadata[file], body)
    copy_rest(base, out, entries, {name: e.dtype for name, e in entries.items()})
    return lost


def losses(
    base: Path, names: Collection[str], *, compute_dtype: ComputeDtype, device: str = "auto"
) -> dict[str, float]:
    """What `write` returns, for the modules `names` alone and without writing anything."""
    from edgeft.training.model import pick_device

    entries, _ = shards.read_checkpoint(base)
    where = pick_device(device)
    held = _held(base, entries, compute_dtype, where, names)
    found: dict[str, float] = {}
    for name, layer in held.items():
        progress.report("measure what NF4 loses", len(found), len(held), unit="layers")
        _, found[layer.name] = _dequantized(entries[name], layer, where)
    return found


def noise(lost: Mapping[str, float], adapter_folder: Path) -> Noise:
    """What `write` or `losses` gave, beside the change that the adapter makes to the same layers.

    The adapter must be one that `merge` accepted: each of its layers changes something.
    """
    from statistics import median

    ratios = {p.module: lost.get(p.module, 0.0) / p.norm for p in adapter.read(adapter_folder)}
    worst = max(ratios, key=lambda name: ratios[name])
    return Noise(median=median(ratios.values()), max=ratios[worst], worst=worst)


def _held(
    base: Path,
    entries: Mapping[str, Entry],
    compute_dtype: ComputeDtype,
    device: str,
    names: Collection[str] = (),
) -> dict[str, Layer]:
    """The NF4 layers, or those among `names`, by the name of their weight in the checkpoint."""
    from edgeft.training import dequantized
    from edgeft.training.model import pick_dtype, skeleton

    shapes, prefix = {name: e.shape for name, e in entries.items()}, skeleton(base).base_model_prefix
    layers = dequantized.layers(base, pick_dtype(compute_dtype, device=device))
    try:
        return {
            adapter.weight_of(layer.name, shapes, prefix): layer
            for layer in layers
            if not names or layer.name in names
        }
    except StageError as e:
        raise StageError(
            f"the base cannot be dequantized: {e}", hint='[merge] base = "original" merges without that'
        ) from e


def _dequantized(entry: Entry, layer: Layer, device: str) -> tuple[torch.Tensor, float]:
    """The layer's numbers, shaped as in the checkpoint, and the norm of what they lost."""
    import torch

    _, weight = next(shards.row_blocks(entry, most=entry.size))
    values = layer.values(weight, device)
    rows = _rows(entry)
    squares = (
        float((was.to(device).float() - now.float()).double().square().sum())
        for was, now in zip(torch.split(weight, rows), torch.split(values, rows), strict=True)
    )
    return values, sum(squares) ** 0.5


def _rows(entry: Entry) -> int:
    return max(1, BLOCK // entry.columns)
