"""Which sequence numbers were given to which contents: two devices must never hold different things under one number."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import DataError, SetupError
from edgeft.updates import disk

FILE = "issued.json"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A folder of keys' list of what was issued, held by this process alone."""

    path: Path
    issued: dict[str, dict[str, Any]]
    """Model -> sequence (as text) -> what it is."""

    def sequence(self, name: str, contents: str, *, wanted: int = 0, above: int = 0) -> int:
        """The number for these contents of a model: the one they have, else the next one that is also over `above`.

        Raises SetupError when the `wanted` number belongs to other contents.
        """
        known = {int(number): entry["contents"] for number, entry in self.issued.get(name, {}).items()}
        if wanted:
            if known.get(wanted, contents) != contents:
                raise SetupError(
                    f"sequence {wanted} of {name} was given to other contents already",
                    hint=f"the next free one is {max(known) + 1}",
                )
            return wanted
        last = max(known, default=0)
        return last if last > above and known[last] == contents else max(last, above) + 1

    def note(self, name: str, sequence: int, entry: Mapping[str, Any]) -> None:
        """Write down what a number was given to."""
        self.issued.setdefault(name, {})[str(sequence)] = dict(entry)
        disk.write(self.path, (json.dumps(self.issued, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def held(folder: Path) -> Iterator[Ledger]:
    """The ledger of a folder of keys; others wait. Raises DataError when its file is damaged."""
    path = folder / FILE
    with (folder / f".{FILE}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            issued = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            _ = [int(number) + len(e["contents"]) for given in issued.values() for number, e in given.items()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path} is damaged: {error}",
                hint="it says which numbers are taken: restore it, or delete it and give --sequence by hand",
            ) from None
        yield Ledger(path=path, issued=issued)


def fingerprint(label: str, files: Mapping[str, str]) -> str:
    """What a number stands for: the label, and name and sha256 of every file of the version."""
    lines = [label, *(f"{name}\t{sha256}" for name, sha256 in sorted(files.items()))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
