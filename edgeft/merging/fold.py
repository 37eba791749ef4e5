"""The merge: W' = W + scale * B A in float32, rounded once, written next to untouched copies of everything else.

Memory: what is held is the adapter, and of the base one block of rows (BLOCK numbers) or one CHUNK of bytes, however
large the model (C-43). Nothing runs on a GPU. The result depends on nothing but the two inputs: the same files give
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgeft import progress
from edgeft.errors import StageError
from edgeft.merging import adapter
from edgeft.merging.adapter import Pair
from edgeft.merging.shards import Entry, pieces, raw_bytes, read_checkpoint, row_blocks, torch_dtype, write

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float16", "bfloat16"]

BLOCK = 1 << 22
"""Numbers of a weight that are merged at once. A block takes about 20 bytes a number at its peak: 75 MB measured, and
210 MB with what glibc's malloc keeps of freed blocks."""

F16_MAX = 65504.0
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
SHORT = {long: short for short, long in _NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written, as read back from the written files."""

    dtype: str
    """Of the adapted weights: float16 or bfloat16."""
    adapted: int
    """Weights with an adapter. Each of them changed, and nothing else did."""
    untouched: int
    max_abs: float
    """Largest magnitude among the adapted weights."""
    changed_share: float
    """Of the adapted weights' numbers, the share that differs from the base after rounding."""
    sha256: str
    """Over all weight files, by name."""


def merge(base_folder: Path, adapter_folder: Path, out_folder: Path, *, dtype: Dtype = "auto") -> Merged:
    """Write the checkpoint in `base_folder` with the adapter folded in to `out_folder`, and check what was written.

    Every tensor keeps its dtype when the base is 16-bit and `dtype` is `auto`; so what is not adapted is copied bit
    for bit (C-01). A float32 base becomes float16, which keeps three more bits than bfloat16, unless a value beyond
    65504 would overflow; a 16-bit base that the adapter drives over that limit becomes bfloat16 (C-35). Config and
    tokenizer files are copied byte for byte; only when the dtype changes, the config's `dtype` follows it.

    Raises StageError when the base is quantized, when an adapter tensor does not belong to exactly one weight, when
    an adapter changes nothing, or when a written tensor is not what it should be.
    """
    from edgeft.training.model import skeleton
    from edgeft.training.modules import is_transposed

    model = skeleton(base_folder)
    entries, metadata = read_checkpoint(base_folder)
    pairs = adapter.read(adapter_folder)
    transposed = {name for name, module in model.named_modules() if is_transposed(module)}
    bound = adapter.bind(pairs, {name: e.shape for name, e in entries.items()}, model, transposed)
    _check_tied(model, entries, bound)
    plan = _output_dtypes(entries, bound, transposed, dtype)
    out_folder.mkdir(parents=True, exist_ok=True)
    files = sorted({entry.file for entry in entries.values()})
    for number, file in enumerate(files):
        progress.report("merge", number, len(files), unit="file")
        mine = {name: entry for name, entry in entries.items() if entry.file == file}

        def body(name: str, mine: Mapping[str, Entry] = mine) -> Iterator[bytes]:
            return _tensor(mine[name], plan[name], bound.get(name), transposed)

        write(
            out_folder / file.name, {n: (plan[n], e.shape) for n, e in mine.items()}, metadata[file], body
        )  # fmt: skip
    copy_rest(base_folder, out_folder, entries, plan)
    return _check(entries, bound, out_folder)


def check_bindable(base_folder: Path, model: Any, modules: Collection[str]) -> None:
    """Refuse, before any training, layers whose adapter could not be merged afterwards.

    `model` is a skeleton of the checkpoint. Raises StageError when a layer has not exactly one weight there (C-02).
    """
    entries, _ = read_checkpoint(base_folder)
    shapes = {name: entry.shape for name, entry in entries.items()}
    for module in modules:
        adapter.weight_of(module, shapes, model.base_model_prefix)


def _check_tied(model: Any, entries: Mapping[str, Entry], bound: Mapping[str, Pair]) -> None:
    """A tied checkpoint that carries its output layer as well must carry the same one (C-12)."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if (module is embedding or module is head) and f"{name}.weight" in entries
    ]
    if touched := [name for name in names if name in bound]:
        raise StageError(f"the adapter changes {touched[0]}, which this model ties to another tensor (C-12)")
    if len(names) == 2 and _digest(entries[names[0]]) != _digest(entries[names[1]]):
        raise StageError(
            f"the config ties {names[0]} and {names[1]}, but the checkpoint holds different values for them (C-12)",
            hint="set tie_word_embeddings to false in the base's config.json, or remove the second tensor",
        )


def _output_dtypes(
    entries: Mapping[str, Entry], bound: Mapping[str, Pair], transposed: set[str], dtype: Dtype
) -> dict[str, str]:
    """The dtype of each tensor to write. Looks through the merged values for what float16 cannot hold."""
    floats = {name: e for name, e in entries.items() if e.dtype in ("F16", "BF16", "F32", "F64")}
    wide = any(floats[name].dtype in ("F32", "F64") for name in bound if name in floats)
    plan = {name: entry.dtype for name, entry in entries.items()}
    if dtype == "auto" and not wide:
        at_risk = [name for name in bound if plan[name] == "F16"]
        target = "F16"
    else:
        target = "F16" if dtype == "auto" else SHORT[dtype]
        plan |= dict.fromkeys(floats, target)
        at_risk = list(floats) if target == "F16" else []
    for name in at_risk:
        largest = _largest(entries[name], bound.get(name), transposed)
        if largest > F16_MAX:
            if dtype == "float16":
                raise StageError(f"{name} reaches {largest:g}; float16 ends at {F16_MAX:g} (C-35)")
            log.warning(
                "%s reaches %g, beyond float16: all weights are written as bfloat16 (C-35)", name, largest
            )
            return {n: "BF16" if n in floats else kept for n, kept in plan.items()}
    return plan


def _largest(entry: Entry, pair: Pair | None, transposed: set[str]) -> float:
    return max(float(block.abs().max()) for _, block in _blocks(entry, pair, transposed))


def _blocks(entry: Entry, pair: Pair | None, transposed: set[str]) -> Iterator[tuple[int, torch.Tensor]]:
    """A weight in float32, with its adapter's share added, in blocks of rows."""
    left = right = None
    if pair:
        # Conv1D keeps W as (in, out): there the change is (B A)^T = A^T B^T.
        left, right = (pair.a.T, pair.b.T) if pair.module in transposed else (pair.b, pair.a)
    for row, block in row_blocks(entry, BLOCK):
        merged = block.float()
        if pair and left is not None and right is not None:
            change = left[row : row + len(block)] @ right
            merged = change.mul_(pair.scale).add_(merged)
        yield row, merged


def _tensor(entry: Entry, dtype: str, pair: Pair | None, transposed: set[str]) -> Iterator[bytes]:
    if pair is None and dtype == entry.dtype:
        yield from pieces(entry)
        return
    for _, block in _blocks(entry, pair, transposed):
        yield raw_bytes(block.to(torch_dtype(dtype)))


def copy_rest(base: Path, out: Path, entries: Mapping[str, Entry], plan: Mapping[str, str]) -> None:
    """Copy config and tokenizer files; where `plan` changes a tensor's dtype, the config and the index say so."""
    changed = any(plan[name] != entry.dtype for name, entry in entries.items())
    for file in sorted(base.iterdir()):
        if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or not file.is_file():
            continue
        shutil.copyfile(file, out / file.name)
        if changed and file.name in ("config.json", "model.safetensors.index.json"):
            _follow_dtype(out / file.name, entries, plan)
    for file in out.iterdir():
        file.chmod(0o644)


def _follow_dtype(file: Path, entries: Mapping[str, Entry], plan: Mapping[str, str]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.name == "config.json":
        written = _NAMES[next(d for d in plan.values() if d in _NAMES)]
        for key in ("dtype", "torch_dtype"):
            if key in content:
                log.info("config.json: %s %s -> %s, as the weights are written", key, content[key], written)
                content[key] = written
    else:
        wide = {"F64": 8, "F32": 4, "I64": 8, "I32": 4}
        sizes = (e.size // wide.get(e.dtype, 2) * wide.get(plan[n], 2) for n, e in entries.items())
        content.setdefault("metadata", {})["total_size"] = sum(sizes)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(entries: Mapping[str, Entry], bound: Mapping[str, Pair], out: Path) -> Merged:
    """Read the written files back: the adapted tensors changed, nothing else did (C-01), no number is missing."""
    written, _ = read_checkpoint(out)
    if written.keys() != entries.keys():
        raise StageError(
            f"tensors differ between base and result: {sorted(written.keys() ^ entries.keys())[:3]}"
        )
    largest, differing, numbers = 0.0, 0, 0
    for done, (name, entry) in enumerate(entries.items()):
        progress.report("check the merge", done, len(entries), unit="tensor")
        changed, peak = _compare(entry, written[name])
        if name not in bound:
            if changed:
                raise StageError(f"{name} has no adapter, yet {changed} of its numbers changed (C-01)")
            continue
        if not changed:
            raise StageError(
                f"the adapter leaves {name} as it was (C-01)",
                hint="it was not trained, or its change is smaller than the weight's rounding",
            )
        largest, differing = max(largest, peak), differing + changed
        numbers += entry.shape[0] * entry.columns
    used = {_NAMES[written[name].dtype] for name in bound}
    return Merged(
        dtype=used.pop() if len(used) == 1 else "mixed",
        adapted=len(bound),
        untouched=len(entries) - len(bound),
        max_abs=largest,
        changed_share=differing / numbers,
        sha256=_files_digest(out),
    )


def _compare(before: Entry, after: Entry) -> tuple[int, float]:
    """How many numbers of `after` are not those of `before` rounded to its dtype, and its largest magnitude."""
    import torch

    if before.dtype == after.dtype and _digest(before) == _digest(after):
        return 0, 0.0
    changed, peak = 0, 0.0
    to = torch_dtype(after.dtype)
    for (_, old), (_, new) in zip(row_blocks(before, BLOCK), row_blocks(after, BLOCK), strict=True):
        if not bool(torch.isfinite(new).all()):
            raise StageError(f"a merged weight holds numbers that are not finite ({after.file.name})")
        changed += int((old.to(to) != new).sum())
        peak = max(peak, float(new.abs().max()))
    return changed, peak


def _digest(entry: Entry) -> str:
    whole = hashlib.sha256()
    for piece in pieces(entry):
        whole.update(piece)
    return whole.hexdigest()


def _files_digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            whole.update(f"{file.name}\0{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
