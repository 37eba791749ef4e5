"""Which linear layers of a model get an adapter, found in the module tree and not in a table of architectures.

A layer counts when it is a Linear (or GPT-2's Conv1D) inside a numbered decoder block. Not counted are the output
embedding, the routers and gates of expert layers, whatever belongs to images or sound, and the output projection of
Mamba mixers, whose kernel reads the weight without calling the layer, so that an adapter there would do nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgeft.errors import RecipeError, StageError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"

_OTHER_SENSES = ("vision", "visual", "image", "audio", "speech", "video", "projector", "aligner", "perceiver")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "gate_inp", "wg"})


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The layers that get an adapter."""

    names: tuple[str, ...]
    """Full module names, in the model's own order."""
    blocks: int
    """Decoder blocks that hold at least one of them."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The distinct last parts of the names, in order of appearance: `q_proj`, `k_proj`, ..."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.names))


def resolve(model: nn.Module, wanted: str | Sequence[str] = ALL_LINEAR) -> Targets:
    """The layers of `model` that `wanted` names: `"all-linear"`, or names such as `q_proj` or `self_attn.q_proj`.

    Raises RecipeError for a wanted name that matches nothing, and StageError when the model has no linear layer in
    its decoder blocks or when blocks of one kind differ in theirs.
    """
    found = linear_layers(model)
    if not found:
        raise StageError(
            f"{type(model).__name__} has no linear layer inside numbered decoder blocks, so nothing can be adapted",
            hint="edgeft adapts decoder-only language models",
        )
    if isinstance(wanted, str):
        _check_even(model, found)
        chosen = found
    else:
        chosen = _named(found, wanted)
    if fused := sum(1 for _ in _fused_experts(model)):
        log.warning(
            "%d fused expert tensors are neither quantized nor adapted: only plain linear layers are", fused
        )
    targets = Targets(names=tuple(chosen), blocks=len({_place(name)[:2] for name in chosen}))
    log.info(
        "%d linear layers in %d blocks get an adapter: %s",
        len(targets.names), targets.blocks, ", ".join(targets.leaves),
    )  # fmt: skip
    for name in targets.names:
        log.debug("adapted: %s", name)
    return targets


def linear_layers(model: nn.Module) -> list[str]:
    """Full names of the language model's linear layers inside its decoder blocks, in the model's own order."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if _is_linear(module)
        and module is not head
        and _in_language_block(name)
        and not _bypassed(name, modules)
    ]


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out), as GPT-2's Conv1D does, and not as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) or is_transposed(module)


def _place(name: str) -> tuple[str, int, str]:
    """Split `model.layers.3.mlp.up_proj` into `model.layers`, 3 and `mlp.up_proj`; block -1 when there is none."""
    match = re.match(r"(.+?)\.(\d+)\.(.+)$", name)
    return (match[1], int(match[2]), match[3]) if match else ("", -1, name)


def _in_language_block(name: str) -> bool:
    parts = name.split(".")
    other = any(word in part.lower() for part in parts for word in _OTHER_SENSES)
    router = parts[-1] in _ROUTERS or any("router" in part for part in parts)
    return _place(name)[1] >= 0 and not other and not router


def _bypassed(name: str, modules: Mapping[str, nn.Module]) -> bool:
    above, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and "mamba" in type(modules[above]).__name__.lower()


def _fused_experts(model: nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        if weight.dim() == 3 and "expert" in name and _in_language_block(name):
            yield name


def _named(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    chosen = set()
    for want in wanted:
        hits = [name for name in found if name == want or name.endswith(f".{want}")]
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in found})
            near = get_close_matches(want, known, n=1)
            meant = f"perhaps {near[0]!r}? " if near else ""
            raise RecipeError(
                f"train.target_modules: {want!r} matches no linear layer of this base",
                hint=f"{meant}its decoder blocks have {', '.join(known)}",
            )
        chosen.update(hits)
    return [name for name in found if name in chosen]


def _check_even(model: nn.Module, found: Sequence[str]) -> None:
    """Blocks of one kind must hold the same layers; a block is of another kind when it is built otherwise."""
    blocks: dict[tuple[str, int], set[str]] = {}
    for name in found:
        path, index, rest = _place(name)
        blocks.setdefault((path, index), set()).add(rest)
    for path in dict.fromkeys(path for path, _ in blocks):
        # A block that lost all its layers is in no name; the module list still counts it.
        for number, _ in model.get_submodule(path).named_children():
            blocks.setdefault((path, int(number)), set())
    first: dict[tuple[object, ...], tuple[str, set[str]]] = {}
    for (path, index), layers in sorted(blocks.items()):
        where = f"{path}.{index}"
        other, expected = first.setdefault((path, *_kind(model, path, index)), (where, layers))
        if layers != expected:
            raise StageError(
                f"{where} and {other} are built alike but differ in {', '.join(sorted(layers ^ expected))}",
                hint='name the layers in the recipe: target_modules = ["..."] under [train]',
            )


def _kind(model: nn.Module, path: str, index: int) -> tuple[object, ...]:
    """What tells a sort of block from another: its class, its parts' classes, and its entry in `layer_types`."""
    block = model.get_submodule(f"{path}.{index}")
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    types = getattr(config, "layer_types", None) or []
    parts = tuple((name, type(child).__name__) for name, child in block.named_children())
    return type(block).__name__, parts, types[index] if index < len(types) else ""
