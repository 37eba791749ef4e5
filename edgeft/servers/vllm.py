"""A model folder as vLLM runs it: its logits, its answers, its tokenizer, its template.

vLLM runs in its own interpreter (`find.py`), in one process with the model, and answers over a socket that nobody else can reach
(`program.py`). It ends with this process.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from edgeft.errors import EdgeftError, SetupError, StageError
from edgeft.servers.find import Found, clean_environment, find
from edgeft.tool import Background, background

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = ("auto", "float16", "bfloat16", "float32")
_PATIENCE = 1800.0
"""Seconds to load a model before it counts as stuck."""
_LONGEST_SOCKET = 90
"""A path longer than 107 bytes is no address of a Unix socket."""


def open_vllm(folder: Path, *, context: int, dtype: str = "auto", log: Path | None = None) -> Session:
    """As `Session`, with the vLLM that this machine has."""
    return Session(folder, context=context, dtype=dtype, log=log)


class Session:
    """A model folder opened by vLLM, until `close`. To be closed in the thread that opened it.

    folder: config.json, tokenizer and weights, in 16 bits or AWQ. context: tokens of the longest prompt with its answer.
    dtype: what it computes in; "auto" is what config.json says. log: where what vLLM says is appended; without it a
    temporary file, which stays only when vLLM fails.

    Raises SetupError where no vLLM is installed, and StageError, with vLLM's own reason, when it cannot load the folder.
    """

    said: str
    """What computes: `vLLM 0.32.0, CPU, float16`."""
    n_vocab: int

    def __init__(
        self,
        folder: Path,
        *,
        context: int,
        dtype: str = "auto",
        log: Path | None = None,
        server: Found | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise SetupError(f"vLLM does not compute in {dtype!r}", hint=f"choose from {', '.join(DTYPES)}")
        server = server or find("vllm")
        self.context, self.folder = context, folder
        self._own_log = log is None
        self.log = (log or _temporary()).absolute()
        self._open = ExitStack()
        try:
            self._start(server, dtype)
        except BaseException:
            self._open.close()
            raise
        self.said = f"{server.said}, {self.about['device']}, {self.about['dtype']}"
        self.n_vocab = int(self.about["n_vocab"])

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[tokens, vocabulary] float32: what vLLM's model says after each token, before anything is sampled."""
        import numpy as np

        found = self._ask({"do": "logits", "ids": _plain(ids)})
        rows = np.empty(found["shape"], dtype=np.float32)
        self._receive(rows)
        return rows

    def generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], bool]:
        """The most probable tokens after a prompt, without the one that ends the answer, and whether it ended by itself."""
        found = self._ask({"do": "generate", "ids": _plain(prompt), "max_tokens": int(max_tokens)})
        return list(found["ids"]), bool(found["ended"])

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as vLLM's tokenizer reads it: special tokens in it are read, none is added."""
        return list(self._ask({"do": "tokenize", "text": text})["ids"])

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._ask({"do": "detokenize", "ids": _plain(ids)})["text"])

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The prompt that the chat endpoint makes of a conversation. None: the folder has no template."""
        text: str | None = self._ask({"do": "render", "messages": [dict(m) for m in messages]})["text"]
        return text

    def close(self) -> None:
        """End vLLM. Closing twice does nothing."""
        self._open.close()
        if self._own_log:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, server: Found, dtype: str) -> None:
        """Start the program, wait until it calls, and until it says what it loaded."""
        place = Path(
            self._open.enter_context(tempfile.TemporaryDirectory(prefix="edgeft-vllm-", dir=_short()))
        )
        program = Path(shutil.copy(Path(__file__).with_name("program.py"), place / "edgeft_vllm.py"))
        door = self._open.enter_context(socket.socket(socket.AF_UNIX))
        door.bind(os.fspath(place / "socket"))
        door.listen(1)
        settings = {
            "socket": os.fspath(place / "socket"), "folder": os.fspath(self.folder.absolute()), "dtype": dtype,
            "context": self.context, "log": os.fspath(self.log),
        }  # fmt: skip
        self.log.parent.mkdir(parents=True, exist_ok=True)
        argv = [os.fspath(server.python), os.fspath(program), json.dumps(settings)]
        # One process with the model in it, so that its logits can be heard. A prompt as long as the model was trained for
        # may be asked, although vLLM counts the token after it. Nothing is compiled for a session that is soon over.
        environment = clean_environment(
            VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1", VLLM_LOGGING_LEVEL="INFO",
            TORCHDYNAMO_DISABLE="1", TMPDIR=os.fspath(place),
        )  # fmt: skip
        self._process: Background = self._open.enter_context(background(argv, env=environment))
        line = self._open.enter_context(self._accept(door))
        self._file: Any = self._open.enter_context(line.makefile("rwb"))
        self.about = self._hear()

    def _accept(self, door: socket.socket) -> socket.socket:
        until = time.monotonic() + _PATIENCE
        door.settimeout(0.2)
        while True:
            try:
                line, _ = door.accept()
            except TimeoutError:
                if not self._process.running:
                    raise self._process.failure("ended before it began") from None
                if time.monotonic() > until:
                    raise self._failed("did not start") from None
            else:
                line.settimeout(_PATIENCE)
                return line

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._file.write(json.dumps(request).encode() + b"\n")
        try:
            self._file.flush()
        except OSError:
            raise self._failed(self._how_it_ended()) from None
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        try:
            text = self._file.readline()
        except TimeoutError:
            raise self._failed("has not answered for half an hour") from None
        except OSError:
            text = b""
        if not text:
            raise self._failed(self._how_it_ended())
        found: dict[str, Any] = json.loads(text)
        if "error" in found:
            what = "cannot load" if found["at"] == "loading" else "could not answer about"
            raise self._failed(f"{what} {self.folder}: {_one_line(found['error'])}")
        return found

    def _receive(self, rows: NDArray[np.float32]) -> None:
        space = memoryview(rows.reshape(-1).view("u1").data)
        while space:
            try:
                got = self._file.readinto(space)
            except OSError:
                got = 0
            if not got:
                raise self._failed("ended in the middle of an answer")
            space = space[got:]

    def _how_it_ended(self) -> str:
        """In words, once it has hung up."""
        until = time.monotonic() + 5
        while self._process.running and time.monotonic() < until:
            time.sleep(0.05)
        code = self._process.process.poll()
        if code is None:
            return "hung up without an answer"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name} (out of memory, most often)"
        return f"ended with status {code} instead of answering"

    def _failed(self, why: str) -> EdgeftError:
        self._own_log = False  # it is worth reading now
        return StageError(f"vLLM {why}", hint=f"the whole story is in {self.log}")


def _one_line(error: str) -> str:
    """The sentence that says why, of an error that vLLM may spread over a page. pydantic's puts it after `Value error,`."""
    text = " ".join(error.split())
    if "Value error, " in text:
        text = text.partition("Value error, ")[2].partition(" [type=")[0]
    return text if len(text) <= 400 else text[:400] + " …"


def _plain(ids: Sequence[int]) -> list[int]:
    return [int(i) for i in ids]


def _short() -> str | None:
    """A folder for the socket, where the usual one for temporary files is too deep."""
    return "/tmp" if len(tempfile.gettempdir()) + 40 > _LONGEST_SOCKET else None


def _temporary() -> Path:
    handle, name = tempfile.mkstemp(prefix="edgeft-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)
