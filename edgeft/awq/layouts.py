"""How 4-bit codes, zero points and scales lie in a file: the two layouts that servers read, packed and unpacked.

A layer's weight [out, in] is cut along `in` into groups of `group` numbers. Each group of a row has a 16-bit scale and a
whole zero point: weight = (code - zero) * scale, computed in the scale's own format. Both layouts hold the same numbers, so
that a file of one can be turned into the other without loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError

if TYPE_CHECKING:
    import torch

BITS = 4
PER_WORD = 32 // BITS
"""Codes in one int32."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """One quantized weight, before packing."""

    codes: torch.Tensor
    """[out, in] uint8, 0 to 15."""
    zeros: torch.Tensor
    """[out, groups] uint8, 0 to 15."""
    scales: torch.Tensor
    """[out, groups], in the model's 16-bit format."""

    def weight(self) -> torch.Tensor:
        """[out, in] in the scales' format: the difference is whole, so that only the product is rounded."""
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        whole = self.codes.view(rows, groups, -1).to(self.scales.dtype) - self.zeros[..., None].to(
            self.scales.dtype
        )
        return (whole * self.scales[..., None]).reshape(rows, columns)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store a layer: which tensors stand in a file in place of `weight`, and how config.json names it."""

    name: str
    suffixes: tuple[str, ...]
    """Of the tensors that replace NAME.weight."""
    pack: Callable[[Codes], dict[str, torch.Tensor]]
    """The tensors by suffix."""
    unpack: Callable[[Mapping[str, torch.Tensor]], Codes]
    config: Callable[[int, Sequence[str]], dict[str, Any]]
    """config.json's `quantization_config`, from the group size and the linear layers that stay 16 bit."""


def of(name: str) -> Layout:
    """The layout called `name`. Raises StageError naming those there are."""
    if name not in LAYOUTS:
        raise StageError(f"{name!r} is no layout of AWQ; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def of_config(config: Mapping[str, Any]) -> Layout:
    """The layout that a config.json's `quantization_config` declares. Raises StageError for any other quantization."""
    found = config.get("quantization_config") or {}
    method = found.get("quant_method")
    if method == "awq" and found.get("version", "gemm").lower() == "gemm" and found.get("bits") == BITS:
        return LAYOUTS["gemm"]
    if method == "compressed-tensors" and found.get("format") == "pack-quantized":
        kinds = [group["weights"] for group in found.get("config_groups", {}).values()]
        if all(k["num_bits"] == BITS and not k["symmetric"] and k["strategy"] == "group" for k in kinds):
            return LAYOUTS["compressed-tensors"]
    raise StageError(
        f"this folder is quantized as {method!r}, not as 4-bit groups with zero points in one of the layouts "
        f"{', '.join(LAYOUTS)}"
    )


# compressed-tensors 0.20, compressors/pack_quantized: codes and zero points as int8 around zero, plus 8, so the unsigned
# numbers themselves; codes packed along `in`, zero points along `out`, the first of eight in the lowest bits.


def _pack_words(values: torch.Tensor) -> torch.Tensor:
    """[rows, 8 n] of 0 to 15 -> int32 [rows, n], the first of each eight in the lowest four bits."""
    import torch

    shifts = torch.arange(0, 32, BITS, device=values.device, dtype=torch.int64)
    words = (values.to(torch.int64).reshape(len(values), -1, PER_WORD) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpack_words(words: torch.Tensor) -> torch.Tensor:
    """The reverse of _pack_words, uint8."""
    import torch

    shifts = torch.arange(0, 32, BITS, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _pack_compressed(layer: Codes) -> dict[str, torch.Tensor]:
    import torch

    return {
        "weight_packed": _pack_words(layer.codes),
        "weight_scale": layer.scales.contiguous(),
        "weight_zero_point": _pack_words(layer.zeros.T).T.contiguous(),
        "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
    }


def _unpack_compressed(found: Mapping[str, torch.Tensor]) -> Codes:
    return Codes(
        codes=_unpack_words(found["weight_packed"]), scales=found["weight_scale"],
        zeros=_unpack_words(found["weight_zero_point"].T).T.contiguous(),
    )  # fmt: skip


def _config_compressed(group: int, kept: Sequence[str]) -> dict[str, Any]:
    # "dequantize" is for transformers alone, servers pass over it: without it transformers 5.23 with compressed-tensors 0.20
    # lays out unpacked zero points and refuses the packed ones (compressors/pack_quantized/base.py, the "meta" branch).
    weights = {
        "num_bits": BITS, "type": "int", "symmetric": False, "strategy": "group", "group_size": group, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": None, "observer_kwargs": {},
    }  # fmt: skip
    scheme = {
        "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
        "format": "pack-quantized",
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": list(kept), "kv_cache_scheme": None,
        "global_compression_ratio": None, "dequantize": True,
    }  # fmt: skip


# AWQ's "gemm": everything transposed and packed along `out`, in an order within each eight that suits its first kernel
# (vLLM 0.32, quantization/auto_awq.py: _REVERSE_AWQ_PACK_ORDER and _convert_awq_to_standard_format).

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in the lowest four bits, the next four, and so on."""


def _interleaved(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1, PER_WORD)[..., list(_ORDER)].flatten(1)


def _straight(values: torch.Tensor) -> torch.Tensor:
    back = [_ORDER.index(i) for i in range(PER_WORD)]
    return values.reshape(len(values), -1, PER_WORD)[..., back].flatten(1)


def _pack_gemm(layer: Codes) -> dict[str, torch.Tensor]:
    return {
        "qweight": _pack_words(_interleaved(layer.codes.T)),
        "qzeros": _pack_words(_interleaved(layer.zeros.T)),
        "scales": layer.scales.T.contiguous(),
    }


def _unpack_gemm(found: Mapping[str, torch.Tensor]) -> Codes:
    return Codes(
        codes=_straight(_unpack_words(found["qweight"])).T.contiguous(),
        zeros=_straight(_unpack_words(found["qzeros"])).T.contiguous(),
        scales=found["scales"].T.contiguous(),
    )


def _config_gemm(group: int, kept: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq", "version": "gemm", "bits": BITS, "group_size": group, "zero_point": True,
        "modules_to_not_convert": list(kept),
    }  # fmt: skip


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="compressed-tensors", pack=_pack_compressed, unpack=_unpack_compressed, config=_config_compressed,
            suffixes=("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"),
        ),
        Layout(
            name="gemm", pack=_pack_gemm, unpack=_unpack_gemm, config=_config_gemm,
            suffixes=("qweight", "qzeros", "scales"),
        ),
    )
}  # fmt: skip
