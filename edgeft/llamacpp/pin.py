"""Which llama.cpp edgeft uses: vendor/llama.cpp.toml as a value."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

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
    parts = {
        name: Targets(targets=tuple(part["targets"]), files=tuple(part["files"]), cmake=part.get("cmake", {}))
        for name, part in table.pop("parts").items()
    }
    return Pin(parts=parts, optimize_ggml=table.pop("optimize")["ggml"], **table)
