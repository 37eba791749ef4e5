"""How much each input channel is scaled before rounding: the search at the heart of AWQ (arXiv 2306.00978, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.awq import folding, rounding, stream
from edgeft.awq.folding import Pair

if TYPE_CHECKING:
    import torch

STEPS = 20
"""Powers that are tried, from 0 to 1, in both ways: 41 candidates with no scaling at all."""
ROWS = 512
"""Of a layer's rows the error is summed over so many, evenly chosen: it is a mean over rows that are alike."""


@dataclass(kw_only=True)
class Seen:
    """What came into a layer on the calibration text."""

    products: torch.Tensor
    """H [in, in]: sum of x x^T."""
    size: torch.Tensor
    """Mean |x| [in]."""


def observe(
    block: Any, together: Sequence[tuple[str, ...]], hidden: Sequence[torch.Tensor], beside: Mapping[str, Any]
) -> dict[str, Seen]:
    """What every linear layer of the block gets, by name; layers of one input share one entry."""
    import torch

    tokens = sum(h.shape[1] for h in hidden)
    found: dict[str, Seen] = {}

    def hook(name: str) -> Any:
        def see(_module: Any, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, -2)
            found[name].products.addmm_(x.T, x)
            found[name].size += x.abs().sum(0) / tokens

        return see

    hooks, device = [], next(block.parameters()).device
    for names in together:
        layer = block.get_submodule(names[0])
        n = layer.weight.shape[1]
        entry = Seen(products=torch.zeros(n, n, device=device), size=torch.zeros(n, device=device))
        found |= dict.fromkeys(names, entry)
        hooks.append(layer.register_forward_pre_hook(hook(names[0])))
    try:
        for h in hidden:
            stream.run(block, h.to(device), beside)
    finally:
        for one in hooks:
            one.remove()
    return found


def search(block: Any, pair: Pair, seen: Mapping[str, Seen], group: int, dtype: torch.dtype) -> torch.Tensor:
    """The scales of a pair's maker with which rounding its readers errs least.

    Tried are mean |x| to a power from 0 to 1, with and without the weights' own size to the rest of it, as AWQ's authors do;
    the error is that of the readers' outputs on the whole calibration text.
    """
    import torch

    whole = [block.get_submodule(n).weight.data for n in pair.readers]
    layers = [w[torch.linspace(0, len(w) - 1, min(ROWS, len(w))).long()] for w in whole]
    of = seen[pair.readers[0]]
    x = folding.gathered(pair, of.size)
    parts = torch.cat(whole).abs().reshape(-1, of.size.shape[0] // group, group)
    w = folding.gathered(pair, (parts / (parts.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0))
    least, kept = float("inf"), torch.ones_like(x)
    for scales in _candidates(x, w):
        wide = folding.spread(pair, scales)
        found = 0.0
        for weight, all_rows in zip(layers, whole, strict=True):
            codes = rounding.nearest(weight * wide, group, dtype)
            lost = rounding.error(codes.weight().float() / wide - weight, of.products)
            found += lost * len(all_rows) / len(weight)
        if found < least:
            least, kept = found, scales
    return kept


def _candidates(x: torch.Tensor, w: torch.Tensor) -> Iterator[torch.Tensor]:
    yield x.new_ones(x.shape)
    for step in range(STEPS):
        ratio = step / (STEPS - 1)
        for scales in (x.pow(ratio), x.pow(ratio) / (w.pow(1 - ratio) + 1e-4)):
            scales = scales.clamp(min=1e-4)
            scales = scales / (scales.max() * scales.min()).sqrt()
            if bool(scales.isfinite().all()):
                yield scales


def rescale(seen: Mapping[str, Seen], pair: Pair, scales: torch.Tensor) -> None:
    """Change what was seen to what the scaled readers get."""
    wide = folding.spread(pair, scales)
    of = seen[pair.readers[0]]
    of.products /= wide[:, None] * wide[None]
    of.size /= wide
