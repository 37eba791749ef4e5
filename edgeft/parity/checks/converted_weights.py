"""Is a 16-bit GGUF file the checkpoint it was converted from? What can be seen without running either.

`exact` compares token ids and logits, and says that a file is wrong; this says which tensor or key it is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.checkpoint.dequantize import chat_template
from edgeft.errors import DataError
from edgeft.llamacpp import runtime
from edgeft.llamacpp.decode import Decoder
from edgeft.llamacpp.header import Header, Tensor, read
from edgeft.parity.checks.check import Check
from edgeft.parity.checks.file_weights import block_count
from edgeft.parity.checks.merge_faults import UNIT
from edgeft.parity.checks.merged_weights import F16_MAX, HEADS
from edgeft.parity.checks.tensors import Stored, config, in_checkpoint, numbers, raw_bytes, rows

log = logging.getLogger(__name__)

LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""How configs call their number of blocks (conversion/base.py)."""


@dataclass(frozen=True, kw_only=True)
class _Print:
    """What of a tensor survives every permutation and transposition."""

    count: int
    norm: float
    largest: float
    broken: int = 0


def gguf(checkpoint: Path, file: Path) -> list[Check]:
    """Check a 16- or 32-bit GGUF `file` against the `checkpoint` folder it was converted from.

    Reads both once, 2^20 weights at a time. The checks: finite weights (C-35), weights (C-10, C-34), block count (C-34),
    vocabulary rows (C-14, C-15), tied embeddings (C-12), chat template (C-20), special tokens (C-21). Raises DataError
    when either cannot be read.
    """
    from transformers import AutoTokenizer

    header, settings = read(file), config(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stored = in_checkpoint(checkpoint)
    prints = {t.name: _print_of(file, header, t) for t in header.tensors}
    return [
        _finite(header, prints),
        _weights(header, prints, stored),
        _blocks(header, settings),
        _rows(header, settings, tokenizer),
        _tied(file, header, settings, stored),
        _template(header, checkpoint),
        _special(file, header, checkpoint, tokenizer),
    ]


def _check(name: str, codes: tuple[str, ...], ok: bool | None, said: str) -> Check:
    return Check(step="gguf", name=name, codes=codes, ok=ok, said=said)


def _finite(header: Header, prints: Mapping[str, _Print]) -> Check:
    name, codes = "finite weights", ("C-35",)
    for tensor in header.tensors:
        found = prints[tensor.name]
        if found.broken:
            why = f": {tensor.type} ends at {F16_MAX:g}" if tensor.type == "F16" else ""
            return _check(name, codes, False, f"{tensor.name} is not finite in {found.broken} places{why}")
        if tensor.type == "F16" and found.largest >= F16_MAX:
            said = f"{tensor.name} reaches {found.largest:g}, where F16 ends: larger numbers were cut off"
            return _check(name, codes, False, said)
    top = max(prints, key=lambda n: prints[n].largest)
    return _check(name, codes, True, f"the largest number is {prints[top].largest:.4g}, in {top}")


def _weights(header: Header, prints: Mapping[str, _Print], stored: Mapping[str, Stored]) -> Check:
    """C-10, C-34: matrices that have the same numbers as the checkpoint's, in whatever order.

    A conversion may permute, transpose, split or stack; what it splits or stacks is not compared. If most matrices
    differ, this family's conversion changes numbers, and only the logits can tell.
    """
    name, codes = "weights", ("C-10", "C-34")
    pairs = _pairs(header, stored)
    wrong = []
    for theirs, tensor in pairs.items():
        ours, kinds = prints[tensor.name], (stored[theirs].dtype, tensor.type)
        wanted = _print_of_stored(stored[theirs])
        unit = 2 * max(UNIT.get(kind, 0.0) for kind in kinds)
        if not (_near(ours.norm, wanted.norm, 2e-3) and _near(ours.largest, wanted.largest, unit)):
            wrong.append((theirs, tensor.name, ours, wanted))
    if not pairs:
        return _check(name, codes, None, "no tensor has a name that leads back to the checkpoint")
    if 2 * len(wrong) > len(pairs):
        said = f"{len(wrong)} of {len(pairs)} matrices have other numbers than the checkpoint's: another model, or a "
        return _check(name, codes, None, said + "conversion that scales weights; the logits decide")
    if wrong:
        theirs, tensor_name, ours, wanted = wrong[0]
        more = f" (and {len(wrong) - 1} more of {len(pairs)} matrices)" if len(wrong) > 1 else ""
        what = "all zeros" if not ours.norm else f"of norm {ours.norm:.6g} and largest {ours.largest:.6g}"
        said = f"{tensor_name} is {what}, {theirs} in the checkpoint has {wanted.norm:.6g} and {wanted.largest:.6g}"
        return _check(name, codes, False, said + more)
    return _check(
        name, codes, True, f"{len(pairs)} matrices hold the checkpoint's numbers (by norm and maximum)"
    )


def _near(a: float, b: float, share: float) -> bool:
    return abs(a - b) <= share * abs(b)


def _pairs(header: Header, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The checkpoint's matrices and the tensors they became, by gguf-py's own table of names."""
    package = runtime.gguf()
    architecture = header.keys.get("general.architecture")
    kind = next((k for k, name in package.MODEL_ARCH_NAMES.items() if name == architecture), None)
    blocks = header.keys.get(f"{architecture}.block_count")
    if kind is None or not isinstance(blocks, int):
        return {}
    table = package.get_tensor_name_map(kind, blocks)
    ours = {t.name: t for t in header.tensors}
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        became = ours.get(table.get_name(key=name, try_suffixes=(".weight", ".bias")) or "")
        same_size = became is not None and became.weights == tensor.columns * (tensor.shape or (1,))[0]
        if became is not None and same_size and len(tensor.shape) > 1 and tensor.dtype in UNIT:
            found[name] = became
    return found


def _print_of(file: Path, header: Header, tensor: Tensor) -> _Print:
    import numpy as np

    squares, largest, broken = 0.0, 0.0, 0
    for block in numbers(file, header, tensor):
        broken += len(block) - int(np.count_nonzero(np.isfinite(block)))
        squares += float(np.dot(block, block))
        largest = max(largest, float(np.abs(block).max()))
    return _Print(count=tensor.weights, norm=squares**0.5, largest=largest, broken=broken)


def _print_of_stored(stored: Stored) -> _Print:
    squares, largest = 0.0, 0.0
    for _, block in rows(stored):
        wide = block.float()
        squares += float(wide.square().sum())
        largest = max(largest, float(wide.abs().max()))
    return _Print(count=0, norm=squares**0.5, largest=largest)


def _blocks(header: Header, settings: Mapping[str, Any]) -> Check:
    """C-34: as many blocks as the config has layers, and any extra ones declared as those that predict further tokens."""
    inside = block_count("gguf", header)
    wanted = next((settings[key] for key in LAYERS if isinstance(settings.get(key), int)), None)
    architecture = header.keys.get("general.architecture")
    count, extra = (
        header.keys.get(f"{architecture}.{key}") or 0 for key in ("block_count", "nextn_predict_layers")
    )
    if inside.ok is False or wanted is None:
        return inside
    said = f"config.json has {wanted} layers, the file {count} blocks"
    if extra:
        said += f", {extra} of them to predict further tokens"
    assert isinstance(count, int) and isinstance(extra, int)
    return _check("block count", ("C-34",), count - extra == wanted, said)


def _rows(header: Header, settings: Mapping[str, Any], tokenizer: Any) -> Check:
    """C-14, C-15: a row of the embedding for every token that the tokenizer or the config knows, and for no other."""
    name, codes = "vocabulary rows", ("C-14", "C-15")
    shapes = {t.name: t.shape for t in header.tensors}
    if "token_embd.weight" not in shapes:
        return _check(name, codes, False, "the file has no token_embd.weight")
    count, tokens = shapes["token_embd.weight"][-1], header.lengths.get("tokenizer.ggml.tokens", 0)
    highest, announced = max(tokenizer.get_vocab().values()), settings.get("vocab_size") or 0
    problems = []
    if tokens != count:
        problems.append(f"the file lists {tokens} tokens, but token_embd.weight has {count} rows")
    if count <= highest:
        problems.append(f"token_embd.weight has {count} rows, but the tokenizer's highest id is {highest}")
    # The converter itself cuts rows without a token off Gemma 3 (conversion/gemma.py).
    if count < announced and not str(header.keys.get("general.architecture")).startswith("gemma3"):
        problems.append(f"token_embd.weight has {count} rows, but config.json says vocab_size {announced}")
    if shapes.get("output.weight", (count,))[-1] != count:
        problems.append(f"output.weight has {shapes['output.weight'][-1]} rows, token_embd.weight {count}")
    for key in ("token_type", "scores"):
        if (length := header.lengths.get(f"tokenizer.ggml.{key}", tokens)) != tokens:
            problems.append(f"tokenizer.ggml.{key} has {length} entries for {tokens} tokens")
    said = f"{count} rows, {tokens} tokens, vocab_size {announced}, highest id {highest}"
    return _check(name, codes, not problems, "; ".join(problems) or said)


def _tied(file: Path, header: Header, settings: Mapping[str, Any], stored: Mapping[str, Stored]) -> Check:
    """C-12: one output layer, the checkpoint's."""
    name, codes = "tied embeddings", ("C-12",)
    tensors = {t.name: t for t in header.tensors}
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    own = any(n.endswith(HEADS) for n in stored)
    ties = settings.get("tie_word_embeddings")
    if head is None:
        if own and ties is False:
            said = "config.json does not tie the embeddings, but output.weight is missing, and token_embd.weight serves"
            return _check(name, codes, False, said)
        return _check(name, codes, True, "token_embd.weight serves as the output layer as well")
    if not ties or embedding is None:
        return _check(name, codes, True, "output.weight is a tensor of its own, as in the checkpoint")
    same = embedding.type == head.type and embedding.bytes == head.bytes
    same = same and raw_bytes(file, header, embedding) == raw_bytes(file, header, head)
    said = "holds the same numbers as" if same else "differs from"
    return _check(name, codes, same, f"output.weight {said} token_embd.weight, which config.json ties it to")


def _template(header: Header, checkpoint: Path) -> Check:
    """C-20: the chat template is in the file, to the byte."""
    name, codes = "chat template", ("C-20",)
    ours, theirs = chat_template(checkpoint), str(header.keys.get("tokenizer.chat_template") or "")
    if ours == theirs:
        said = f"the checkpoint's {len(ours)} characters" if ours else "neither has one"
        return _check(name, codes, True, said)
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    said = f"tokenizer.chat_template has {theirs[at : at + 24]!r} at character {at}, the checkpoint {ours[at : at + 24]!r}"
    return _check(
        name,
        codes,
        False,
        said if theirs else "the file has no tokenizer.chat_template, the checkpoint has one",
    )


def _special(file: Path, header: Header, checkpoint: Path, tokenizer: Any) -> Check:
    """C-21: the ids that begin, end and pad a text are those that were trained, and llama.cpp stops where training did."""
    name, codes = "special tokens", ("C-21", "C-22")
    problems, said = [], []
    for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        ours = getattr(tokenizer, f"{kind}_token_id")
        theirs = header.keys.get(f"tokenizer.ggml.{key}_token_id")
        if ours is not None and theirs != ours and (theirs is not None or kind == "eos"):
            problems.append(f"tokenizer.ggml.{key}_token_id is {theirs}, the tokenizer's {kind} id is {ours}")
        said.append(f"{kind} {theirs}")
    end = _turn_end(tokenizer, _listed_ends(checkpoint))
    try:
        with Decoder(file, vocab_only=True) as decoder:
            if end is not None and not decoder.is_end(end):
                problems.append(f"an answer ends with token {end}, at which llama.cpp does not stop")
    except DataError as error:
        return _check(name, codes, False, str(error))
    said.append(f"an answer ends with {end}")
    return _check(name, codes, not problems, "; ".join(problems or said))


def _turn_end(tokenizer: Any, listed: Sequence[int]) -> int | None:
    """The special token that the chat template puts behind an answer; without one, the first at which transformers stops."""
    answer = "An answer."
    turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}]
    otherwise: int | None = listed[0] if listed else tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return otherwise
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # noqa: BLE001  a template raises what it likes; `exact` compares the shapes it accepts
        log.debug("the template refuses a question and an answer: %s", error)
        return otherwise
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *listed}
    behind = tokenizer.encode(text.rpartition(answer)[2], add_special_tokens=False)
    return next((i for i in behind if i in special), otherwise)


def _listed_ends(checkpoint: Path) -> Sequence[int]:
    """generation_config.json's own ids, at which transformers ends an answer."""
    path = checkpoint / "generation_config.json"
    listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)]
