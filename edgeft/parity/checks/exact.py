"""Is a GGUF file the checkpoint it was made from? Token ids, template, special ids, and logits of the same ids.

These are exact questions, asked before any quantization: a converted file that fails one of them is not the model that
was trained, however small its perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.llamacpp.decode import Decoder
from edgeft.parity.checks import tokens
from edgeft.parity.checks.check import Check, failed
from edgeft.parity.checks.corpus import NASTY, chats, plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_KLD = 1e-4
"""Mean KL divergence in nats, the checkpoint computed in float32. Right conversions of fifteen model families measured
4e-7 in F32 and 3e-6 in F16; a silently wrong one (random Gemma-3) 4e-2."""
MAX_KLD_16BIT = 5e-3
"""The same for a checkpoint computed in its own 16 bits, whose own rounding counts too. A judgement, not
measured, and weak: a tiny wrong Gemma-3 measured 6e-3. For a large base the strong check is the preflight's float32 one."""
FLOAT32_BELOW = 1.5e9
"""Parameters up to which the checkpoint is computed in float32: 6 GB."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """What was compared and what differed. `problems` is empty when the file is the checkpoint."""

    texts: int
    conversations: int
    tokens: int
    """How many ids were scored."""
    kld: float
    """Mean KL divergence of the file from the checkpoint, nats per token."""
    max_kld: float
    same_top: float
    checks: tuple[Check, ...]
    """All of the step "gguf"."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The sentences of the failed checks."""
        return tuple(check.said for check in failed(self.checks))


def compare(checkpoint: Path, gguf: Path, texts: Sequence[str] = ()) -> Exactness:
    """Compare a 16-bit checkpoint with a GGUF file made from it.

    `texts` are tokenized on both sides beside the built-in nasty ones, and the first few are scored.
    """
    from transformers import AutoTokenizer

    with Decoder(gguf) as decoder:
        checks = tokens.against_checkpoint(checkpoint, decoder, texts)
        ids = _probe(AutoTokenizer.from_pretrained(checkpoint), texts)
        exact = _weight_bytes(checkpoint) / 2 < FLOAT32_BELOW
        kld, same_top = _logits(checkpoint, decoder, ids, float32=exact)
    mean, limit = float(kld.mean()), MAX_KLD if exact else MAX_KLD_16BIT
    right = mean <= limit  # not so for NaN
    said = f"mean KL divergence {mean:.2e} over {len(ids)} tokens, {'at most' if right else 'more than'} {limit:.0e}"
    checks.append(Check(
        step="gguf", name=f"logits at {32 if exact else 16} bits", codes=("C-05", "C-38"), ok=right,
        said=said if right else f"the logits differ: {said}",
    ))  # fmt: skip
    return Exactness(
        texts=len(plain(texts)), conversations=len(chats(texts)), tokens=len(ids), kld=mean, max_kld=float(kld.max()),
        same_top=float(same_top.mean()), checks=tuple(checks),
    )  # fmt: skip


def _probe(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """About two hundred token ids to score: the caller's own texts first, then ordinary and odd ones."""
    text = "\n".join([*texts[:4], *NASTY[:24]])
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:224]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def _weight_bytes(checkpoint: Path) -> int:
    return sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))


def _logits(
    checkpoint: Path, decoder: Decoder, ids: list[int], *, float32: bool
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL(checkpoint || file) and same-top of every position, torch in float32 against llama.cpp."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32 if float32 else "auto"
    ).eval()
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()
    theirs = torch.from_numpy(np.ascontiguousarray(decoder.logits(ids))).double().log_softmax(-1).numpy()
    width = min(ours.shape[1], theirs.shape[1])
    ours, theirs = ours[:, :width], theirs[:, :width]
    kld = (np.exp(ours) * (ours - theirs)).sum(axis=1)
    return np.maximum(kld, 0.0), ours.argmax(axis=1) == theirs.argmax(axis=1)
