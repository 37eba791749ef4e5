"""The file that was trained on and the adapter beside it, as they ship: model.gguf and adapter.gguf."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgeft import estimates, llamacpp
from edgeft.stage import Facts, Job, Params, Stage, Where


class Pack(Params):
    pass


def run(job: Job[Pack]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.grid import adapter
    from edgeft.parity.checks import rendering

    base, train, file = job.inputs["base"].path / "model", job.inputs["train"], job.inputs["quantize/grid"]
    model, out = job.out / "model.gguf", job.out / "adapter.gguf"
    _place(file.path / "model.gguf", model)
    written = adapter.write(train.path / "adapter", base, model, out)
    adapter.check_base(model, out)
    size = out.stat().st_size
    return {
        **file.facts,
        "summary": f"{file.facts['type']} base {file.facts['bytes'] / 1e6:,.1f} MB + adapter {size / 1e6:,.1f} MB "
        f"({written.layers} layers in {written.type}, {written.relative_error:.1e} off as it was trained)",
        "bytes": file.facts["bytes"] + size, "adapter_bytes": size, "adapter": written.facts(),
        "checks": [c.facts() for c in rendering.against_checkpoint(base, model)],
    }  # fmt: skip


def _place(source: Path, out: Path) -> None:
    """The same bytes under another name: a second name for the file where the disk allows."""
    try:
        os.link(source, out)
    except OSError:
        shutil.copyfile(source, out)


STAGE = Stage(
    name="pack", params=Pack, run=run, needs=("base", "train", "quantize/grid"), makes=("model.gguf", "adapter.gguf"),
    extra="train", tools=(llamacpp.LIBRARY, llamacpp.SERVER), estimate=estimates.packed,
    when=Where(table="train", key="method", values=("grid-adapter",)), replaces=("quantize/gguf",),
)  # fmt: skip
