"""Does llama-server write the prompts that a model was trained on? Asked of the pinned server itself, byte by byte.

The server has a Jinja of its own, works around templates it takes for faulty, sets variables that training did not, and
falls back to a built-in template (known failures C-17, C-19, C-20, C-24). So it is started on the shipped file, with the
options that edgeft serves with, and asked for its prompts.

Of the 70 templates that the pinned llama.cpp carries (models/templates), 50 are served as transformers writes them. Of the
others 15 write thoughts when the server sets `enable_thinking`, which training did not; 4 render without tools in the
server alone; and for one (StepFun) the server trims every message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edgeft.bundle import Settings, server_arguments
from edgeft.errors import ToolError
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.server import Refused, Server, running
from edgeft.parity.checks import prompts
from edgeft.parity.checks.check import Check
from edgeft.parity.checks.corpus import CONVERSATIONS, TOOLS
from edgeft.parity.checks.prompts import Messages, Prompts, Tools
from edgeft.parity.checks.turns import difference

COMPLAINT = re.compile(r"^\S+ [WE] .*template", re.IGNORECASE)
"""A line of the log, warning or error, about the template. The pinned source has these (common/chat.cpp,
common/chat-auto-parser-generator.cpp, tools/server/server-context.cpp): "vocab does not have a BOS token, jinja template
won't work as intended", "failed to initialize chat template", "failed to parse tool use chat template (ignoring it)",
"Neither string content nor typed content is supported by the template", "Removing system prompt due to template not
supporting system role", "Template supports tool calls but does not natively describe tools", "Template seems to support
tool calls, but failed to determine tool format", "Forcing pure content template", "detected an outdated gemma4 chat
template", "chat template parsing error"."""
HARMLESS = re.compile(r"template supports preserving reasoning|got exception")
"""About thoughts in earlier answers, of which chats here have none; and a refused chat, which is judged by itself."""
ABOUT_TOOLS = re.compile(r"template (?:supports|seems to support) tool calls", re.IGNORECASE)
DOES_NOT_START = re.compile(r"chat template parsing error|failed to initialize chat template")
_PATCH = "{%- if false %}"
"""What llama.cpp writes over a condition of two template families (common_chat_templates_init)."""


@dataclass(frozen=True, kw_only=True)
class _Session:
    """Who is compared with whom."""

    trained: Prompts
    file: Decoder
    server: Server
    used: str
    """The template that the server says it uses."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What came of one chat; all empty when the server's prompt is the trained one."""

    refused: bool = False
    """By both."""
    note: str = ""
    """Why it is right although it is not the plain rendering."""
    wrong_text: str = ""
    wrong_ids: str = ""


def against_checkpoint(checkpoint: Path, gguf: Path) -> list[Check]:
    """Whether llama-server, on `gguf`, writes the prompts that the checkpoint's tokenizer writes: step "served".

    Loads the file's weights for as long as it takes (a second for 100 MB). Raises ToolError when the server does not
    start for another reason than the template.
    """
    from transformers import AutoTokenizer

    return _checks(prompts.of_checkpoint(checkpoint, AutoTokenizer.from_pretrained(checkpoint)), gguf)


def between_files(reference: Path, gguf: Path) -> list[Check]:
    """The same when the trained model is known as a GGUF file only: its own template, rendered by transformers."""
    with Decoder(reference, vocab_only=True) as file:
        return _checks(prompts.of_file(file), gguf)


def _checks(trained: Prompts, gguf: Path) -> list[Check]:
    if not trained.template:
        said = f"{trained.owner} has no chat template"
        return [Check(step="served", name="served template", codes=("C-17",), ok=None, said=said)]
    try:
        with Decoder(gguf, vocab_only=True) as file, running(gguf, _arguments()) as server:
            used = str(server.properties()["chat_template"])
            session = _Session(trained=trained, file=file, server=server, used=used)
            chats = [_ask(session, m, answering, ()) for m in CONVERSATIONS for answering in (True, False)]
            with_tools = [_ask(session, m, True, TOOLS) for m in CONVERSATIONS[: 2 * trained.takes_tools]]
    except ToolError as error:
        if not DOES_NOT_START.search(str(error)):
            raise
        return [
            _check(
                "served template", ("C-19",), f"llama-server refuses the template: {_reason(str(error))}", ""
            )
        ]
    complaints = [line for line in server.lines if COMPLAINT.search(line) and not HARMLESS.search(line)]
    warnings = [f"llama-server warns: {_words(line)}" for line in complaints if not ABOUT_TOOLS.search(line)]
    right = [a for a in chats if not (a.refused or a.wrong_text)]
    notes = "".join(f", {note}" for note in dict.fromkeys(a.note for a in right) if note)
    refused = sum(a.refused for a in chats)
    return [
        _check("served template", ("C-19", "C-20"), _other_template(session), "the server uses the trained one"),
        _check("served prompts", ("C-17",), _first([a.wrong_text for a in chats]),
               f"{len(right)} prompts have the trained bytes, {refused} chats are refused on both sides{notes}"),
        _check("served tokens", ("C-24", "C-26"), _first([a.wrong_ids for a in chats]),
               f"{len(right)} prompts have the trained ids"),
        _check("server warnings", ("C-19",), _first(warnings), "none in the log about the template"),
        *_tools(with_tools, [_words(line) for line in complaints if ABOUT_TOOLS.search(line)]),
    ]  # fmt: skip


def _arguments() -> list[str]:
    """As a bundle is served, on a free port and with little memory."""
    settings = Settings(
        name="parity", context=512, parallel=1, kv_type="f16", threads=1, gpu=False, mmap=True, prompt_cache_mb=0,
        temperature=0, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1, system="", host="127.0.0.1", port=0,
    )  # fmt: skip
    return [*server_arguments(settings), "--no-warmup"]


def _ask(s: _Session, messages: Messages, answering: bool, tools: Tools) -> _Answer:
    chat = ", ".join(m["role"] for m in messages) + (" with tools" if tools else "")
    expected = list(_expected(s, messages, answering, tools))
    try:
        theirs = s.server.apply_template(messages, generation_prompt=answering, tools=tools)
    except Refused as refusal:
        if not expected:
            return _Answer(refused=True)
        return _Answer(wrong_text=f"llama-server refuses the chat {chat}: {_reason(str(refusal))}")
    if not expected:
        return _Answer(wrong_text=f"llama-server answers the chat {chat}, which the trained template refuses")
    same = [(text, note) for text, note in expected if prompts.served_text(s.file, text) == theirs]
    text, note = (same or expected)[0]
    wrong_text = ""
    if not same:
        wrong_text = f"the prompt of the chat {chat} {_parts(prompts.served_text(s.file, text), theirs)}"
        wrong_text += _because_of_thoughts(s, messages, answering, tools, text)
    wanted, got = s.trained.encode(text), s.server.tokenize(theirs)
    wrong_ids = ""
    if wanted != got:
        wrong_ids = f"the prompt of the chat {chat} has other tokens: "
        wrong_ids += difference((s.trained.owner, "llama-server"), wanted, got) + _count_bos(
            s.trained, wanted, got
        )
    elif answering and not tools and (counted := s.server.count_tokens(messages)) != len(got):
        wrong_ids = f"the chat endpoint counts {counted} tokens for the chat {chat} of {len(got)}"
    return _Answer(note=note, wrong_text=wrong_text, wrong_ids=wrong_ids)


def _expected(s: _Session, messages: Messages, answering: bool, tools: Tools) -> Iterator[tuple[str, str]]:
    """The trained prompt; and what llama.cpp's deliberate workarounds make of it, with a note."""
    ours = s.trained.text(messages, generation_prompt=answering, tools=tools)
    if ours is not None:
        yield ours, ""
        if "date_string" in s.trained.template or "datetime" in s.trained.template:
            today = {"date_string": f"{datetime.now():%d %b %Y}", "datetime": f"{datetime.now():%b %d %Y}"}
            dated = s.trained.text(messages, generation_prompt=answering, tools=tools, variables=today)
            yield dated or ours, "with today's date where the template has a fixed one"
        if not answering and (begun := s.trained.text(messages, tools=tools)) is not None:
            yield begun, "an answer is begun even when none is asked for"
        return
    merged = s.trained.text(_merged(messages), generation_prompt=answering, tools=tools)
    if merged is not None:
        yield merged, "a system prompt, which the template refuses, goes into the first question"
    if _PATCH in s.used:
        patched = s.trained.text(messages, generation_prompt=answering, tools=tools, template=s.used)
        if patched is not None:
            yield patched, "llama.cpp lets chats pass that the template refuses"


def _merged(messages: Messages) -> Messages:
    """What the server makes of a refused system prompt (common/chat.cpp, system_message_not_supported)."""
    first, *others = messages
    if first["role"] != "system" or not others:
        return messages
    return [{**others[0], "content": f"{first['content']}\n{others[0]['content']}"}, *others[1:]]


def _because_of_thoughts(s: _Session, messages: Messages, answering: bool, tools: Tools, wanted: str) -> str:
    """Whether the reason is a variable that the server sets for models that can think, and training did not."""
    if "enable_thinking" not in s.trained.template:
        return ""
    without = s.server.apply_template(
        messages, generation_prompt=answering, tools=tools, variables={"enable_thinking": False}
    )
    same = without == prompts.served_text(s.file, wanted)
    return (
        "; with --reasoning off it would be the trained one" if same else "; the server sets enable_thinking"
    )


def _tools(answers: Sequence[_Answer], complaints: Sequence[str]) -> Iterator[Check]:
    """A check of its own, since few models are trained on chats with tools."""
    if not answers:
        return
    wrong = [*(a.wrong_text for a in answers), *(a.wrong_ids for a in answers), *complaints]
    if all(a.refused or a.wrong_text.endswith("refuses") for a in answers):
        said = "transformers cannot render tools with this template"
        yield Check(step="served", name="served tools", codes=("C-17",), ok=None, said=said)
    else:
        yield _check(
            "served tools",
            ("C-17",),
            _first(wrong),
            f"{len(answers)} prompts with a tool have the trained bytes",
        )


def _other_template(s: _Session) -> str:
    # Jinja reads every end of line as \n and drops the last one; llama.cpp does so before it says what it uses.
    ours = re.sub(r"\r\n?", "\n", s.trained.template).removesuffix("\n")
    if s.used == ours or (_PATCH in s.used and _PATCH not in ours):
        return ""
    return f"llama-server uses another template than the trained one: {s.used[:60]!r}… ({len(s.used)} characters)"


def _count_bos(trained: Prompts, wanted: Sequence[int], got: Sequence[int]) -> str:
    if trained.bos is None:
        return ""
    return f" ({wanted.count(trained.bos)} BOS as trained, {got.count(trained.bos)} as served)"


def _check(name: str, codes: tuple[str, ...], wrong: str, right: str) -> Check:
    return Check(step="served", name=name, codes=codes, ok=not wrong, said=wrong or right)


def _first(wrong: Sequence[str]) -> str:
    found = [sentence for sentence in wrong if sentence]
    return found[0] + f" ({len(found) - 1} more)" * (len(found) > 1) if found else ""


def _parts(expected: str, got: str) -> str:
    """Where two texts part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    start = max(0, at - 20)
    return f"differs at character {at}: {got[start : at + 30]!r} instead of {expected[start : at + 30]!r}"


def _reason(said: str) -> str:
    """The last line that names an error, out of what may be many with the template's source."""
    found = [line for line in said.splitlines() if re.search(r"\berror: (?!std::)", line, re.IGNORECASE)]
    return _words((found or said.splitlines() or [""])[-1 if found else 0])


def _words(line: str) -> str:
    return re.sub(r"^\d[\d.]* [A-Z] +", "", line).strip()
