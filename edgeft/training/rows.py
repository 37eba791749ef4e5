"""Tokenized conversations: read from a data artifact, checked, put in order, and stacked into batches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

NOT_SUPERVISED = -100
_WINDOW = 32  # batches that are sorted by length together: little padding, and the order is still shuffled


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation."""

    ids: tuple[int, ...]
    """Token ids."""
    labels: tuple[int, ...]
    """As long as `ids`: the same id where it is to be learnt, NOT_SUPERVISED elsewhere."""


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON Lines file with the fields `ids` and `labels`.

    Raises DataError, with file and line, for a row that lacks them or has them in different lengths.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            fields = json.loads(line)
            row = Row(ids=tuple(fields.get("ids", ())), labels=tuple(fields.get("labels", ())))
            if not row.ids or len(row.ids) != len(row.labels):
                raise DataError(f"{path}:{number}: {len(row.ids)} token ids and {len(row.labels)} labels")
            rows.append(row)
    return rows


def check_rows(rows: Sequence[Row], *, end_of_turn: int, split: str, context: int = 0) -> None:
    """Refuse rows that would teach nothing, or that would teach a model not to stop (C-49, C-22).

    `context` is the most tokens the model takes, 0 when unknown. Raises DataError.
    """
    if not rows:
        raise DataError(f"the {split} split is empty")
    mute = [n for n, row in enumerate(rows, 1) if all(label == NOT_SUPERVISED for label in row.labels[1:])]
    if mute:
        raise DataError(
            f"{len(mute)} of {len(rows)} {split} rows have no supervised token, the first is row {mute[0]}",
            hint="the template did not mark the answer, or the row was cut before it (C-49)",
        )
    endless = [n for n, row in enumerate(rows, 1) if end_of_turn not in row.labels[1:]]
    if endless:
        raise DataError(
            f"{len(endless)} of {len(rows)} {split} rows do not supervise the end-of-turn token {end_of_turn}, "
            f"the first is row {endless[0]}",
            hint="the tuned model would never stop (C-22)",
        )
    longest = max(len(row.ids) for row in rows)
    if context and longest > context:
        raise DataError(f"a {split} row has {longest} tokens; the base takes {context}")


def order(rows: Sequence[Row], *, total: int, batch: int, seed: int) -> list[int]:
    """Row numbers in training order, `total` of them: every epoch a new shuffle, alike lengths side by side.

    The whole run's order is laid out before it starts, so a resumed run only has to know how far it came.
    """
    laid: list[int] = []
    epoch = 0
    while len(laid) < total:
        laid += _one_epoch(rows, batch=batch, rng=random.Random(f"{seed}/{epoch}"))
        epoch += 1
    return laid[:total]


def collator(*, answers_only: bool) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
    """A function that stacks rows into one batch, padded on the right to its longest row.

    It gives `input_ids` and `attention_mask` (rows, length) and `labels`, already shifted: column j + 1 is what the
    j-th returned logit must predict, and column 0 is never supervised. With `answers_only`, `logits_to_keep` lists
    the positions whose logits are needed at all, which spares the output layer the prompts.
    """
    import torch

    def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, NOT_SUPERVISED)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = torch.tensor(row.ids)
            mask[at, : len(row.ids)] = 1
            labels[at, : len(row.ids)] = torch.tensor(row.labels)
        labels[:, 0] = NOT_SUPERVISED
        batch = {"input_ids": ids, "attention_mask": mask}
        if answers_only:
            keep = (labels[:, 1:] != NOT_SUPERVISED).any(dim=0).nonzero().flatten()
            labels = torch.cat([labels[:, :1], labels[:, keep + 1]], dim=1)
            batch["logits_to_keep"] = keep
        return {**batch, "labels": labels}

    return collate


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, in float32 nats, of each supervised token of a batch, and those tokens' ids.

    `labels` as a `collator` gives them; `logits` (rows, positions, vocabulary).
    """
    import torch

    targets = labels[:, 1:]
    supervised = targets != NOT_SUPERVISED
    wanted = targets[supervised]
    losses = torch.nn.functional.cross_entropy(
        logits[:, : targets.shape[1]][supervised].float(), wanted, reduction="none"
    )
    return losses, wanted


def _one_epoch(rows: Sequence[Row], *, batch: int, rng: random.Random) -> list[int]:
    numbers = list(range(len(rows)))
    rng.shuffle(numbers)
    batches = []
    for start in range(0, len(numbers), batch * _WINDOW):
        window = sorted(numbers[start : start + batch * _WINDOW], key=lambda n: len(rows[n].ids))
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    # The one short batch goes last, so that the others stay whole when epochs are chained.
    whole, short = [b for b in batches if len(b) == batch], [b for b in batches if len(b) < batch]
    rng.shuffle(whole)
    return [n for b in [*whole, *short] for n in b]
