"""Runs a pinned converter of llama.cpp so that it sees every key of config.json. A program of its own, not imported.

The converter asks transformers for the config, and transformers 5 drops keys it has moved elsewhere (GPT-NeoX's
`rotary_pct`), although the file has them. What transformers says stays; what it left out is taken from the file.

    python converter.py LLAMA_CPP_TREE convert_hf_to_gguf.py|convert_lora_to_gguf.py ITS_ARGUMENTS …
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Patch one function of the converter, then run it as it stands."""
    tree = sys.argv[1]
    sys.path.insert(0, tree)
    base: Any = importlib.import_module("conversion.base").ModelBase
    original = base.load_hparams

    def load_hparams(folder: Path, is_mistral_format: bool) -> dict[str, Any]:
        config: dict[str, Any] = original(folder, is_mistral_format)
        file = Path(folder) / "config.json"
        own = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {**{key: value for key, value in own.items() if key not in config}, **config}

    base.load_hparams = staticmethod(load_hparams)
    sys.argv = [str(Path(tree) / sys.argv[2]), *sys.argv[3:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
