"""Which runtimes there are, which one a device gets, and how one comes to lie in the cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path

from edgeft import llamacpp
from edgeft.errors import DataError, SetupError, ToolError
from edgeft.llamacpp import toolchain
from edgeft.llamacpp.build import identity
from edgeft.runtimes.elf import check_elf
from edgeft.runtimes.isa import Isa
from edgeft.runtimes.needs import Needs, read_needs

_GLIBC = r"(lib(c|m|mvec|dl|rt|pthread)|ld-linux-(x86-64|aarch64))\.so\.\d"
_LIBRARIES = {
    "cpu": None, "vulkan": rf"{_GLIBC}|libvulkan\.so\.1", "cuda": rf"{_GLIBC}|lib(cudart|cublas|cublasLt)\.so\.\d+",
}  # fmt: skip
"""What a program may ask the system for; None: nothing at all."""


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
    """What computes, as in targets/*.toml: cpu, vulkan, or cuda with the GPU's compute capability, cuda:8.6."""

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
        """The folder with its programs, compiled now if they are not there yet (some nine CPU minutes; with a GPU more).

        Raises SetupError when this machine cannot compile, ToolError when compiling fails or when a program is not what
        it should be: for this processor, of this pin, and static, or without other libraries than its accelerator's.
        """
        folder = llamacpp.ensure(self.part)
        for name in llamacpp.load().parts[self.part].files:
            try:
                elf = check_elf(folder / name, self.arch, self.isa)
            except DataError as error:
                raise ToolError(f"compiling {self.name} made what cannot ship: {error}") from error
            if elf.note != identity(self.part):
                raise ToolError(f"{folder / name} says it is {elf.note}, wanted is {identity(self.part)}")
            allowed = _LIBRARIES[self.kind]
            if elf.interpreter and allowed is None:
                raise ToolError(f"{folder / name} is not static: it asks for {elf.interpreter}")
            needs = read_needs(folder / name) if allowed else Needs()
            if needs.searched:
                raise ToolError(f"{folder / name} would look for libraries in {', '.join(needs.searched)}")
            for library in needs.libraries:
                if not re.fullmatch(allowed or "", library):
                    raise ToolError(f"{folder / name} asks for {library}, which its device may not have")
        return folder

    @property
    def kind(self) -> str:
        """The accelerator without its capability: cpu, vulkan, cuda."""
        return self.accelerator.partition(":")[0]

    @property
    def static(self) -> bool:
        """Whether it runs where there is nothing but a kernel."""
        return self.kind == "cpu"

    def needs(self) -> Needs:
        """The libraries that its programs load and the glibc that they want, read from them. Compiles them if need be."""
        folder = self.ensure()
        if self.static:
            return Needs()
        files = llamacpp.load().parts[self.part].files
        return reduce(or_, (read_needs(folder / name) for name in files))

    def debian(self) -> tuple[str, ...]:
        """The packages that have what it needs, as `Depends:` of a .deb takes them; none for a static one.

        Vulkan's are Debian's: the loader, and any package with a driver. CUDA's are those of NVIDIA's own repository, of the
        release that it was compiled with, for Debian has others.
        """
        needs = self.needs()
        found = [f"libc6 (>= {needs.glibc})"] if needs.glibc else []
        if self.kind == "vulkan":
            found += ["libvulkan1", "mesa-vulkan-drivers | vulkan-icd"]
        if self.kind == "cuda":
            noted = self.ensure().parent / toolchain.CUDA_RELEASE
            release = noted.read_text(encoding="ascii").replace(".", "-")
            found += [f"cuda-cudart-{release}", f"libcublas-{release}"]
        return tuple(found)


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
    """The runtime that uses the most of what a processor and its GPU have, and nothing else.

    `arch`, `isa` and `accelerator` are those of a target file. Raises DataError when they cannot be read, SetupError when no
    runtime runs there.
    """
    device = Isa.parse(arch, isa)
    kind, _, capability = accelerator.partition(":")
    wanted = _capability(kind, capability)
    there = [runtime for runtime in available() if runtime.arch == arch and runtime.kind == kind]
    able = [runtime for runtime in there if _same_gpu(runtime, wanted)]
    fitting = [
        (needs.level, len(needs.extensions), runtime.accelerator, runtime)
        for runtime in able
        if (needs := Isa.parse(runtime.arch, runtime.isa)).runs_on(device)
    ]
    if fitting:
        return max(fitting, key=lambda entry: entry[:3])[3]
    if there and not able:
        made = ", ".join(runtime.accelerator for runtime in there)
        raise SetupError(
            f"no runtime for {arch} with {accelerator}: its machine code runs on that kind of GPU only, and there is {made}",
            hint=f"on the device: cmake -B build {_FLAGS['cuda']}={capability.replace('.', '')} && cmake --build build "
            '--target llama-server; or take the processor\'s runtime: accelerator = "cpu"',
        )
    least = [f"{runtime.name} ({runtime.isa})" for runtime in there]
    raise SetupError(
        f"no {'' if kind == 'cpu' else kind + ' '}runtime for {arch} with {isa}: all there are need more ({', '.join(least)})",
        hint=f"compile llama-server on the device itself, with {_FLAGS[kind]}, and ship the bundle without a runtime",
    )


_FLAGS = {
    "cpu": "-DGGML_NATIVE=ON", "vulkan": "-DGGML_VULKAN=ON", "cuda": "-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES",
}  # fmt: skip
"""llama.cpp's own (docs/build.md there)."""


def _capability(kind: str, text: str) -> tuple[int, int] | None:
    """8.6 as (8, 6); None for what has none."""
    if kind not in _FLAGS or (kind != "cuda" and text):
        raise SetupError(
            f"{kind + ':' + text if text else kind!r} is no accelerator edgeft knows",
            hint="accelerators are cpu, vulkan, and cuda with the GPU's compute capability: cuda:8.6",
        )
    if kind != "cuda":
        return None
    if not (found := re.fullmatch(r"(\d+)\.(\d)", text)):
        raise SetupError(
            f"accelerator {'cuda:' + text!r} names no compute capability"
            if text
            else "cuda alone names no compute capability",
            hint="write cuda:8.6 for a GeForce RTX 30, cuda:8.7 for a Jetson Orin; `nvidia-smi --query-gpu=compute_cap "
            "--format=csv` tells it on the device",
        )
    return int(found[1]), int(found[2])


def _same_gpu(runtime: Runtime, wanted: tuple[int, int] | None) -> bool:
    """Machine code for 8.6 runs on 8.9 as well, but not on 9.0; a Jetson's runs on nothing else (CUDA C++ Programming
    Guide, "Binary Compatibility")."""
    if wanted is None:
        return True
    major, minor = (int(part) for part in runtime.accelerator.partition(":")[2].split("."))
    return (major, minor) == wanted or (runtime.arch == "amd64" and major == wanted[0] and minor <= wanted[1])
