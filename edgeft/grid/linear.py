"""A frozen linear layer that keeps its weight as the blocks of a GGUF file, and computes with what they stand for.

The weight is dequantized where it is used, forward and again backward; only the blocks stay. PEFT takes the layer for
what it is, a `torch.nn.Linear`: rank, targets, dropout and rsLoRA work as on any other.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError
from edgeft.grid import formats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Widen = Callable[[Tensor], Tensor]

log = logging.getLogger(__name__)

_PIECE = 1 << 20
"""Weights dequantized at once without a compiler: their intermediate results stay in a cache."""


def widen(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The weights [out, in] of packed rows, uint8 [out, row bytes], computed in float32 and rounded to `dtype`.

    On a GPU by a function that torch compiles once for a type of blocks, so that nothing but the result is written; if
    there is no compiler, by the same steps one by one, which is said once in the log. The numbers are the same: every
    step is exact in float32 (`formats.block`). Raises StageError for a type that `formats` does not know.
    """
    import torch

    format = formats.of(kind)
    blocks = packed.reshape(-1, format.bytes)
    if torch.compiler.is_compiling():
        wide = format.dequantize(blocks).to(dtype)
    elif packed.is_cuda:
        wide = _compiled(kind, dtype)(blocks)
    else:
        wide = _eager(blocks, format, dtype)
    return wide.reshape(packed.shape[0], -1)


def __getattr__(name: str) -> Any:
    if name == "GridLinear":
        return _grid_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _grid_linear() -> type[Any]:
    """The class, made at the first use: its base class is torch's."""
    import torch
    from torch.nn.functional import linear

    class Product(torch.autograd.Function):
        """x W^T + b, where only the blocks of W are kept for the way back."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, kind: str) -> Tensor:
            ctx.save_for_backward(packed)
            ctx.kind = kind
            return linear(x, widen(packed, kind, x.dtype), bias)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
            (grad,), (packed,) = grads, ctx.saved_tensors
            into_x = grad @ widen(packed, ctx.kind, grad.dtype) if ctx.needs_input_grad[0] else None
            into_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
            return into_x, None, into_bias, None

    product: Callable[..., Tensor] = Product.apply

    class GridLinear(torch.nn.Linear):
        """A frozen linear layer whose weight is packed: uint8 [out, row bytes], in blocks of the type `kind`.

        Under autocast it computes in autocast's type, as any linear layer, else in `compute_dtype`, and returns the
        input's type. `bias` [out] is any tensor, or None. Raises StageError for an unknown type and for rows that are
        no whole blocks.
        """

        held: Tensor | None

        def __init__(
            self,
            packed: Tensor,
            kind: str,
            bias: Tensor | None = None,
            *,
            compute_dtype: torch.dtype = torch.float32,
        ) -> None:
            torch.nn.Module.__init__(self)
            format = formats.of(kind)
            if packed.dtype is not torch.uint8 or packed.dim() != 2 or packed.shape[1] % format.bytes:
                raise StageError(
                    f"{kind} rows are multiples of {format.bytes} bytes, not {packed.dtype} {tuple(packed.shape)}"
                )
            self.out_features = packed.shape[0]
            self.in_features = packed.shape[1] // format.bytes * format.block
            self.kind = kind
            self.compute_dtype = compute_dtype
            frozen = partial(torch.nn.Parameter, requires_grad=False)
            self.register_parameter("weight", frozen(packed))
            self.register_parameter("bias", None if bias is None else frozen(bias))
            self.register_buffer("held", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            auto = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if auto else self.compute_dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            if self.held is not None and self.held.dtype is dtype:
                y = linear(x.to(dtype), self.held, bias)
            else:
                y = product(x.to(dtype), self.weight, bias, self.kind)
            return y if auto else y.to(x.dtype)

        def hold(self, dtype: torch.dtype | None = None) -> None:
            """Keep the dense weight too, in `dtype` (`compute_dtype`): the same numbers, not computed at every use."""
            self.held = widen(self.weight, self.kind, dtype or self.compute_dtype)

        def dequantized(self) -> Tensor:
            """The weight, float32 [out, in], bit for bit what llama.cpp makes of the blocks."""
            return widen(self.weight, self.kind, torch.float32)

        def extra_repr(self) -> str:
            return f"{super().extra_repr()}, kind={self.kind}"

    GridLinear.__qualname__ = "GridLinear"
    return GridLinear


def _eager(blocks: Tensor, format: formats.Format, dtype: torch.dtype) -> Tensor:
    import torch

    step = _PIECE // format.block
    if len(blocks) <= step:
        return format.dequantize(blocks).to(dtype)
    wide = torch.empty(len(blocks), format.block, dtype=dtype, device=blocks.device)
    for start in range(0, len(blocks), step):
        wide[start : start + step] = format.dequantize(blocks[start : start + step])
    return wide


@cache
def _compiled(kind: str, dtype: torch.dtype) -> Widen:
    """`format.dequantize` and the rounding to `dtype` in one kernel, for any number of blocks."""
    import torch

    format = formats.of(kind)

    def dequantize(blocks: Tensor) -> Tensor:
        return format.dequantize(blocks).to(dtype)

    # torch counts compilations by code object and gives up at the eighth, for all types of blocks together.
    own = types.FunctionType(
        dequantize.__code__.replace(), dequantize.__globals__, f"dequantize_{kind}", None, dequantize.__closure__
    )  # fmt: skip
    fast = torch.compile(own, fullgraph=True)
    slow = False

    def run(blocks: Tensor) -> Tensor:
        nonlocal slow
        # Forward runs under autocast and backward does not: without this there would be two compilations.
        with torch.autocast(blocks.device.type, enabled=False):
            if not slow and len(blocks) > 1:  # torch takes a size of one for a constant
                try:
                    torch._dynamo.mark_dynamic(blocks, 0)
                    wide: Tensor = fast(blocks)
                    return wide
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # noqa: BLE001  a missing compiler shows itself in many ways
                    slow = True
                    reason = next((line for line in str(error).splitlines() if line.strip()), "")
                    log.warning("%s blocks are dequantized step by step, which is slow: torch cannot compile (%s: %s)",
                                kind, type(error).__name__, reason.strip())  # fmt: skip
            return _eager(blocks, format, dtype)

    return run
