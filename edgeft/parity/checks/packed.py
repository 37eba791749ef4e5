"""Reads the packed weights of folders that other runtimes serve, layer by layer, as float32.

Written from the formats' own descriptions and not from the code that writes edgeft's folders: two programs must agree.
What a runtime computes with is (code − zero) · scale, for each group of columns of each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import DataError
from edgeft.parity.checks.merged_weights import EMBEDDINGS, HEADS
from edgeft.parity.checks.tensors import Stored, in_checkpoint, rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ's gemm layout: where in a word each of eight neighbours lies (AutoAWQ, the kernel's interleaving)."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One packed weight."""

    name: str
    """The weight's name in a checkpoint."""
    weight: Matrix
    """[out, in], as a runtime computes with it."""
    scales: Matrix
    """[out, groups]: the step between two codes."""
    bits: int
    group: int
    """Columns that share a scale."""
    first: int | None = None
    """Where the checkpoint's weight holds more than this one: its row that is the first here."""


def awq(folder: Path) -> Iterator[Layer]:
    """The packed layers of a folder of AWQ's gemm layout or of compressed-tensors' pack-quantized.

    Raises DataError for what neither description covers.
    """
    stored = in_checkpoint(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    for name in sorted(stored):
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            yield _gemm(layer, stored, said)
        elif part == "weight_packed":
            yield _compressed(layer, stored, _bits(said))


def plain(folder: Path) -> Iterator[tuple[str, Matrix]]:
    """The embedding and the output matrix, where they are not packed, by name."""
    for name, stored in in_checkpoint(folder).items():
        if name.endswith((*EMBEDDINGS, *HEADS)):
            yield name, whole(stored)


def whole(stored: Stored) -> NDArray[Any]:
    """A tensor of a checkpoint: floats as float32, integers as they are."""
    import torch

    read = torch.cat([block for _, block in rows(stored)]).reshape(stored.shape)
    found: NDArray[Any] = (read.float() if read.is_floating_point() else read).numpy()
    return found


def _bits(said: Mapping[str, Any]) -> int:
    kinds = [group["weights"] for group in said["config_groups"].values()]
    bits = {int(kind["num_bits"]) for kind in kinds}
    if len(bits) != 1 or 32 % min(bits) or any(kind.get("actorder") for kind in kinds):
        raise DataError(f"weights of {sorted(bits)} bits, or with reordered columns, cannot be unpacked here")
    return bits.pop()


def _codes(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """int32 [rows, n] -> [rows, n * 32/bits], the first code in the lowest bits."""
    import numpy as np

    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    return codes.astype(np.uint8).reshape(words.shape[0], -1)


def _compressed(layer: str, stored: Mapping[str, Stored], bits: int) -> Layer:
    """compressed-tensors: codes along `in`, zero points along `out`; without these the codes are signed."""
    import numpy as np

    height, width = (int(x) for x in whole(stored[f"{layer}.weight_shape"]))
    codes = _codes(whole(stored[f"{layer}.weight_packed"]), bits)[:, :width]
    scales = whole(stored[f"{layer}.weight_scale"]).reshape(height, -1)
    zeros = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    if (packed := stored.get(f"{layer}.weight_zero_point")) is not None:
        zeros = _codes(np.ascontiguousarray(whole(packed).T), bits).T[:height].astype(np.float32)
    return Layer(
        name=f"{layer}.weight", scales=scales, bits=bits, group=-(-width // scales.shape[1]),
        weight=_weight(codes, zeros, scales, width),
    )  # fmt: skip


def _gemm(layer: str, stored: Mapping[str, Stored], said: Mapping[str, Any]) -> Layer:
    """AWQ's gemm: everything transposed, packed along `out`, eight at a time interleaved."""
    if int(said.get("bits", said.get("w_bit", 0))) != 4:
        raise DataError("AWQ's gemm layout has 4 bits")

    def straight(name: str) -> NDArray[np.uint8]:
        codes = _codes(whole(stored[f"{layer}.{name}"]), 4)
        found: NDArray[np.uint8] = codes.reshape(len(codes), -1, 8)[..., list(_ORDER)].reshape(len(codes), -1)
        return found

    codes, zeros, scales = straight("qweight"), straight("qzeros"), whole(stored[f"{layer}.scales"])
    return Layer(
        name=f"{layer}.weight", scales=scales.T, bits=4, group=-(-codes.shape[0] // scales.shape[0]),
        weight=_weight(codes.T, zeros.T, scales.T, codes.shape[0]),
    )  # fmt: skip


def _weight(codes: NDArray[Any], zeros: NDArray[Any], scales: Matrix, width: int) -> Matrix:
    """(code - zero) * scale by groups of columns; the last group may be short."""
    import numpy as np

    group = -(-width // scales.shape[1])
    where = np.arange(width) // group
    with np.errstate(invalid="ignore"):  # a scale that is not finite is counted by whoever looks
        found: Matrix = (codes.astype(np.float32) - zeros.astype(np.float32)[:, where]) * scales[:, where]
    return found
