"""One exact question about a file, and its answer. The questions themselves stand in the modules beside this one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Step = Literal["text", "trained", "merged", "gguf", "quantized", "served"]
"""The steps from text to device, in order. A check is named after the step that made what it looks at."""

STEPS: tuple[Step, ...] = ("text", "trained", "merged", "gguf", "quantized", "served")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A question that is answered by yes or no, without statistics."""

    step: Step
    """Which step is at fault when the answer is no."""
    name: str
    """Two or three words, such as "token ids"."""
    codes: tuple[str, ...]
    """The known failures it looks for: C-01 to C-51, docs/certificate.md."""
    ok: bool | None
    """None when it could not be asked; then `said` says why."""
    said: str
    """One sentence: what was compared, or what is wrong, with the offending value."""

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Check:
        """The check that `facts()` described."""
        return cls(**{**facts, "codes": tuple(facts["codes"])})


def failed(checks: Iterable[Check]) -> list[Check]:
    """The checks that were answered with no, earliest step first."""
    return sorted((c for c in checks if c.ok is False), key=lambda c: STEPS.index(c.step))
