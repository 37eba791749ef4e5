import random

import pytest
import torch

from edgeft.errors import DataError
from edgeft.training.rows import NOT_SUPERVISED, Row, check_rows, collator, order, read_rows, token_losses
from tests.training import tiny


def test_a_row_whose_labels_do_not_match_its_ids_is_named_by_line(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"ids": [1, 2], "labels": [-100, 2]}\n{"ids": [1, 2], "labels": [2]}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        read_rows(file)


def test_a_row_without_supervised_tokens_is_refused():
    good, mute = tiny.rows(1)[0], Row(ids=(1, 5, 2), labels=(NOT_SUPERVISED,) * 3)
    check_rows([good], end_of_turn=tiny.END, split="train")
    with pytest.raises(DataError, match="1 of 2 train rows have no supervised token, the first is row 2"):
        check_rows([good, mute], end_of_turn=tiny.END, split="train")


def test_a_row_that_does_not_supervise_the_end_of_turn_is_refused():
    endless = Row(ids=(1, 5, 7), labels=(NOT_SUPERVISED, 5, 7))
    with pytest.raises(DataError, match="do not supervise the end-of-turn token 2"):
        check_rows([endless], end_of_turn=tiny.END, split="train")


def test_a_row_beyond_the_context_is_refused():
    with pytest.raises(DataError, match="the base takes 4"):
        check_rows(tiny.rows(3), end_of_turn=tiny.END, split="train", context=4)


def test_every_epoch_holds_every_row_once_in_another_order():
    rows = tiny.rows(37)
    laid = order(rows, total=74, batch=4, seed=1)
    assert sorted(laid[:37]) == sorted(laid[37:]) == list(range(37))
    assert laid[:37] != laid[37:]
    assert laid == order(rows, total=74, batch=4, seed=1) != order(rows, total=74, batch=4, seed=2)


def test_batches_hold_rows_of_alike_length():
    rng = random.Random(0)
    rows = [Row(ids=(5,) * n, labels=(5,) * n) for n in (rng.randint(5, 100) for _ in range(256))]
    laid = order(rows, total=256, batch=8, seed=0)
    padded = sum(8 * max(len(rows[n].ids) for n in laid[i : i + 8]) for i in range(0, 256, 8))
    assert padded < 1.1 * sum(len(row.ids) for row in rows)


@pytest.mark.parametrize("answers_only", [True, False])
def test_the_loss_is_the_one_transformers_computes(answers_only):
    model, rows = tiny.model("llama"), tiny.rows(5)
    batch = collator(answers_only=answers_only)(rows)
    labels = batch.pop("labels")
    losses, wanted = token_losses(model(**batch).logits, labels)
    full = collator(answers_only=False)(rows)
    theirs = model(**full).loss
    assert torch.allclose(losses.mean(), theirs, atol=1e-6)
    assert losses.numel() == sum(label != NOT_SUPERVISED for row in rows for label in row.labels)
    assert (wanted == tiny.END).sum() == 5
