"""How a training run is set up, and what it found out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Optimizer = Literal["auto", "paged_adamw_8bit", "adamw_8bit", "adamw"]

CHECKPOINT_SECONDS = 60.0
"""Pause between checkpoints when the recipe counts no steps."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the loop is told. Documented where a recipe sets it: `edgeft.stages.train.Train`."""

    learning_rate: float
    epochs: float
    max_steps: int
    batch_size: int
    accumulation: int
    warmup: float
    weight_decay: float
    clip: float
    eval_every: int
    patience: int
    checkpoint_every: int
    seed: int
    gradient_checkpointing: bool
    optimizer: Optimizer
    device: str

    def steps(self, rows: int) -> int:
        """Optimizer steps of the whole run over this many rows."""
        steps = max(1, math.ceil(rows * self.epochs / (self.batch_size * self.accumulation)))
        return min(steps, self.max_steps) if self.max_steps else steps

    def rows(self, count: int) -> int:
        """How many rows, repeats counted, the whole run sees of this many. Whole epochs end with a short batch rather
        than with a few rows twice."""
        most = self.steps(count) * self.batch_size * self.accumulation
        return min(most, math.ceil(count * self.epochs))

    def resolved_optimizer(self) -> str:
        """The optimizer by transformers' name for it.

        `auto` pages an 8-bit AdamW on a GPU. On a CPU it is torch's AdamW: bitsandbytes has an 8-bit AdamW for CPUs
        since 0.49, but no paging there, and the states of an adapter are too small to be worth rounding.
        """
        auto = "adamw" if self.device == "cpu" else "paged_adamw_8bit"
        chosen = auto if self.optimizer == "auto" else self.optimizer
        return {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit"}.get(chosen, chosen)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run found out. Losses are nats per supervised token."""

    steps: int
    tokens: int
    """Tokens that went through the model in training, prompts included, padding not."""
    seconds: float
    """Spent in training steps, over all resumed parts."""
    train_loss: float
    heldout_loss_base: float
    heldout_loss: float
    """Of the adapter that was kept: the best one."""
    best_step: int
    end_of_turn_probability: float
    """Mean probability, under the kept adapter, of the end-of-turn token where a held-out answer ends."""
    stopped_early: bool
    resumed_from: int
    """The step of the checkpoint that this run continued; 0 when it started afresh."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry a step: `step`, `loss`, `learning_rate`, and `heldout_loss` where it was measured."""
