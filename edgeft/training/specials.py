"""Whether a base ever learnt the special tokens of its chat template (C-51)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeft.training.rows import Row

log = logging.getLogger(__name__)

_FAR = 3.0


def untrained(model: Any, folder: Path, rows: Sequence[Row]) -> dict[str, float]:
    """Special tokens of the rows whose embedding looks untrained, with its norm over that of a typical token.

    Untrained rows keep the small norm they were initialized with, or one far off the rest: below a third or above
    three times the median norm of the ordinary tokens in the same rows. Warns of each.
    """
    import torch

    used = {token for row in rows for token in row.ids}
    special = {token: text for token, text in _special_tokens(folder).items() if token in used}
    ordinary = sorted(used - special.keys())
    if not special or not ordinary:
        return {}
    weight = model.get_input_embeddings().weight.detach()
    typical = weight[torch.tensor(ordinary, device=weight.device)].float().norm(dim=1).median().item()
    found = {}
    for token, text in sorted(special.items()):
        ratio = weight[token].float().norm().item() / max(typical, 1e-30)
        if not 1 / _FAR <= ratio <= _FAR:
            found[text] = round(ratio, 4)
            log.warning(
                "the embedding of the template's token %s has %.2f times the norm of a typical token: this base was "
                "probably never trained on its chat template; an instruct model would answer better", text, ratio,
            )  # fmt: skip
    return found


def _special_tokens(folder: Path) -> dict[int, str]:
    """Id and text of the added special tokens in tokenizer.json; nothing when the checkpoint has no such file."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {t["id"]: t["content"] for t in tokenizer.get("added_tokens", []) if t.get("special")}
