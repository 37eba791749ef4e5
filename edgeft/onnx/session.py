"""Runs an ONNX Runtime GenAI folder in this process: its own graph, its own tokenizer, its own chat template."""

from __future__ import annotations

import gc
import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from edgeft.errors import DataError, SetupError, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONFIG = "genai_config.json"
CUDA_LIBRARIES = "'onnxruntime-gpu[cuda]' 'nvidia-cublas~=13.0'"
"""For pip, beside onnxruntime-genai-cuda, which brings none of CUDA's libraries. The extra of onnxruntime-gpu 1.31 leaves out
cuBLAS, which its provider is linked with."""

Device = Literal["auto", "cpu", "cuda"]

log = logging.getLogger(__name__)


class Session:
    """A GenAI folder, open. A context manager; `close` frees the model.

    `device` "auto" computes a folder made for CUDA with CUDA where GenAI can, and everything else on the CPU; "cpu" and "cuda"
    insist, whatever the folder was made for. `said` tells which it is. On the CPU a folder made for CUDA or DirectML is the
    same graph with the same packed weights and 16-bit inputs and outputs.

    `context` is the longest sequence in tokens (0: what the model was trained for). `threads` 0: as many as ONNX Runtime
    takes, which is one for each core. Raises DataError for a folder that is none or that GenAI cannot open, SetupError
    without GenAI or, where it is insisted on, without CUDA.
    """

    def __init__(self, folder: Path, *, context: int = 0, threads: int = 0, device: Device = "auto") -> None:
        self.folder, self._model, self._tokenizer = folder, None, None
        self._og = genai()
        config = read_config(folder)
        self.provider = provider(config)
        self.n_vocab = int(config["model"]["vocab_size"])
        longest = int(config["model"]["context_length"])
        self.context = min(context, longest) if context else longest
        window = config["model"]["decoder"].get("sliding_window", {}).get("window_size", 0)
        # A cache smaller than the window of windowed layers is refused by ONNX Runtime's attention.
        self._least = min(longest, window)
        ends = config["model"]["eos_token_id"]
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._renders = has_template(folder)
        try:
            self._model = self._with_cuda(threads, device)
            if self._model is None:
                self._model = self._open(threads)
            self._tokenizer = self._og.Tokenizer(self._model)
            # The text of a prompt brings its special tokens with it, and what a model says is looked at in full.
            self._tokenizer.update_options(add_special_tokens="false", skip_special_tokens="false")
        except (RuntimeError, ValueError) as e:
            self.close()
            raise DataError(f"ONNX Runtime GenAI cannot open {folder.name}/: {e}") from e
        where = str(self._model.device_type)
        made_for = "" if where.lower() == self.provider else f" (the folder is made for {self.provider})"
        self.said = f"ONNX Runtime GenAI {self._og.__version__}, {where}{made_for}"

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(ids), n_vocab] after each token of a sequence of its own.

        They are what the generator itself computes while it reads a prompt, bit for bit those of the same graph in an
        onnxruntime.InferenceSession (tests/onnx_genai/test_session.py).
        """
        import numpy as np

        generator = self._generator(len(ids), len(ids) + 1)
        generator.append_tokens(np.asarray(ids, dtype=np.int32))
        found: NDArray[np.float32] = generator.get_output("logits")[0].astype(np.float32, copy=False)
        if found.shape != (len(ids), self.n_vocab):
            raise StageError(
                f"{self.said} gave logits of shape {found.shape} for {len(ids)} tokens and {self.n_vocab} words"
            )
        return found

    def generate(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], bool]:
        """The greedy continuation without the token that ended it, and whether it ended by itself.

        Plain greedy: what genai_config.json says of sampling and of repetitions is set aside, as for every other
        runtime that is compared.
        """
        import numpy as np

        room = min(max_tokens, self.context - len(prompt))
        generator = self._generator(len(prompt), len(prompt) + room)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        out: list[int] = []
        while len(out) < room and not generator.is_done():
            generator.generate_next_token()
            out.append(int(generator.get_next_tokens()[0]))
            if out[-1] in self.ends:
                return out[:-1], True
        return out, False

    def tokenize(self, text: str) -> list[int]:
        """Ids by GenAI's own tokenizer: special tokens in the text are read, none is added."""
        assert self._tokenizer is not None
        return [int(i) for i in self._tokenizer.encode(text)] if text else []

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens spelled out."""
        import numpy as np

        assert self._tokenizer is not None
        return str(self._tokenizer.decode(np.asarray(ids, dtype=np.int32))) if ids else ""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        """The messages by GenAI's own template engine, with the start of the answer; None without a template.

        Raises DataError for what the template refuses or the engine cannot run.
        """
        assert self._tokenizer is not None
        if not self._renders:
            return None
        given = json.dumps([dict(m) for m in messages], ensure_ascii=False)
        try:
            return str(self._tokenizer.apply_chat_template(given, add_generation_prompt=True))
        except RuntimeError as e:
            raise DataError(f"ONNX Runtime GenAI cannot apply the chat template: {e}") from e

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._tokenizer = self._model = None
        gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _with_cuda(self, threads: int, device: Device) -> Any:
        """The model on the GPU; None where the CPU is to compute it. Raises SetupError where CUDA is insisted on and fails."""
        if device == "cpu" or (device == "auto" and self.provider != "cuda"):
            return None
        if not self._og.is_cuda_available():
            if device == "auto":
                return None
            raise SetupError(
                "the installed ONNX Runtime GenAI has no CUDA",
                hint="first pip uninstall onnxruntime-genai onnxruntime, which have files of the same names; then "
                f"pip install onnxruntime-genai-cuda {CUDA_LIBRARIES}",
            )
        _load_cuda()
        try:
            return self._open(threads, cuda=True)
        except RuntimeError as e:
            why = str(e).strip().partition("\n")[0]
            if device == "auto":
                log.warning("%s/ is made for CUDA and is computed by the CPU: %s", self.folder.name, why)
                return None
            raise SetupError(
                f"ONNX Runtime GenAI cannot compute {self.folder.name}/ with CUDA: {why}",
                hint=f"`edgeft doctor` shows the driver; pip install {CUDA_LIBRARIES} brings CUDA's libraries",
            ) from e

    def _open(self, threads: int, *, cuda: bool = False) -> Any:
        """The model, on the CPU or with `cuda`. What the folder says of CUDA's options holds; any other provider is left out."""
        wanted = self._og.Config(str(self.folder))
        if not (cuda and self.provider == "cuda"):
            wanted.clear_providers()
        if cuda:
            wanted.append_provider("cuda")
        if threads:
            wanted.overlay(_session_options(intra_op_num_threads=threads))
        return self._og.Model(wanted)

    def _generator(self, tokens: int, length: int) -> Any:
        """A generator with a cache for `length` tokens. Raises DataError for more than the model was made for."""
        if not tokens or tokens > self.context:
            raise DataError(f"{tokens} tokens do not go into a context of {self.context}")
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(
            max_length=max(min(length, self.context), self._least), min_length=0, do_sample=False, num_beams=1, repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )  # fmt: skip
        return self._og.Generator(self._model, params)


def genai() -> Any:
    """The module onnxruntime_genai, telling nobody that it is used. Raises SetupError where it is not installed."""
    try:
        import onnxruntime_genai
    except ImportError as e:
        raise SetupError(
            f"ONNX Runtime GenAI cannot be imported: {e}", hint="pip install 'edgeft[onnx]'"
        ) from e
    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def _load_cuda() -> None:
    """Load CUDA's libraries from NVIDIA's Python packages: GenAI itself looks only where the system's linker does.

    What is missing shows when the model is opened.
    """
    import onnxruntime

    with redirect_stdout(io.StringIO()):  # it prints what it did not find
        onnxruntime.preload_dlls(msvc=False)


def read_config(folder: Path) -> dict[str, Any]:
    """genai_config.json of a folder. Raises DataError where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{folder} is no ONNX Runtime GenAI folder: {CONFIG}: {e}") from e
    return found


def provider(config: Mapping[str, Any]) -> str:
    """The execution provider that genai_config.json asks for, in small letters: cpu, cuda, dml …"""
    asked = config["model"]["decoder"].get("session_options", {}).get("provider_options", [])
    return next((str(name).lower() for options in asked for name in options), "cpu")


def has_template(folder: Path) -> bool:
    """Whether GenAI finds a chat template in the folder: chat_template.jinja, or one in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text("utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def _session_options(**options: Any) -> str:
    return json.dumps({"model": {"decoder": {"session_options": options}}})
