"""A folder that another runtime than llama.cpp serves, as a speaker: which formats there are, and who speaks for each.

A session is the runtime itself, reading the folder as a server would. A new format is one line in RUNTIMES and one in
`format_of`; what a session must offer stands in `Session`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from edgeft.errors import DataError, SetupError
from edgeft.llamacpp import score
from edgeft.parity.speakers import Reply

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAMES = {"awq": "AWQ", "onnx": "ONNX"}
"""What a format is called."""


class Session(Protocol):
    """A runtime that has a folder open."""

    n_vocab: int

    @property
    def said(self) -> str:
        """Who speaks, with version and device: "ONNX Runtime GenAI 0.18.0, CPU"."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(ids), n_vocab] after each token."""
        ...

    def generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], bool]:
        """Greedy ids without the token that ended them, and whether one did."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text: special tokens are read, none is added."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """A chat by the runtime's own template engine, ready to be answered; None where it has none of its own."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...


class Served:
    """A session as a Speaker: windows are read whole, and their second half is scored as everywhere."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.n_vocab = session.n_vocab

    def logits(self, window: Sequence[int]) -> NDArray[np.float32]:
        """As Speaker.logits."""
        import numpy as np

        rows = self.session.logits(window)[score.first_scored(len(window)) : len(window) - 1]
        return np.ascontiguousarray(rows, np.float32)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> Reply:
        """As Speaker.answer."""
        ids, stopped = self.session.generate(prompt, max_tokens)
        return Reply(ids=ids, text=self.session.detokenize(ids).strip(), stopped=stopped)


def open_served(kind: str, folder: Path, *, n_ctx: int, runtime: str = "auto") -> Session:
    """Open a folder of the format `kind` in its runtime, for sequences of up to `n_ctx` tokens.

    Raises SetupError when there is no such runtime here, DataError for a folder that it cannot read.
    """
    found: Session = RUNTIMES[kind][which(kind, runtime)](folder, n_ctx)
    return found


def which(kind: str, runtime: str = "auto") -> str:
    """The name of the runtime that will speak for a format; "auto" is the first one that can be started.

    Raises SetupError when that cannot be started, or there is no such runtime for the format.
    """
    return _first(kind, _wanted(kind, runtime))


def insist(kind: str, runtime: str = "auto") -> None:
    """Raise SetupError when `which` would. Asks the last one first: vLLM's interpreter takes a second to answer."""
    _first(kind, _wanted(kind, runtime)[::-1])


def _wanted(kind: str, runtime: str) -> list[str]:
    choices = list(RUNTIMES[kind])
    if runtime != "auto" and runtime not in choices:
        raise SetupError(
            f"{NAMES[kind]} folders are not scored by {runtime!r}", hint=f"choose from {', '.join(choices)}"
        )
    return choices if runtime == "auto" else [runtime]


def _first(kind: str, names: Sequence[str]) -> str:
    missing = []
    for name in names:
        if not (why := MISSING[name]()):
            return name
        missing.append(why)
    raise SetupError(f"nothing here can score {NAMES[kind]} folders", hint="; ".join(missing))


def format_of(folder: Path) -> str:
    """The format of a folder that ships: "awq" or "onnx". Raises DataError with what is missing for any other."""
    if (folder / "genai_config.json").is_file():
        return "onnx"
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} has neither genai_config.json nor config.json",
            hint="an ONNX folder is served by ONNX Runtime GenAI, which needs its genai_config.json"
            if list(folder.glob("*.onnx")) else "give a .gguf file, or the folder that a server is pointed at",
        )  # fmt: skip
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantized = config.get("quantization_config") or {}
    method = str(quantized.get("quant_method", ""))
    if not quantized:
        raise DataError(
            f"{folder} is a checkpoint; a certificate is about what ships",
            hint="name the checkpoint as reference, or with --via, and the .gguf file or the AWQ or ONNX folder last",
        )
    if method == "awq":
        return "awq"
    if method != "compressed-tensors":
        raise DataError(
            f"{folder} is quantized by {method or 'a method without a name'}; folders are certified when they are AWQ or ONNX",
            hint="what is missing for it is a session that gives the logits of every token as its server computes them, and "
            "a reader of its packed weights",
        )  # fmt: skip
    if (packing := str(quantized.get("format", ""))) != "pack-quantized":
        raise DataError(
            f"{folder} holds compressed-tensors weights in the format {packing or 'without a name'}",
            hint='what is read is "pack-quantized": whole numbers of a few bits in groups, as AWQ has them',
        )
    return "awq"


def _onnx(folder: Path, n_ctx: int) -> Session:
    from edgeft.onnx.session import Session as Onnx

    session = Onnx(folder)
    if session.context < n_ctx:
        session.close()
        raise DataError(f"{folder.name} was made for {session.context} tokens, and {n_ctx} are to be read")
    return session


def _transformers(folder: Path, n_ctx: int) -> Session:
    from edgeft.awq.session import Session as Awq

    found: Session = Awq(folder)
    return found


def _vllm(folder: Path, n_ctx: int) -> Session:
    from edgeft.servers import open_vllm

    found: Session = open_vllm(folder, context=n_ctx)
    return found


def _no_onnx() -> str:
    return _absent("onnxruntime_genai", "onnx")


def _no_transformers() -> str:
    return _absent("transformers", "train")


def _no_vllm() -> str:
    from edgeft.servers import available

    return "" if available("vllm") else "vLLM cannot be started here: docs/servers.md says how to install it"


def _absent(module: str, extra: str) -> str:
    from importlib.util import find_spec

    return "" if find_spec(module) else f"pip install 'edgeft[{extra}]'"


Opener = Callable[[Path, int], Any]
RUNTIMES: dict[str, dict[str, Opener]] = {
    "awq": {"vllm": _vllm, "transformers": _transformers},
    "onnx": {"onnxruntime": _onnx},
}
"""Who can speak for a format, the one that serves it first."""
MISSING: dict[str, Callable[[], str]] = {
    "vllm": _no_vllm,
    "transformers": _no_transformers,
    "onnxruntime": _no_onnx,
}
"""What to do where a runtime cannot be started; "" where it can. Nothing is imported to know it."""
