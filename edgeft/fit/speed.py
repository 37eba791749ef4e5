"""How fast a board will probably answer: a prediction from its memory bandwidth, never a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from edgeft.fit.board import Board
from edgeft.fit.memory import Serving, kv_bytes
from edgeft.fit.quant import place
from edgeft.fit.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Range:
    """A predicted span, in tokens a second."""

    low: float
    high: float

    def __str__(self) -> str:
        digits = 0 if self.low >= 20 else 1
        return f"{self.low:.{digits}f}-{self.high:.{digits}f} tokens/s (predicted)"


def decode(
    shape: ModelShape, label: str, board: Board, *, used: int = 0, kv_type: str = "f16", beside: int = 0
) -> Range:
    """Tokens a second while answering, with `used` tokens already in the context and `beside` bytes of an adapter.

    One token reads every weight once, so time = overhead + (weights + KV cache) / bandwidth. On six published
    Raspberry Pi 5 results one bandwidth explains all within 5 %.
    """
    weights = read_bytes(shape, label)
    cache = kv_bytes(shape, Serving(context=used, kv_type=kv_type)) if used else 0
    slow, fast = (_rate(weights + beside + cache, board, gb_s) for gb_s in board.effective_gb_s)
    return Range(low=slow, high=fast)


def prefill(shape: ModelShape, board: Board) -> Range | None:
    """Tokens a second while reading a prompt; it is bound by arithmetic. None where nothing was published."""
    if board.prefill_gparam_s is None:
        return None
    slow, fast = (rate * 1e9 / max(1, _active(shape)) for rate in board.prefill_gparam_s)
    return Range(low=slow, high=fast)


def read_bytes(shape: ModelShape, label: str) -> int:
    """Bytes of weights that one token reads: all but an untied embedding and the experts it does not visit."""
    total = 4 * shape.vectors
    for p in place(shape, label):
        if p.matrix.role == "token_embd" and not shape.tied:
            continue
        share = shape.experts_used / p.matrix.experts if p.matrix.experts > 1 and shape.experts_used else 1.0
        total += int(p.bytes * share)
    return total


def _active(shape: ModelShape) -> int:
    idle = sum(
        m.elements * (m.experts - shape.experts_used) // m.experts
        for m in shape.linears
        if m.experts > 1 and shape.experts_used
    )
    return shape.linear_parameters - idle


def _rate(read: int, board: Board, gb_s: float) -> float:
    return 1 / (board.token_overhead_ms / 1e3 + read / (gb_s * 1e9))
