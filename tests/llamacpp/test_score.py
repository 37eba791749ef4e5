from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from edgeft.errors import DataError
from edgeft.llamacpp import decode, quantize, score
from edgeft.tool import run
from tests.conftest import ensure
from tests.llamacpp.test_imatrix import quantize_f16

N_CTX = 32


@pytest.fixture(scope="module")
def chunks():
    return np.random.default_rng(7).integers(100, 40_000, (3, N_CTX)).tolist()


@pytest.fixture
def base_file(tiny, chunks, tmp_path):
    path = tmp_path / "base.kld"
    with decode.Decoder(tiny(256), n_ctx=N_CTX, threads=1) as decoder:
        score.write_base(
            path, n_ctx=N_CTX, n_vocab=decoder.n_vocab, chunks=chunks,
            logits=(score.scored_logits(decoder, chunk) for chunk in chunks),
        )  # fmt: skip
    return path


def test_windows_do_not_overlap_and_the_tail_is_dropped():
    assert score.windows(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert score.windows(range(10), 4, bos=99) == [[99, 1, 2, 3], [99, 5, 6, 7]]
    assert score.windows(range(10), 4, at_most=1) == [[0, 1, 2, 3]]
    with pytest.raises(DataError, match="3 tokens do not fill one window of 4"):
        score.windows(range(3), 4)


def test_the_second_half_is_scored_each_position_for_the_token_after_it(tiny, chunks):
    with decode.Decoder(tiny(64), n_ctx=N_CTX, threads=1) as decoder:
        found = score.perplexity(decoder, chunks[:1])
        logits = decoder.logits(chunks[0]).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [-logp[t, chunks[0][t + 1]] for t in range(N_CTX // 2, N_CTX - 1)]
    assert len(found) == N_CTX - 1 - N_CTX // 2 == 15
    assert np.allclose(found, expected, atol=1e-3)


def test_the_base_file_has_llama_cpps_layout_and_16_bit_accuracy(base_file, tiny, chunks):
    raw = base_file.read_bytes()
    assert raw[:8] == b"_logits_"
    assert struct.unpack_from("<iii", raw, 8) == (N_CTX, 49152, 3)
    assert len(raw) == 20 + 4 * 3 * N_CTX + 3 * 15 * 2 * (49152 + 4)
    base = score.read_base(base_file)
    assert base.windows == chunks
    rows = list(base.log_probabilities())
    with decode.Decoder(tiny(256), n_ctx=N_CTX, threads=1) as decoder:
        exact = score.log_softmax(score.scored_logits(decoder, chunks[1]))
    cut = np.maximum(exact, exact.max(-1, keepdims=True) - 16)
    assert np.abs(rows[1] - cut).max() < 16 / 65535


def test_a_model_does_not_differ_from_itself_and_another_one_does(base_file, tiny, chunks, tmp_path):
    quantize.quantize(tiny(256), tmp_path / "q8.gguf", "Q8_0")
    quantize.quantize(tiny(256), tmp_path / "q2.gguf", "Q2_K")
    found = {}
    for name, path in (("same", tiny(256)), ("q8", tmp_path / "q8.gguf"), ("q2", tmp_path / "q2.gguf")):
        with decode.Decoder(path, n_ctx=N_CTX, threads=1) as decoder:
            found[name] = score.compare(base_file, decoder)
    assert found["same"].kld.shape == (3, 15)
    assert found["same"].same_top.all()
    assert abs(found["same"].kld.mean()) < 1e-4
    assert found["same"].kld.mean() < found["q8"].kld.mean() < found["q2"].kld.mean()
    assert found["q2"].kld.mean() > 0.01
    assert found["same"].summary()["ppl_ratio"] == pytest.approx(1, abs=1e-3)
    assert found["q2"].target.tolist() == [chunk[17:] for chunk in chunks]
    assert (found["q2"].entropy > 0).all()


def test_logits_are_compared_at_full_precision_without_a_file():
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 6, 50)).astype(np.float32)
    found = score.compare_logits(a, b, [0, 1, 2, 3, 4, 5])
    p, q = (
        np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (a, b)
    )
    assert np.allclose(found.kld[0], (p * np.log(p / q)).sum(-1), atol=1e-6)
    assert np.allclose(found.nll[0], -np.log(q[range(6), range(6)]), atol=1e-6)
    assert np.allclose(found.entropy_base[0], -(p * np.log(p)).sum(-1), atol=1e-6)
    assert score.compare_logits(a, a, [0] * 6).kld.max() == 0


def test_what_is_measured_does_not_depend_on_how_it_is_cut_up_for_speed(base_file, tiny, monkeypatch):
    """The same bits from blocks of any size, and from the formulas written out plainly over a whole window."""
    from edgeft.llamacpp import base_file as blocks

    with decode.Decoder(tiny(64), n_ctx=N_CTX, threads=1) as decoder:
        found = score.compare(base_file, decoder)
        monkeypatch.setattr(blocks, "BLOCK", 1 << 21)
        whole = score.compare(base_file, decoder)
        base = score.read_base(base_file)
        b = score.log_softmax(score.scored_logits(decoder, base.windows[1]))
    for name in score.Scores.__dataclass_fields__:
        assert np.array_equal(getattr(found, name), getattr(whole, name)), name
    a = base.unpack(base.packed(1))
    p = np.exp(a)
    p[a <= -16] = 0
    assert np.array_equal(found.kld[1], np.einsum("ij,ij->i", p, a - b, dtype=np.float64))
    assert np.array_equal(found.entropy_base[1], -np.einsum("ij,ij->i", p, a, dtype=np.float64))
    assert np.array_equal(found.entropy[1], -np.einsum("ij,ij->i", np.exp(b), b, dtype=np.float64))


def test_a_model_with_another_vocabulary_is_refused(base_file):
    with pytest.raises(
        DataError, match="holds 15 x 49152 log-probabilities a window; this model gave 15 x 7"
    ):
        score.compare(base_file, lambda window: np.zeros((15, 7), np.float32))


def test_scores_survive_their_file(base_file, tiny, tmp_path):
    with decode.Decoder(tiny(256), n_ctx=N_CTX, threads=1) as decoder:
        found = score.compare(base_file, decoder)
    np.savez(tmp_path / "s.npz", **found.arrays("domain_"))
    again = score.Scores.of(dict(np.load(tmp_path / "s.npz")), "domain_")
    assert np.array_equal(again.kld, found.kld) and np.array_equal(again.top, found.top)


def test_a_base_file_that_is_cut_off_or_of_another_kind_is_refused(base_file, tmp_path):
    cut = tmp_path / "cut.kld"
    cut.write_bytes(base_file.read_bytes()[:-2])
    with pytest.raises(DataError, match="3 windows of 32 need"):
        score.read_base(cut)
    cut.write_bytes(b"not_that" + bytes(100))
    with pytest.raises(DataError, match="holds no log-probabilities"):
        score.read_base(cut)


def test_a_base_file_of_too_few_windows_does_not_appear(tmp_path):
    path = tmp_path / "base.kld"
    rows = np.zeros((1, 10), np.float32)
    with pytest.raises(DataError, match="1 windows of logits came for 2"):
        score.write_base(path, n_ctx=4, n_vocab=10, chunks=[[1, 2, 3, 4]] * 2, logits=[rows])
    with pytest.raises(DataError, match="shape"):
        score.write_base(path, n_ctx=4, n_vocab=11, chunks=[[1, 2, 3, 4]], logits=[rows])
    assert not path.exists()


def test_equal_logits_make_a_base_file_row_without_a_division_by_zero(tmp_path):
    path = tmp_path / "base.kld"
    score.write_base(
        path, n_ctx=4, n_vocab=10, chunks=[[1, 2, 3, 4]], logits=[np.full((1, 10), 3, np.float32)]
    )
    (rows,) = score.read_base(path).log_probabilities()
    assert np.allclose(rows, -np.log(10))


@pytest.mark.slow
def test_perplexity_and_kl_divergence_are_llama_perplexitys(smollm2, english, tmp_path):
    """F16 perplexity to four digits, mean KLD within 2 % and 1e-3, with either side's base file."""
    binaries = ensure("perplexity")
    f16, q4 = tmp_path / "f16.gguf", tmp_path / "q4.gguf"
    quantize_f16(binaries, smollm2, f16)
    quantize.quantize(f16, q4, "Q4_0")
    text = tmp_path / "text.txt"
    text.write_text(english)
    tool = [
        str(binaries / "llama-perplexity"),
        "-f",
        str(text),
        "-c",
        "256",
        "-b",
        "256",
        "--chunks",
        "4",
        "-t",
        "1",
    ]
    said = run([*tool, "-m", str(f16), "--save-all-logits", str(tmp_path / "theirs.kld")])
    theirs = float(re.search(r"PPL = ([\d.]+)", said)[1])
    with decode.Decoder(f16, n_ctx=256, threads=1) as decoder:
        ids = decoder.tokenize(english, add_special=True, parse_special=False)
        chunks = score.windows(ids, 256, at_most=4)
        ours = float(np.exp(score.perplexity(decoder, chunks).mean()))
        score.write_base(
            tmp_path / "ours.kld", n_ctx=256, n_vocab=decoder.n_vocab, chunks=chunks,
            logits=(score.scored_logits(decoder, chunk) for chunk in chunks),
        )  # fmt: skip
    assert ours == pytest.approx(theirs, abs=6e-5)
    assert score.read_base(tmp_path / "theirs.kld").windows == chunks
    pairs = zip(
        score.read_base(tmp_path / "theirs.kld").log_probabilities(),
        score.read_base(tmp_path / "ours.kld").log_probabilities(), strict=True,
    )  # fmt: skip
    assert max(float(np.abs(a - b).max()) for a, b in pairs) < 2e-3
    for name in ("ours", "theirs"):
        said = run(
            [*tool, "-m", str(q4), "--kl-divergence", "--kl-divergence-base", str(tmp_path / f"{name}.kld")]
        )
        kld = float(re.search(r"Mean    KLD:\s+([\d.]+)", said)[1])
        top = float(re.search(r"Same top p:\s+([\d.]+)", said)[1])
        with decode.Decoder(q4, n_ctx=256, threads=1) as decoder:
            found = score.compare(tmp_path / f"{name}.kld", decoder).summary()
        assert found["kld_mean"] == pytest.approx(kld, rel=0.02, abs=1e-3)
        assert 100 * found["same_top"] == pytest.approx(top, abs=0.5)
