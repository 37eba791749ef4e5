"""What a model that edgeft did not train is asked: windows of domain and general text, and prompts, from plain files."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.corpus import sources
from edgeft.errors import DataError, ParityError
from edgeft.parity import suite
from edgeft.parity.checks import calibration
from edgeft.parity.checks.check import Check
from edgeft.parity.opening import Opened
from edgeft.parity.suite import Text

if TYPE_CHECKING:
    from edgeft.parity.certify import Request


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A question in tokens, and what was written as its answer."""

    question: str
    expected: str
    ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """All that the models are asked."""

    texts: dict[str, Text]
    prompts: list[Prompt]
    plain: list[str]
    """Some of the domain text as strings, for the tokenizers to agree on."""
    checks: list[Check]
    notes: list[str]


def sample(request: Request, model: Opened) -> Sample:
    """Read the request's texts with the reference's tokenizer and template.

    Conversations are shuffled by the seed and joined until the windows are full; a plain text starts at a place that
    follows from the seed. Without a domain text, general text takes its place. Raises DataError for unreadable files,
    ParityError when calibration and test share their text.
    """
    notes: list[str] = []
    prompts: list[Prompt] = []
    wanted = request.windows * request.n_ctx
    own = _plain(request.general or suite.GENERAL)
    texts: dict[str, Text] = {}
    if request.text is None:
        notes.append("no text of the model's own domain was given: measured on general text alone")
        source, plain = own, [own]
        texts["domain"] = _windows(model, own, request, request.windows, "domain")
    elif request.text.suffix in (".txt", ".md"):
        source = _plain(request.text)
        plain = [source]
        texts["domain"] = _windows(model, source, request, request.windows, "domain")
    else:
        rows, prompts, plain = _conversations(request.text, model, request.seed, wanted, request.questions)
        source = "\n".join(plain)
        texts["domain"] = suite.domain(rows, request.n_ctx, request.windows, bos=model.bos)
    if request.text is not None and request.general_windows:
        texts["general"] = _windows(model, own, request, request.general_windows, "general")
    if not prompts:
        notes.append("no conversations were given, so no question was asked")
    checks = []
    if request.calibration:
        checks.append(calibration.overlap([_plain(request.calibration)], [source]))
        if checks[0].ok is False:
            raise ParityError(checks[0].said, hint="test on text that the quantizer has not seen")
    return Sample(
        texts=texts, prompts=prompts, plain=[p[:2000] for p in plain[:100]], checks=checks, notes=notes
    )


def _windows(model: Opened, text: str, request: Request, count: int, name: str) -> Text:
    ids = model.encode(text)
    spare = len(ids) - count * request.n_ctx
    start = random.Random(request.seed).randrange(spare + 1) if request.seed and spare > 0 else 0
    return suite.plain(ids[start:], request.n_ctx, count, bos=model.bos, name=name)


def _conversations(
    path: Path, model: Opened, seed: int, wanted: int, questions: int
) -> tuple[list[tuple[list[int], list[int]]], list[Prompt], list[str]]:
    """Token rows with labels, until `wanted` tokens are there; the first questions; and the texts."""
    (loaded,) = sources.load([sources.Source(path=path)])
    order = list(range(len(loaded.rows)))
    random.Random(seed).shuffle(order)
    rows: list[tuple[list[int], list[int]]] = []
    prompts: list[Prompt] = []
    plain: list[str] = []
    tokens = 0
    for number in order:
        messages = loaded.rows[number].as_dicts()
        if messages[-1]["role"] != "assistant":
            continue
        prompt = model.prompts.text(messages[:-1])
        whole = model.prompts.text(messages, generation_prompt=False)
        if prompt is None or whole is None or not whole.startswith(prompt):
            raise DataError(
                f"{loaded.rows[number].origin}: {model.prompts.owner} has no chat template that renders this conversation "
                "and its prompt alike, so the answer's tokens cannot be told",
                hint="give the text as a .txt file",
            )
        asked, answered = model.prompts.encode(prompt), model.encode(whole[len(prompt) :])
        rows.append(([*asked, *answered], [-100] * len(asked) + answered))
        plain += [m["content"] for m in messages]
        tokens += len(asked) + len(answered)
        if len(prompts) < questions:
            prompts.append(Prompt(question=messages[-2]["content"] if len(messages) > 1 else "",
                                  expected=messages[-1]["content"], ids=asked))  # fmt: skip
        if tokens >= wanted:
            break
    if not rows:
        raise DataError(f"{path} holds no conversation that ends with an answer")
    return rows, prompts, plain


def _plain(path: Path) -> str:
    """The text of a file: as it stands, or all that is said in its conversations."""
    if path.suffix in (".txt", ".md"):
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path} cannot be read as UTF-8 text: {e}") from None
    (loaded,) = sources.load([sources.Source(path=path)])
    return "\n".join(m.content for row in loaded.rows for m in row.messages)
