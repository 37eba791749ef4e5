"""A pipeline without machine learning: real files, real processes, the real store, plan and build."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import Field

from edgeft import progress
from edgeft.errors import DataError, ParityError
from edgeft.stage import Facts, InputPath, Job, Needs, Params, Stage, Step


class Data(Params):
    source: InputPath
    holdout: int = 2


def _data(job: Job[Data]) -> Facts:
    rows = job.params.source.read_text().splitlines()
    if not rows:
        raise DataError(f"{job.params.source.name} is empty", hint="add a row")
    (job.out / "train.txt").write_text("\n".join(rows[job.params.holdout :]))
    return {"rows": len(rows), "summary": f"{len(rows)} rows"}


class Train(Params):
    steps: int = Field(4, ge=1)
    lr: float = Field(2e-4, gt=0, lt=1)
    pause: float = 0.0
    boom: bool = False


def _train(job: Job[Train]) -> Facts:
    """Counts its steps in a file, so that a test sees where it went on after a crash."""
    state = job.out / "step"
    start = int(state.read_text()) if state.exists() else 0
    for step in range(start, job.params.steps):
        state.write_text(str(step + 1))
        progress.report("train", step + 1, job.params.steps, unit="step", numbers={"loss": 1 / (step + 1)})
        time.sleep(job.params.pause)
        if job.params.boom and step == 1 and start == 0:
            raise RuntimeError("boom")
    (job.out / "adapter").write_text(job.inputs["data"].path.joinpath("train.txt").read_text())
    return {"resumed_at": start}


class Quantize(Params):
    type: Literal["Q4", "Q8"]

    def label(self) -> str:
        return self.type.lower()


def _quantize(job: Job[Quantize]) -> Facts:
    (job.out / "model").write_text(job.inputs["train"].path.joinpath("adapter").read_text() + job.params.type)
    return {"kl": 0.05 if job.params.type == "Q4" else 0.001}


def _quantize_needs(step: Step, artifacts: Any) -> Needs:
    return Needs(disk_mb=10)


class Gate(Params):
    max_kl: float = 0.1


def _gate(job: Job[Gate]) -> Facts:
    if job.inputs["quantize"].facts["kl"] > job.params.max_kl:
        raise ParityError(f"KL divergence is over the limit of {job.params.max_kl}", hint="more bits")
    return {}


class Device(Params):
    ram_mb: int


def _device(job: Job[Device]) -> Facts:
    return job.params.model_dump()


class Export(Params):
    name: str = "bundle"


def _export(job: Job[Export]) -> Facts:
    (job.out / "bundle").write_text(job.inputs["quantize/gguf"].path.joinpath("model").read_text())
    return {"ram_mb": job.inputs["device"].facts["ram_mb"]}


TOY: tuple[Stage[Any], ...] = (
    Stage(name="device", params=Device, run=_device, per_target=True),
    Stage(name="data", params=Data, run=_data, makes=("train.txt",)),
    Stage(name="train", params=Train, run=_train, needs=("data",), makes=("adapter",), resumable=True),
    Stage(name="quantize", kind="gguf", params=Quantize, run=_quantize, needs=("train",), makes=("model",), listed=True,
          estimate=_quantize_needs),
    Stage(name="gate", params=Gate, run=_gate, needs=("quantize",)),
    Stage(name="export", kind="tar", params=Export, run=_export, needs=("device", "quantize/gguf", "gate"),
          makes=("bundle",), per_target=True, listed=True),
)  # fmt: skip

RECIPE = """
[data]
source = "rows.txt"

[train]
lr = 1e-4

[[quantize]]
kind = "gguf"
type = "Q4"

[[quantize]]
kind = "gguf"
type = "Q8"
"""
TARGET = """
[device]
ram_mb = 4096
[export]
kind = "tar"
"""
