"""What the target file says of the board. Its only product is its facts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from edgeft.fit.board import ARM_LEVELS, X86_LEVELS, Board
from edgeft.image import kinds
from edgeft.stage import Facts, Job, Params, Stage


class Device(Params):
    name: str
    """The target's name, as its file's."""
    arch: Literal["arm64", "amd64"]
    isa: str
    """The processor's level and features, as compilers write them: `armv8.2-a+dotprod+fp16`, `x86-64-v3`."""
    ram_mb: int = Field(gt=0)
    """Memory as bought, in 10^6 bytes: 4 GiB are 4295."""
    os_reserve_mb: int = Field(gt=0)
    """What firmware, system and everything else on the board keep of it."""
    threads: int = Field(gt=0)
    """Threads for llama.cpp: the physical cores, without the slow ones."""
    bandwidth_gb_s: float = Field(gt=0)
    """Theoretical bandwidth of the memory that the model lies in, GB/s."""
    effective_gb_s: tuple[float, float]
    """What decoding reaches of it, lowest and highest, from published tokens a second."""
    token_overhead_ms: float = Field(0.0, ge=0)
    """Time a token takes however small the model is."""
    prefill_gparam_s: tuple[float, float] | None = None
    """Billions of parameters applied a second while reading a prompt, where it was published."""
    gpu: str = ""
    """The GPU that computes, if one does."""
    vram_mb: int = Field(0, ge=0)
    """Memory of its own that the GPU has; 0 when it shares the RAM."""
    vram_reserve_mb: int = Field(0, ge=0)
    """What driver, CUDA context and screen keep of it."""
    accelerator: str = Field("", pattern=r"^(|cpu|vulkan|cuda:\d+\.\d)$")
    """How the GPU is programmed: vulkan, or cuda with its compute capability, `cuda:8.6`; it chooses the runtime that ships."""
    image: str = ""
    """How the board starts, for `[[export]] kind = "image"`; "" where that is not known."""

    @field_validator("isa")
    @classmethod
    def _known_level(cls, value: str) -> str:
        known = (*X86_LEVELS, *ARM_LEVELS)
        if value.split("+")[0] not in known:
            raise ValueError(f"{value!r} starts with no known level; choose from {', '.join(known)}")
        return value

    @field_validator("image")
    @classmethod
    def _known_image(cls, value: str) -> str:
        if value and value not in kinds.NAMES:
            raise ValueError(f"{value!r} is none of {', '.join(kinds.NAMES)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Device:
        if self.isa.startswith("x86") != (self.arch == "amd64"):
            raise ValueError(f"isa = {self.isa!r} is not of arch = {self.arch!r}")
        if (kind := kinds.KINDS.get(self.image)) and kind.arch != self.arch:
            raise ValueError(f"image = {self.image!r} is for arch = {kind.arch!r}")
        if self.os_reserve_mb >= self.ram_mb or self.vram_reserve_mb > self.vram_mb:
            raise ValueError("the reserve leaves no memory for a model")
        low, high = self.effective_gb_s
        if not 0 < low <= high <= self.bandwidth_gb_s:
            raise ValueError(f"effective_gb_s must rise from above 0 to at most {self.bandwidth_gb_s}")
        return self

    def board(self) -> Board:
        """The same facts, as the fit package takes them."""
        return Board(**self.model_dump(include=set(Board.__dataclass_fields__)))


def run(job: Job[Device]) -> Facts:
    p = job.params
    memory = f"{p.vram_mb:,} MB of VRAM" if p.vram_mb else f"{p.ram_mb:,} MB of RAM"
    summary = f"{p.isa}, {memory}, {p.threads} threads"
    return {"summary": summary, **p.model_dump(mode="json")}


STAGE = Stage(name="device", params=Device, run=run, per_target=True)
