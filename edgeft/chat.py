"""Ask a finished model: llama.cpp through llama-cpp-python, with the template in the file and the adapter beside it; or a folder
through the session of the runtime that serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from edgeft.errors import DataError, SetupError

Message = dict[str, str]


class Chat:
    """One loaded GGUF model and the conversation so far. Close it, or use it in a `with`."""

    def __init__(
        self, model: Path, *, context: int, threads: int, system: str = "", temperature: float = 0.0
    ) -> None:
        from edgeft import llamacpp
        from edgeft.llamacpp.adapter import adapter_beside, check_base

        adapter = adapter_beside(model)
        if adapter:
            check_base(model, adapter)
        llamacpp.activate()
        llamacpp.ensure("library")
        bindings = llamacpp.native()
        self.temperature = temperature
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        with contextlib.redirect_stderr(None):
            self._llama: Any = bindings.Llama(
                str(model), n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        if adapter:
            # Not through its lora_path: it would go on with a null pointer when the adapter cannot be loaded.
            try:
                llamacpp.runtime.add_adapter(self._llama.model, self._llama.ctx, adapter)
            except DataError:
                self.close()
                raise
        if "tokenizer.chat_template" not in self._llama.metadata:
            self.close()
            raise SetupError(f"{model} carries no chat template", hint="build it from a base that has one")

    def ask(self, question: str, max_tokens: int) -> Iterator[str]:
        """Stream the answer piece by piece, and keep it as part of the conversation."""
        self.messages.append({"role": "user", "content": question})
        said = ""
        stream = self._llama.create_chat_completion(
            messages=self.messages, max_tokens=max_tokens, temperature=self.temperature, stream=True
        )
        for part in stream:
            piece = part["choices"][0]["delta"].get("content") or ""
            said += piece
            if piece:
                yield piece
        self.messages.append({"role": "assistant", "content": said})

    def close(self) -> None:
        """Free the model."""
        self._llama.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class FolderChat:
    """A conversation with a folder that another runtime has open (edgeft.parity.served.Session), by that runtime's own template
    and tokenizer. It says the most probable answer, all at once."""

    def __init__(self, session: Any, *, context: int, system: str = "") -> None:
        self.session, self.context = session, context
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, max_tokens: int) -> Iterator[str]:
        """The answer, which stays part of the conversation. Raises SetupError without a template, DataError when the
        conversation has become longer than the context."""
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = self.session.render(asked)
        if prompt is None:
            raise SetupError("the folder carries no chat template", hint="build it from a base that has one")
        ids = self.session.tokenize(prompt)
        room = self.context - len(ids)
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the context {self.context}",
                hint="start a new one",
            )
        said = self.session.detokenize(self.session.generate(ids, min(max_tokens, room))[0]).strip()
        self.messages = [*asked, {"role": "assistant", "content": said}]
        yield said

    def close(self) -> None:
        """Close the runtime."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
