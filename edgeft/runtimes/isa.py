"""Instruction sets as compilers write them, "armv8.2-a+dotprod" or "x86-64-v3", and which of them contains which."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeft.errors import DataError

_LEVELS = {
    "arm64": re.compile(r"armv([89])(?:\.(\d))?-a$"),
    "amd64": re.compile(r"x86-64(?:-v([234]))?$"),
}
_COMES_WITH = {
    (8, 1): {"crc", "lse", "rdma"},
    (8, 3): {"rcpc"},
    (8, 4): {"dotprod", "flagm"},
    (8, 5): {"sb", "ssbs", "predres"},
    (8, 6): {"bf16", "i8mm"},
    (9, 0): {"sve", "sve2"},
}
"""Extensions that a level of the Arm architecture always has: GCC's manual, "AArch64 Options", -march."""
_ENABLES = {"sve2": {"sve"}, "sve": {"fp16"}, "fp16fml": {"fp16"}}
"""Extensions that an extension cannot be without; the same page."""


@dataclass(frozen=True, kw_only=True)
class Isa:
    """A processor's instructions, or those that a program may use."""

    arch: str
    """arm64 or amd64."""
    level: tuple[int, int]
    """The Arm architecture's version; (n, 0) for x86-64-vn, with 1 for x86-64."""
    extensions: frozenset[str]
    """By the compiler's names, with those that the level or another extension brings."""

    @classmethod
    def parse(cls, arch: str, text: str) -> Isa:
        """Raises DataError for an architecture or a level that is not known. Extensions are not looked up."""
        if arch not in _LEVELS:
            raise DataError(f"arch {arch!r} is not known; known are {', '.join(sorted(_LEVELS))}")
        base, *extensions = text.split("+")
        found = _LEVELS[arch].match(base)
        if not found or not all(
            re.fullmatch(r"[a-z0-9._-]+", e) and not e.startswith("no") for e in extensions
        ):
            example = {"arm64": "armv8.2-a+dotprod", "amd64": "x86-64-v3"}[arch]
            raise DataError(f"isa {text!r} is no level of {arch} with +extensions; one looks like {example}")
        if arch == "amd64":
            return cls(arch=arch, level=(int(found[1] or 1), 0), extensions=frozenset(extensions))
        level = int(found[1]), int(found[2] or 0)
        return cls(arch=arch, level=level, extensions=_with_implied(level, set(extensions)))

    def runs_on(self, device: Isa) -> bool:
        """Whether a program that may use all of this runs on `device`."""
        if self.arch != device.arch:
            return False
        return _reached(self.level, device.level) and self.extensions <= device.extensions


def _with_implied(level: tuple[int, int], extensions: set[str]) -> frozenset[str]:
    for since, names in _COMES_WITH.items():
        if _reached(since, level):
            extensions |= names
    for name, names in _ENABLES.items():
        if name in extensions:
            extensions |= names
    return frozenset(extensions)


def _reached(wanted: tuple[int, int], level: tuple[int, int]) -> bool:
    """Armv9.n contains Armv8.(n + 5), and no v8 contains v9."""
    if wanted[0] == 8 and level[0] == 9:
        level = (8, level[1] + 5)
    return wanted <= level
