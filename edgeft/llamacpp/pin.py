"""Which llama.cpp edgeft uses: vendor/llama.cpp.toml as a value."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from edgeft.resources import folder


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What one part of the build consists of."""

    targets: tuple[str, ...]
    """What ninja is asked for."""
    files: tuple[str, ...]
    """What must then be in bin/."""
    cmake: Mapping[str, str] = field(default_factory=dict)
    """What differs from the pin's settings; a part with any is compiled in a tree of its own."""
    tree: str = ""
    """The name of that tree: the part's own, or of the part that this one is like."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What its template's {words} stand for: arch, isa … of a runtime."""

    @property
    def settings(self) -> str:
        """Short hash of `cmake`, which is not in the pin's id; the same on every machine."""
        return hashlib.sha256(json.dumps(sorted(self.cmake.items())).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The source package, what it must answer when asked who it is, and how it is configured."""

    package: str
    version: str
    sha256: str
    commit: str
    llama: str
    ggml: str
    cmake: Mapping[str, str]
    optimize_ggml: str
    """Compiler flags of ggml alone, in place of the configuration's release flags."""
    parts: Mapping[str, Targets]

    @cached_property
    def id(self) -> str:
        """Short, for cache keys and folder names: version, commit, and a hash of the flags."""
        flags = json.dumps([sorted(self.cmake.items()), self.optimize_ggml])
        return f"{self.version}-{self.commit[:9]}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


@cache
def load() -> Pin:
    """The pin that ships with this edgeft."""
    table = tomllib.loads((folder("vendor") / "llama.cpp.toml").read_text(encoding="utf-8"))
    templates, named = table.pop("templates"), table.pop("parts")
    parts = {name: _part(name, named, templates) for name in named}
    return Pin(parts=parts, optimize_ggml=table.pop("optimize")["ggml"], **table)


def _part(name: str, named: Mapping[str, Any], templates: Mapping[str, Any]) -> Targets:
    part, tree = dict(named[name]), name
    while (like := part.pop("like", None)) is not None:
        base, tree = (named[like], like) if like in named else (templates[like], tree)
        part = {**base, **part, "cmake": {**base.get("cmake", {}), **part.get("cmake", {})}}
    words = part.get("with", {})
    cmake = {key: _filled(value, words) for key, value in part.get("cmake", {}).items()}
    return Targets(
        targets=tuple(part["targets"]), files=tuple(part["files"]), cmake=cmake, tree=tree, words=words
    )


def _filled(text: str, words: Mapping[str, str]) -> str:
    """{words} replaced; those that `words` does not have are left to the build."""
    return re.sub(r"\{(\w+)\}", lambda found: words.get(found[1], found[0]), text)
