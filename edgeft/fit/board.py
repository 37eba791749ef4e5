"""The board a model is to run on: its memory, its bandwidth, and what its processor can do."""

from __future__ import annotations

from dataclasses import dataclass

X86_LEVELS = {
    "x86-64": (), "x86-64-v2": (), "x86-64-v3": ("avx2",), "x86-64-v4": ("avx2", "avx512"),
}  # fmt: skip
ARM_LEVELS = ("armv8-a", "armv8.2-a", "armv8.4-a", "armv8.6-a", "armv9-a")


@dataclass(frozen=True, kw_only=True)
class Board:
    """Megabytes are 10^6 bytes, gigabytes 10^9."""

    name: str
    isa: str
    """A base and features: `armv8.2-a+dotprod+fp16`, `x86-64-v3`."""
    ram_mb: int
    """Memory as bought: 4 GiB are 4295."""
    os_reserve_mb: int
    """What firmware, kernel, system and everything else on the board keep."""
    vram_mb: int = 0
    """Memory of a graphics card that holds the model; 0 when the model lies in main memory."""
    vram_reserve_mb: int = 0
    """What the driver, the CUDA context and a screen keep of it."""
    effective_gb_s: tuple[float, float]
    """Bytes read a second while decoding, lowest and highest, derived from published tokens a second."""
    token_overhead_ms: float = 0.0
    """Time a token takes however small the model is."""
    prefill_gparam_s: tuple[float, float] | None = None
    """Billions of parameters applied a second while reading a prompt, where it was published."""

    @property
    def features(self) -> frozenset[str]:
        """What llama.cpp's choice of kernels asks for: dotprod, i8mm, avx2, avx512."""
        base, *extra = self.isa.split("+")
        return frozenset((*X86_LEVELS.get(base, ()), *extra))

    @property
    def memory(self) -> str:
        """Which memory has to hold the model."""
        return "VRAM" if self.vram_mb else "RAM"

    @property
    def available_mb(self) -> int:
        """What is left there for a model."""
        return self.vram_mb - self.vram_reserve_mb if self.vram_mb else self.ram_mb - self.os_reserve_mb
