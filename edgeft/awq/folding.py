"""Scaling a layer's inputs without changing the model: divide what makes them, multiply the weights that read them.

Who makes and who reads is not looked up by the model's family but found in the block itself, and proven by numbers: a pair
counts only if scaling through it leaves the block's output as it was. So a norm whose weight is added to one (Gemma), a
norm that something else reads too, or an attention that does more than mix values, is either handled or left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.awq import stream

if TYPE_CHECKING:
    import torch

SAME = 1e-3
"""Of the output's own spread: how far a block may be from itself after scaling, all in float32."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Layers that read one input, and what makes that input, by name inside the block."""

    maker: str
    readers: tuple[str, ...]
    rows: tuple[int, int] | None = None
    """Which rows of the maker's weight make the input, for a linear maker; None for a norm."""
    repeat: tuple[int, int] | None = None
    """(heads, size of a head) of the maker, where each head is read several times (grouped-query attention)."""
    plus_one: bool = False
    """A norm that multiplies by one plus its weight."""


def linears(block: Any) -> dict[str, Any]:
    """The linear layers of a block, by name."""
    import torch

    return {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}


def readers(block: Any, hidden: torch.Tensor, beside: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The block's linear layers, those together that read the very same tensor."""
    order: list[tuple[Any, list[str]]] = []

    def hook(name: str) -> Any:
        def see(_module: Any, args: tuple[Any, ...]) -> None:
            for seen, names in order:
                if seen is args[0]:
                    names.append(name)
                    return
            order.append((args[0], [name]))

        return see

    hooks = [m.register_forward_pre_hook(hook(n)) for n, m in linears(block).items()]
    try:
        stream.run(block, hidden, beside)
    finally:
        for h in hooks:
            h.remove()
    return [tuple(names) for _, names in order]


def pairs(block: Any, hidden: torch.Tensor, beside: Mapping[str, Any]) -> list[Pair]:
    """Every pair of the block that scaling may go through, proven on `hidden` [1, tokens, width]."""
    found = []
    before = stream.run(block, hidden, beside)
    for pair in [*_of_norms(block, hidden, beside), *_of_linears(block)]:
        state = {n: p.data for n, p in block.named_parameters()}
        scales = _trial(width(block, pair)).to(before.device)
        apply(block, pair, scales)
        off = (stream.run(block, hidden, beside) - before).abs().max() / before.std()
        for name, p in block.named_parameters():
            p.data = state[name]
        if float(off) < SAME:
            found.append(pair)
    return found


def width(block: Any, pair: Pair) -> int:
    """How many scales the pair has."""
    maker = block.get_submodule(pair.maker)
    return pair.rows[1] - pair.rows[0] if pair.rows else int(maker.weight.shape[0])


def spread(pair: Pair, scales: torch.Tensor) -> torch.Tensor:
    """The scales of the readers' columns from those of the maker's rows: each head as often as it is read."""
    if not pair.repeat:
        return scales
    heads, times = pair.repeat
    return scales.view(heads, 1, -1).expand(heads, times, -1).reshape(-1)


def gathered(pair: Pair, columns: torch.Tensor) -> torch.Tensor:
    """The reverse, for a measure of the columns: its mean over the times that a head is read."""
    if not pair.repeat:
        return columns
    heads, times = pair.repeat
    return columns.view(heads, times, -1).mean(1).reshape(-1)


def apply(block: Any, pair: Pair, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Divide what the maker makes by `scales`, multiply the readers' columns by them; returns the scales as applied.

    With `dtype` the divided norm is rounded to that format first, and the scales are what really came out: then the
    rounding costs nothing. Parameters are replaced, never written to.
    """
    import torch

    maker = block.get_submodule(pair.maker)
    weight, bias = maker.weight.data, getattr(maker, "bias", None)
    if pair.rows is None:
        whole = weight + 1 if pair.plus_one else weight
        divided = whole / scales
        if dtype is not None:
            stored = (divided - 1 if pair.plus_one else divided).to(dtype).float()
            divided = stored + 1 if pair.plus_one else stored
            usable = (divided != 0) & (whole != 0)
            scales = torch.where(usable, whole / torch.where(usable, divided, 1), 1.0)
            divided = torch.where(usable, divided, whole)
        maker.weight.data = divided - 1 if pair.plus_one else divided
        if bias is not None:
            bias.data = bias.data / scales
    else:
        first, last = pair.rows
        weight = weight.clone()
        weight[first:last] /= scales[:, None]
        maker.weight.data = weight
        if bias is not None:
            bias.data = torch.cat([bias.data[:first], bias.data[first:last] / scales, bias.data[last:]])
    for name in pair.readers:
        layer = block.get_submodule(name)
        layer.weight.data = layer.weight.data * spread(pair, scales)
    return scales


def _trial(n: int) -> torch.Tensor:
    """Scales between a half and two, the same each time."""
    import torch

    return torch.exp2(torch.rand(n, generator=torch.Generator().manual_seed(n)) * 2 - 1)


def _of_norms(block: Any, hidden: torch.Tensor, beside: Mapping[str, Any]) -> list[Pair]:
    """Norms whose output tensor is what linear layers read; both ways in which a norm can use its weight."""
    made: dict[str, Any] = {}
    read: dict[str, Any] = {}
    hooks = []
    for name, module in block.named_modules():
        if name in linears(block):
            hooks.append(
                module.register_forward_pre_hook(lambda _m, args, name=name: read.update({name: args[0]}))
            )
        elif getattr(getattr(module, "weight", None), "ndim", 0) == 1 and not list(module.children()):
            hooks.append(
                module.register_forward_hook(lambda _m, _a, out, name=name: made.update({name: out}))
            )
    try:
        stream.run(block, hidden, beside)
    finally:
        for h in hooks:
            h.remove()
    found = []
    for name, out in made.items():
        names = tuple(n for n, given in read.items() if given is out)
        if names:
            found += [Pair(maker=name, readers=names, plus_one=plus) for plus in (False, True)]
    return found


def _of_linears(block: Any) -> list[Pair]:
    """Values to the output of attention, and the linear half of a gated feed-forward layer to its last layer."""
    known, found = linears(block), []
    for name, layer in known.items():
        where, _, last = name.rpartition(".")
        beside = {n.rpartition(".")[2]: n for n in known if n.rpartition(".")[0] == where}
        rows = int(layer.weight.shape[0])
        if last == "up_proj" and "down_proj" in beside:
            found.append(Pair(maker=name, readers=(beside["down_proj"],), rows=(0, rows)))
        if last == "gate_up_proj" and "down_proj" in beside:
            found.append(Pair(maker=name, readers=(beside["down_proj"],), rows=(rows // 2, rows)))
        if last == "v_proj" and "o_proj" in beside:
            found += _values(block.get_submodule(where), name, beside["o_proj"], (0, rows))
        if last == "qkv_proj" and "o_proj" in beside:
            wide = int(known[beside["o_proj"]].weight.shape[1])
            found += _values(
                block.get_submodule(where), name, beside["o_proj"], (rows - (rows - wide) // 2, rows)
            )
    return found


def _values(attention: Any, maker: str, reader: str, rows: tuple[int, int]) -> list[Pair]:
    size, made = getattr(attention, "head_dim", 0), rows[1] - rows[0]
    wide = int(attention.get_submodule(reader.rpartition(".")[2]).weight.shape[1])
    if not size or made % size or wide % made:
        return []
    return [
        Pair(
            maker=maker,
            readers=(reader,),
            rows=rows,
            repeat=(made // size, wide // made) if wide != made else None,
        )
    ]


def unscaled(groups: Sequence[tuple[str, ...]], found: Sequence[Pair]) -> list[str]:
    """Linear layers whose inputs nothing can scale."""
    scaled = {name for pair in found for name in pair.readers}
    return [name for names in groups for name in names if name not in scaled]
