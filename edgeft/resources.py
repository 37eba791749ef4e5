"""Where the files that ship beside the code are: recipes/, targets/, vendor/.

In a checkout they stand next to the package; an installed wheel carries them inside it.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder `recipes`, `targets` or `vendor`. Raises FileNotFoundError for a broken installation."""
    for root in (_PACKAGE / "shipped", _PACKAGE.parent):
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"edgeft's own folder {name}/ is missing beside {_PACKAGE}")


def cache() -> Path:
    """The per-user folder for what is fetched and built once a machine: $EDGEFT_CACHE, else XDG's.

    Not created here.
    """
    if own := os.environ.get("EDGEFT_CACHE"):
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "edgeft"
