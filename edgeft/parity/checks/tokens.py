"""Do two tokenizers say the same? A checkpoint's against a GGUF file's, or two files' against each other.

llama.cpp's tokenizers are reimplementations, and a file can carry another vocabulary, template or special id than the
checkpoint it was made from. Every answer is exact: one differing id is a failure, and the first one is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from edgeft.llamacpp import header
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.header import Header
from edgeft.parity.checks import prompts, turns
from edgeft.parity.checks.check import Check, Step
from edgeft.parity.checks.corpus import plain
from edgeft.parity.checks.prompts import Prompts
from edgeft.parity.checks.turns import Answer

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_NORMAL, _UNUSED, _BYTE = 1, 5, 6
"""Values of tokenizer.ggml.token_type (llama.h, llama_token_type)."""
_SAME_SPELLING = ("gpt2", "llama")
"""Values of tokenizer.ggml.model whose tokens are spelled in the file as transformers spells them."""
_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>")
"""Special tokens of gpt-oss that llama.cpp shows in answers whatever the file says (src/llama-vocab.cpp)."""
_HIDDEN = (
    ("<|", "|>"),
    ("<｜", "｜>"),
    ("<unused", ">"),
    ("<pad", ">"),
    ("<mask", ">"),
    ("<2mass", ">"),
    ("[@BOS@", "]"),
)
"""How tokens begin and end that the converter makes control tokens although transformers does not call them special
(conversion/base.py, does_token_look_special)."""  # fmt: skip

Encode = Callable[[str], list[int]]


def against_checkpoint(checkpoint: Path, file: Decoder, texts: Sequence[str] = ()) -> list[Check]:
    """Whether a GGUF file tokenizes as the checkpoint does, and stops where it should: checks of the step "gguf".

    `file` may be opened with `vocab_only`. `texts` are the caller's own, tokenized beside the nasty ones of `corpus`,
    alone and inside the chat template. Where the checkpoint's tokenizer composes characters (NFC: Qwen), which llama.cpp
    does not, the nasty ones are compared composed, as keyboards write them, and the check says so; the caller's are not.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inside = header.read(file.path, arrays=(_TOKENS, _TYPES))
    trained = prompts.of_checkpoint(checkpoint, tokenizer)

    def ours(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    names, theirs = ("transformers", "llama.cpp"), _reads(file)
    added = {i: t.content for i, t in sorted(tokenizer.added_tokens_decoder.items())}
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    same = _texts(names, ours, theirs, plain(texts, trained.form))
    ends = turns.same_ends(checkpoint, tokenizer, trained, file)
    return [
        _check("gguf", "vocabulary rows", ("C-14", "C-15"), _rows(tokenizer, file, inside)),
        _check("gguf", "vocabulary", ("C-16", "C-26"), _spelling(tokenizer, inside)),
        _check("gguf", "token ids", ("C-04", "C-26"), _composed(trained.form, same)),
        _check("gguf", "added tokens", ("C-16",), _added(names, ours, theirs, added)),
        _check("gguf", "control tokens", ("C-16",), _control(file, added, special)),
        _check("gguf", "special ids", ("C-21",), turns.same_special_ids(tokenizer, file)),
        _check("gguf", "end of generation", ("C-21", "C-22"), ends),
        *_chats("gguf", trained, file, names, texts),
    ]


def between_files(
    reference: Decoder, shipped: Decoder, texts: Sequence[str] = (), *, step: Step = "quantized"
) -> list[Check]:
    """The same questions between two GGUF files; the checks are named after `step`, which made `shipped`.

    Both may be opened with `vocab_only`.
    """
    a, b = (header.read(file.path, arrays=(_TOKENS, _TYPES)) for file in (reference, shipped))
    names, ours, theirs = ("the reference file", "the shipped file"), _reads(reference), _reads(shipped)
    kinds = enumerate(zip(_array(a, _TOKENS), _array(a, _TYPES), strict=False))
    added = {i: token for i, (token, kind) in kinds if kind not in (_NORMAL, _UNUSED, _BYTE)}
    special = {i for i in added if not reference.detokenize([i], special=False)}
    same_ids = turns.same_special_ids_as(reference, shipped, added)
    return [
        _check(step, "vocabulary", ("C-15", "C-16"), _same_vocabulary(a, b)),
        _check(step, "token ids", ("C-04", "C-26"), _texts(names, ours, theirs, plain(texts))),
        _check(step, "added tokens", ("C-16",), _added(names, ours, theirs, added)),
        _check(step, "control tokens", ("C-16",), _control(shipped, added, special, strict=True)),
        _check(step, "special ids", ("C-21", "C-22", "C-24"), same_ids),
        *_chats(step, prompts.of_file(reference), shipped, names, texts),
    ]


def _check(step: Step, name: str, codes: tuple[str, ...], answer: Answer) -> Check:
    wrong, right = answer
    return Check(step=step, name=name, codes=codes, ok=not wrong, said=wrong or right)


def _chats(
    step: Step, trained: Prompts, file: Decoder, names: tuple[str, str], texts: Sequence[str]
) -> list[Check]:
    own = _check(step, "chat template", ("C-17", "C-20"), turns.same_template(trained, file))
    if not trained.template:
        return [own]
    seen = turns.seen(trained, file, texts)
    return [
        own,
        _check(step, "chat tokens", ("C-04", "C-26"), turns.same_chats(seen, names)),
        _check(step, "BOS", ("C-24",), turns.same_bos(seen, trained, file)),
    ]


def _reads(file: Decoder) -> Encode:
    return lambda text: file.tokenize(text, add_special=False, parse_special=True)


def _array(file: Header, key: str) -> list[Any]:
    found = file.keys.get(key)
    return found if isinstance(found, list) else []


def _rows(tokenizer: Any, file: Decoder, inside: Header) -> Answer:
    """C-14, C-15: a row for every token, a token for every row, and those that mean nothing marked as unused."""
    known = set(tokenizer.get_vocab().values())
    rows = next((t.shape[1] for t in inside.tensors if t.name == "token_embd.weight"), file.n_vocab)
    if file.n_vocab <= max(known):
        return f"the file has {file.n_vocab} vocabulary rows; the tokenizer's highest id is {max(known)}", ""
    if rows != file.n_vocab:
        return f"the file has {file.n_vocab} tokens and {rows} embedding rows", ""
    for i, kind in enumerate(_array(inside, _TYPES)):
        if i not in known and kind != _UNUSED:
            return f"row {i} is no token of the checkpoint, and not marked as unused (its type is {kind})", ""
    return "", f"{file.n_vocab} rows for {len(known)} tokens"


def _spelling(tokenizer: Any, inside: Header) -> Answer:
    """Every ordinary token stands at its id: two that changed places may be in none of the texts."""
    tokens, types = _array(inside, _TOKENS), _array(inside, _TYPES)
    if inside.keys.get("tokenizer.ggml.model") not in _SAME_SPELLING:
        return "", "not compared: a GGUF file spells this kind of vocabulary otherwise"
    added = tokenizer.added_tokens_decoder
    ids = [i for i in sorted(tokenizer.get_vocab().values()) if i < len(tokens) and i not in added]
    ids = [i for i in ids if i >= len(types) or types[i] == _NORMAL]
    wrong = [
        f"token {i} is {tokens[i]!r} in the file and {token!r} in the checkpoint"
        for i, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
        if tokens[i] != token
    ]
    return _first(wrong), f"{len(ids)} tokens stand where they stood"


def _same_vocabulary(a: Header, b: Header) -> Answer:
    ours, theirs = _array(a, _TOKENS), _array(b, _TOKENS)
    if len(ours) != len(theirs):
        return f"the shipped file has {len(theirs)} tokens, the reference file {len(ours)}", ""
    wrong = [
        f"token {i} is {y!r} in the shipped file and {x!r} in the reference file"
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True))
        if x != y
    ]
    return _first(wrong), f"the same {len(ours)} tokens"


def _first(wrong: Sequence[str]) -> str:
    return wrong[0] + f", and {len(wrong) - 1} more differ" * (len(wrong) > 1) if wrong else ""


def _texts(names: tuple[str, str], ours: Encode, theirs: Encode, texts: Sequence[str]) -> Answer:
    """C-26: llama.cpp's tokenizer is a reimplementation. The first difference is shown."""
    return next(_disagreements(names, ours, theirs, texts), ""), f"{len(texts)} texts tokenize alike"


def _composed(form: str, answer: Answer) -> Answer:
    wrong, right = answer
    note = f"; the tokenizer puts text into {form} first, which llama.cpp does not: send it text in that form"
    return wrong, right + note if form else right


def _disagreements(
    names: tuple[str, str], ours: Encode, theirs: Encode, texts: Sequence[str]
) -> Iterator[str]:
    for text in texts:
        a, b = ours(text), theirs(text)
        if a != b:
            yield f"the tokenizers disagree on {text[:60]!r}: {turns.difference(names, a, b)}"


def _added(names: tuple[str, str], ours: Encode, theirs: Encode, added: Mapping[int, str]) -> Answer:
    """C-16: each added token is one id, the same on both sides, alone and between text."""
    for i, token in added.items():
        text = token.replace(
            "▁", " "
        )  # a token of spaces is spelled with these; in a text they mean themselves
        a, b = ours(text), theirs(text)
        if a != b or (text == token and a != [i]):
            return f"token {i} {token!r} alone is read as {a[:4]} by {names[0]} and {b[:4]} by {names[1]}", ""
    texts = [token.replace("▁", " ") for token in added.values()]
    for group in (texts[i : i + 32] for i in range(0, len(texts), 32)):
        between = [f"a{''.join(f'{t}b' for t in group)}", "".join(f"one {t} two\n{t}\n" for t in group)]
        for wrong in _disagreements(names, ours, theirs, between):
            one_by_one = [text for t in group for text in (f"a{t}b", f"one {t} two", f"\n{t}\n")]
            return next(_disagreements(names, ours, theirs, one_by_one), wrong), ""
    return "", f"{len(added)} added tokens are one id each, alone and between text"


def _control(
    file: Decoder, added: Mapping[int, str], special: AbstractSet[int], *, strict: bool = False
) -> Answer:
    """C-16: what is special (left out of answers) is a control token, and nothing else is, or tool calls would vanish.

    Unless `strict`, the tokens that llama.cpp knows by name are its own to decide.
    """
    for i, token in added.items():
        control = i < file.n_vocab and not file.detokenize([i], special=False)
        if control == (i in special):
            continue
        hidden = any(token.startswith(a) and token.endswith(b) for a, b in _HIDDEN) or file.is_end(i)
        if strict or not (hidden if control else token in _SHOWN):
            is_control, is_special = ("" if yes else "not " for yes in (control, i in special))
            return (
                f"token {i} {token!r} is {is_control}a control token in the file, but was {is_special}special",
                "",
            )
    return "", f"{len(special)} of {len(added)} added tokens are left out of answers"
