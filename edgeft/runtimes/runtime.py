"""Which runtimes there are, which one a device gets, and how one comes to lie in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeft import llamacpp
from edgeft.errors import DataError, SetupError, ToolError
from edgeft.llamacpp.build import identity
from edgeft.runtimes.elf import check_elf
from edgeft.runtimes.isa import Isa


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """llama-server, llama-perplexity and llama-bench for one kind of processor; `name`, `pin` and `find()` are a tool's."""

    name: str
    """As the part of vendor/llama.cpp.toml is called: arm64-cortex-a76."""
    arch: str
    isa: str
    """What it was compiled with: any processor of `arch` that has this runs it."""
    part: str
    accelerator: str = "cpu"

    @property
    def pin(self) -> str:
        """llama.cpp's pin and a hash of this runtime's settings: what a cache key needs to know of it."""
        return identity(self.part)["pin"]

    @property
    def hint(self) -> str:
        return llamacpp.Part(part=self.part).hint

    def find(self) -> str:
        """Where its llama-server is or will be. Cheap: compiles nothing.

        Raises SetupError when it is not there and this machine cannot compile it.
        """
        return llamacpp.Part(part=self.part).find()

    def built(self) -> bool:
        """Whether it is there. Raises ToolError when a file of it was changed since it was compiled."""
        return llamacpp.built(self.part)

    def ensure(self) -> Path:
        """The folder with its programs, compiled now if they are not there yet (some nine CPU minutes).

        Raises SetupError when this machine cannot compile, ToolError when compiling fails or when a program is not what
        it should be: for this processor, of this pin, and static.
        """
        folder = llamacpp.ensure(self.part)
        for name in llamacpp.load().parts[self.part].files:
            try:
                elf = check_elf(folder / name, self.arch, self.isa)
            except DataError as error:
                raise ToolError(f"compiling {self.name} made what cannot ship: {error}") from error
            if elf.note != identity(self.part):
                raise ToolError(f"{folder / name} says it is {elf.note}, wanted is {identity(self.part)}")
            if elf.interpreter and self.accelerator == "cpu":
                raise ToolError(f"{folder / name} is not static: it asks for {elf.interpreter}")
        return folder


def available() -> tuple[Runtime, ...]:
    """All runtimes, as vendor/llama.cpp.toml lists them; compiled or not."""
    return tuple(
        Runtime(
            name=name, arch=part.words["arch"], isa=part.words["isa"], part=name,
            accelerator=part.words.get("accelerator", "cpu"),
        )
        for name, part in llamacpp.load().parts.items()
        if "arch" in part.words and part.tree == name
    )  # fmt: skip


def for_device(arch: str, isa: str, *, accelerator: str = "cpu") -> Runtime:
    """The runtime that uses the most of what a processor has, and nothing else.

    `arch` and `isa` are those of a target file. Raises DataError when they cannot be read, SetupError when no runtime
    runs there.
    """
    device = Isa.parse(arch, isa)
    fitting = [
        (needs.level, len(needs.extensions), runtime)
        for runtime in available()
        if runtime.accelerator == accelerator
        and (needs := Isa.parse(runtime.arch, runtime.isa)).runs_on(device)
    ]
    if fitting:
        return max(fitting, key=lambda entry: entry[:2])[2]
    if accelerator == "cpu":
        least = [f"{runtime.name} ({runtime.isa})" for runtime in available() if runtime.arch == arch]
        raise SetupError(
            f"no runtime for {arch} with {isa}: all there are need more ({', '.join(least)})",
            hint="compile llama-server on the device itself, with -DGGML_NATIVE=ON, and ship the bundle without a runtime",
        )
    reason, flags = _NOT_OURS.get(
        (accelerator, arch), (f"{accelerator!r} is no accelerator edgeft knows", "")
    )
    raise SetupError(
        f"there is no {accelerator} runtime for {arch}: {reason}",
        hint=f"on the device: cmake -B build {flags} && cmake --build build --target llama-server; "
        "or take the runtime without it: accelerator = cpu" if flags else "accelerators are cpu, cuda, vulkan",
    )  # fmt: skip


_CUDA = "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES"
_NOT_OURS = {
    ("cuda", "arm64"): (
        "a Jetson's CUDA belongs to its vendor's system (JetPack), and what is compiled elsewhere does not run on it",
        f"{_CUDA}=87",
    ),
    ("cuda", "amd64"): (
        "it needs NVIDIA's libraries of the driver's version, which no static program can bring",
        f"{_CUDA}=native",
    ),
    ("vulkan", "arm64"): ("it needs the board's own Vulkan driver to link with", "-DGGML_VULKAN=ON"),
    ("vulkan", "amd64"): ("it needs the machine's own Vulkan loader to link with", "-DGGML_VULKAN=ON"),
}
"""Why nothing is cross-compiled for an accelerator, and with which of llama.cpp's flags (docs/build.md there) to do it."""
