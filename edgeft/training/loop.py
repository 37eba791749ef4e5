"""The training run: transformers' Trainer, told exactly what to do, and what is read off it afterwards."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.errors import StageError
from edgeft.training import checkpoints
from edgeft.training.heldout import Heldout, measure
from edgeft.training.model import recompute_activations, save_adapter, takes_logits_to_keep
from edgeft.training.rows import Row, collator, order, token_losses
from edgeft.training.settings import Outcome, Settings
from edgeft.training.watch import Watch, as_callback

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def train(
    model: Any,
    rows: Sequence[Row],
    heldout: Sequence[Row],
    *,
    settings: Settings,
    end_of_turn: int,
    out: Path,
) -> Outcome:
    """Train the adapter on `model` (a PeftModel) and write the best one to `out/adapter`, the curve to
    `out/curve.jsonl` and TensorBoard's events to `out/tensorboard`.

    Continues from the newest complete checkpoint under `out/checkpoints` when there is one; on a CPU the result is
    then the same to the bit as without the interruption. Checkpoints are removed at the end.

    Raises StageError when the loss is no number, vanishes or stands still, naming the step.
    """
    steps = settings.steps(len(rows))
    seen = order(rows, total=settings.rows(len(rows)), batch=settings.batch_size, seed=settings.seed)
    base = model.get_base_model()
    if settings.gradient_checkpointing:
        recompute_activations(base)

    def score() -> Heldout:
        return measure(model, heldout, end_of_turn=end_of_turn, batch_size=max(8, settings.batch_size))

    watch = Watch(model, settings=settings, steps=steps, measure=score, tensorboard=out / "tensorboard")
    trainer = _trainer(model, [rows[n] for n in seen], settings, out / "checkpoints")
    found = checkpoints.newest(out / "checkpoints")
    if found:
        watch.restore(*found)
        log.info("continuing from %s", found[0].name)
    watch.begin(checkpoints.step_of(found[0]) if found else 0)
    trainer.add_callback(as_callback(watch))
    trainer.train(resume_from_checkpoint=os.fspath(found[0]) if found else None)
    watch.writer.close()
    return _finish(model, watch, settings, [rows[n] for n in seen], found, out)


def _trainer(model: Any, rows: list[Row], settings: Settings, folder: Path) -> Any:
    """A Trainer that walks through `rows` once, in the order given; epochs are already in it."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = math.ceil(len(rows) / (settings.batch_size * settings.accumulation))
    arguments = TrainingArguments(
        output_dir=os.fspath(folder), use_cpu=settings.device == "cpu", seed=settings.seed,
        num_train_epochs=1, train_sampling_strategy="sequential", remove_unused_columns=False,
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.accumulation,
        optim=settings.resolved_optimizer(), learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, max_grad_norm=settings.clip,
        lr_scheduler_type="cosine", warmup_steps=math.ceil(settings.warmup * steps),
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", eval_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    # With several GPUs in the machine the Trainer would split each batch over them (DataParallel). One is used.
    arguments.device  # noqa: B018  (reading it is what counts the GPUs)
    arguments._n_gpu = min(1, arguments.n_gpu)

    def answer_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        losses, _ = token_losses(outputs.logits, labels)
        return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)

    trainer = Trainer(
        model=model, args=arguments, train_dataset=_Listed(rows), compute_loss_func=answer_loss,
        data_collator=collator(answers_only=takes_logits_to_keep(model.get_base_model())),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Listed:
    """A list of rows in the form a torch DataLoader takes."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> Row:
        return self.rows[at]


def _finish(
    model: Any, watch: Watch, settings: Settings, rows: list[Row], found: tuple[Path, Any] | None, out: Path
) -> Outcome:
    last = int(watch.curve[-1]["step"])
    if watch.best is None:
        raise StageError(f"training ended after {last} steps without a held-out loss")
    if watch.best.loss >= watch.base_loss:
        log.warning(
            "training did not help: held-out loss %.4f, base %.4f", watch.best.loss, watch.base_loss
        )  # fmt: skip
    partial = out / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(model, watch.best_weights, partial)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    partial.replace(out / "adapter")
    lines = "".join(json.dumps(point) + "\n" for point in watch.curve)
    (out / "curve.jsonl").write_text(lines, encoding="utf-8")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    losses = [point["loss"] for point in watch.curve if "loss" in point]
    return Outcome(
        steps=last,
        tokens=sum(len(row.ids) for row in rows[: last * settings.batch_size * settings.accumulation]),
        seconds=watch.seconds,
        train_loss=losses[-1],
        heldout_loss_base=watch.base_loss,
        heldout_loss=watch.best.loss,
        best_step=watch.best_step,
        end_of_turn_probability=watch.best.end_of_turn_probability,
        stopped_early=watch.stopped_early,
        resumed_from=checkpoints.step_of(found[0]) if found else 0,
        curve=watch.curve,
    )
