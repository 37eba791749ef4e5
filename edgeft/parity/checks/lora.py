"""A PEFT LoRA adapter as its published format says, for checks: which weight changes by how much.

Written apart from edgeft's merge on purpose (edgeft/merging/adapter.py): what checks the merge must not share its
mistakes. The format: `adapter_config.json` and `base_model.model.<module>.lora_A.weight` (rank, in), `.lora_B.weight`
(out, rank); `rank_pattern` and `alpha_pattern` match ends of module names (peft/utils/other.py, `get_pattern_key`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.parity.checks.tensors import Stored

if TYPE_CHECKING:
    import torch

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


class UnknownAdapter(Exception):
    """The adapter does more than add B A, so what the merge should be is not known here."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer's adapter: its weight changes by `scale * b @ a`."""

    module: str
    a: torch.Tensor
    """(rank, in), float32."""
    b: torch.Tensor
    """(out, rank), float32."""
    rank: int
    alpha: float
    rslora: bool
    transposed: bool
    """The weight is stored as (in, out), as GPT-2's Conv1D does. Until `bind`: what the config says."""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def read(folder: Path) -> list[Change]:
    """The adapter's layers. Raises UnknownAdapter when it is not plain LoRA, or its files do not fit each other."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _refuse_more_than_lora(config)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if not (match := _KEY.fullmatch(key)):
            raise UnknownAdapter(f"the adapter holds {key}, which is no lora_A or lora_B weight of a layer")
        halves.setdefault(match[1], {})[match[2]] = tensor.float()
    if lone := [module for module, sides in halves.items() if len(sides) < 2]:
        raise UnknownAdapter(f"the adapter has one half only for {lone[0]}")
    return [
        Change(
            module=module, a=sides["A"], b=sides["B"], rank=_own(config.get("rank_pattern"), module, config["r"]),
            alpha=float(_own(config.get("alpha_pattern"), module, config["lora_alpha"])),
            rslora=bool(config.get("use_rslora")), transposed=bool(config.get("fan_in_fan_out")),
        )
        for module, sides in sorted(halves.items())
    ]  # fmt: skip


def bind(changes: Iterable[Change], tensors: Mapping[str, Stored]) -> tuple[dict[str, Change], list[str]]:
    """Each change under the name of its weight in the checkpoint, and a sentence for each that has not exactly one.

    A checkpoint saved without its language-model head lacks the first part of the names (`transformer.`), or has one
    more than the module. Which way round a square weight lies follows the config; any other shows it by its shape.
    """
    bound: dict[str, Change] = {}
    problems: list[str] = []
    longer = {name.partition(".")[2]: name for name in tensors if "." in name}
    for change in changes:
        wanted = f"{change.module}.weight"
        names = {wanted, wanted.partition(".")[2], longer.get(wanted, "")} & tensors.keys()
        shape = (change.b.shape[0], change.a.shape[1])
        if len(names) != 1:
            problems.append(f"adapter layer {change.module} has {len(names) or 'no'} weights in the base")
        elif (name := names.pop()) in bound:
            problems.append(f"adapter layers {bound[name].module} and {change.module} both belong to {name}")
        elif tensors[name].shape not in (shape, shape[::-1]) or change.rank != change.a.shape[0]:
            problems.append(
                f"the adapter of {change.module} has rank {change.a.shape[0]} and is for a weight of {shape}; "
                f"its config says rank {change.rank}, the base's weight is {tensors[name].shape}"
            )
        else:
            square = shape[0] == shape[1]
            turned = change.transposed if square else tensors[name].shape != shape
            bound[name] = replace(change, transposed=turned)
    return bound, problems


def _own(pattern: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """A module's own value: the first pattern that is the end of its name."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", module)), otherwise)


def _refuse_more_than_lora(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnknownAdapter(f"the adapter is of type {config.get('peft_type')}, not LORA")
    for name in ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "lora_bias"):
        if config.get(name):
            raise UnknownAdapter(
                f"the adapter was made with {name} = {config[name]}, which changes more than B A"
            )
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise UnknownAdapter(f"the adapter started from {start}, which changes the base's weights first")
