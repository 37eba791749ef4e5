"""Checkpoints as llama.cpp's converter expects them: what is missing from a config is added, and said.

transformers 5 no longer writes some keys that equal their default or have an alias; the converter reads the JSON
file and stumbles. Nothing is changed that is there: a repair adds a key whose value the config already implies.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Config = dict[str, Any]


def repair(folder: Path) -> list[str]:
    """Add missing keys to `folder/config.json`; returns one sentence for each, and logs it."""
    path = folder / "config.json"
    config: Config = json.loads(path.read_text(encoding="utf-8"))
    said = []
    rule = _RULES.get(str(config.get("model_type")))
    for key, value in rule(config).items() if rule else ():
        if key not in config and value is not None:
            config[key] = value
            said.append(
                f"config.json: added {key} = {value!r}, which the converter reads and the checkpoint left out"
            )
    if said:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for sentence in said:
        log.warning("%s", sentence)
    return said


def _gpt2(config: Config) -> Config:
    return {
        "n_ctx": config.get("n_positions", 1024),
        "n_positions": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
    }


def _gpt_neox(config: Config) -> Config:
    rope = config.get("rope_parameters") or {}
    return {
        "rotary_pct": rope.get("partial_rotary_factor", 0.25),
        "rotary_emb_base": rope.get("rope_theta", 10000),
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
    }


_RULES: dict[str, Callable[[Config], Config]] = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}
