"""Where the device step is run: an interface, and this machine as the simplest place, with or without an emulator."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeft.errors import SetupError
from edgeft.tool import run

EMULATOR = "qemu-aarch64-static"
EMULATED_CORE = "cortex-a76"


class Place(Protocol):
    """A shell and a folder."""

    @property
    def where(self) -> str:
        """ "local", "qemu" or "ssh"."""

    @property
    def before(self) -> tuple[str, ...]:
        """What stands before a program: the emulator."""

    def shell(self, script: str, watch: Callable[[str], None] = ...) -> str:
        """Run a POSIX script in the work folder; its output, of which `watch` sees every line at once.

        Raises ToolError when it fails.
        """

    def put(self, files: Mapping[str, Path]) -> None:
        """Make files appear in the work folder under these names. Names are the sha256 of their contents."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """This machine; files are linked, not copied."""

    folder: Path
    emulate: bool = False

    @property
    def where(self) -> str:
        return "qemu" if self.emulate else "local"

    @property
    def before(self) -> tuple[str, ...]:
        return (_emulator(), "-cpu", EMULATED_CORE) if self.emulate else ()

    def shell(self, script: str, watch: Callable[[str], None] = lambda line: None) -> str:
        return run(["sh", "-c", script], cwd=self.folder, watch=watch)

    def put(self, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / name).symlink_to(path.resolve())


@contextmanager
def here(*, emulate: bool = False) -> Iterator[Here]:
    """This machine, with a folder that is gone afterwards. Raises SetupError when the emulator is not installed."""
    if emulate:
        _emulator()
    with tempfile.TemporaryDirectory(prefix="edgeft-verify-") as folder:
        yield Here(folder=Path(folder), emulate=emulate)


def _emulator() -> str:
    if found := shutil.which(EMULATOR):
        return os.fspath(found)
    raise SetupError(f"{EMULATOR} is not installed", hint="sudo apt install qemu-user-static")
