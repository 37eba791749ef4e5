"""Quantizes a GGUF file through libllama and says what became of each tensor.

The bytes are those of llama.cpp's own llama-quantize and do not depend on the number of threads (measured).
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.errors import StageError, ToolError
from edgeft.llamacpp.header import GGML_TYPES
from edgeft.llamacpp.tensor_types import TypeReport, types_in
from edgeft.llamacpp.threads import allowed_cpus

__all__ = ["NEED_IMATRIX", "TYPES", "Fallback", "TypeReport", "fallbacks", "quantize", "types_in"]

log = logging.getLogger(__name__)

_FTYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q6_K": 18,
    "Q5_0": 8, "Q5_1": 9, "Q5_K_S": 16, "Q5_K_M": 17,
    "Q4_0": 2, "Q4_1": 3, "Q4_K_S": 14, "Q4_K_M": 15, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26, "IQ3_M": 27,
    "Q2_K": 10, "Q2_K_S": 21, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29, "TQ2_0": 37,
    "IQ1_S": 24, "IQ1_M": 31, "TQ1_0": 36,
}  # fmt: skip
"""enum llama_ftype of llama.h."""

TYPES: tuple[str, ...] = tuple(_FTYPES)
"""Every name `quantize` takes, largest files first."""

NEED_IMATRIX = frozenset(
    {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M", "Q2_K_S", "IQ3_XS"}
)
"""Labels whose mix holds a type that llama.cpp refuses to make without an importance matrix."""


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A tensor whose rows do not divide into the blocks of the type its label asks for."""

    tensor: str
    row: int
    """Weights a row."""
    wanted: str
    got: str


def quantize(
    src: Path,
    dst: Path,
    type_name: str,
    *,
    imatrix: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    threads: int = 0,
    output_type: str | None = None,
    token_embedding_type: str | None = None,
    dry_run: bool = False,
) -> tuple[Fallback, ...]:
    """Write `dst`, the model `src` (F32, F16 or BF16) with its weights as `type_name` (one of TYPES).

    `overrides` maps a regular expression over tensor names to a ggml type ("ffn_down": "Q6_K"); the first that
    matches decides. `imatrix` is an importance matrix in GGUF form; its provenance keys (dataset, entries, chunks)
    are written as llama-quantize does. `threads` 0 means all allowed processors. `dry_run` writes nothing. Returns
    the tensors that fell back to another type, in llama.cpp's own words. Raises ToolError with llama.cpp's reason.
    """
    from edgeft.llamacpp import runtime

    bindings = runtime.native()
    if type_name not in _FTYPES:
        raise StageError(f"{type_name!r} is no quantization type", hint=f"choose from {', '.join(TYPES)}")
    params = bindings.llama_model_quantize_default_params()
    params.ftype = _FTYPES[type_name]
    params.nthread = threads or allowed_cpus()
    params.dry_run = dry_run
    if output_type:
        params.output_tensor_type = _ggml_type(output_type)
    if token_embedding_type:
        params.token_embedding_type = _ggml_type(token_embedding_type)
    keep: list[Any] = []  # C reads these arrays while it runs
    if overrides:
        params.tt_overrides = _overrides(bindings, overrides, keep)
    if imatrix:
        params.imatrix, params.kv_overrides = _imatrix(bindings, imatrix, keep)
    aside = dst.with_name(dst.name + ".part")
    progress.report(f"quantize to {type_name}")
    try:
        with runtime.listening(lambda line: _report(type_name, line)) as said:
            failed = bindings.llama_model_quantize(os.fsencode(src), os.fsencode(aside), ctypes.byref(params))
        if failed:
            raise ToolError(f"llama.cpp could not quantize {src} to {type_name}: {runtime.complaint(said)}")
        if not dry_run:
            with aside.open("rb") as stream:
                os.fsync(stream.fileno())
            aside.replace(dst)
    finally:
        aside.unlink(missing_ok=True)
    return fallbacks("".join(said))


def _report(type_name: str, line: str) -> None:
    if counted := re.match(r"\[\s*(\d+)/\s*(\d+)\]", line):
        progress.report(f"quantize to {type_name}", int(counted[1]), int(counted[2]), unit="tensors")


def fallbacks(text: str) -> tuple[Fallback, ...]:
    """The tensors that llama.cpp's quantizer says it gave another type than wanted."""
    found = re.finditer(
        r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+\d+ \(required for type\s+(\S+)\)"
        r"[^\n]*?-> falling back to\s+(\S+)",
        text,
    )
    return tuple(Fallback(tensor=m[1], row=int(m[2]), wanted=m[3].upper(), got=m[4].upper()) for m in found)


def _ggml_type(name: str) -> int:
    for number, (label, _, _) in GGML_TYPES.items():
        if label == name.upper():
            return number
    choices = ", ".join(label for label, _, _ in GGML_TYPES.values())
    raise StageError(f"{name!r} is no tensor type", hint=f"choose from {choices}")


def _overrides(bindings: Any, overrides: Mapping[str, str], keep: list[Any]) -> Any:
    """A C array that ends with pattern = NULL."""
    array = (bindings.llama_model_tensor_override * (len(overrides) + 1))()
    for slot, (pattern, kind) in zip(array, overrides.items(), strict=False):
        try:
            re.compile(pattern)
        except re.error as error:
            raise StageError(f"the tensor pattern {pattern!r} is no regular expression: {error}") from error
        slot.pattern, slot.type = pattern.encode(), _ggml_type(kind)
    array[len(overrides)].type = bindings.GGML_TYPE_COUNT
    keep.append(array)
    return array


def _imatrix(bindings: Any, path: Path, keep: list[Any]) -> tuple[Any, Any]:
    """The matrix as a C array that ends with name = NULL, and the keys llama-quantize notes beside it."""
    from edgeft.llamacpp.imatrix import load

    matrix = load(path)
    means = matrix.means()
    array = (bindings.llama_model_imatrix_data * (len(means) + 1))()
    for slot, (name, values) in zip(array, means.items(), strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = ctypes.cast(values.ctypes.data, ctypes.POINTER(ctypes.c_float))
    notes: list[tuple[str, str | int]] = [("file", path.name)]
    if matrix.datasets:
        notes.append(("dataset", matrix.datasets[0]))
    notes.append(("entries_count", len(means)))
    if matrix.chunks > 0:
        notes.append(("chunks_count", matrix.chunks))
    keys = (bindings.llama_model_kv_override * (len(notes) + 1))()
    for slot, (name, value) in zip(keys, notes, strict=False):
        slot.key = f"quantize.imatrix.{name}".encode()
        if isinstance(value, int):
            slot.tag, slot.value.val_i64 = bindings.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            # A fixed field of 128 bytes in C; cut between characters, not inside one.
            cut = value.encode()[:127].decode(errors="ignore").encode()
            slot.tag, slot.value.val_str = bindings.LLAMA_KV_OVERRIDE_TYPE_STR, cut
    keep += [array, means, keys]
    return array, keys
