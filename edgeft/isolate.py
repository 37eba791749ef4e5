"""Runs a heavy stage in a process of its own, so that its memory, its GPU and its imports end with it.

The child sends its progress and warnings through a pipe, keeps its log in a file, dies with its parent, and leaves
Ctrl-C to the parent.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.errors import EdgeftError, StageError
from edgeft.stage import Facts, Job, Stage
from edgeft.tool import die_with_parent

log = logging.getLogger(__name__)


def isolated(stage: Stage[Any], job: Job[Any], log_file: Path, sink: progress.Sink) -> Facts:
    """Run `stage.run(job)` in a fresh interpreter and return its facts.

    Raises the stage's own EdgeftError, or StageError when it failed otherwise or was killed.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, stage.run, job, log_file), daemon=False)
    process.start()
    there.close()
    try:
        result = _listen(here, sink)
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    if isinstance(result, Exception):
        raise result
    if result is None:
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "most often: out of memory" if code == -signal.SIGKILL else f"the end of its log: {log_file}"
        raise StageError(f"{stage.id} {how} before it was done", hint=hint)
    return dict(result)


def here(stage: Stage[Any], job: Job[Any], log_file: Path, sink: progress.Sink) -> Facts:
    """Run a light stage in this process."""
    with log_to(log_file), progress.listen(sink):
        return stage.run(job)


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Append everything edgeft logs inside the block to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("edgeft")
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        handler.close()


def _listen(pipe: Connection, sink: progress.Sink) -> Any:
    """Hand on what the child says until it returns, raises (an exception object) or dies (None)."""
    while True:
        try:
            kind, value = pipe.recv()
        except EOFError:
            return None
        if kind == "progress":
            sink(value)
        elif kind == "warning":
            log.warning("%s", value)
        else:
            return value


def _child(pipe: Connection, run: Callable[[Job[Any]], Facts], job: Job[Any], log_file: Path) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _say_into(log_file)
    _wait_without_spinning()
    logging.getLogger("edgeft").addHandler(_Forward(pipe))
    with log_to(log_file), progress.listen(lambda p: pipe.send(("progress", p))):
        try:
            pipe.send(("facts", run(job)))
        except EdgeftError as e:
            log.debug("failed", exc_info=True)
            pipe.send(("error", _sendable(e)))
        except Exception as e:  # noqa: BLE001  whatever it is, the parent must hear of it
            log.error("%s", traceback.format_exc())
            text = f"{type(e).__name__}: {e}".strip()
            pipe.send(("error", StageError(text, hint=f"the whole story is in {log_file}")))


def _say_into(log_file: Path) -> None:
    """What libraries print, their progress bars and C code included, goes into the log instead of the screen."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ["TQDM_DISABLE"] = "1"


def _wait_without_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait for one another; read by libgomp when torch loads it.

    By default a waiting thread spins, which costs nothing on an idle machine and everything on a busy one: with two
    other processes on two cores, small products took 38 s instead of 2 s (benchmarks/waiting_threads.py).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _sendable(error: EdgeftError) -> EdgeftError:
    """The error itself when it survives pickling (one with its own arguments may not), else its words."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # noqa: BLE001  pickle raises what it likes
        log.debug("%s cannot be pickled", type(error).__name__)
    plain: EdgeftError = next(k for k in type(error).__mro__ if k.__module__ == "edgeft.errors")(str(error))
    plain.hint = error.hint
    return plain


class _Forward(logging.Handler):
    """Sends warnings to the parent, where the console shows them."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self.pipe.send(("warning", record.getMessage()))
