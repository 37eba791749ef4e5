from __future__ import annotations

import pytest

from edgeft.errors import DataError
from edgeft.llamacpp import convert, decode, quantize, score, stock
from edgeft.llamacpp.base_file import write_base

LOG = """\
0.01.986.771 I system_info: n_threads = 1 (n_threads_batch = 1) / 2 | CPU : NEON = 1 | DOTPROD = 1 | REPACK = 1 | 
0.00.539.498 I kl_divergence: computing over 4 chunks, n_ctx=64, batch_size=64, n_seq=1
0.00.489.219 W kl_divergence: calculated n_seq=8 exceeds context's n_seq_max=1, capping at 1
0.00.746.316 I kl_divergence: 0.20 seconds per pass - ETA 0.00 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      11.3828 ±    4.2586       0.42481 ±    0.13827       0.27540 ±    0.05151    13.217 ±  3.165 %    64.516 ±  8.736 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  23.835694 ±   5.912611
Mean PPL(base)                :  19.986869 ±   5.010661
Cor(ln(PPL(Q)), ln(PPL(base))):  93.95%
Mean ln(PPL(Q)/PPL(base))     :   0.176109 ±   0.086790
Mean PPL(Q)/PPL(base)         :   1.192568 ±   0.103503
Mean PPL(Q)-PPL(base)         :   3.848825 ±   2.097300

====== KL divergence statistics ======
Mean    KLD:   0.305943 ±   0.025050
Maximum KLD:   1.588883
99.9%   KLD:   1.536636
99.0%   KLD:   1.140140
95.0%   KLD:   0.855527
Median  KLD:   0.217515
Minimum KLD:  -0.000008

====== Token probability statistics ======
Mean    Δp: -3.465 ± 1.023 %
RMS Δp    : 11.859 ± 1.983 %
Same top p: 66.129 ± 4.267 %
"""


def test_the_log_of_a_board_is_read():
    found = stock.parse(LOG)
    assert (found.ppl, found.ppl_base, found.ppl_ratio) == (23.835694, 19.986869, 1.192568)
    assert (found.kld, found.kld_error, found.kld_median) == (0.305943, 0.02505, 0.217515)
    assert (found.kld_99, found.kld_999, found.kld_max) == (1.14014, 1.536636, 1.588883)
    assert (found.rms_dp, found.same_top) == pytest.approx((0.11859, 0.66129))
    assert found.kernels == "CPU : NEON = 1 | DOTPROD = 1 | REPACK = 1"
    pasted = LOG.replace("±", "+-").replace("\n", "\r\n")
    assert stock.parse(pasted) == found
    assert stock.parse(LOG.split("\n", 1)[1]).kernels == ""


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("E kl_divergence: failed to open base.kld", "failed to open base.kld"),
        ("E kl_divergence: base.kld has been computed with 512, while the current context is 256. Increase",
         "computed with 512, while the current context is 256"),
        ("E kl_divergence : failed to decode", "failed to decode"),
        ("E kl_divergence: inconsistent vocabulary (49150 vs 49152)", r"inconsistent vocabulary \(49150 vs 49152\)"),
    ],
)  # fmt: skip
def test_what_the_tool_complains_of_is_an_error_though_it_exits_with_0(said, reason):
    with pytest.raises(DataError, match=reason):
        stock.parse(f"{said}\n{LOG}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("Mean    KLD:   0.305943", "Mean    KLD:        inf", "measured 'Mean    KLD:        inf"),
        ("Mean PPL(Q)                   :  23.835694", "Mean PPL(Q)                   :       -nan", "-nan"),
        ("Same top p:", "", "'Same top p' is not in it"),
        ("====== KL", "", "holds no statistics"),
    ],
)
def test_a_log_without_finite_statistics_is_refused(old, new, reason):
    assert old in LOG
    text = LOG[: LOG.index(old)] if old == "====== KL" else LOG.replace(old, new)
    with pytest.raises(DataError, match=reason):
        stock.parse(text)


def torch_base(path, checkpoint, windows):
    """Write the base file of a checkpoint as torch runs it, in float32; its vocabulary's size."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    n_ctx, n_vocab = len(windows[0]), model.config.vocab_size

    def logits():
        for window in windows:
            with torch.inference_mode():
                yield model(torch.tensor([window])).logits[0, score.first_scored(n_ctx) : -1].numpy()

    write_base(path, n_ctx=n_ctx, n_vocab=n_vocab, chunks=windows, logits=logits())


def assert_agree(base, gguf, *, kld):
    """Our scoring and the stock tool's on one base file, and the KLD is of the size `kld`.

    2 % is what must hold; with the same library, windows and threads they agree to all printed digits.
    """
    n_ctx = score.read_base(base).n_ctx
    theirs = stock.run_stock(base, gguf, threads=1)
    with decode.Decoder(gguf, n_ctx=n_ctx, threads=1) as decoder:
        ours = score.compare(base, decoder).summary()
    assert kld / 3 < theirs.kld < 3 * kld
    assert ours["kld_mean"] == pytest.approx(theirs.kld, rel=1e-4)
    assert ours["kld_p99"] == pytest.approx(theirs.kld_99, rel=1e-3)
    assert ours["ppl"] == pytest.approx(theirs.ppl, rel=1e-5)
    assert ours["ppl_base"] == pytest.approx(theirs.ppl_base, rel=1e-5)
    assert ours["ppl_ratio"] == pytest.approx(theirs.ppl_ratio, rel=1e-5)
    assert ours["same_top"] == pytest.approx(theirs.same_top, abs=1e-4)
    assert "REPACK" in theirs.kernels


@pytest.mark.slow
def test_the_stock_tool_scores_a_gguf_against_torch_as_we_do(tiny_checkpoint, tmp_path):
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float16)
    with torch.no_grad():  # a random model believes in nothing: louder layers and a louder end make peaks
        for layer in model.model.layers:
            for weight in (w for w in layer.parameters() if w.dim() == 2):
                weight *= 10
        model.model.norm.weight *= 20
    model.save_pretrained(tmp_path / "sharp")
    for file in tiny_checkpoint.iterdir():
        if not (tmp_path / "sharp" / file.name).exists():
            (tmp_path / "sharp" / file.name).symlink_to(file)
    windows = np.random.default_rng(5).integers(100, 40_000, (8, 64)).tolist()
    torch_base(tmp_path / "base.kld", tmp_path / "sharp", windows)
    convert.to_gguf(tmp_path / "sharp", tmp_path / "f16.gguf", outtype="f16")
    quantize.quantize(tmp_path / "f16.gguf", tmp_path / "q4.gguf", "Q4_0")
    assert_agree(tmp_path / "base.kld", tmp_path / "q4.gguf", kld=1)


@pytest.mark.slow
def test_the_stock_tool_scores_smollm2_against_torch_as_we_do(smollm2, english, tmp_path):
    from transformers import AutoTokenizer

    from edgeft.checkpoint.dequantize import gguf_to_checkpoint

    gguf_to_checkpoint(smollm2, tmp_path / "hf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(english[:20_000])["input_ids"]
    torch_base(tmp_path / "base.kld", tmp_path / "hf", score.windows(ids, 256, at_most=2))
    convert.to_gguf(tmp_path / "hf", tmp_path / "f16.gguf", outtype="f16")
    for kind, kld in (("Q4_0", 0.25), ("Q4_K_M", 0.05)):
        quantize.quantize(tmp_path / "f16.gguf", tmp_path / f"{kind}.gguf", kind)
        assert_agree(tmp_path / "base.kld", tmp_path / f"{kind}.gguf", kld=kld)
