"""LoRA adapters beside a GGUF base, as llama.cpp runs them: which base one belongs to, where it lies, what it holds.

llama.cpp takes any adapter whose tensors have the base's names and shapes, and answers with nonsense when the weights
under it are others. So edgeft's adapters carry the hash of their base's tensors, and nothing here loads one unchecked.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

from edgeft.errors import DataError
from edgeft.llamacpp import header
from edgeft.llamacpp.threads import default_threads

MODEL, ADAPTER = "model.gguf", "adapter.gguf"
"""What the two files are called in every folder that holds a finished model."""
BASE_KEY = "edgeft.base.tensors_sha256"
"""The adapter's key for `base_hash` of the file it was trained on."""
_BLOCK = 1 << 20


def adapter_beside(model: Path) -> Path | None:
    """The adapter that is part of a finished model: `adapter.gguf` beside `model.gguf`; None when there is none.

    Whoever loads `model.gguf` loads it too: without its adapter such a file is the untrained base. A file of any other
    name is only itself.
    """
    beside = model.with_name(ADAPTER)
    return beside if model.name == MODEL and beside.is_file() else None


def lora_arguments(model: Path) -> list[str]:
    """`--lora PATH` for llama.cpp's programs when an adapter belongs to `model`, else nothing.

    Raises DataError when the adapter beside it is for another base.
    """
    adapter = adapter_beside(model)
    if adapter is None:
        return []
    check_base(model, adapter)
    return ["--lora", os.fspath(adapter)]


def check_base(base: Path, adapter: Path) -> str:
    """Make sure that `adapter` was made for exactly the weights in `base`; the hash they agree on.

    Raises DataError with both hashes when they differ, and when the adapter does not say, is no adapter, or either
    file is no GGUF.
    """
    keys = _keys(adapter)
    if keys.get("general.type") != "adapter":
        raise DataError(
            f"{adapter} is no adapter: its general.type is {keys.get('general.type')!r}",
            hint="was the model given where the adapter belongs?",
        )
    noted = keys.get(BASE_KEY)
    if not isinstance(noted, str):
        raise DataError(
            f"{adapter} does not say which base it was trained on: it has no key {BASE_KEY}",
            hint="adapters that edgeft writes have it; convert the PEFT adapter again with edgeft.grid.adapter.write",
        )
    if (found := base_hash(base)) != noted:
        raise DataError(
            f"{adapter} was trained on other weights than those in {base}: "
            f"its base's tensors hash to {noted}, this file's to {found}",
            hint="run the adapter on the very file it was trained on; another quantization of the same model is another base",
        )
    return noted


def base_hash(file: Path) -> str:
    """sha256 of a GGUF file's weights: names, types, shapes and bytes, whatever their order or the metadata.

    Each tensor is hashed by itself and makes one line, `name TAB type TAB shape TAB sha256 of its bytes`, shape in
    ggml's order joined by x; the result is the sha256 of the lines, sorted. So a template that was repaired leaves
    the hash alone, and several tensors are read at once. A file that did not change since (size, time, inode) is read
    once a process. Raises DataError when it is no GGUF file or is cut off.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    stat = file.stat()
    return _hash(file.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


def tensor_bytes(adapter: Path) -> int:
    """Memory that llama.cpp takes for an adapter's tensors: what they take in the file, in bytes."""
    return sum(tensor.bytes for tensor in header.read(adapter).tensors)


@lru_cache(maxsize=16)
def _hash(file: Path, *_identity: int) -> str:
    found = header.read(file)
    with file.open("rb") as stream, ThreadPoolExecutor(default_threads()) as pool:
        lines = list(pool.map(partial(_line, stream.fileno(), found.data_offset, file), found.tensors))
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _line(handle: int, start: int, file: Path, tensor: header.Tensor) -> str:
    """One tensor's line. Reads by position, so that threads can share the handle."""
    digest, at, end = hashlib.sha256(), start + tensor.offset, start + tensor.offset + tensor.bytes
    while at < end:
        if not (block := os.pread(handle, min(_BLOCK, end - at), at)):
            raise DataError(f"{file} ends inside {tensor.name}")
        digest.update(block)
        at += len(block)
    shape = "x".join(map(str, tensor.shape))
    return f"{tensor.name}\t{tensor.type}\t{shape}\t{digest.hexdigest()}\n"


def _keys(file: Path) -> dict[str, header.Value | None]:
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    return dict(header.read(file).keys)
