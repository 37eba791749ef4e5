import json

import pytest
import torch

from edgeft.errors import SetupError, StageError
from edgeft.training import heldout, load_base, load_trained, nf4, resolve
from edgeft.training import model as models
from edgeft.training.specials import untrained
from tests.training import tiny


def test_a_base_on_the_cpu_holds_exactly_what_nf4_stands_for(tmp_path, monkeypatch):
    base = tiny.checkpoint(tmp_path / "base")
    plain = load_base(base, method="qlora", device="cpu")
    monkeypatch.setattr(nf4, "_fits", lambda *_: False)
    packed = load_base(base, method="qlora", device="cpu")
    full = load_base(base, method="lora", device="cpu")
    kinds = {type(packed.get_submodule(name)).__name__ for name in resolve(packed).names}
    assert kinds == {"Linear4bit"}
    assert type(packed.lm_head).__name__ == "Linear"
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, packed(ids).logits)
        assert not torch.allclose(plain(ids).logits, full(ids).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_saved_adapter_gives_the_same_model_again(tmp_path, family, method):
    base = tiny.checkpoint(tmp_path / "base", family)
    bare = load_base(base, method=method, device="cpu")
    tuned = models.attach(bare, resolve(bare), rank=4, alpha=8, dropout=0, rslora=False, seed=0)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    models.save_adapter(tuned, models.adapter_weights(tuned), tmp_path / "one")
    models.save_adapter(tuned, models.adapter_weights(tuned), tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        assert (tmp_path / "one" / name).stat().st_mode & 0o777 == 0o644
    assert str(tmp_path) not in (tmp_path / "one" / "adapter_config.json").read_text()
    again = load_trained(base, tmp_path / "one", method=method, device="cpu")
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tuned.eval()(ids).logits)
        with again.disable_adapter():
            base_logits = again(ids).logits
        assert torch.equal(base_logits, load_base(base, method=method, device="cpu")(ids).logits)
        assert not torch.allclose(base_logits, again(ids).logits, atol=1e-3)


def test_heldout_loss_weighs_every_token_alike_whatever_the_batch():
    model, rows = tiny.model("llama"), tiny.rows(20)
    one = heldout.measure(model, rows, end_of_turn=tiny.END, batch_size=1)
    many = heldout.measure(model, rows, end_of_turn=tiny.END, batch_size=7)
    assert one.tokens == many.tokens
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    assert one.end_of_turn_probability == pytest.approx(many.end_of_turn_probability, rel=1e-5)


def test_a_heldout_loss_that_is_no_number_is_refused():
    model = tiny.model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(StageError, match="not a number"):
        heldout.measure(model, tiny.rows(3), end_of_turn=tiny.END, batch_size=2)


def test_a_quantized_checkpoint_is_refused(tmp_path):
    base = tiny.checkpoint(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    for method in ("lora", "qlora"):
        with pytest.raises(StageError, match="already quantized"):
            load_base(base, method=method, device="cpu")


def test_the_device_can_be_forced_and_a_missing_one_is_refused(monkeypatch):
    monkeypatch.setenv("EDGEFT_DEVICE", "cpu")
    assert models.pick_device() == "cpu"
    monkeypatch.setenv("EDGEFT_DEVICE", "tpu")
    with pytest.raises(SetupError, match="tpu"):
        models.pick_device()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("EDGEFT_DEVICE", "cuda")
    with pytest.raises(SetupError, match="no CUDA GPU"):
        models.pick_device()


def test_special_tokens_that_were_never_trained_are_pointed_out(tmp_path, caplog):
    model, rows = tiny.model("llama"), tiny.rows(10)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 2, "content": "<|im_end|>", "special": True}]})
    )
    assert untrained(model, tmp_path, rows) == {}
    model.get_input_embeddings().weight.data[2] *= 0.01
    assert list(untrained(model, tmp_path, rows)) == ["<|im_end|>"]
    assert "<|im_end|>" in caplog.text
