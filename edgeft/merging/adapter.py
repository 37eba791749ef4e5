"""Reads a PEFT adapter and binds each of its tensor pairs to the one weight it belongs to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One layer's adapter: its weight changes by `scale * b @ a`."""

    module: str
    a: torch.Tensor
    """(rank, in), float32."""
    b: torch.Tensor
    """(out, rank), float32."""
    scale: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the change, from rank x rank products: |BA|^2 = trace((B^T B)(A A^T))."""
        a, b = self.a.double(), self.b.double()
        return abs(self.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def read(folder: Path) -> list[Pair]:
    """The pairs of the adapter in `folder`, by module name.

    Raises StageError for an adapter that is not plain LoRA, and for any tensor that is not half of a pair (C-02).
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_unmergeable(config)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = _KEY.fullmatch(key)
        if not match:
            raise StageError(f"adapter tensor {key} is no lora_A or lora_B weight of a layer (C-02)")
        halves.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not halves:
        raise StageError("the adapter holds no tensor at all")
    return [_pair(module, sides, config) for module, sides in sorted(halves.items())]


def bind(
    pairs: Collection[Pair], shapes: Mapping[str, tuple[int, ...]], model: Any, transposed: Collection[str]
) -> dict[str, Pair]:
    """Each pair under the name of its weight in the checkpoint.

    `shapes` are the checkpoint's tensors; `model` a skeleton of it, which says how its names may differ from the
    module names (a checkpoint saved without the language-model head has no `transformer.` in front); `transposed` the
    modules whose weight is stored as (in, out). Raises StageError unless every pair has exactly one weight, of its
    own shape, and no weight has two pairs (C-02).
    """
    bound: dict[str, Pair] = {}
    for pair in pairs:
        weight = weight_of(pair.module, shapes, model.base_model_prefix)
        if weight in bound:
            raise StageError(
                f"adapter layers {bound[weight].module} and {pair.module} both belong to {weight} (C-02)"
            )
        wanted = (pair.b.shape[0], pair.a.shape[1])
        stored = tuple(reversed(wanted)) if pair.module in transposed else wanted
        if shapes[weight] != stored:
            raise StageError(
                f"the adapter of {pair.module} is for a weight of {stored}, {weight} has {shapes[weight]}"
            )
        bound[weight] = pair
    return bound


def weight_of(module: str, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> str:
    """The one tensor of the checkpoint that is the weight of `module`. Raises StageError for none or several (C-02).

    `prefix` is what a checkpoint saved without the language-model head lacks in front: `transformer`, `model`.
    """
    names = {f"{module}.weight", f"{module.removeprefix(prefix + '.')}.weight", f"{prefix}.{module}.weight"}
    hits = sorted(names & shapes.keys())
    if len(hits) != 1:
        found = f"{len(hits)} weights ({', '.join(hits)})" if hits else "no weight"
        raise StageError(
            f"adapter layer {module} matches {found} of the base (C-02)",
            hint="the adapter was made for another model, its names carry another prefix, or transformers renames this "
            "family's tensors while loading, which the merge does not follow",
        )
    return hits[0]


def _pair(module: str, sides: dict[str, torch.Tensor], config: dict[str, Any]) -> Pair:
    if missing := {"A", "B"} - sides.keys():
        raise StageError(f"the adapter has no lora_{missing.pop()} for {module} (C-02)")
    a, b = sides["A"], sides["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise StageError(
            f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {module} do not fit each other"
        )
    rank = _patterned(config.get("rank_pattern"), module, config["r"])
    if rank != a.shape[0]:
        raise StageError(f"adapter_config.json gives {module} rank {rank}, its tensors have {a.shape[0]}")
    alpha = float(_patterned(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return Pair(module=module, a=a, b=b, scale=alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _patterned(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """A module's own value: the first pattern that is the end of its name, as PEFT matches them."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise


def _refuse_unmergeable(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise StageError(f"the adapter is of type {config.get('peft_type')}; LORA can be merged")
    for name in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias"):
        if config.get(name):
            raise StageError(f"the adapter was made with {name} = {config[name]}, which is not merged here")
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise StageError(
            f"the adapter started from {start}, which changes the base's weights first",
            hint="merging it into the untouched base would count its first values twice",
        )
