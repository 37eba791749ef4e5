"""Quantize to an ONNX Runtime GenAI folder: int4 for the CPU, or for a GPU through CUDA or DirectML."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from edgeft import estimates
from edgeft.errors import RecipeError, SetupError
from edgeft.stage import Artifact, Facts, Job, Needs, Params, Stage, Step, Where

if TYPE_CHECKING:
    import torch

    from edgeft.onnx.pack import Given

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Genai:
    """ONNX Runtime GenAI as a tool: another version's builder may make another graph, so its number is in the key."""

    name: str = "onnxruntime-genai"

    @property
    def pin(self) -> str:
        """Of the package for whichever provider is installed: all have the same builder."""
        for name in (self.name, f"{self.name}-cuda", f"{self.name}-directml"):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return ""

    def find(self) -> str:
        """Its version. Raises SetupError where it is not installed."""
        if not self.pin:
            raise SetupError("ONNX Runtime GenAI is not installed", hint="pip install 'edgeft[onnx]'")
        return self.pin


GENAI = _Genai()
_HEAD_BITS: dict[str, Literal[4, 8, 0]] = {"int8": 8, "int4": 4, "full": 0}
_SHORT = {
    "block_size": "g", "symmetric": "symmetric-", "accuracy_level": "level", "algorithm": "", "chunks": "c", "own_chunks": "own",
    "mixed": "mixed-", "head": "head-",
}  # fmt: skip


class QuantizeOnnx(Params):
    provider: Literal["cpu", "cuda", "dml"] = "cpu"
    """Whom the graph is made for: ONNX Runtime's CPU, CUDA (NVIDIA) or DirectML (Windows) execution provider."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale and a zero point. Any width goes: a row's last block is filled up."""
    symmetric: bool = False
    """Without zero points: a little smaller and clearly worse."""
    accuracy_level: Literal[0, 1, 2, 3, 4] | None = None
    """MatMulNBits' own: 4 computes with inputs rounded to 8 bits, 1 in float32, 0 as the provider likes. By default 4 for
    the CPU and 0 for the others, as the model builder has it."""
    algorithm: Literal["importance", "awq", "k_quant", "rtn"] = "importance"
    """How weights are rounded. awq: on training text, by what kind = "awq" does, whose codes are taken as they are; it takes
    minutes, and widths that the block size divides. importance: scale and zero point with the least error, weighed by how the training text uses
    each column; k_quant: the same without the weighing; rtn: to nearest between the outermost weights."""
    chunks: int = Field(32, ge=1, le=10_000)
    """Windows of 512 training tokens that awq looks at."""
    own_chunks: int = Field(16, ge=0, le=10_000)
    """As many beside them that the base writes by itself."""
    mixed: bool | None = None
    """Eight bits for the values and down projections of the first, the last and every third layer between, as Q4_K_M does.
    By default so, and not for awq, which rounds everything to four."""
    head: Literal["int8", "int4", "full"] = "int8"
    """The output matrix and the embedding, which are one matrix in most small models. full: left at 16 or 32 bits."""

    @model_validator(mode="after")
    def _awq_alone(self) -> QuantizeOnnx:
        if self.algorithm == "awq":
            if self.mixed:
                raise ValueError('algorithm = "awq" rounds all products to four bits: leave mixed out')
            if self.symmetric:
                raise ValueError('algorithm = "awq" has zero points: leave symmetric out')
            if self.block_size not in (32, 64, 128):
                raise ValueError(f'algorithm = "awq" takes blocks of 32, 64 or 128, not {self.block_size}')
        return self

    @property
    def accuracy(self) -> int:
        """The accuracy level that is written."""
        return self.accuracy_level if self.accuracy_level is not None else 4 * (self.provider == "cpu")

    def label(self) -> str:
        given = self.model_dump(exclude_defaults=True, exclude={"provider"}, exclude_none=True)
        parts = [f"{_SHORT[name]}{value}" for name, value in given.items()]
        return "-".join(["onnx-int4", self.provider, *parts]).replace("_", "-").lower()


def run(job: Job[QuantizeOnnx]) -> Facts:
    from edgeft.llamacpp import imatrix
    from edgeft.onnx import checks
    from edgeft.onnx.build import Settings, build
    from edgeft.onnx.inside import inside

    p, checkpoint, out = job.params, job.inputs["merge"].path / "model", job.out / "model"
    means = (
        imatrix.load(job.inputs["imatrix"].path / "imatrix.gguf").means()
        if p.algorithm == "importance"
        else None
    )
    settings = Settings(
        provider=p.provider, block=p.block_size, symmetric=p.symmetric, accuracy=p.accuracy, search=p.algorithm != "rtn",
        mixed=p.algorithm != "awq" if p.mixed is None else p.mixed, head=_HEAD_BITS[p.head],
    )  # fmt: skip
    text: list[Facts] = []
    if p.algorithm == "awq":
        with tempfile.TemporaryDirectory(dir=job.out) as aside:
            codes, text = _awq(job, Path(aside))
            built = build(Path(aside) / "scaled", out, settings, codes=codes)
    else:
        built = build(checkpoint, out, settings, means)
        if means is not None:
            text = [_weighed(built.unweighed)]
    found = checks.folder(checkpoint, out)
    checks.insist(found)
    held = inside(out)
    return {
        "summary": f"{held.bytes / 1e6:,.1f} MB, {held.bits_per_weight:.2f} bits per weight: {held.said}",
        "type": "ONNX int4" if p.provider == "cpu" else f"ONNX int4 {p.provider}", "format": "onnx", "provider": p.provider,
        "bytes": held.bytes, "bits_per_weight": held.bits_per_weight, "types": dict(held.types),
        "algorithm": p.algorithm, "repairs": built.repairs, "checks": [*text, *found],
    }  # fmt: skip


def _weighed(without: Sequence[str]) -> Facts:
    """Whether the importance matrix had something to say of every product: a name that does not fit would be silent."""
    said = "each product's errors are weighed by the importance matrix"
    if without:
        said = f"the importance matrix says nothing of {len(without)} products, {without[0]} first"
        log.warning("%s: their errors are not weighed", said)
    ok = None if without else True
    return {"step": "quantized", "name": "importance", "codes": ("C-40",), "ok": ok, "said": said}


def _awq(job: Job[QuantizeOnnx], aside: Path) -> tuple[dict[str, Given], list[Facts]]:
    """The codes of every product by AWQ, and in `aside`/scaled the 16-bit checkpoint with the same numbers, its norms holding
    what the scaling put there; and the check that nothing of the test was looked at."""
    from safetensors.torch import save_file

    from edgeft import awq
    from edgeft.awq import weights
    from edgeft.awq.layouts import Codes
    from edgeft.parity import calibration_text
    from edgeft.training.model import pick_device

    checkpoint, p, device = job.inputs["merge"].path / "model", job.params, pick_device()
    windows, text = calibration_text.mixed(
        job.inputs["data"].path, job.inputs["base"].path / "model", job.out, chunks=p.chunks, own=p.own_chunks, device=device
    )  # fmt: skip
    awq.quantize(checkpoint, aside / "awq", windows, awq.Settings(group=p.block_size, device=device))
    scaled = aside / "scaled"
    scaled.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, scaled / file.name)
    codes: dict[str, Given] = {}
    state: dict[str, torch.Tensor] = {}
    for name, found in weights.tensors(aside / "awq"):
        if isinstance(found, Codes):
            state[name] = found.weight().contiguous()
            codes[name] = (found.codes.numpy(), found.scales.float().numpy(), found.zeros.numpy())
        else:
            state[name] = found.contiguous()
    save_file(state, scaled / "model.safetensors", metadata={"format": "pt"})
    return codes, [text.facts()]


def check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse, before the training, a base that cannot be built."""
    from edgeft.onnx.build import refuse

    base = step.find("base")
    if base is None:
        return
    p = step.params
    assert isinstance(p, QuantizeOnnx)
    shape = estimates.shape_for(step, artifacts)
    if shape and p.algorithm == "awq":
        for matrix in shape.linears:
            if matrix.columns % p.block_size:
                raise RecipeError(
                    f'algorithm = "awq" needs widths that {p.block_size} divides, and {matrix.role} is {matrix.columns} wide',
                    hint='take a smaller block_size, or algorithm = "importance", which takes any width',
                )
    made = artifacts.get(base.key)
    given = getattr(base.params, "path", None)
    places = [made.path / "model" if made else None, estimates.glimpse(base), given]
    configs = (Path(place) / "config.json" for place in places if place)
    if found := next((path for path in configs if path.is_file()), None):
        refuse(json.loads(found.read_text(encoding="utf-8")))


def estimate(step: Step, artifacts: Mapping[str, Artifact]) -> Needs:
    """The packed folder and, for a while, the graph before it; the checkpoint in memory, and the graph as it is written."""
    shape = estimates.shape_for(step, artifacts)
    if shape is None:
        return Needs()
    assert isinstance(step.params, QuantizeOnnx)
    each = 4 if step.params.provider == "cpu" else 2
    plain = each * shape.parameters // 10**6
    return Needs(
        disk_mb=plain + plain // 4, ram_mb=estimates.PYTHON_MB + plain + 2 * shape.parameters // 10**6
    )


STAGE = Stage(
    name="quantize", kind="onnx", params=QuantizeOnnx, run=run, needs=("base", "data", "merge", "imatrix"), replaces=("quantize/served",),
    makes=("model/genai_config.json", "model/model.onnx", "model/model.onnx.data"), extra="onnx", listed=True,
    tools=(GENAI,), check=check, estimate=estimate,
    when=Where(table="train", key="method", values=("qlora", "lora")),
)  # fmt: skip
