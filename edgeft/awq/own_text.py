"""Text that a model makes up when nobody asks it anything: what stands in for everything that the training text is not about.

Rounding that looks at training text alone keeps what was trained, and lets go of the rest (docs/awq.md has the numbers).
Self-calibration (arXiv 2410.17170) needs no corpus, no language and no licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft import progress

if TYPE_CHECKING:
    import torch

TOGETHER = 16
"""Windows that are written at once: their keys and values are in memory together."""


def write(
    checkpoint: Path, windows: int, length: int, *, device: str = "cpu", seed: int = 0
) -> list[list[int]]:
    """`windows` times `length` token ids, drawn one after the other from the model's own distribution.

    Each begins with an ordinary token taken at random (as in LLM-QAT, arXiv 2305.17888, section 3.1), never ends early, and is
    the same for the same seed, machine and number of threads.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not windows:
        return []
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    small = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")) < 3e9
    dtype = torch.float32 if small and device == "cpu" else torch.bfloat16
    where = device if device == "cpu" or _room(checkpoint) else "cpu"
    model = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, local_files_only=True).to(where).eval()
    )
    ordinary = sorted(
        set(range(len(tokenizer))) - set(tokenizer.all_special_ids) - set(tokenizer.added_tokens_decoder)
    )
    found: list[list[int]] = []
    with torch.random.fork_rng(devices=[where] if where != "cpu" else []), torch.inference_mode():
        torch.manual_seed(seed)
        while len(found) < windows:
            count = min(TOGETHER, windows - len(found))
            first = torch.randint(len(ordinary), (count, 1))
            ids = torch.tensor(ordinary)[first].to(where)
            found += _continued(model, ids, length, len(found), windows).tolist()
    return found


def _continued(model: Any, ids: torch.Tensor, length: int, done: int, windows: int) -> torch.Tensor:
    """The ids [n, 1], drawn on until they are [n, length]. No token that ends a text is drawn."""
    import torch

    said = model.generation_config.eos_token_id
    ends = said if isinstance(said, list) else [said] if said is not None else []
    past, last, out = None, ids, [ids]
    for at in range(1, length):
        progress.report("write own text", done * length + at * len(ids), windows * length, unit="tokens")
        given = model(input_ids=last, past_key_values=past, use_cache=True)
        past, logits = given.past_key_values, given.logits[:, -1].float()
        logits[:, ends] = -torch.inf
        last = torch.multinomial(logits.softmax(-1).cpu(), 1).to(ids.device)
        out.append(last)
    return torch.cat(out, 1)


def _room(checkpoint: Path) -> bool:
    """Whether the GPU holds the model in 16 bits and a third more for what is drawn."""
    import torch

    size = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    return bool(torch.cuda.mem_get_info()[0] > size * 4 / 3)
