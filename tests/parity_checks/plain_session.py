"""A runtime session over a plain checkpoint folder, as the served formats offer one: transformers, in float32."""

from __future__ import annotations

from pathlib import Path


class Session:
    said = "transformers, float32, CPU"

    def __init__(self, folder: Path, context: int = 0) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self.n_vocab = int(self.model.config.vocab_size)
        self.context = context

    def logits(self, ids):
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([list(ids)])).logits[0].numpy()

    def generate(self, prompt, max_tokens):
        out = []
        while len(out) < max_tokens:
            out.append(int(self.logits([*prompt, *out])[-1].argmax()))
            if out[-1] == self.tokenizer.eos_token_id:
                return out[:-1], True
        return out, False

    def tokenize(self, text):
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def detokenize(self, ids):
        return self.tokenizer.decode(ids)

    def render(self, messages):
        return None

    def close(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
