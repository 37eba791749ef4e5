"""A real tokenizer small enough to build in a test: byte-level, no merges, with a chat template."""

from __future__ import annotations

import json
import random
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Earlier answers lose what they thought, as in Qwen 3; the last one gets an empty thought.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The number of turns stands at the front, so the rendered prompt is no prefix of the rendered whole.
COUNTING = "{{ messages | length }} turns\n" + CHATML
# Only the last answer keeps its text.
FORGETTING = CHATML.replace(
    "m['content']", "(m['content'] if m['role'] != 'assistant' or loop.last else 'an earlier answer')"
)


def save(
    folder: Path, template: str | None = CHATML, *, pad: str = "<|im_end|>", bos: str | None = None
) -> Path:
    """Write a checkpoint folder that holds nothing but a tokenizer; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=pad, bos_token=bos,
        extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    if template is not None:
        wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


# Words from which distinct texts are made: any two rows share hardly an eight-word run.
_WORDS = [
    "amber",
    "basin",
    "copper",
    "dune",
    "ember",
    "fjord",
    "garnet",
    "harbour",
    "island",
    "juniper",
    "kettle",
    "lantern",
    "meadow",
    "nectar",
    "orchard",
    "pebble",
    "quarry",
    "river",
    "saddle",
    "thicket",
    "umber",
    "valley",
    "willow",
    "yarrow",
    "zephyr",
]


def pair(n: int) -> dict:
    """The n-th of many unrelated rows."""
    word = random.Random(n).choices(_WORDS, k=14)
    return {"question": f"What is {word[0]} {n}?", "answer": f"It is {' '.join(word[1:])} number {n}."}
