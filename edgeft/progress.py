"""How a running stage says how far it is, without knowing who listens.

A stage calls `report(...)`; whoever runs the stage installs a sink with `listen(...)`. Without a sink a report
goes nowhere. A report is small and picklable, because a heavy stage runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One report: what is being done, how far, and numbers worth a curve (`{"loss": 2.1}`)."""

    what: str
    done: float = 0.0
    total: float = 0.0
    """0 when unknown."""
    unit: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


Sink = Callable[[Progress], None]

_sink: Sink | None = None


def report(
    what: str, done: float = 0, total: float = 0, *, unit: str = "", numbers: dict[str, float] | None = None
) -> None:
    """Tell the listener, if there is one. `done` and `total` are in `unit`; `total` 0 means unknown."""
    if _sink is not None:
        _sink(Progress(what=what, done=done, total=total, unit=unit, numbers=numbers or {}))


@contextmanager
def listen(sink: Sink) -> Iterator[None]:
    """Send every report made inside the block to `sink`."""
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before
