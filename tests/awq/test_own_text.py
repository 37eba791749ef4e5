from __future__ import annotations

import json
import random

import pytest
import torch
import transformers

from edgeft.awq import own_text
from edgeft.errors import ParityError
from edgeft.parity import calibration_text
from tests.awq import models


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("own"), "llama", torch.float32)


def test_a_model_writes_the_text_that_it_finds_likely_and_the_same_again(checkpoint):
    written = own_text.write(checkpoint, 20, 48)
    assert [len(window) for window in written] == [48] * 20
    assert own_text.write(checkpoint, 20, 48) == written != own_text.write(checkpoint, 20, 48, seed=1)
    assert len({tuple(window) for window in written}) == 20
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    shuffled = [random.Random(0).sample(window, len(window)) for window in written]
    losses = [
        float(model(input_ids=(ids := torch.tensor(text)), labels=ids).loss.detach())
        for text in (written, shuffled)
    ]
    assert losses[0] < losses[1]


def test_its_text_neither_ends_nor_begins_with_a_special_token(checkpoint):
    written = own_text.write(checkpoint, 40, 64)
    assert not any(2 in window for window in written)
    assert not {window[0] for window in written} & {0, 1, 2}


def test_no_text_is_written_where_none_is_asked_for(tmp_path):
    assert own_text.write(tmp_path, 0, 512) == []


def _data(folder, rows, heldout):
    folder.mkdir()
    for name, part in (("train", rows), ("heldout", heldout)):
        lines = [
            json.dumps({"messages": [{"role": "user", "content": " ".join(f"w{i}" for i in ids)}], "ids": ids,
                        "labels": ids, "origin": "x:1", "group": ""})
            for ids in part
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_what_was_written_before_a_crash_is_taken_again(checkpoint, tmp_path):
    rows = models.windows(40, 40)
    data = _data(tmp_path / "data", rows[:36], rows[36:])
    found, text = calibration_text.mixed(data, checkpoint, tmp_path, chunks=2, own=1, device="cpu")
    assert [len(window) for window in found] == [512] * 3 and text.ok
    kept = tmp_path / calibration_text.KEPT
    assert json.loads(kept.read_text()) == found[2:]
    kept.write_text(json.dumps([[7] * 512]))
    again, _ = calibration_text.mixed(data, checkpoint, tmp_path, chunks=2, own=1, device="cpu")
    assert again == [*found[:2], [7] * 512]


def test_training_text_that_is_the_test_is_refused_before_anything_is_written(checkpoint, tmp_path):
    rows = models.windows(40, 40)
    with pytest.raises(ParityError):
        calibration_text.mixed(
            _data(tmp_path / "data", rows, rows[:4]), checkpoint, tmp_path, chunks=2, own=1, device="cpu"
        )
    assert not (tmp_path / calibration_text.KEPT).exists()
