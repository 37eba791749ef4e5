from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip(
    "onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'edgeft[onnx]'"
)

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "The quick brown fox, it's 12 o'clock.  Anemia is a kind of blood disease;  3456 of 78,900 people have it.\n\nNext."


def tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer that takes digits apart, as SmolLM2's does, trained on one sentence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        [TEXT] * 4,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


SIZES = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip


def checkpoint(
    folder: Path, family: str = "Llama", *, says: dict[str, object] | None = None, **sizes: object
) -> Path:
    """A random model of a family of transformers as a float16 checkpoint, with tokenizer and a licence."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer(folder)
    (folder / "LICENSE").write_text("Anybody may.")
    if says:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **says}))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tied Llama whose generation settings differ from everybody's defaults."""
    return checkpoint(
        tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=True,
        says={"repetition_penalty": 1.2, "temperature": 0.7, "top_k": 20, "do_sample": True, "eos_token_id": [2, 0]},
    )  # fmt: skip


@pytest.fixture(scope="session")
def built(tiny, tmp_path_factory) -> Path:
    """The tiny model as an ONNX folder. Tests that change it copy it first."""
    from edgeft.onnx.build import build

    out = tmp_path_factory.mktemp("built") / "model"
    build(tiny, out, settings())
    return out


def settings(**given: object):
    """What the stage builds by default; inputs in float32, so that nothing is rounded but the weights."""
    from edgeft.onnx.build import Settings

    usual = {
        "provider": "cpu", "block": 32, "symmetric": False, "accuracy": 1, "search": True, "mixed": True, "head": 8,
    }  # fmt: skip
    return Settings(**{**usual, **given})
