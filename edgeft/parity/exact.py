"""Is a GGUF file the checkpoint it was made from? Token ids, template, special ids, and logits of the same ids.

These are exact questions, asked before any quantization: a converted file that fails one of them is not the model that
was trained, however small its perplexity.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.checkpoint.dequantize import chat_template
from edgeft.llamacpp.decode import Decoder
from edgeft.parity.corpus import CONVERSATIONS, NASTY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

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
    kld: float
    max_kld: float
    same_top: float
    problems: tuple[str, ...]


def compare(checkpoint: Path, gguf: Path, texts: Sequence[str] = ()) -> Exactness:
    """Compare a 16-bit checkpoint with a GGUF file made from it.

    `texts` are tokenized on both sides beside the built-in nasty ones, and the first few are scored.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with Decoder(gguf) as decoder:
        problems = [
            *_vocabulary(tokenizer, decoder),
            *_token_ids(tokenizer, decoder, [*NASTY, *texts]),
            *_template(tokenizer, checkpoint, decoder),
        ]
        ids = _probe(tokenizer, texts)
        exact = _weight_bytes(checkpoint) / 2 < FLOAT32_BELOW
        limit = MAX_KLD if exact else MAX_KLD_16BIT
        kld, same_top = _logits(checkpoint, decoder, ids, float32=exact)
    mean = float(kld.mean())
    if not mean <= limit:
        problems.append(
            f"the logits differ: mean KL divergence {mean:.2e} over {len(ids)} tokens, more than {limit:.0e}"
        )
    return Exactness(
        texts=len(NASTY) + len(texts), conversations=len(CONVERSATIONS), tokens=len(ids), kld=mean,
        max_kld=float(kld.max()), same_top=float(same_top.mean()), problems=tuple(problems),
    )  # fmt: skip


def _token_ids(tokenizer: Any, decoder: Decoder, texts: Sequence[str]) -> list[str]:
    """C-26: llama.cpp's tokenizer is a reimplementation. The first difference is shown."""
    for text in texts:
        ours = tokenizer.encode(text, add_special_tokens=False)
        theirs = decoder.tokenize(text, add_special=False, parse_special=True)
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            return [
                (
                    f"the tokenizers disagree on {text[:60]!r}: at token {at} transformers has {ours[at : at + 4]}, "
                    f"llama.cpp {theirs[at : at + 4]}"
                )
            ]
    return []


def _vocabulary(tokenizer: Any, decoder: Decoder) -> list[str]:
    problems = []
    highest = max(tokenizer.get_vocab().values())
    if decoder.n_vocab <= highest:
        problems.append(
            f"the file has {decoder.n_vocab} vocabulary rows; the tokenizer's highest id is {highest}"
        )
    pairs = (
        ("end-of-sequence", tokenizer.eos_token_id, decoder.eos),
        ("begin-of-sequence", tokenizer.bos_token_id, decoder.bos),
    )
    for name, ours, theirs in pairs:
        if ours is not None and theirs not in (ours, -1, None):
            problems.append(f"the {name} id is {theirs} in the file and {ours} in the checkpoint")
    if tokenizer.eos_token_id is not None and decoder.eos in (-1, None):
        problems.append(f"the file has no end-of-sequence id; the checkpoint has {tokenizer.eos_token_id}")
    return problems


def _template(tokenizer: Any, checkpoint: Path, decoder: Decoder) -> list[str]:
    """C-17, C-20: the file must carry the template that was trained, to the byte, and render the same ids."""
    ours, theirs = chat_template(checkpoint), decoder.chat_template or ""
    if ours != theirs:
        what = (
            "carries no chat template" if not theirs else "carries another chat template than the checkpoint"
        )
        return [f"the file {what} ({len(theirs)} characters, {len(ours)} expected)"]
    for conversation in CONVERSATIONS if ours else ():
        try:
            text = tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=True
            )
        except Exception as e:  # noqa: BLE001  a template may refuse a shape; then the runtime's Jinja refuses it as well
            log.debug("the template refuses %s: %s", [m["role"] for m in conversation], e)
            continue
        if problem := _token_ids(tokenizer, decoder, [text]):
            return problem
    return []


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
