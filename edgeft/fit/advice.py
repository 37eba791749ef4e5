"""What of a model fits a board, how fast each quantization would answer there, and which one to take.

Every speed is a prediction from published figures (speed.py), whatever board it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeft.fit import speed
from edgeft.fit.board import Board
from edgeft.fit.memory import OFFERED, Need, Serving, largest_that_fits, longest_context, predict
from edgeft.fit.shape import ModelShape
from edgeft.fit.speed import Range
from edgeft.fit.training import adapter_parameters

READING = 7.0
"""Tokens a second at which an answer appears as fast as it is read: 300 words a minute, 0.75 words a token."""
FOUR_BITS = "Q4_K_M"
"""The smallest that is taken for the sake of speed alone; below it a small model is hardly itself any more."""
HALF_EMPTY = 4
"""Speeds are told with the first quarter of the context in use."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One quantization of the model on one board."""

    label: str
    need: Need
    fits: bool
    longest: int
    """The longest context that would fit, in tokens; 0 when not even the shortest does."""
    answering: Range
    """Tokens a second with a quarter of the context in use. Meaningless where the model does not fit."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """All quantizations of a model on one board, largest first, and the one to take."""

    board: Board
    serving: Serving
    choices: tuple[Choice, ...]
    reading: Range | None
    """Tokens a second of a prompt, the same for all; None where nothing was published for this board."""
    take: Choice | None
    reason: str


def advise(
    shape: ModelShape,
    board: Board,
    serving: Serving,
    *,
    labels: Sequence[str] = OFFERED,
    adapter_rank: int = 0,
) -> Advice:
    """Look at every quantization on `board`, served as `serving` says, with an adapter of that rank beside it (0: none).

    Raises RecipeError for an unknown quantization or KV cache type.
    """
    adapter = 2 * adapter_parameters(shape, adapter_rank)
    choices = []
    for label in labels:
        need = predict(shape, label, serving, board, adapter_mb=adapter / 1e6)
        answering = speed.decode(
            shape, label, board, used=serving.context // HALF_EMPTY, kv_type=serving.kv_type, beside=adapter
        )
        choices.append(
            Choice(
                label=label, need=need, fits=need.total <= board.available_mb, answering=answering,
                longest=longest_context(shape, label, serving, board, adapter_mb=adapter / 1e6),
            )
        )  # fmt: skip
    choices.sort(key=lambda c: -c.need.weights)
    take, reason = _taken(choices)
    if take is None:
        reason = _nothing(shape, board, serving, choices, labels, adapter / 1e6)
    return Advice(
        board=board, serving=serving, choices=tuple(choices), reading=speed.prefill(shape, board), take=take,
        reason=reason,
    )  # fmt: skip


def _taken(choices: Sequence[Choice]) -> tuple[Choice | None, str]:
    """The largest that fits and answers as fast as one reads; else four bits; else whatever fits.

    16-bit files are shown but not taken where Q8_0 is at hand: half the bytes, and what it loses is within what kernels
    differ by.
    """
    fitting = [c for c in choices if c.fits]
    if not fitting:
        return None, ""
    worth = [c for c in fitting if c.label not in ("F32", "F16", "BF16")] or fitting
    quick = [c for c in worth if c.answering.low >= READING]
    if quick and (quick[0] is worth[0] or quick[0].need.weights >= _four_bits(choices)):
        first = quick[0]
        if first is worth[0]:
            return first, "the largest that fits, and it answers at least as fast as one reads"
        return first, f"the largest that answers as fast as one reads ({READING:.0f} tokens/s)"
    four = next((c for c in worth if c.label == FOUR_BITS), None)
    if four is not None:
        return (
            four,
            "none of four bits or more answers as fast as one reads here; this is the fastest that stays itself",
        )
    return worth[
        0
    ], "the largest that fits; it answers slower than one reads" if not quick else "the largest that fits"


def _four_bits(choices: Sequence[Choice]) -> float:
    return next((c.need.weights for c in choices if c.label == FOUR_BITS), 0.0)


def _nothing(
    shape: ModelShape, board: Board, serving: Serving, choices: Sequence[Choice], labels: Sequence[str], adapter_mb: float
) -> str:  # fmt: skip
    smallest = choices[-1]
    best = largest_that_fits(shape, smallest.label, serving, board, labels, adapter_mb=adapter_mb)
    if best.smaller[0]:
        return f"nothing fits with a context of {serving.context}; {best.smaller[0]} would with {best.smaller[1]}"
    return (
        f"nothing fits: {smallest.label} alone needs {smallest.need.total:,.0f} MB and {board.name} leaves "
        f"{board.available_mb:,} MB; take a smaller model or a larger board"
    )
