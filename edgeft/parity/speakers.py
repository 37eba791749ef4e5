"""Whoever can be asked what comes next: a model in torch, or a GGUF file in llama.cpp, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgeft.llamacpp import score
from edgeft.llamacpp.decode import Decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A greedy answer."""

    ids: list[int]
    """Without the token that ended it."""
    text: str
    stopped: bool
    """It ended by itself, not at the limit."""


class Speaker(Protocol):
    """A model that gives logits for windows and greedy answers to prompts."""

    n_vocab: int

    def logits(self, window: Sequence[int]) -> NDArray[np.float32]:
        """Logits [n_ctx - 1 - n_ctx//2, n_vocab] of a window's scored positions."""
        ...

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Reply:
        """The greedy continuation of a rendered prompt."""
        ...


class Gguf:
    """A GGUF file, opened by a Decoder whose context holds a window and an answer."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.n_vocab = decoder.n_vocab

    def logits(self, window: Sequence[int]) -> NDArray[np.float32]:
        """As Speaker.logits."""
        return score.scored_logits(self.decoder, window)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Reply:
        """As Speaker.answer."""
        ids = self.decoder.generate(prompt, max_tokens)
        room = min(max_tokens, self.decoder.n_ctx - len(prompt))
        return Reply(ids=ids, text=self.decoder.detokenize(ids).strip(), stopped=len(ids) < room)


class Torch:
    """A transformers model, with or without an adapter, as it stands (its device, its dtype, its autocast)."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from edgeft.training.model import takes_logits_to_keep

        self.model, self.tokenizer = model.eval(), tokenizer
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._keeps = takes_logits_to_keep(bare)
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {i for i in (*ends, tokenizer.eos_token_id) if i is not None}

    def logits(self, window: Sequence[int]) -> NDArray[np.float32]:
        """As Speaker.logits, in float32 on the CPU."""
        import numpy as np
        import torch

        first = score.first_scored(len(window))
        extra = {"logits_to_keep": len(window) - first} if self._keeps else {}
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            given = self.model(input_ids=torch.tensor([list(window)], device=device), **extra).logits[0]
            rows = given[-(len(window) - first) : -1].float().cpu()
        return np.ascontiguousarray(rows.numpy())

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Reply:
        """As Speaker.answer."""
        import torch

        device = next(self.model.parameters()).device
        given = torch.tensor([list(prompt)], device=device)
        pad = self.tokenizer.pad_token_id
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, do_sample=False,
                temperature=None, top_p=None, top_k=None, eos_token_id=sorted(self._ends),
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            )  # fmt: skip
        ids = out[0, len(prompt) :].tolist()
        stopped = bool(ids) and ids[-1] in self._ends
        ids = ids[:-1] if stopped else ids
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Reply(ids=ids, text=text.strip(), stopped=stopped)
