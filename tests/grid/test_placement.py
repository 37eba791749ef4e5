"""Where a converter put each row: found on made-up pairs of files, and on what the pinned converter makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgeft.errors import DataError, StageError
from edgeft.grid.placement import Placement, placement
from edgeft.llamacpp import header

WIDTH, HALF = 8, [0, 4, 1, 5, 2, 6, 3, 7]
"""Rows of a head of eight, as llama's rotary layout has them in a file."""


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def placed(folder: Path, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], **keys) -> Placement:
    """The placement of a checkpoint of these tensors in a GGUF file of those."""
    save_file({name: tensor.contiguous() for name, tensor in ours.items()}, folder / "model.safetensors")
    tensors = {
        name: (tuple(reversed(tensor.shape)), tensor.float().contiguous().numpy().tobytes())
        for name, tensor in theirs.items()
    }
    header.write(
        folder / "plain.gguf", {"general.architecture": "llama", "llama.block_count": 2, **keys}, tensors
    )
    return placement(folder, folder / "plain.gguf")


Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"


def test_a_permuted_matrix_and_its_bias_are_led_back_row_by_row(tmp_path):
    w, b = weights(8, WIDTH), weights(8, seed=1)
    ours = {
        Q.format(0) + ".weight": w,
        Q.format(0) + ".bias": b,
        "model.embed_tokens.weight": weights(9, WIDTH),
    }
    theirs = {
        "blk.0.attn_q.weight": w[HALF],
        "blk.0.attn_q.bias": b[HALF],
        "token_embd.weight": weights(9, WIDTH),
    }
    found = placed(tmp_path, ours, theirs)
    assert not found.unplaced and not found.unclaimed
    for name, tensor in ours.items():
        at = found.of(name)
        file = theirs[at.tensor]
        assert torch.equal(file if at.rows is None else file[torch.from_numpy(at.rows)], tensor), name
    assert found.of("model.embed_tokens.weight").rows is None


def test_a_zero_bias_takes_the_order_of_its_weight(tmp_path):
    w, zero = weights(8, WIDTH), torch.zeros(8)
    found = placed(
        tmp_path,
        {Q.format(0) + ".weight": w, Q.format(0) + ".bias": zero},
        {"blk.0.attn_q.weight": w[HALF], "blk.0.attn_q.bias": zero},
    )
    rows = found.of(Q.format(0) + ".weight").rows
    assert rows is not None and np.array_equal(found.of(Q.format(0) + ".bias").rows, rows)


def test_equal_rows_take_the_order_of_the_same_layer_in_another_block_or_none(tmp_path):
    pruned = weights(8, WIDTH)
    pruned[[2, 3, 7]] = 0
    ours = {Q.format(0) + ".weight": pruned, Q.format(1) + ".weight": weights(8, WIDTH, seed=5)}
    theirs = {"blk.0.attn_q.weight": pruned[HALF], "blk.1.attn_q.weight": weights(8, WIDTH, seed=5)[HALF]}
    found = placed(tmp_path, ours, theirs)
    assert np.array_equal(found.of(Q.format(0) + ".weight").rows, found.of(Q.format(1) + ".weight").rows)
    (alone := tmp_path / "alone").mkdir()
    lost = placed(alone, {Q.format(0) + ".weight": pruned}, {"blk.0.attn_q.weight": pruned[HALF]})
    with pytest.raises(
        StageError, match=r"layers\.0\.self_attn\.q_proj\.weight has equal rows, and nothing tells"
    ):
        lost.of(Q.format(0) + ".weight")


def test_equal_rows_in_the_files_own_order_stay_there(tmp_path):
    embedding = weights(9, WIDTH)
    embedding[4:] = 0
    ours = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(8)}
    found = placed(tmp_path, ours, {"token_embd.weight": embedding, "output_norm.weight": torch.ones(8)})
    assert all(found.of(name).rows is None for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_added_to_a_norm_is_seen_exactly_and_nothing_else_is_taken_for_it(tmp_path, dtype):
    norm = weights(8).to(dtype)
    added = norm + 1 if dtype is torch.float16 else norm.float() + 1  # as the converter does
    ours = {"model.norm.weight": norm}
    found = placed(tmp_path, ours, {"output_norm.weight": added})
    assert found.of("model.norm.weight").added == 1.0
    scaled = placed(tmp_path, ours, {"output_norm.weight": norm.float() * 1.5})
    assert "do not hold the same rows" in scaled.unplaced["model.norm.weight"]
    assert scaled.unclaimed == ("output_norm.weight",)


def test_a_matrix_kept_the_other_way_round_is_placed_by_its_outputs_even_if_it_is_square(tmp_path):
    w, square = weights(8, 24), weights(8, 8)
    found = placed(
        tmp_path,
        {"transformer.h.0.attn.c_attn.weight": w, "transformer.h.0.attn.c_proj.weight": square},
        {"blk.0.attn_qkv.weight": w.T, "blk.0.attn_output.weight": square.T},
        **{"general.architecture": "gpt2", "gpt2.block_count": 1},
    )
    assert not found.unplaced
    assert all(p.transposed and p.rows is None for p in found.placed.values())


def test_an_output_layer_that_repeats_the_embedding_is_the_embedding(tmp_path):
    w = weights(9, WIDTH)
    found = placed(
        tmp_path, {"model.embed_tokens.weight": w, "lm_head.weight": w.clone()}, {"token_embd.weight": w}
    )
    assert found.of("lm_head.weight").tensor == "token_embd.weight"
    other = placed(tmp_path, {"lm_head.weight": weights(9, WIDTH, seed=9)}, {"token_embd.weight": w})
    assert list(other.unplaced) == ["lm_head.weight"]


def test_what_is_split_stacked_or_changed_is_named_and_refused(tmp_path):
    w = weights(8, WIDTH)
    ours = {
        "model.layers.0.mlp.experts.0.up_proj.weight": w, "model.layers.0.mlp.up_proj.weight": weights(16, WIDTH),
        K.format(0) + ".weight": w.clone(),
    }  # fmt: skip
    changed = w[HALF].clone()
    changed[3, 3] = torch.nextafter(changed[3, 3], torch.tensor(9.0))
    theirs = {
        "blk.0.ffn_up_exps.weight": w[None], "blk.0.ffn_up.weight": weights(16, WIDTH)[:8],
        "blk.0.attn_k.weight": changed,
    }  # fmt: skip
    found = placed(tmp_path, ours, theirs)
    assert not found.placed and set(found.unplaced) == set(ours) and set(found.unclaimed) == set(theirs)
    assert (
        "has no tensor of its own in plain.gguf"
        in found.unplaced["model.layers.0.mlp.experts.0.up_proj.weight"]
    )
    with pytest.raises(StageError, match="blocks cannot be trained"):
        found.of(K.format(0) + ".weight")
    with pytest.raises(StageError, match="nothing is no tensor of the checkpoint"):
        found.of("nothing")


def test_files_that_cannot_be_led_back_at_all_are_refused(tmp_path):
    with pytest.raises(DataError, match="knows no architecture 'perceptron'"):
        placed(tmp_path, {"a": weights(2, 2)}, {"b": weights(2, 2)}, **{"general.architecture": "perceptron"})
    (tmp_path / "empty").mkdir()
    placed(tmp_path, {"a": weights(2, 2)}, {"b": weights(2, 2)})
    with pytest.raises(DataError, match=r"holds no \*\.safetensors file"):
        placement(tmp_path / "empty", tmp_path / "plain.gguf")
