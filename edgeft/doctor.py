"""Looks at this machine and says what a build would miss, with the command that repairs it. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeft import resources
from edgeft.errors import EdgeftError
from edgeft.tool import Tool, run

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "datasketch", "gguf", "jinja2",
    "diskcache", "zstandard", "tensorboard", "safetensors", "huggingface_hub", "numpy",
)  # fmt: skip
"""Modules of the `train` extra, by the names they are imported under."""

CACHE_MB = 1500
"""The source, the build tree and the libraries of llama.cpp."""
STORE_MB = 3000
"""The default recipe's results, with room to spare; a larger base needs what `edgeft plan` says."""
RAM_MB = 4000
"""The default recipe's training peaks below this."""

NVIDIA_SMI = Tool(name="nvidia-smi")
_HELLO = '#include <filesystem>\n#include <iostream>\nint main() { std::cout << std::filesystem::path("c++17").string(); }\n'


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool | None
    """False: a build cannot run. None: it can, without this or slower."""
    found: str
    repair: str = ""
    """A command, or what to do; empty when nothing needs repair."""


def examine(store: Path) -> list[Finding]:
    """Everything that matters for a build into `store`. Takes some seconds where torch is installed."""
    packages = _packages()
    findings = [_python(), packages, *_compiler(), *_llama_cpp(), *_gpu()]
    if packages.ok:
        findings += _torch(has_gpu=any(f.name == "GPU" and f.ok for f in findings))
    return [
        *findings, _servers(), _cpu(), _ram(),
        _disk("disk for the store", store, STORE_MB, "free some space, or build into another disk with --store DIR"),
        _disk("disk for the cache", resources.cache(), CACHE_MB, "free some space, or set EDGEFT_CACHE=DIR"),
    ]  # fmt: skip


def _python() -> Finding:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    return Finding(
        name="Python", ok=fine, found=version, repair="" if fine else _install("python3.11", "python@3.11")
    )


def _packages() -> Finding:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(
            name="packages",
            ok=False,
            found=f"missing: {', '.join(missing)}",
            repair="pip install 'edgeft[train]'",
        )
    versions = ", ".join(
        f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers", "peft", "bitsandbytes")
    )
    return Finding(name="packages", ok=True, found=versions)


def _compiler() -> Iterator[Finding]:
    """A C++17 compiler that compiles, links and runs; cmake and ninja, also those beside this Python."""
    # without a compiler everything still works where llama.cpp was compiled before
    lacking = None if _is_built("library") else False
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    path = next((found for n in names if n and (found := shutil.which(n.split()[0]))), None)
    if path is None:
        yield Finding(name="C++ compiler", ok=lacking, found="none on PATH", repair=_install("g++", "gcc"))
    else:
        problem = _cannot_compile(path)
        yield Finding(
            name="C++ compiler", ok=lacking if problem else True, found=problem or _first_line([path, "--version"]),
            repair=_install("g++", "gcc") if problem else "",
        )  # fmt: skip
    beside = os.fspath(Path(sys.executable).parent)
    for name in ("cmake", "ninja"):
        program = shutil.which(name, path=beside) or shutil.which(name)
        if program is None:
            yield Finding(name=name, ok=lacking, found="not installed", repair=f"pip install {name}")
        else:
            yield Finding(name=name, ok=True, found=_first_line([program, "--version"]))


def _cannot_compile(compiler: str) -> str:
    """Why a small program cannot be compiled, linked and run; empty when it can."""
    with tempfile.TemporaryDirectory(prefix="edgeft-doctor-") as folder:
        source, program = Path(folder) / "hello.cpp", Path(folder) / "hello"
        source.write_text(_HELLO)
        try:
            run([compiler, "-std=c++17", os.fspath(source), "-o", os.fspath(program)])
            return (
                ""
                if run([os.fspath(program)]) == "c++17"
                else f"{compiler} makes programs that do not run right"
            )
        except (EdgeftError, OSError) as e:
            return f"{compiler} cannot compile C++17: {_last_line(str(e))}"


def _llama_cpp() -> Iterator[Finding]:
    from edgeft.llamacpp import build, pin

    name = f"{pin.load().package} {pin.load().version}"
    for part, later in (("library", "the first build compiles it"), ("server", "`edgeft serve` compiles it")):
        try:
            there = build.built(part)
        except EdgeftError as e:
            yield Finding(name=f"llama.cpp {part}", ok=False, found=str(e), repair=e.hint)
            continue
        found = f"{name}, in {build.binaries()}" if there else f"{name} is not built yet: {later}"
        yield Finding(name=f"llama.cpp {part}", ok=True if there else None, found=found)


def _is_built(part: str) -> bool:
    from edgeft.llamacpp import build

    try:
        return build.built(part)
    except EdgeftError:
        return False


def _gpu() -> Iterator[Finding]:
    """The NVIDIA GPU and its driver, asked of nvidia-smi."""
    cpu = "training runs on the CPU, which is enough for models up to some hundred million parameters"
    if shutil.which(NVIDIA_SMI.name) is None:
        yield Finding(name="GPU", ok=None, found=f"no nvidia-smi: {cpu}")
        return
    try:
        lines = NVIDIA_SMI("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").strip()
    except EdgeftError as e:
        yield Finding(
            name="GPU", ok=None, found=f"nvidia-smi fails ({_last_line(str(e))}): {cpu}",
            repair="install the NVIDIA driver again and restart",
        )  # fmt: skip
        return
    for line in lines.splitlines() or [""]:
        model, *rest = [part.strip() for part in line.split(",")]
        found = ", driver ".join([f"{model}, {rest[0]}", rest[1]]) if len(rest) == 2 else line
        yield Finding(name="GPU", ok=True, found=found)


_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
answer = {"cuda": "", "device": "", "nf4": ""}
import torch
answer["cuda"] = torch.version.cuda or ""
if torch.cuda.is_available():
    answer["device"] = torch.cuda.get_device_name(0)
try:
    import bitsandbytes.functional as F
    place = "cuda" if answer["device"] else "cpu"
    packed, state = F.quantize_4bit(torch.randn(64, 64, device=place), quant_type="nf4")
    assert F.dequantize_4bit(packed, state).shape == (64, 64)
except Exception as e:
    answer["nf4"] = f"{type(e).__name__}: {e}"
print("PROBED" + json.dumps(answer))
"""


def _torch(*, has_gpu: bool) -> Iterator[Finding]:
    """What torch and bitsandbytes can do, tried in a process of its own so that this one stays light."""
    try:
        output = run([sys.executable, "-c", _PROBE])
        answer = json.loads(
            next(x for x in output.splitlines() if x.startswith("PROBED")).removeprefix("PROBED")
        )
    except (EdgeftError, StopIteration, ValueError) as e:
        yield Finding(
            name="torch", ok=False, found=f"cannot be imported: {_last_line(str(e))}",
            repair="pip install --force-reinstall 'edgeft[train]'",
        )  # fmt: skip
        return
    if answer["device"]:
        yield Finding(name="torch on the GPU", ok=True, found=f"CUDA {answer['cuda']}, {answer['device']}")
    elif has_gpu:
        why = (
            f"this torch is built for CUDA {answer['cuda']} and sees no GPU"
            if answer["cuda"]
            else "this torch is CPU-only"
        )
        repair = (
            "update the driver"
            if answer["cuda"]
            else "install a CUDA build of torch (pytorch.org, Get Started)"
        )
        yield Finding(name="torch on the GPU", ok=None, found=why, repair=repair)
    if answer["nf4"]:
        yield Finding(
            name="bitsandbytes", ok=False, found=f"NF4 fails: {_last_line(answer['nf4'])}",
            repair="pip install --upgrade bitsandbytes",
        )  # fmt: skip
    else:
        place = "GPU" if answer["device"] else "CPU"
        yield Finding(name="bitsandbytes", ok=True, found=f"NF4 works on the {place}")


def _servers() -> Finding:
    """What serves and measures folders that are no GGUF files; a GGUF file needs none of it."""
    from edgeft import servers

    here = [found.said for found in servers.installed()]
    if importlib.util.find_spec("onnxruntime_genai"):
        names = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
        versions = [v for name in names if (v := _distribution(name))]
        here.append(f"ONNX Runtime GenAI {', '.join(versions)}".strip())
    return Finding(
        name="AWQ, ONNX", ok=True if here else None, found=", ".join(here) or "neither vLLM, SGLang nor ONNX Runtime GenAI",
        repair="" if here else f"ONNX: pip install 'edgeft[onnx]'; AWQ: {servers.find_hint('vllm')}",
    )  # fmt: skip


def _distribution(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu() -> Finding:
    """The processor, and whether it has the instructions that llama.cpp's fast kernels use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return Finding(name="CPU", ok=True, found=f"{os.cpu_count()} cores, {platform.machine()}")
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    fast = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp", "i8mm", "sve") if f in flags]
    name = values.get("model name") or platform.machine()
    found = (
        f"{os.cpu_count()} cores, {name}: {', '.join(fast) or 'no fast instructions for quantized weights'}"
    )
    return Finding(name="CPU", ok=True if fast else None, found=found)


def _ram() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, memory.available / 1e9
    enough = memory.total >= RAM_MB * 1e6
    repair = "" if enough else "close programs or add swap; `edgeft plan` says what each step takes"
    return Finding(
        name="memory", ok=True if enough else None, found=f"{total:.1f} GB, {free:.1f} free", repair=repair
    )


def _disk(name: str, path: Path, wanted_mb: int, repair: str) -> Finding:
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    enough = free >= wanted_mb * 1e6
    found = f"{free / 1e9:,.1f} GB free in {place}" + (
        "" if enough else f"; {wanted_mb / 1e3:.1f} GB are needed"
    )
    return Finding(name=name, ok=enough, found=found, repair="" if enough else repair)


def _install(debian: str, brew: str) -> str:
    """The command for this system's package manager."""
    for manager, command in (
        ("apt-get", f"sudo apt install {debian}"),
        ("dnf", f"sudo dnf install {'gcc-c++' if debian == 'g++' else debian}"),
        ("pacman", f"sudo pacman -S {'gcc' if debian == 'g++' else 'python'}"),
        ("zypper", f"sudo zypper install {'gcc-c++' if debian == 'g++' else debian}"),
        ("brew", f"brew install {brew}"),
    ):
        if shutil.which(manager):
            return command
    return f"sudo apt install {debian}   (Debian's name; use your system's package manager)"


def _first_line(argv: list[str]) -> str:
    try:
        return next((line.strip() for line in run(argv).splitlines() if line.strip()), argv[0])
    except (EdgeftError, OSError) as e:
        return f"{argv[0]}: {_last_line(str(e))}"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), text)
