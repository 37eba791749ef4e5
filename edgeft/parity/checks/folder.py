"""Is a folder that another runtime serves the checkpoint it was made from, in all that is not a weight?

Asked twice: of the folder's own files, as transformers reads them (step "quantized", which wrote them), and of the
runtime that has the folder open (step "served"), whose tokenizer and template engine may be reimplementations. Every
answer is exact; the first difference is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.checkpoint.dequantize import chat_template
from edgeft.errors import EdgeftError
from edgeft.parity.checks import prompts, turns
from edgeft.parity.checks.check import Check, Step
from edgeft.parity.checks.corpus import CONVERSATIONS, chats, plain
from edgeft.parity.checks.prompts import Messages, Prompts
from edgeft.parity.checks.tensors import config
from edgeft.parity.checks.turns import Answer, difference

if TYPE_CHECKING:
    from edgeft.parity.served import Session

Encode = Callable[[str], list[int]]


def against_checkpoint(
    checkpoint: Path, folder: Path, session: Session, texts: Sequence[str] = ()
) -> list[Check]:
    """Whether `folder`, and the runtime that has it open, read, render and stop as the checkpoint does.

    `texts` are the caller's own, tokenized beside the nasty ones of `corpus`, alone and inside the chat template. Where
    the checkpoint's tokenizer composes characters (NFC), the nasty ones are compared composed.
    """
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(checkpoint)
    theirs = AutoTokenizer.from_pretrained(folder)
    trained, written = prompts.of_checkpoint(checkpoint, ours), prompts.of_checkpoint(folder, theirs)
    all_texts = plain(texts, trained.form)
    rendered = [text for chat in chats(texts, trained.form) if (text := trained.text(chat)) is not None]
    who = session.said.partition(",")[0]
    seen = [(trained.encode(text), session.tokenize(text)) for text in rendered]
    found = [
        _check("quantized", "vocabulary rows", ("C-14", "C-15"), _rows(checkpoint, ours, session)),
        _check("quantized", "vocabulary", ("C-16",), _vocabulary(ours, theirs)),
        _check("quantized", "token ids", ("C-04", "C-26"),
               _texts(("the checkpoint", "the folder's tokenizer"), trained.encode, written.encode, all_texts)),
        _check("quantized", "special ids", ("C-21",), _special(ours, theirs, folder)),
        _check("quantized", "end of generation", ("C-21", "C-22"), _ends(checkpoint, ours, trained, theirs, folder)),
        _check("quantized", "chat template", ("C-17", "C-20"), _template(trained, folder)),
        _check("quantized", "tied embeddings", ("C-12",), _tied(checkpoint, folder)),
        _check("served", "served texts", ("C-04", "C-26"),
               _composed(trained, _texts(("the checkpoint", who), trained.encode, session.tokenize, all_texts))),
        _check("served", "added tokens", ("C-16",), _added(ours, session, who)),
    ]  # fmt: skip
    if not trained.template:
        return found
    return [
        *found,
        _check("served", "served prompts", ("C-17", "C-19"), _prompts(trained, written, session, who)),
        _check("served", "served tokens", ("C-04", "C-26"), _chats(rendered, seen, who)),
        _check("served", "BOS", ("C-24",), _counted(seen, ours, who)),
    ]


def _check(step: Step, name: str, codes: tuple[str, ...], answer: Answer) -> Check:
    wrong, right = answer
    return Check(step=step, name=name, codes=codes, ok=not wrong, said=wrong or right)


def _rows(checkpoint: Path, tokenizer: Any, session: Session) -> Answer:
    """C-14, C-15: as many rows as the checkpoint has, and one for every token."""
    rows, known = config(checkpoint).get("vocab_size"), set(tokenizer.get_vocab().values())
    if session.n_vocab != rows:
        return f"{session.n_vocab} vocabulary rows are served; the checkpoint has {rows}", ""
    if session.n_vocab <= max(known):
        return f"{session.n_vocab} vocabulary rows are served; the tokenizer's highest id is {max(known)}", ""
    return "", f"{session.n_vocab} rows for {len(known)} tokens"


def _vocabulary(ours: Any, theirs: Any) -> Answer:
    """C-16: every token stands at its id, and is special where it was."""
    a, b = ours.get_vocab(), theirs.get_vocab()
    if moved := sorted((a[t], t) for t in a if b.get(t) != a[t]):
        token, text = moved[0]
        return (
            f"token {token} {text!r} has id {b.get(text)} in the folder, and {len(moved) - 1} more moved",
            "",
        )
    if more := sorted(set(b) - set(a)):
        return f"the folder's tokenizer knows {more[0]!r}, which the checkpoint's does not", ""
    kinds = [{i: t.special for i, t in one.added_tokens_decoder.items()} for one in (ours, theirs)]
    for token in sorted(kinds[0].keys() | kinds[1].keys()):
        if kinds[0].get(token) != kinds[1].get(token):
            return f"token {token} {ours.convert_ids_to_tokens(token)!r} is special on one side only", ""
    return "", f"the same {len(a)} tokens"


def _texts(names: tuple[str, str], ours: Encode, theirs: Encode, texts: Sequence[str]) -> Answer:
    wrong = (
        f"the tokenizers disagree on {text[:60]!r}: {difference(names, a, b)}"
        for text in texts if (a := ours(text)) != (b := theirs(text))
    )  # fmt: skip
    return next(wrong, ""), f"{len(texts)} texts tokenize alike"


def _composed(trained: Prompts, answer: Answer) -> Answer:
    wrong, right = answer
    return wrong, f"{right}, written in {trained.form}" if trained.form else right


def _special(ours: Any, theirs: Any, folder: Path) -> Answer:
    """C-21: the ids of BOS, EOS and padding, in the folder's tokenizer and in genai_config.json."""
    genai = _genai(folder)
    named = ("bos", "eos", "pad")
    for name in named:
        a, b = (getattr(one, f"{name}_token_id") for one in (ours, theirs))
        if a != b:
            return f"the {name} id is {b} in the folder's tokenizer and {a} in the checkpoint's", ""
    if genai and ours.bos_token_id is not None and genai.get("bos_token_id") != ours.bos_token_id:
        return f"the bos id is {genai.get('bos_token_id')} in genai_config.json and {ours.bos_token_id} in the checkpoint", ""  # fmt: skip
    return "", ", ".join(f"{name} {getattr(ours, f'{name}_token_id')}" for name in named)


def _ends(checkpoint: Path, ours: Any, trained: Prompts, theirs: Any, folder: Path) -> Answer:
    """C-21, C-22: a server stops wherever the trained model does, and nowhere else."""
    wanted, said = turns.ends(checkpoint, ours, trained)
    if genai := _genai(folder):
        listed, where = genai.get("eos_token_id"), "genai_config.json"
        stops = {i for i in (listed if isinstance(listed, list) else [listed]) if i is not None}
    else:
        where = "generation_config.json"
        stops = {*turns.named_ends(folder), theirs.eos_token_id} - {None}
    for token, why in wanted.items():
        if token not in stops:
            text = ours.convert_ids_to_tokens(token)
            return f"{where} does not stop an answer at token {token} {text!r}, {why}", ""
    if more := sorted(stops - wanted.keys() - set(turns.named_ends(checkpoint))):
        text = ours.convert_ids_to_tokens(more[0])
        return f"{where} ends answers at token {more[0]} {text!r}, where the checkpoint does not", ""
    return "", f"answers end at {sorted(wanted)}{said}"


def _genai(folder: Path) -> dict[str, Any]:
    path = folder / "genai_config.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else {}
    return found


def _template(trained: Prompts, folder: Path) -> Answer:
    """C-17, C-20: the template that was trained, to the byte."""
    ours, theirs = trained.template, chat_template(folder)
    if ours == theirs:
        return "", f"the same {len(ours)} characters" if ours else "neither has one"
    what = "carries another chat template than the checkpoint" if theirs else "carries no chat template"
    return f"the folder {what} ({len(theirs)} characters, {len(ours)} expected)", ""


def _tied(checkpoint: Path, folder: Path) -> Answer:
    """C-12: a head of its own exactly where the checkpoint has one. In an ONNX graph the weights alone say it."""
    if not (folder / "config.json").is_file() or _genai(folder):
        return "", "an ONNX graph has no such flag: see the check of the weights"
    ours, theirs = (bool(config(one).get("tie_word_embeddings")) for one in (checkpoint, folder))
    if ours != theirs:
        return f"tie_word_embeddings is {theirs} in the folder and {ours} in the checkpoint", ""
    return "", "tied, as in the checkpoint" if ours else "not tied, as in the checkpoint"


def _added(tokenizer: Any, session: Session, who: str) -> Answer:
    """C-16: each added token is one id, alone and between text."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    for token, kind in sorted(added.items()):
        for text in (kind.content, f"a{kind.content}b"):
            a, b = list(tokenizer.encode(text, add_special_tokens=False)), session.tokenize(text)
            if a != b:
                return f"token {token} in {text!r}: {difference(('the checkpoint', who), a, b)}", ""
    return "", f"{len(added)} added tokens are one id each, alone and between text"


def _prompts(trained: Prompts, written: Prompts, session: Session, who: str) -> Answer:
    """C-17, C-19: the bytes of fourteen shapes of conversation, by the runtime's own engine where it has one."""
    wrong = [said for chat in CONVERSATIONS if (said := _prompt(trained, written, session, chat))]
    if wrong:
        return wrong[0] + (f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""), ""
    own = _render(written, session, CONVERSATIONS[0])[1]
    by = f"{who}'s own template engine" if own else "Jinja, with the folder's template"
    return "", f"{len(CONVERSATIONS)} chats have the trained bytes by {by}"


def _prompt(trained: Prompts, written: Prompts, session: Session, chat: Messages) -> str:
    shape = ", ".join(m["role"] for m in chat)
    wanted = trained.text(chat)
    try:
        got, _ = _render(written, session, chat)
    except EdgeftError as e:
        return f"the chat {shape} is refused: {e}" if wanted is not None else ""
    if got == wanted or (wanted is None and not got):
        return ""
    if wanted is None:
        return f"the chat {shape} is rendered, which the trained template refuses"
    return f"the prompt of the chat {shape} {_parts(wanted, got or '')}"


def _render(written: Prompts, session: Session, chat: Messages) -> tuple[str | None, bool]:
    """A chat as it is served, and whether the runtime's own engine wrote it."""
    own = session.render(chat)
    return (written.text(chat), False) if own is None else (own, True)


def _parts(wanted: str, got: str) -> str:
    pairs = enumerate(zip(wanted, got, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(wanted), len(got)))
    start = max(0, at - 20)
    return f"differs at character {at}: {got[start : at + 30]!r} instead of {wanted[start : at + 30]!r}"


def _chats(rendered: Sequence[str], seen: Sequence[tuple[list[int], list[int]]], who: str) -> Answer:
    """C-04: chats have the ids they were trained with."""
    wrong: Iterator[str] = (
        f"the prompt that ends in {text[-60:]!r} has other tokens: {difference(('the checkpoint', who), a, b)}"
        for text, (a, b) in zip(rendered, seen, strict=True) if a != b
    )  # fmt: skip
    return next(wrong, ""), f"{len(rendered)} templated chats have the ids they were trained with"


def _counted(seen: Sequence[tuple[list[int], list[int]]], tokenizer: Any, who: str) -> Answer:
    """C-24: the trained number of BOS and of EOS."""
    for name, token in (("BOS", tokenizer.bos_token_id), ("EOS", tokenizer.eos_token_id)):
        for a, b in seen if token is not None else ():
            if a.count(token) != b.count(token):
                return f"a prompt has {a.count(token)} {name} (token {token}) as trained and {b.count(token)} as {who} reads it", ""  # fmt: skip
    if tokenizer.bos_token_id is None or not seen:
        return "", "no BOS is known"
    return "", f"{len(seen)} chats, the first with {seen[0][0].count(tokenizer.bos_token_id)} BOS as trained"
