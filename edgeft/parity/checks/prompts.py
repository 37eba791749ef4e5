"""Chats as text and as token ids: as a checkpoint was trained on them, and as llama-server hands them to a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from edgeft.checkpoint.dequantize import chat_template
from edgeft.parity.checks.corpus import Form

if TYPE_CHECKING:
    from edgeft.llamacpp.decode import Decoder

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a template makes of a chat, in transformers' Jinja, and the ids that a model then sees."""

    owner: str
    """Whose they are, for a sentence: "the checkpoint"."""
    template: str
    """Empty when there is none."""
    encode: Callable[[str], list[int]]
    """The ids of a rendered prompt."""
    bos: int | None
    render: Callable[[str, Messages, bool, Tools, Mapping[str, str]], str]
    """Template ("" for the own one), chat, whether an answer is to follow, tools, further variables."""

    form: Form = ""
    """The Unicode form that the tokenizer puts every text into. llama.cpp's tokenizers do not."""

    @property
    def takes_tools(self) -> bool:
        return "tools" in self.template

    def text(
        self,
        messages: Messages,
        *,
        generation_prompt: bool = True,
        tools: Tools = (),
        template: str = "",
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> str | None:
        """The rendered prompt, or None when the template refuses the chat.

        `template` replaces the own one; `variables` are what it sees beside the chat.
        """
        try:
            return self.render(template, messages, generation_prompt, tools, variables)
        except Exception as e:  # noqa: BLE001  templates raise what they like: TemplateError, TypeError, …
            log.debug("the template refuses %s: %s", [m["role"] for m in messages], e)
            return None


def of_checkpoint(checkpoint: Path, tokenizer: Any) -> Prompts:
    """Rendered and tokenized by transformers, as in training: the tokenizer adds nothing to what the template writes."""

    def render(
        template: str, messages: Messages, generation_prompt: bool, tools: Tools, variables: Mapping[str, str]
    ) -> str:
        text: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tools=list(tools) or None, chat_template=template or None, tokenize=False,
            add_generation_prompt=generation_prompt, **variables,
        )  # fmt: skip
        return text

    return Prompts(
        owner="the checkpoint", template=chat_template(checkpoint), bos=tokenizer.bos_token_id,
        encode=lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), render=render,
        form=_form(tokenizer),
    )  # fmt: skip


def of_file(file: Decoder, owner: str = "the reference file") -> Prompts:
    """Rendered by transformers from the template inside a GGUF file, tokenized by llama.cpp as its server does.

    `file` may be opened with `vocab_only`.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    named = {"bos_token": file.bos, "eos_token": file.eos, **{
        f"{name}_token": _number(file.meta(f"tokenizer.ggml.{key}_token_id"))
        for name, key in (("unk", "unknown"), ("pad", "padding"), ("sep", "seperator"))  # as the format spells it
    }}  # fmt: skip
    specials = {name: file.detokenize([token]) for name, token in named.items() if token is not None}
    own, with_tools = file.chat_template, file.meta("tokenizer.chat_template.tool_use")

    def render(
        template: str, messages: Messages, generation_prompt: bool, tools: Tools, variables: Mapping[str, str]
    ) -> str:
        rendered, _ = render_jinja_template(
            [[dict(m) for m in messages]], tools=list(tools) or None,
            chat_template=template or (with_tools if tools and with_tools else own),
            add_generation_prompt=generation_prompt, **{**specials, **variables},
        )  # fmt: skip
        return str(rendered[0])

    return Prompts(
        owner=owner, template=own, bos=file.bos, encode=lambda text: served_ids(file, text), render=render,
    )  # fmt: skip


def served_text(file: Decoder, prompt: str) -> str:
    """A rendered prompt as llama-server hands it to its tokenizer: without the BOS or EOS that this will add.

    One BOS, and only at the very beginning; one EOS at the very end (common/chat.cpp,
    common_chat_template_direct_apply_impl).
    """
    added = file.tokenize("", add_special=True, parse_special=True)
    if file.add_bos and added:
        prompt = prompt.removeprefix(file.detokenize(added[:1]))
        added = added[1:]
    return prompt.removesuffix(file.detokenize(added)) if added else prompt


def served_ids(file: Decoder, prompt: str) -> list[int]:
    """The ids llama-server decodes for a rendered prompt (server-context.cpp, handle_completions_impl)."""
    return file.tokenize(served_text(file, prompt), add_special=True, parse_special=True)


def _form(tokenizer: Any) -> Form:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    used = json.dumps(json.loads(backend.to_str())["normalizer"]) if backend else ""
    forms: tuple[Form, ...] = ("NFC", "NFKC")
    return next((form for form in forms if f'"{form}"' in used), "")


def _number(text: str | None) -> int | None:
    return int(text) if text else None
