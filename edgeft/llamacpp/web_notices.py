"""Whose work is in the web chat: the licence of every npm package that the page was made of, in one text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeft.errors import ToolError

_PACKAGE = re.compile(r".*node_modules/(?:@[^/]+/)?[^/]+(?=/)")
_TEXTS = ("license", "licence", "copying", "notice", "unlicense")


def notices(ui: Path, files: Iterable[str], *, licence: Path) -> str:
    """The notices for a page made of `files`, relative to the folder `ui`; `licence` is that of the page's own source.

    Raises ToolError when a package neither brings a text nor names a licence.
    """
    packages = sorted({m[0] for name in files if (m := _PACKAGE.match(name))})
    vendors = ui / "src" / "lib" / "vendors"
    own = [("llama.cpp, tools/ui", "https://github.com/ggml-org/llama.cpp", "MIT", _read([licence]))]
    carried = [_carried(path) for path in sorted(vendors.iterdir()) if path.is_dir()]
    found = [*own, *carried, *sorted({_package(ui / name) for name in packages})]
    texts: dict[str, list[str]] = {}
    for name, address, terms, text in found:
        texts.setdefault(text, []).append(f"{name}  {terms}  {address}".strip())
    head = [
        "The web chat of llama-server, and the packages that the page was made of, each with its licence.",
        "What a package has packed into itself of others is not taken apart here.",
    ]
    parts = ["\n".join(head)]
    for text, names in sorted(texts.items(), key=lambda item: item[1]):
        parts.append("\n".join([*names, "", text or "(brings no text of its own)"]))
    return f"\n\n{'-' * 78}\n".join(parts) + "\n"


def _package(folder: Path) -> tuple[str, str, str, str]:
    about = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    terms, text = _terms(about), _read(_texts(folder))
    if not terms and not text:
        raise ToolError(f"the npm package {about['name']} {about['version']} says nothing about its licence")
    return f"{about['name']} {about['version']}", _address(about), terms or "see below", text


def _carried(folder: Path) -> tuple[str, str, str, str]:
    text = _read(_texts(folder))
    if not text:
        raise ToolError(f"{folder.name}, which llama.cpp's web chat carries, has no licence beside it")
    return folder.name, "", "see below", text


def _texts(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().startswith(_TEXTS))


def _read(paths: Iterable[Path]) -> str:
    return "\n\n".join(
        path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip() for path in paths
    )


def _terms(about: dict[str, Any]) -> str:
    """`license` is a string (SPDX); old packages have an object, or a list of them as `licenses`."""
    said = about.get("license") or about.get("licenses") or ""
    several = said if isinstance(said, list) else [said]
    return " or ".join(str(one.get("type", "")) if isinstance(one, dict) else str(one) for one in several)


def _address(about: dict[str, Any]) -> str:
    said = about.get("homepage") or about.get("repository") or ""
    address = said.get("url", "") if isinstance(said, dict) else str(said)
    return re.sub(r"^git\+|^git:(?=//)|\.git$", "", address)
