"""Watches a run step by step: refuses a broken loss, measures the held-out one, keeps the best adapter, stops early,
asks for checkpoints, and tells TensorBoard and whoever listens to progress.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress
from edgeft.errors import StageError
from edgeft.training import checkpoints
from edgeft.training.heldout import Heldout
from edgeft.training.model import adapter_weights
from edgeft.training.settings import CHECKPOINT_SECONDS, Settings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_STUCK = 20  # steps with one and the same loss before a run counts as broken
_VANISHED = 1e-4


class Watch:
    """The state of a run beyond the weights. All of it is in `state()`, so a resumed run goes on as if never cut."""

    def __init__(
        self, model: Any, *, settings: Settings, steps: int, measure: Callable[[], Heldout], tensorboard: Path
    ) -> None:
        self.model, self.settings, self.steps, self.measure = model, settings, steps, measure
        self.eval_every = settings.eval_every or max(1, math.ceil(steps / 5))
        self.tensorboard_folder = tensorboard
        self.curve: list[dict[str, float]] = []
        self.base_loss = math.nan
        self.best: Heldout | None = None
        self.best_step = 0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.worse = 0
        self.seconds = 0.0
        self.stopped_early = False
        self._started = 0.0
        self._saved = time.monotonic()

    def begin(self, resumed_from: int) -> None:
        """Open the TensorBoard file; at the start of a run measure the base (the adapter is still zero)."""
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer = SummaryWriter(str(self.tensorboard_folder), purge_step=resumed_from + 1)
        if not resumed_from:
            self.base_loss = self.measure().loss
            self.curve.append({"step": 0, "heldout_loss": self.base_loss})
            self._tell(self.curve[-1])
            log.info("held-out loss of the base: %.4f", self.base_loss)

    def step_begins(self) -> None:
        """Start the clock of a training step."""
        self._started = self._started or time.monotonic()

    def step_ends(self) -> None:
        """Stop it."""
        self.seconds += time.monotonic() - self._started
        self._started = 0.0

    def step_logged(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> bool:
        """Take in one finished step. Returns whether to take a checkpoint now; sets `stopped_early`.

        Raises StageError for a loss that is no number, has vanished, or does not move.
        """
        self._refuse_broken(step, loss, gradient_norm)
        self.curve.append({"step": step, "loss": loss, "learning_rate": learning_rate})
        if step % self.eval_every == 0 or step == self.steps:
            self._evaluate(step)
        self._tell(self.curve[-1])
        return self._checkpoint_is_due(step)

    def checkpoint_saved(self, folder: Path) -> None:
        """Complete a checkpoint the Trainer has just written: our state, the best adapter, the marker."""
        from safetensors.torch import save_file

        if self.best_weights:
            save_file(self.best_weights, folder / "best.safetensors")
        checkpoints.complete(folder, self.state())
        checkpoints.keep_last(folder.parent, 2)
        self._saved = time.monotonic()

    def state(self) -> dict[str, Any]:
        """JSON-ready; `restore` takes it back."""
        best = self.best and {**self.best.__dict__}
        return {
            "curve": self.curve, "base_loss": self.base_loss, "best": best, "best_step": self.best_step,
            "worse": self.worse, "seconds": self.seconds,
        }  # fmt: skip

    def restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        from safetensors.torch import load_file

        self.curve, self.base_loss = state["curve"], state["base_loss"]
        self.best = Heldout(**state["best"]) if state["best"] else None
        self.best_step, self.worse, self.seconds = state["best_step"], state["worse"], state["seconds"]
        if self.best:
            self.best_weights = load_file(folder / "best.safetensors")

    def _evaluate(self, step: int) -> None:
        now = self.measure()
        self.curve[-1]["heldout_loss"] = now.loss
        log.info("step %d: held-out loss %.4f (base %.4f)", step, now.loss, self.base_loss)
        if self.best is None or now.loss < self.best.loss:
            self.best, self.best_step, self.worse = now, step, 0
            self.best_weights = adapter_weights(self.model)
            return
        self.worse += 1
        if self.settings.patience and self.worse >= self.settings.patience and step < self.steps:
            log.info("stopped at step %d: held-out loss was best at step %d", step, self.best_step)
            self.stopped_early = True

    def _checkpoint_is_due(self, step: int) -> bool:
        if step == self.steps or self.stopped_early:
            return False
        if every := self.settings.checkpoint_every:
            return step % every == 0
        return time.monotonic() - self._saved >= CHECKPOINT_SECONDS

    def _refuse_broken(self, step: int, loss: float, gradient_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise StageError(
                f"training broke at step {step}: loss {loss}, gradient norm {gradient_norm}",
                hint=f"most often the learning rate ({self.settings.learning_rate:g}) is too high; else a number "
                'overflowed: try compute_dtype = "float32", or look for damaged weights in the base',
            )
        if loss < _VANISHED:
            raise StageError(
                f"the loss fell to {loss:.1e} at step {step}",
                hint="either the labels are broken or the model knows its few rows by heart (C-37): "
                "give it more rows, or fewer epochs",
            )
        last = [point["loss"] for point in self.curve[-_STUCK + 1 :] if "loss" in point]
        if len(last) == _STUCK - 1 and all(before == loss for before in last):
            raise StageError(
                f"the loss has been {loss:.6f} for {_STUCK} steps, up to step {step}: nothing is learnt (C-37)",
                hint="is learning_rate 0, or are all rows the same?",
            )

    def _tell(self, point: dict[str, float]) -> None:
        step = int(point["step"])
        numbers = {name: value for name, value in point.items() if name != "step"}
        for name, value in numbers.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        progress.report("train", step, self.steps, unit="step", numbers=numbers)


def as_callback(watch: Watch) -> Any:
    """`watch` in the form that transformers' Trainer calls."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.step_begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.step_ends()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return  # the Trainer's summary after the last step
            control.should_save = watch.step_logged(
                state.global_step, logs["loss"], logs["learning_rate"], logs.get("grad_norm", 0.0)
            )
            control.should_training_stop = control.should_training_stop or watch.stopped_early

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            watch.checkpoint_saved(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Callback()
