"""Statistics on arrays whose answer is known; exactness on real files with planted faults."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from edgeft.errors import DataError
from edgeft.parity import reference, statistics
from edgeft.parity.gates import Limits, best_tier, violations


def arrays(windows=24, tokens=64, shift=0.0, noise=0.1, kld=0.02, seed=0):
    random = np.random.default_rng(seed)
    nll = random.exponential(2.0, (windows, tokens))
    shipped = nll + shift + noise * random.standard_normal(nll.shape)
    return nll, shipped, kld * random.exponential(1.0, nll.shape), random.random(nll.shape) < 0.93


def test_a_model_against_itself_has_ratio_one_and_no_divergence():
    nll, _, _, _ = arrays()
    same = statistics.compare(nll, nll, np.zeros_like(nll), np.ones_like(nll, bool))
    assert (same.ppl_ratio, same.ppl_ratio_bound, same.kld, same.kld_bound, same.same_top) == (1, 1, 0, 0, 1)
    assert best_tier(same) == "near-lossless"


def test_a_known_shift_is_found_and_the_bound_is_on_the_bad_side():
    found = statistics.compare(*arrays(shift=0.05))
    assert found.ppl_ratio == pytest.approx(np.exp(0.05), rel=0.01)
    assert found.ppl_ratio_bound > found.ppl_ratio
    assert found.kld_bound > found.kld and found.same_top_bound < found.same_top


def test_the_bound_covers_the_truth_in_about_95_of_100_draws():
    truth = np.exp(0.02)
    covered = sum(
        statistics.compare(*arrays(shift=0.02, noise=0.3, seed=s)).ppl_ratio_bound >= truth
        for s in range(100)
    )
    assert 85 <= covered <= 100


def test_windows_that_differ_widen_the_bound_more_than_tokens_that_differ():
    nll, _, kld, top = arrays()
    random = np.random.default_rng(1)
    by_window = nll + 0.1 * random.standard_normal((len(nll), 1))
    by_token = nll + 0.1 * random.standard_normal(nll.shape)

    def width(shipped):
        found = statistics.compare(nll, shipped, kld, top)
        return found.ppl_ratio_bound - found.ppl_ratio

    assert width(by_window) > 3 * width(by_token)


def test_retention_is_one_for_the_trained_model_zero_for_the_base_and_none_without_a_gain():
    trained, _, _, answers = arrays()
    base = trained + 0.5
    assert statistics.retention(base, trained, trained, answers).retention == pytest.approx(1)
    assert statistics.retention(base, trained, base, answers).retention == pytest.approx(0)
    half = statistics.retention(base, trained, trained + 0.25, answers)
    assert half.retention == pytest.approx(0.5) and half.retention_bound == pytest.approx(0.5)
    assert statistics.retention(trained, trained, base, answers).retention is None
    assert statistics.retention(base, trained, base, np.zeros_like(answers)).retention is None


def test_every_limit_that_a_bound_breaks_is_named():
    found = statistics.compare(*arrays(shift=0.3, kld=0.5))
    broken = violations(found, Limits.of("parity", None, None, None))
    assert [b.split()[0] for b in broken] == ["KL", "perplexity"] and "is over the limit of 0.05" in broken[0]
    assert violations(found, Limits.of("parity", 9, 9, 0)) == []
    assert len(violations(found, Limits.of("parity", 9, 9, 0.99))) == 1
    assert best_tier(found) == ""


def test_windows_mark_the_answers_of_the_scored_half():
    rows = [(list(range(10)), [-100] * 6 + [6, 7, 8, 9])] * 10
    cut = reference.windows(rows, 32, 9, bos=None)
    stream = [label for _, labels in rows for label in labels]
    assert len(cut.ids) == 3 and cut.answers.shape == (3, 15)
    expected = [[stream[w * 32 + t] != -100 for t in range(17, 32)] for w in range(3)]
    assert cut.answers.tolist() == expected


def test_too_little_held_out_text_is_refused_with_its_size():
    with pytest.raises(DataError, match="has 10 tokens"):
        reference.windows([(list(range(10)), [-100] * 10)], 512, 4, bos=None)


@pytest.mark.slow
class TestExactness:
    """A converted file against its checkpoint; each fault is planted in a copy of the checkpoint."""

    @pytest.fixture(scope="class")
    def gguf(self, tiny_checkpoint, tmp_path_factory):
        from edgeft.llamacpp import convert

        out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        convert.to_gguf(tiny_checkpoint, out, outtype="f32")
        return out

    @pytest.fixture
    def copy(self, tiny_checkpoint, tmp_path):
        return shutil.copytree(tiny_checkpoint, tmp_path / "copy")

    def problems(self, checkpoint, gguf):
        from edgeft.parity import exact

        return "; ".join(exact.compare(checkpoint, gguf).problems)

    def test_a_faithful_conversion_has_no_problem(self, tiny_checkpoint, gguf):
        from edgeft.parity import exact

        found = exact.compare(tiny_checkpoint, gguf)
        assert found.problems == () and found.kld < 1e-6 and found.same_top > 0.99

    def test_other_weights_are_found(self, copy, gguf):
        from safetensors.torch import load_file, save_file

        weights = load_file(copy / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 0
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        assert "the logits differ" in self.problems(copy, gguf)

    def test_another_template_is_found(self, copy, gguf):
        (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + " ")
        assert "another chat template" in self.problems(copy, gguf)

    def test_another_end_of_sequence_is_found(self, copy, gguf):
        config = json.loads((copy / "tokenizer_config.json").read_text())
        config["eos_token"] = "<|endoftext|>"
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
        assert "the end-of-sequence id is 2 in the file and 0 in the checkpoint" in self.problems(copy, gguf)

    def test_a_tokenizer_that_splits_digits_otherwise_is_found(self, copy, gguf):
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"] = tokenizer["pre_tokenizer"]["pretokenizers"][-1]
        (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert "the tokenizers disagree on" in self.problems(copy, gguf)
