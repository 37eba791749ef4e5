"""What this machine compiles llama.cpp with: C++ compilers, cmake and ninja; for GPUs, Vulkan's headers and shader compiler or
NVIDIA's CUDA toolkit. Found where their own tools look for them, and checked before anything starts.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeft import progress
from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp.pin import load
from edgeft.llamacpp.threads import allowed_cpus
from edgeft.tool import run

CUDA_RELEASE = "cuda-release"
"""The file in a tree that holds the release of the CUDA toolkit it was compiled with: 13.0."""
_RAM_A_JOB_MB = 700
"""Measured peaks of one compiler process (gcc 12): 425 MB in the library, 537 MB in the server."""
_VULKAN_FUNCTIONS = (
    "vkCmdCopyBuffer", "vkGetDeviceProcAddr", "vkGetInstanceProcAddr", "vkGetPhysicalDeviceFeatures2",
)  # fmt: skip
"""What ggml-vulkan calls by name; all else it asks for at run time. Another one, and the linker says so."""
_LAYER_SETTINGS = "VK_EXT_layer_settings"
"""The newest extension that ggml-vulkan takes from the headers without asking whether they have it."""
_COMPILERS = re.compile(
    r"^(cc1|cc1plus|as|ld|collect2|glslc|vulkan-shaders.*|nvcc|cicc|ptxas|cudafe.*|clang.*|cmake|ninja)$|g\+\+|gcc"
)
_PATIENCE_S = 600
"""No file takes longer."""
_CUDA_FOLDERS = {"amd64": ("x86_64-linux",), "arm64": ("aarch64-linux", "sbsa-linux")}
"""Where a toolkit has headers and libraries for a kind of machine, below targets/ (cmake's FindCUDAToolkit)."""


@dataclass(frozen=True, kw_only=True)
class Vulkan:
    """Headers are the same for every processor; nothing of this machine's own Vulkan gets into a program."""

    headers: tuple[Path, Path]
    """The folders vulkan/ and spirv/ (beside vulkan/ lies vk_video/, where these headers have one)."""
    glslc: str


@dataclass(frozen=True, kw_only=True)
class Cuda:
    nvcc: str
    release: str
    """13.0"""
    root: Path


def check(part: str) -> None:
    """Whether all is there that compiling a part takes. Raises SetupError, with what to install, when something is not."""
    compiler(part)
    program("cmake")
    program("ninja")
    kind, _, capability = load().parts[part].words.get("accelerator", "").partition(":")
    if kind == "vulkan":
        vulkan(part)
    elif kind == "cuda":
        cuda(part, capability)


def words(part: str, tree: Path, cxx: str) -> dict[str, str]:
    """What a part's {words} of its accelerator stand for; makes the files in the tree that they name."""
    kind, _, capability = load().parts[part].words.get("accelerator", "").partition(":")
    if kind == "vulkan":
        found, folder = vulkan(part), tree / "vulkan"
        _vulkan_folder(found, folder, cxx)
        return {"{vulkan}": os.fspath(folder), "{glslc}": found.glslc}
    if kind == "cuda":
        toolkit = cuda(part, capability)
        (tree / CUDA_RELEASE).write_text(toolkit.release, encoding="ascii")
        return {"{nvcc}": toolkit.nvcc, "{cuda}": os.fspath(toolkit.root)}
    return {}


def program(name: str) -> str:
    """cmake or ninja: the one installed beside this Python first, since the `train` extra brings both."""
    beside = shutil.which(name, path=os.fspath(Path(sys.executable).parent))
    if found := beside or shutil.which(name):
        return found
    raise SetupError(
        f"{name} is not installed, so llama.cpp cannot be compiled",
        hint=f"pip install {name}   (the extra edgeft[train] brings it)",
    )


def compiler(part: str) -> str:
    """The C++ compiler for a part's processor. Raises SetupError when there is none."""
    own = load().parts[part].cmake
    if cross := own.get("CMAKE_CXX_COMPILER"):
        if found := shutil.which(cross):
            return found
        if own.get("CMAKE_SYSTEM_PROCESSOR") == platform.machine() and (found := shutil.which("g++")):
            return found  # not a cross compiler, here
        kind, _, name = cross.rpartition("-")  # Debian's packages are named the other way round
        raise SetupError(
            f"{cross} is not installed, so llama.cpp's {part} cannot be compiled",
            hint=f"sudo apt install {name}-{kind.replace('_', '-')}",
        )
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name.split()[0])):
            return found
    raise SetupError(
        "no C++ compiler is installed, so llama.cpp cannot be compiled", hint="sudo apt install g++"
    )


def c_compiler(cxx: str) -> str:
    """The C compiler that belongs to a g++."""
    return cxx.removesuffix("g++") + "gcc"


def jobs() -> int:
    """How many compilers run at once: as many as there are processors and memory for."""
    import psutil

    free_mb = psutil.virtual_memory().available // 2**20
    return int(max(1, min(allowed_cpus(), free_mb // _RAM_A_JOB_MB)))


def outlive(tree: Path) -> None:
    """Wait until no compiler of a build that was killed is at work in the tree any more: it would write into our files.

    Ninja dies with edgeft, but not what ninja started; all of that has the tree as its working directory.
    """
    import psutil

    def busy(process: psutil.Process) -> bool:
        try:
            return bool(_COMPILERS.search(process.name())) and Path(process.cwd()).is_relative_to(tree)
        except (psutil.Error, OSError):
            return False

    until = time.monotonic() + _PATIENCE_S
    waits = False
    while any(busy(process) for process in psutil.process_iter()) and time.monotonic() < until:
        if not waits:
            progress.report("wait for the compilers of a build that was stopped")
        waits = True
        time.sleep(0.5)


def vulkan(part: str) -> Vulkan:
    """Headers and glslc, in $VULKAN_SDK first. Raises SetupError when they are missing or too old for the pinned source."""
    hint = (
        "sudo apt install glslc libvulkan-dev spirv-headers   (Debian 13's headers are new enough, Debian 12's are not; "
        "or unpack newer ones and let VULKAN_SDK name the folder with their include/)"
    )
    sdk = [Path(named)] if (named := os.environ.get("VULKAN_SDK")) else []
    includes = [*(folder / "include" for folder in sdk), *_SYSTEM]
    old = ""
    for include in includes:
        headers = include / "vulkan"
        if not (headers / "vulkan.hpp").is_file():
            continue
        text = (headers / "vulkan_core.h").read_text(encoding="utf-8", errors="replace")
        if f"#define {_LAYER_SETTINGS} 1" not in text:
            old = (
                old
                or f"1.{_defined(text, 'VK_HEADER_VERSION_COMPLETE')}.{_defined(text, 'VK_HEADER_VERSION')} in {include}"
            )
            continue
        break
    else:
        said = (
            f"the Vulkan headers {old} lack {_LAYER_SETTINGS}"
            if old
            else "Vulkan's C++ headers are not installed"
        )
        raise SetupError(f"{said}, so llama.cpp's {part} cannot be compiled", hint=hint)
    spirv = next((i / "spirv" for i in includes if (i / "spirv" / "unified1" / "spirv.hpp").is_file()), None)
    if spirv is None:
        raise SetupError(
            f"SPIR-V's headers are not installed, so llama.cpp's {part} cannot be compiled", hint=hint
        )
    path = os.pathsep.join([*(os.fspath(folder / "bin") for folder in sdk), os.environ.get("PATH", "")])
    if not (glslc := shutil.which("glslc", path=path)):
        raise SetupError(f"glslc is not installed, so llama.cpp's {part} cannot be compiled", hint=hint)
    return Vulkan(headers=(headers, spirv), glslc=glslc)


def cuda(part: str, capability: str) -> Cuda:
    """NVIDIA's toolkit, when it compiles for a GPU of this capability ("8.6") and has its libraries for the part's machine.

    Raises SetupError with the reason otherwise. The libraries are those of nvcc's own folder, so that the versions agree.
    """
    words = load().parts[part].words
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        raise SetupError(
            f"nvcc is not installed, so llama.cpp's {part} cannot be compiled",
            hint="install NVIDIA's CUDA toolkit with cuBLAS; or let CUDACXX name its nvcc",
        )
    release, codes, root = _nvcc(nvcc)
    if (code := f"sm_{capability.replace('.', '')}") not in codes:
        raise SetupError(
            f"{nvcc} is CUDA {release} and does not compile for {code}, so llama.cpp's {part} cannot be compiled",
            hint=f"it knows {', '.join(codes)}; another release of the CUDA toolkit knows others",
        )
    folders = [root / "targets" / name for name in _CUDA_FOLDERS[words["arch"]]]
    if words["machine"] == platform.machine():
        folders.append(root)
    for needed in ("include/cublas_v2.h", "lib*/libcublas.so", "lib*/libcudart.so"):
        if not any(any(folder.glob(needed)) for folder in folders):
            raise SetupError(
                f"the CUDA toolkit {release} in {root} has no {needed.rpartition('/')[2]} for {words['machine']}, so llama.cpp's "
                f"{part} cannot be compiled",
                hint="install its development package (libcublas-dev or cuda-cudart-dev of that release), for that machine",
            )
    return Cuda(nvcc=nvcc, release=release, root=root)


_SYSTEM = (Path("/usr/include"), Path("/usr/local/include"))


def _defined(text: str, name: str) -> str:
    """A number that the header defines; of VK_HEADER_VERSION_COMPLETE the minor version. "?" when it is not there."""
    shape = r"VK_MAKE_API_VERSION\(\d+, \d+, (\d+)," if name.endswith("COMPLETE") else r"(\d+)"
    found = re.search(rf"^#define {name} {shape}", text, re.MULTILINE)
    return found[1] if found else "?"


def _vulkan_folder(found: Vulkan, folder: Path, cxx: str) -> None:
    """The headers alone, not what else lies beside them, and in place of libvulkan a library with its name and no code.

    So a program for another processor needs none of that one's libraries here, and the linker still refuses a function
    that is not in the list.
    """
    include = folder / "include"
    include.mkdir(parents=True, exist_ok=True)
    for source in (found.headers[0], found.headers[0].with_name("vk_video"), found.headers[1]):
        link = include / source.name
        link.unlink(missing_ok=True)
        if source.is_dir():
            link.symlink_to(source.resolve())
    (folder / "SPIRV-HeadersConfig.cmake").write_text("# the headers are in include/\n", encoding="utf-8")
    code = folder / "libvulkan.s"
    code.write_text("".join(_symbol(name) for name in _VULKAN_FUNCTIONS), encoding="ascii")
    run([
        cxx, "-shared", "-nostdlib", "-Wl,-soname,libvulkan.so.1", "-Wl,--build-id=none", os.fspath(code),
        "-o", os.fspath(folder / "libvulkan.so"),
    ])  # fmt: skip


def _symbol(name: str) -> str:
    return f".text\n.globl {name}\n.type {name},%function\n{name}:\n.byte 0\n"


@cache
def _nvcc(nvcc: str) -> tuple[str, tuple[str, ...], Path]:
    """Its release, the GPUs it compiles for ("sm_86"), and the toolkit's folder, which it may be far from (a wrapper)."""
    try:
        release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
        codes = tuple(re.findall(r"^sm_\w+", run([nvcc, "--list-gpu-code"]), re.MULTILINE))
        top = re.search(
            r"^#\$ TOP=(.*)$", run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]), re.MULTILINE
        )
    except ToolError as error:
        raise SetupError(
            f"{nvcc} does not work: {error}", hint="install NVIDIA's CUDA toolkit again"
        ) from None
    if not (release and top):
        raise SetupError(
            f"{nvcc} does not say its release and where its toolkit is", hint="let CUDACXX name another nvcc"
        )
    return release[1], codes, Path(top[1].strip()).resolve()
