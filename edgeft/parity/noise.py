"""How far two right computations of one folder differ: the noise floor of what another runtime than llama.cpp serves.

AWQ: vLLM's kernels against the same weights unpacked and multiplied by torch. ONNX: the graph's 4-bit products with their
inputs rounded to 8 bits, as they are on most CPUs, against the same in float32, as `accuracy_level` 1 has it. ONNX that CUDA
computed: against the same folder on the CPU. All are the folder's own numbers, computed by other kernels.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.errors import EdgeftError
from edgeft.llamacpp import kernels
from edgeft.llamacpp.base_file import first_scored
from edgeft.parity import served
from edgeft.parity.served import Served, Session

log = logging.getLogger(__name__)

_FLOAT, _BYTES = 1, 4
"""MatMulNBits' accuracy_level: inputs in float32, or rounded to int8 (ONNX Runtime, docs/ContribOperators.md)."""


def floor(
    kind: str, folder: Path, windows: Sequence[Sequence[int]], native: Path, said: str, scratch: Path
) -> dict[str, Any] | None:
    """The noise floor as `kernels.Floor.facts()`; None where there is no second way to compute the folder here.

    `native` holds what the runtime `said` gave for these windows (`kernels.remembered`), and is deleted. `scratch` is a
    folder for a changed copy of the graph.
    """
    try:
        with _another(kind, folder, said, scratch, len(windows[0])) as (session, what):
            if session is None:
                return None
            progress.report("measure the kernels' noise")
            kld, same_top = kernels.between(native, Served(session).logits, windows)
            pair = kernels.Pair(what=what, kld=kld, same_top=same_top, kernels=session.said)
    except (
        EdgeftError
    ) as e:  # what cannot be started, or cannot be rewritten, measures nothing; the page says so
        log.warning("the kernels' noise was not measured: %s", e)
        return None
    finally:
        native.unlink(missing_ok=True)
    scored = len(windows[0]) - 1 - first_scored(len(windows[0]))
    return kernels.Floor(pairs=(pair,), kernels=said, tokens=len(windows) * scored).facts()


@contextmanager
def _another(
    kind: str, folder: Path, said: str, scratch: Path, n_ctx: int
) -> Iterator[tuple[Session | None, str]]:
    """Another computation of the folder, and what the two are."""
    if kind == "onnx" and ", CUDA" in said:
        from edgeft.onnx.session import Session as Onnx

        # accuracy_level is the CPU's: two ways that CUDA computes alike would measure nothing.
        with Onnx(folder, device="cpu") as session:
            yield session, "CUDA / CPU"
    elif kind == "onnx":
        copy = scratch / "accuracy"
        try:
            what = _with_other_accuracy(folder, copy)
            if not what:
                yield None, ""
                return
            with served.open_served(kind, copy, n_ctx=n_ctx) as session:
                yield session, what
        finally:
            shutil.rmtree(copy, ignore_errors=True)
    elif "vLLM" in said and not served.MISSING["transformers"]():
        with served.open_served(kind, folder, n_ctx=n_ctx, runtime="transformers") as session:
            yield session, "vLLM / torch"
    else:
        yield None, ""


def _link(file: Path, to: Path) -> None:
    """By a hard link: ONNX Runtime reads no weights through a symbolic one that leads out of the folder."""
    try:
        os.link(file, to)
    except OSError:  # on another disk
        shutil.copy(file, to)


def _with_other_accuracy(folder: Path, copy: Path) -> str:
    """Write the folder again with the other way to compute its 4-bit products, and the same weights; what the two ways are.

    "" for a graph that has no such product.
    """
    import onnx

    graphs = list(folder.glob("*.onnx"))
    copy.mkdir()
    for file in folder.iterdir():
        if file not in graphs:
            _link(file, copy / file.name)
    changed = was = 0
    for path in graphs:
        model = onnx.load(str(path), load_external_data=False)
        for node in (n for n in model.graph.node if n.op_type == "MatMulNBits"):
            level = next((a for a in node.attribute if a.name == "accuracy_level"), None)
            was = level.i if level else 0
            if level:
                node.attribute.remove(level)
            other = _FLOAT if was == _BYTES else _BYTES
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", other))
            changed += 1
        onnx.save(model, str(copy / path.name))
    ways = ("in 8 bits", "in float32") if was == _BYTES else ("in floats", "in 8 bits")
    return f"inputs of products {' / '.join(ways)}" if changed else ""
