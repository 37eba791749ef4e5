"""Every weight type of ggml in torch: blocks to weights on any device, and for most of them weights back to codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgeft.errors import StageError
from edgeft.grid.formats import codebook, floats, fp4, kquants, legacy, nonlinear, ternary
from edgeft.grid.formats.block import Format, Rounding

__all__ = ["FORMATS", "Format", "Rounding", "of"]

_families = (legacy, kquants, nonlinear, codebook, ternary, fp4, floats)

FORMATS: Mapping[str, Format] = MappingProxyType(
    {f.name: f for family in _families for f in family.formats()}
)
"""By name, as in gguf.GGMLQuantizationType."""


def of(name: str) -> Format:
    """The format of this name. Raises StageError, naming all, for a type without one."""
    try:
        return FORMATS[name]
    except KeyError:
        raise StageError(f"no weight type {name!r} (there are {', '.join(FORMATS)})") from None
