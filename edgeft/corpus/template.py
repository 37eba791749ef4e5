"""A conversation rendered with the model's own chat template, as token ids and labels.

Which characters the model is to learn is found from the template alone: the conversation is rendered up to each
answer and again with it, and the difference is the answer with the token that ends its turn. Nothing is masked
by token id, so a pad token that equals the end-of-turn token does no harm (known failures C-22, C-23, C-24, C-49).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.corpus.conversation import Conversation
from edgeft.errors import DataError, RecipeError

IGNORED = -100
"""The label of a token whose loss does not count, as torch's cross entropy has it."""
_FIXED_DATE = {"%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%-d": "1", "%e": " 1", "%B": "January", "%b": "Jan",
               "%A": "Wednesday", "%a": "Wed", "%H": "00", "%I": "12", "%p": "AM", "%M": "00", "%S": "00", "%j": "001"}  # fmt: skip
_PROBE = "edgeft probe answer"
Dicts = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One conversation in tokens; `ids` and `labels` have the same length."""

    ids: list[int]
    labels: list[int]
    """The id where it is to be learnt, IGNORED elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A tokenizer with its chat template, and what was found out about the two."""

    tokenizer: Any
    sha256: str
    """Of the template's text."""
    end_of_turn: str
    """The token that the template writes after an answer."""
    end_of_turn_id: int
    closing: str
    """What the template writes between an answer's last character and the end of that token."""
    bos: str
    """The beginning-of-sequence token; empty if the tokenizer has none."""
    bos_count: int
    """How many of it the template writes for one question and answer."""
    specials: tuple[str, ...]
    """Texts that become control tokens wherever they stand."""

    def control_token(self, row: Conversation) -> str:
        """A control token that a row spells out in its own text, such as "<|im_end|>"; empty if there is none."""
        return next((s for s in self.specials if any(s in m.content for m in row.messages)), "")

    def render(self, rows: Sequence[Conversation]) -> list[Rendered]:
        """Ids and labels of each row; what is learnt is each answer and the end-of-turn token after it.

        Raises DataError, naming the row, for a conversation that the template refuses or rewrites.
        """
        texts: list[str] = []
        spans: list[list[tuple[int, int]]] = []
        for row in rows:
            text, found = self._spans(row)
            texts.append(text)
            spans.append(found)
        coded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        every = zip(rows, texts, spans, coded["input_ids"], coded["offset_mapping"], strict=True)
        return [self._labelled(*one) for one in every]

    def _spans(self, row: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the start and end of what is to be learnt in it, one span an answer."""
        messages = row.as_dicts()
        write = _writer(self.tokenizer, row.origin)
        text = write(messages, False)
        spans: list[tuple[int, int]] = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = write(messages[:k], True)
            if not text.startswith(prompt):
                raise DataError(
                    f"{row.origin}: the chat template writes the turns before answer {len(spans) + 1} differently once the "
                    "answer follows, so the prompt a model sees in use would not be the one it is trained on",
                    hint="use single-turn rows, or a base model whose template only appends",
                )
            closed = message["content"] + self.closing
            at = text.find(closed, len(prompt))
            if at < 0 or self.end_of_turn in text[len(prompt) : at]:
                raise DataError(
                    f"{row.origin}: the chat template does not write answer {len(spans) + 1} as it stands in the data, "
                    f"followed by {self.closing!r}",
                    hint="the template rewrites or drops parts of earlier answers; use single-turn rows",
                )
            spans.append((len(prompt), at + len(closed)))
        return text, spans

    def _labelled(
        self,
        row: Conversation,
        text: str,
        spans: list[tuple[int, int]],
        ids: list[int],
        offsets: list[tuple[int, int]],
    ) -> Rendered:
        labels = [IGNORED] * len(ids)
        at = 0
        for start, end in spans:
            while at < len(ids) and offsets[at][1] <= start:
                at += 1
            if at < len(ids) and offsets[at][0] < start:
                raise DataError(
                    f"{row.origin}: the token {text[slice(*offsets[at])]!r} joins the end of the prompt with the "
                    "answer, so the prompt alone would have other tokens than in training"
                )
            while at < len(ids) and offsets[at][1] <= end:
                labels[at] = ids[at]
                at += 1
            if labels[at - 1] != self.end_of_turn_id:
                raise DataError(
                    f"{row.origin}: the end-of-turn token {self.end_of_turn!r} is not learnt (C-22)"
                )
        if self.bos and ids.count(self.tokenizer.bos_token_id) != text.count(self.bos):
            raise DataError(
                f"{row.origin}: {ids.count(self.tokenizer.bos_token_id)} {self.bos!r} tokens where the template "
                f"writes {text.count(self.bos)} (C-24)"
            )
        return Rendered(ids=ids, labels=labels)


def load(model: Path) -> Template:
    """The tokenizer and template of a checkpoint folder.

    Raises RecipeError when the model has no chat template, a template whose answers end in no control token,
    or a tokenizer that cannot say which characters a token stands for.
    """
    from transformers import AutoTokenizer

    return inspect(AutoTokenizer.from_pretrained(os.fspath(model)))


def inspect(tokenizer: Any) -> Template:
    """Find out how a tokenizer's chat template ends a turn. Raises RecipeError as `load` does."""
    try:
        source = tokenizer.get_chat_template()
    except ValueError:
        source = None
    if not source:
        raise RecipeError(
            "the base model has no chat template, so nobody can tell it where a question ends",
            hint="choose an Instruct (or Chat) variant of the model as [base]",
        )
    if not tokenizer.is_fast:
        raise RecipeError(
            f"the base model's tokenizer ({type(tokenizer).__name__}) does not say which characters a token stands for",
            hint="choose a base model with a tokenizer.json",
        )
    write = _writer(tokenizer, "the base model")
    ask: Dicts = [{"role": "user", "content": "edgeft probe question"}]
    text = write([*ask, {"role": "assistant", "content": _PROBE}], False)
    added = tokenizer.added_tokens_encoder
    end_of_turn, closing = _end_of_turn(text, added)
    _check_boundary(tokenizer, write(ask, True), text)
    bos = tokenizer.bos_token or ""
    return Template(
        tokenizer=tokenizer,
        sha256=hashlib.sha256(source.encode()).hexdigest(),
        end_of_turn=end_of_turn,
        end_of_turn_id=added[end_of_turn],
        closing=closing,
        bos=bos,
        bos_count=text.count(bos) if bos else 0,
        specials=tuple(sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)),
    )


def _end_of_turn(text: str, added: dict[str, int]) -> tuple[str, str]:
    """The first control token after the probe's answer, and all from the answer's end to that token's end."""
    tail = text.rpartition(_PROBE)[2] if _PROBE in text else ""
    ends = sorted((tail.index(t), -len(t), t) for t in added if t and t in tail)
    if not ends:
        raise RecipeError(
            f"the base model's chat template writes no control token after an answer (it writes {tail!r}), "
            "so the model could never learn to stop (C-22)",
            hint="choose another base model",
        )
    at, _, token = ends[0]
    return token, tail[: at + len(token)]


def _check_boundary(tokenizer: Any, prompt: str, text: str) -> None:
    """The prompt alone must have the tokens it has before an answer; offsets do not show a swallowed space."""
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.startswith(prompt) and whole[: len(alone)] != alone:
        raise RecipeError(
            f"the base model's prompt ends in {prompt[-12:]!r}, and its last token changes when an answer follows",
            hint="choose another base model: this template cannot be trained as it is used",
        )


def _writer(tokenizer: Any, origin: str) -> Callable[[Dicts, bool], str]:
    """A function from messages and "add the generation prompt" to text."""
    import jinja2

    source = _undated(tokenizer.get_chat_template())

    def write(messages: Dicts, generation_prompt: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateError as e:
            roles = ", ".join(m["role"] for m in messages[:4])
            raise DataError(
                f"{origin}: the chat template refuses the turns {roles}: {e}",
                hint="some templates take no system prompt: leave out `system`" if "system" in roles else "",
            ) from None
        return text

    return write


def _undated(source: str) -> str:
    """A template that writes today's date is given a fixed one, 1 January 2025, so that a build repeats."""
    if "strftime_now" not in source:
        return source
    filled = "".join(f" | replace('{code}', '{value}')" for code, value in _FIXED_DATE.items())
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filled} }}}}{{%- endmacro %}}{source}"
