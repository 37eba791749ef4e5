"""How large the difference between two models is, by the way it is taken and packed, and how long that takes.

    python benchmarks/update_delta.py OLD.gguf NEW.gguf

Every eighth frame stands for all in the comparison of ways; the last lines are the delta itself and zstd (the program).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy

from edgeft.agent import delta as device
from edgeft.updates import delta

EVERY = 8
LARGE = [{**delta._LZMA[0], "dict_size": 1 << 20, "depth": 0, "nice_len": 64}]


def main(old: Path, new: Path) -> None:
    """Print a line for each way."""
    a, b = (numpy.memmap(path, numpy.uint8, "r") for path in (old, new))
    changed = [p for p in delta._frames(delta._pieces(old, new), a, b) if p.old is not None and not p.same][
        ::EVERY
    ]
    whole = sum(p.end - p.start for p in changed)
    small = delta._LZMA
    print(f"{whole / 1e6:.1f} MB of {len(b) / 1e6:.1f} MB, of what has changed")
    for title, xor, planes, lzma in (
        ("subtracted, planes, LZMA 4 KiB or deflate (what is shipped)", False, True, small),
        ("the same with exclusive or", True, True, small),
        ("the same without planes", False, False, small),
        ("the same with a dictionary of 1 MiB", False, True, LARGE),
    ):
        delta._LZMA = lzma
        began, size = time.perf_counter(), 0
        for p in changed:
            assert p.old is not None
            now, was = b[p.start : p.end], a[p.old : p.old + p.end - p.start]
            piece = p if planes else replace(p, fields=(sum(p.fields),))
            size += len(delta._planes(device.ADD, 0, now ^ was if xor else now - was, piece.fields))
        print(
            f"{100 * size / whole:5.1f} %  {whole / 1e6 / (time.perf_counter() - began):5.1f} MB/s  {title}",
            flush=True,
        )
    delta._LZMA = small
    with tempfile.TemporaryDirectory() as folder:
        out, result = Path(folder) / "delta", Path(folder) / "result"
        began = time.perf_counter()
        size = delta.make(old, new, out)
        made = time.perf_counter() - began
        began, used = time.perf_counter(), time.process_time()
        device.apply(old, out, result)
        took, used = time.perf_counter() - began, time.process_time() - used
        print(f"{100 * size.share:5.1f} %  delta, {size.bytes / 1e6:.1f} of {size.whole / 1e6:.1f} MB; made and proved in {made:.0f} s, "
              f"applied in {took:.1f} s ({used:.1f} s of one processor)")  # fmt: skip
    for title, options in (
        ("zstd -3 of the new file", ()),
        ("zstd -3 --patch-from", ("--long=31", f"--patch-from={old}")),
    ):
        packed = subprocess.run(
            ["zstd", "-q", "-c", "-3", *options, str(new)], stdout=subprocess.PIPE, check=True
        ).stdout
        print(f"{100 * len(packed) / len(b):5.1f} %  {title}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
