"""The weights of an AWQ folder, as numbers again: by the code here, and by the library that defines the layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.awq import layouts
from edgeft.awq.layouts import Codes

if TYPE_CHECKING:
    import torch


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor | Codes]]:
    """Every parameter under its name in the 16-bit checkpoint: as it is stored, or as codes with zero points and scales.

    One tensor at a time is in memory. Raises StageError for a folder in neither of the layouts.
    """
    from safetensors import safe_open

    layout = layouts.of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    marker, *others = layout.suffixes
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                layer, _, last = name.rpartition(".")
                if last == marker:
                    packed = {suffix: f.get_tensor(f"{layer}.{suffix}") for suffix in layout.suffixes}
                    yield f"{layer}.weight", layout.unpack(packed)
                elif last not in others:
                    yield name, f.get_tensor(name)


def stored(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name, value in float32 and, where it is quantized, the step between its levels [out, in / group], of each parameter."""
    for name, found in tensors(folder):
        if isinstance(found, Codes):
            yield name, found.weight().float(), found.scales.float()
        else:
            yield name, found.float(), None


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """All parameters in their own 16-bit format: the state that transformers loads."""
    return {name: x.weight() if isinstance(x, Codes) else x for name, x in tensors(folder)}


def by_library(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The quantized weights as compressed-tensors itself unpacks them, in the scales' format; nothing for another layout.

    Raises ImportError where the library is not installed.
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layout = layouts.of_config(config)
    if layout.name != "compressed-tensors":
        return
    (scheme,) = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118
                layer, _, last = name.rpartition(".")
                if last == "weight_packed":
                    packed = {suffix: f.get_tensor(f"{layer}.{suffix}") for suffix in layout.suffixes}
                    yield f"{layer}.weight", PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
