from __future__ import annotations

import numpy as np
import pytest

from edgeft.errors import DataError
from edgeft.llamacpp import decode, header, imatrix, quantize, score
from edgeft.tool import run
from tests.conftest import ensure


def tensor(path, name):
    head = header.read(path)
    found = next(t for t in head.tensors if t.name == name)
    return np.fromfile(path, "<f4", found.weights, offset=head.data_offset + found.offset).reshape(
        found.shape[::-1]
    )


def test_the_first_layers_sums_are_the_squares_of_its_normed_embeddings(tiny, tmp_path):
    path, chunks = tiny(64), [list(range(100, 140)), list(range(900, 940))]
    matrix = imatrix.collect(path, chunks, tmp_path / "i.gguf", threads=1)
    x = tensor(path, "token_embd.weight")[[i for chunk in chunks for i in chunk]].astype(np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * tensor(path, "blk.0.attn_norm.weight")
    for name in ("attn_q", "attn_k", "attn_v"):
        assert matrix.counts[f"blk.0.{name}.weight"].tolist() == [80]
        assert np.allclose(matrix.sums[f"blk.0.{name}.weight"][0], (normed**2).sum(0), rtol=1e-5)
    assert matrix.chunks == 2
    assert len(matrix.sums) == 14
    assert "output.weight" not in matrix.sums


def test_the_file_comes_back_as_it_was_written(tiny, tmp_path):
    matrix = imatrix.collect(
        tiny(64), [list(range(100, 150))], tmp_path / "i.gguf", dataset="train split", threads=1
    )
    again = imatrix.load(tmp_path / "i.gguf")
    assert (again.datasets, again.chunks, again.chunk_size) == (("train split",), 1, 50)
    assert list(again.sums) == list(matrix.sums)
    assert all(np.array_equal(again.sums[name], matrix.sums[name]) for name in matrix.sums)


def test_an_expert_no_token_reached_counts_as_one(tmp_path):
    matrix = imatrix.Matrix(
        sums={"blk.0.ffn_up_exps.weight": np.array([[4, 6], [0, 0]], np.float32)},
        counts={"blk.0.ffn_up_exps.weight": np.array([2, 0], np.float32)}, datasets=(), chunks=0, chunk_size=16,
    )  # fmt: skip
    imatrix.save(matrix, tmp_path / "i.gguf")
    means = imatrix.load(tmp_path / "i.gguf").means()
    assert means["blk.0.ffn_up_exps.weight"].tolist() == [2, 3, 1, 1]


def test_a_matrix_changes_the_weights_and_is_noted_in_the_file(tiny, tmp_path):
    model = tiny(256)
    imatrix.collect(model, [list(range(100, 164))] * 2, tmp_path / "i.gguf", dataset="train", threads=1)
    for name, matrix in (("with", tmp_path / "i.gguf"), ("without", None)):
        quantize.quantize(
            model, tmp_path / f"{name}.gguf", "Q4_K_S", imatrix=matrix, token_embedding_type="Q8_0"
        )
    keys = header.read(tmp_path / "with.gguf").keys
    assert keys["quantize.imatrix.file"] == "i.gguf"
    assert keys["quantize.imatrix.dataset"] == "train"
    assert keys["quantize.imatrix.entries_count"] == 14
    assert keys["quantize.imatrix.chunks_count"] == 2
    data = [
        p.read_bytes()[header.read(p).data_offset :]
        for p in (tmp_path / "with.gguf", tmp_path / "without.gguf")
    ]
    assert len(data[0]) == len(data[1])
    assert data[0] != data[1]


@pytest.mark.slow
def test_types_that_need_a_matrix_are_made_with_one(tiny, tmp_path):
    imatrix.collect(tiny(256), [list(range(100, 164))], tmp_path / "i.gguf", threads=1)
    quantize.quantize(tiny(256), tmp_path / "q.gguf", "IQ2_XS", imatrix=tmp_path / "i.gguf")
    assert "IQ2_XS" in quantize.types_in(tmp_path / "q.gguf").counts


def test_what_is_no_matrix_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="is no importance matrix"):
        imatrix.load(tiny(64))
    with pytest.raises(DataError, match="at least 16 tokens"):
        imatrix.collect(tiny(64), [[1, 2, 3]], tmp_path / "i.gguf")


@pytest.mark.slow
def test_the_file_is_the_one_llama_imatrix_writes(smollm2, english, tmp_path):
    """Same tokens, same sums to the last bit, and the same quantized weights."""
    binaries = ensure("perplexity")
    quantize_f16(binaries, smollm2, tmp_path / "f16.gguf")
    (tmp_path / "text.txt").write_text(english)
    run([
        str(binaries / "llama-imatrix"), "-m", str(tmp_path / "f16.gguf"), "-f", str(tmp_path / "text.txt"),
        "-o", str(tmp_path / "theirs.gguf"), "-c", "256", "-b", "256", "--chunks", "3", "-t", "1", "--no-ppl",
    ])  # fmt: skip
    with decode.Decoder(smollm2, vocab_only=True) as vocabulary:
        ids = vocabulary.tokenize(english, add_special=True, parse_special=False)
    chunks = score.windows(ids, 256, at_most=3)
    imatrix.collect(
        tmp_path / "f16.gguf", chunks, tmp_path / "ours.gguf", dataset=str(tmp_path / "text.txt"), threads=1
    )
    theirs, ours = imatrix.load(tmp_path / "theirs.gguf"), imatrix.load(tmp_path / "ours.gguf")
    assert (ours.chunks, ours.chunk_size, ours.datasets) == (
        theirs.chunks,
        theirs.chunk_size,
        theirs.datasets,
    )
    assert list(ours.sums) == list(theirs.sums)
    for name in theirs.sums:
        assert np.array_equal(ours.counts[name], theirs.counts[name])
        assert np.array_equal(ours.sums[name], theirs.sums[name]), name
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    for name in ("ours", "theirs"):
        quantize.quantize(
            tmp_path / "f16.gguf", tmp_path / f"{name}-q.gguf", "Q4_K_M", imatrix=tmp_path / f"{name}.gguf"
        )
    run([
        str(binaries / "llama-quantize"), "--imatrix", str(tmp_path / "theirs.gguf"),
        str(tmp_path / "f16.gguf"), str(tmp_path / "tool-q.gguf"), "Q4_K_M", "1",
    ])  # fmt: skip
    data = [
        (tmp_path / f"{name}-q.gguf").read_bytes()[header.read(tmp_path / f"{name}-q.gguf").data_offset :]
        for name in ("ours", "theirs", "tool")
    ]
    assert data[0] == data[1] == data[2]
    keys = [header.read(tmp_path / f"{name}-q.gguf").keys for name in ("theirs", "tool")]
    assert keys[0] | {"quantize.imatrix.file": ""} == keys[1] | {"quantize.imatrix.file": ""}


@pytest.mark.slow
@pytest.mark.parametrize("label", ["Q8_0", "Q4_K_M", "IQ4_XS", "Q4_0"])
def test_quantized_files_are_byte_for_byte_llama_quantizes(tiny, tmp_path, label):
    binaries = ensure("perplexity")
    for width in (64, 256):
        quantize.quantize(tiny(width), tmp_path / "ours.gguf", label)
        run([str(binaries / "llama-quantize"), str(tiny(width)), str(tmp_path / "tool.gguf"), label, "1"])
        assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "tool.gguf").read_bytes()


def quantize_f16(binaries, source, out):
    """Q4_1 back to F16 by the C++ tool: the one requantization that ours refuses."""
    run([str(binaries / "llama-quantize"), "--allow-requantize", str(source), str(out), "F16", "2"])
