"""A file whose codes were trained, held against the one it started from: faults planted one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeft import llamacpp
from edgeft.llamacpp import header
from edgeft.parity.checks.tuned_weights import tuned

llamacpp.activate()
NAMES = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight")


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """Three Q4_0 matrices and a norm."""
    import gguf

    path = tmp_path / "start.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    numbers = np.random.default_rng(0)
    for name in NAMES:
        weights = numbers.normal(size=(4, 64)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(start: Path, *places: tuple[str, int, int]) -> Path:
    """A copy with one byte set in each of some tensors: (tensor, byte, value)."""
    found, raw = header.read(start), bytearray(start.read_bytes())
    for name, at, value in places:
        tensor = next(t for t in found.tensors if t.name == name)
        raw[found.data_offset + tensor.offset + at] = value
    out = start.with_name("tuned.gguf")
    out.write_bytes(raw)
    return out


def wrong(start: Path, file: Path) -> list[str]:
    return [c.name for c in tuned(start, file) if c.ok is False]


def test_other_codes_in_a_layer_are_what_training_makes(start):
    assert wrong(start, changed(start, (NAMES[1], 5, 0x12), (NAMES[2], 20, 0x34))) == []


def test_a_file_in_which_nothing_changed_was_not_trained(start):
    assert wrong(start, changed(start)) == ["trained tensors"]


def test_a_changed_embedding_is_named(start):
    (check,) = [c for c in tuned(start, changed(start, (NAMES[0], 5, 0x12))) if c.ok is False]
    assert NAMES[0] in check.said


def test_a_changed_norm_is_found(start):
    file = changed(start, (NAMES[1], 5, 0x12), ("blk.0.attn_norm.weight", 1, 1))
    assert wrong(start, file) == ["trained tensors"]


def test_a_scale_that_overflowed_is_found(start):
    assert wrong(start, changed(start, (NAMES[1], 0, 0x00), (NAMES[1], 1, 0x7C))) == ["finite tuned weights"]


def test_another_header_is_found(start):
    file = changed(start, (NAMES[1], 5, 0x12))
    file.write_bytes(file.read_bytes().replace(b"llama", b"lhama", 1))
    assert wrong(start, file) == ["same header"]
