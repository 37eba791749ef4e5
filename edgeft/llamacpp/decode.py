"""Runs one GGUF file in this process: tokens in, logits for every position out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from edgeft.errors import DataError, StageError, ToolError
from edgeft.llamacpp import runtime
from edgeft.llamacpp.adapter import check_base
from edgeft.llamacpp.threads import default_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray


class Decoder:
    """A model and one context over it. A context manager; `close` frees both.

    `n_ctx` is the longest sequence in tokens (0: what the model was trained for, at most 4096). `repack` lets
    ggml rearrange quantized weights for this processor; with and without it the same file's logits differ by
    the kernels' noise. `vocab_only` loads no weights: tokenizing works, decoding does not. `cb_eval` is ggml's
    callback for every node of the graph. `adapter` is a LoRA adapter (GGUF) made for this file, which adds its products
    `adapter_scale` times (0: the base alone). Raises DataError when the file is no model llama.cpp can load or the
    adapter is not for it, ToolError with llama.cpp's reason when there is no memory for it.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 0,
        threads: int = 0,
        repack: bool = True,
        gpu_layers: int = 0,
        vocab_only: bool = False,
        cb_eval: Callable[[int, bool], bool] | None = None,
        adapter: Path | None = None,
        adapter_scale: float = 1.0,
    ) -> None:
        self.path = path
        self.adapter = adapter
        self._c = runtime.native()
        self._context: Any = None
        self._model: Any = None
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        if adapter:
            check_base(path, adapter)
        with runtime.listening() as said:
            self._model = self._load(repack, gpu_layers, vocab_only)
        if not self._model:
            raise DataError(f"llama.cpp cannot load {path}: {runtime.complaint(said)}")
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._c.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = self._c.llama_model_n_ctx_train(self._model)
        self.n_ctx = n_ctx or min(self.n_ctx_train, 4096)
        self.threads = threads or default_threads()
        if not vocab_only:
            with runtime.listening() as said:
                self._context = self._open(cb_eval)
            if not self._context:
                reason = runtime.complaint(said)
                self.close()
                raise ToolError(f"llama.cpp cannot run {path} with a context of {self.n_ctx}: {reason}")
            if adapter:
                try:
                    runtime.add_adapter(self._model, self._context, adapter, adapter_scale)
                except DataError:
                    self.close()
                    raise

    def _load(self, repack: bool, gpu_layers: int, vocab_only: bool) -> Any:
        params = self._c.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = repack
        params.vocab_only = vocab_only
        return self._c.llama_model_load_from_file(os.fsencode(self.path), params)

    def _open(self, cb_eval: Callable[[int, bool], bool] | None) -> Any:
        params = self._c.llama_context_default_params()
        # One ubatch holds the whole sequence, so that a window is computed as llama-perplexity computes it.
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_ctx
        params.n_outputs_max = self.n_ctx
        params.n_threads = params.n_threads_batch = self.threads
        params.no_perf = True
        if cb_eval:
            watch = cb_eval
            self._callback = self._c.ggml_backend_sched_eval_callback(lambda node, ask, _: watch(node, ask))
            params.cb_eval = self._callback
        return self._c.llama_init_from_model(self._model, params)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model. Safe to call twice."""
        if self._context:
            self._c.llama_free(self._context)
            self._context = None
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None

    @property
    def add_bos(self) -> bool:
        """Whether the vocabulary asks for a beginning-of-sequence token."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int | None:
        return self._token(self._c.llama_vocab_bos)

    @property
    def eos(self) -> int | None:
        return self._token(self._c.llama_vocab_eos)

    @property
    def eot(self) -> int | None:
        """End of turn."""
        return self._token(self._c.llama_vocab_eot)

    @property
    def chat_template(self) -> str:
        """The file's Jinja template; "" when it has none."""
        return (self._c.llama_model_chat_template(self._model, None) or b"").decode()

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def meta(self, key: str) -> str | None:
        """A scalar or string key of the file, as text; None when it is absent (or an array)."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed: int = self._c.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if needed < size:
                return None if needed < 0 else buffer.value.decode()
            size = needed + 1

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids. `add_special` adds what the model wants at its ends (BOS, EOS); `parse_special` reads
        `<|im_start|>` and its kin as the tokens they name instead of as plain characters."""
        raw = text.encode()
        room = len(raw) + 16
        while True:
            ids = (self._c.llama_token * room)()
            count: int = self._c.llama_tokenize(
                self._vocab, raw, len(raw), ids, room, add_special, parse_special
            )
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of the ids; `special` spells out control tokens. Incomplete UTF-8 becomes U+FFFD."""
        tokens = (self._c.llama_token * len(ids))(*ids)
        room = 8 * len(ids) + 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count: int = self._c.llama_detokenize(self._vocab, tokens, len(ids), buffer, room, False, special)
            if count >= 0:
                return buffer.raw[:count].decode(errors="replace")
            room = -count

    def logits(self, ids: Sequence[int], *, first: int = 0) -> NDArray[np.float32]:
        """Logits [len(ids) - first, n_vocab] of a sequence of its own: the cache is cleared before it.

        Positions before `first` are computed without their logits, which is most of a small model's work.
        """
        self._clear()
        return self._decode(ids, start=0, first=first)

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation, without the end-of-generation token it stopped at."""
        self._clear()
        answer: list[int] = []
        row = self._decode(ids, start=0, first=len(ids) - 1)[0]
        while len(answer) < max_tokens:
            token = int(row.argmax())
            if self.is_end(token):
                break
            answer.append(token)
            if len(ids) + len(answer) >= self.n_ctx:
                break
            row = self._decode([token], start=len(ids) + len(answer) - 1, first=0)[0]
        return answer

    def _clear(self) -> None:
        if self._context is None:
            raise StageError(f"{self.path} is closed, or was opened for its vocabulary only")
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], *, start: int, first: int) -> NDArray[np.float32]:
        """Logits [len(ids) - first, n_vocab] of tokens that stand at positions start, start + 1, …"""
        import numpy as np

        if not 0 <= first < len(ids):
            raise StageError(f"no logits are left of {len(ids)} tokens from the {first}th on")
        if not 0 < start + len(ids) <= self.n_ctx:
            raise StageError(f"{start + len(ids)} tokens do not fit a context of {self.n_ctx}")
        if outside := [token for token in ids if not 0 <= token < self.n_vocab]:
            raise StageError(f"token {outside[0]} is not in the vocabulary of {self.n_vocab}")
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i >= first
            with runtime.listening() as said:
                failed = self._c.llama_decode(self._context, batch)
            if failed:
                raise ToolError(f"llama_decode returned {failed} on {self.path}: {runtime.complaint(said)}")
        finally:
            self._c.llama_batch_free(batch)
        rows = len(ids) - first
        flat = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), shape=(rows * self.n_vocab,))
        return flat.reshape(rows, self.n_vocab).copy()

    def _token(self, ask: Callable[[Any], int]) -> int | None:
        token = ask(self._vocab)
        return token if token >= 0 else None
