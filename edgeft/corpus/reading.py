"""Records out of data files: JSON, JSONL, CSV, TSV, Parquet, folders of them and Hugging Face datasets.

A record is a dict of columns together with the place it was read from. What the columns mean is
`edgeft.corpus.formats`'s business.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeft.corpus import json_rows
from edgeft.corpus.conversation import Record
from edgeft.errors import DataError

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, ".parquet")
_SPLITS = "train|validation|valid|val|dev|test|eval|heldout"


def read(path: Path, *, split: str = "train") -> Iterator[Record]:
    """Yield the records of a file or folder in order; a bad row is yielded with its `problem`.

    A folder is a dataset saved by `datasets.save_to_disk`, or holds data files of the kinds in SUFFIXES; of
    files named after splits only those of `split` are read. Raises DataError for a path or kind of file
    that cannot be read at all.
    """
    if path.is_dir():
        yield from _folder(path, split)
        return
    if not path.is_file():
        raise DataError(f"data file {path} does not exist")
    yield from _file(path, path.name)


def read_hub(name: str, *, revision: str, config: str = "", split: str = "train") -> Iterator[Record]:
    """Yield the records of a dataset on the Hugging Face hub at a pinned commit (40 hex digits).

    Raises DataError when the dataset cannot be had: no network, no such name, revision, config or split.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, revision=revision, split=split)
    except Exception as e:
        # datasets raises a dozen unrelated types here; every one means the same to the user.
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(
            f"dataset {name!r} (split {split!r}, revision {revision[:12]}) cannot be loaded: {reason}",
            hint="check the name, the revision and the network, or give the data as a file with `path`",
        ) from e
    yield from _dataset_rows(rows, f"{name}/{split}")


def sha256(path: Path) -> str:
    """The sha256 of a file; of a folder, over its files' names and hashes in order of name."""
    if path.is_file():
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(
        (p for p in path.rglob("*") if p.is_file()), key=lambda p: p.relative_to(path).as_posix()
    ):
        whole.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
    return whole.hexdigest()


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _folder(path: Path, split: str) -> Iterator[Record]:
    saved = _saved_dataset(path, split)
    if saved is not None:
        import datasets

        try:
            rows = datasets.load_from_disk(str(saved))
        except Exception as e:
            # A damaged folder surfaces as whatever the Arrow reader trips over first.
            raise DataError(f"{saved} is not a dataset that `datasets` can load: {e}") from e
        yield from _dataset_rows(rows, path.name)
        return
    files = sorted(
        (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()),
        key=lambda p: p.relative_to(path).as_posix(),
    )
    if not files:
        raise DataError(f"folder {path} holds no data file", hint=f"edgeft reads {', '.join(SUFFIXES)}")
    for file in _of_split(files, path, split):
        yield from _file(file, f"{path.name}/{file.relative_to(path).as_posix()}")


def _saved_dataset(path: Path, split: str) -> Path | None:
    """The folder of one split if `path` was written by `save_to_disk`."""
    if (path / "state.json").is_file():
        return path
    if not (path / "dataset_dict.json").is_file():
        return None
    if (path / split / "state.json").is_file():
        return path / split
    names = sorted(p.parent.name for p in path.glob("*/state.json"))
    raise DataError(
        f"dataset folder {path} has no split {split!r}", hint=f"it has {', '.join(names) or 'none'}"
    )


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """Files whose name or folder starts with the split's name; all, when no name speaks of any split."""

    def named(file: Path, splits: str) -> bool:
        parts = file.relative_to(root).with_suffix("").parts
        return any(re.fullmatch(rf"({splits})([-_.].*)?", p, re.IGNORECASE) for p in parts)

    if not any(named(f, _SPLITS) or named(f, re.escape(split)) for f in files):
        return files
    chosen = [f for f in files if named(f, re.escape(split))]
    if not chosen:
        found = ", ".join(f.relative_to(root).as_posix() for f in files[:8])
        raise DataError(f"folder {root} has no file of split {split!r}", hint=f"it holds {found}")
    return chosen


def _file(path: Path, name: str) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES:
        yield from json_rows.read_json(path, name)
    elif suffix in TABLE_SUFFIXES:
        yield from _table(path, name)
    elif suffix == ".parquet":
        yield from _parquet(path, name)
    else:
        raise DataError(
            f"{path}: edgeft does not read {suffix or 'files without a suffix'}",
            hint=f"it reads {', '.join(SUFFIXES)}",
        )


def _table(path: Path, name: str) -> Iterator[Record]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        yield Record(origin=f"{name}:{line}", columns={}, problem="not UTF-8; save the table as UTF-8")
        return
    header = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for row in rows:
            if not names:
                names = row
            elif row:
                yield _table_row(f"{name}:{line}", names, row)
            line = rows.line_num + 1
    except csv.Error as e:
        yield Record(origin=f"{name}:{line}", columns={}, problem=f"not {path.suffix[1:].upper()}: {e}")


def _table_row(origin: str, names: list[str], row: list[str]) -> Record:
    if len(row) != len(names):
        problem = f"has {len(row)} fields where the header has {len(names)}"
        return Record(origin=origin, columns={}, problem=problem)
    return Record(origin=origin, columns=dict(zip(names, row, strict=True)))


def _parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield Record(origin=f"{name}:{number}", columns=row)
    except (pyarrow.ArrowException, OSError) as e:
        raise DataError(f"{path} is not a Parquet file that can be read: {e}") from e


def _dataset_rows(rows: Any, name: str) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield Record(origin=f"{name}:{number}", columns=dict(row))
