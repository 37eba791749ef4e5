"""Compiles the pinned llama.cpp once a machine, part by part in one build tree, and knows whether it is intact.

A part with settings of its own (other kernels, another processor) has a build tree of its own.

A part counts as built when its marker is there. The marker is written last, by rename, and holds the sha256 of
every file of the part; a file that no longer agrees with it is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft import progress
from edgeft.errors import ToolError
from edgeft.llamacpp import note, toolchain
from edgeft.llamacpp.pin import Pin, load
from edgeft.llamacpp.source import home, llama_cpp_tree, locked
from edgeft.tool import run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of llama.cpp as a stage's tool: `name`, `pin` and `find()` are what edgeft.tool.Tool has."""

    part: str

    @property
    def name(self) -> str:
        return f"llama.cpp {self.part}"

    @property
    def pin(self) -> str:
        return load().id

    @property
    def hint(self) -> str:
        return "sudo apt install g++"

    def find(self) -> str:
        """Where the part is or will be. Cheap: compiles nothing.

        Raises SetupError when it is not built and this machine cannot build it.
        """
        if not built(self.part):
            toolchain.check(self.part)
        return os.fspath(_folder(self.part) / load().parts[self.part].files[0])


LIBRARY = Part(part="library")
"""libllama and ggml: quantization, importance matrices, decoding, scoring."""
CONVERTER = LIBRARY
"""The converter is Python out of the same source; nothing of it is compiled."""
SERVER = Part(part="server")
PERPLEXITY = Part(part="perplexity")
"""llama.cpp's own llama-perplexity, llama-imatrix and llama-quantize, to check ours against."""
PORTABLE = Part(part="portable")
"""ggml's processor kernels without this processor's instructions: other sums, other roundings, same model."""
PERPLEXITY_A76 = Part(part="perplexity-a76")
"""llama-perplexity out of the Raspberry Pi 5's runtime: one static file, cross-compiled."""


def ensure(part: str = "library") -> Path:
    """The folder with the part's files, compiled now if they are not there yet.

    Raises SetupError when this machine cannot build, ToolError when compiling fails or when what lies there is
    not what was built.
    """
    if built(part):
        return _folder(part)
    llama_cpp_tree()  # fetched before the lock below is taken: it takes the same one
    with locked():
        if not built(part):
            beside = [other for other in load().parts if _folder(other) == _folder(part)]
            intact = [other for other in beside if built(other)]
            _compile(part)
            if "library" in beside and "library" not in intact:
                _identify(load())
            for name in (*intact, part):
                _mark(name)
    return _folder(part)


def built(part: str) -> bool:
    """Whether the part is there. Raises ToolError when a file of it was changed since it was built."""
    marker = _marker(part)
    if not marker.is_file():
        return False
    files = json.loads(marker.read_text(encoding="utf-8"))["files"]
    if set(files) != set(load().parts[part].files):
        return False
    for name, noted in files.items():
        path = _folder(part) / name
        if not path.is_file():
            return False
        stat = path.stat()
        if [stat.st_size, stat.st_mtime_ns] != noted["stat"] and _sha256(path) != noted["sha256"]:
            raise ToolError(
                f"{path} is not the file that was built here: its sha256 is {_sha256(path)}, "
                f"noted is {noted['sha256']}",
                hint=f"delete {path.parent.parent}; the next build compiles it again",
            )
    return True


def binaries() -> Path:
    """The folder libraries and programs are built into; one a kind of processor, for homes shared by machines."""
    return home() / f"build-{platform.machine()}-{_processor()}" / "bin"


def _folder(part: str) -> Path:
    """Where a part's files are: with all others, or in the tree of its own settings."""
    own = load().parts[part]
    if not own.cmake:
        return binaries()
    return home() / f"build-{own.tree}-{platform.machine()}-{own.settings}" / "bin"


def _compile(part: str) -> None:
    pin, tree = load(), _folder(part).parent
    compiler, ninja = toolchain.compiler(part), toolchain.program("ninja")
    tree.mkdir(parents=True, exist_ok=True)
    ggml = tree / "optimize-ggml.cmake"
    ggml.write_text(
        "".join(f'set(CMAKE_{lang}_FLAGS_RELEASE "{pin.optimize_ggml}")\n' for lang in ("C", "CXX", "ASM")),
        encoding="utf-8",
    )
    progress.report("configure llama.cpp")
    own = dict(pin.parts[part].cmake)
    if "CMAKE_CXX_COMPILER" in own:
        own["CMAKE_CXX_COMPILER"], own["CMAKE_C_COMPILER"] = compiler, toolchain.c_compiler(compiler)
    source = os.fspath(llama_cpp_tree())
    here = {
        "{source}": source,
        "{tree}": os.fspath(tree),
        "{cxx}": compiler,
        **toolchain.words(part, tree, compiler),
    }
    if any("{note}" in value for value in own.values()):
        here["{note}"] = os.fspath(_note(part, compiler))
    for word, path in here.items():
        quoted = shlex.quote(path)  # in compiler flags, which a shell reads
        own = {key: text.replace(word, quoted if "_FLAGS" in key else path) for key, text in own.items()}
    settings = {
        **pin.cmake,
        **own,
        "LLAMA_BUILD_COMMIT": pin.commit,
        "CMAKE_PROJECT_ggml_INCLUDE": os.fspath(ggml),
        "CMAKE_MAKE_PROGRAM": ninja,
    }
    if "accelerator" in pin.parts[part].words:  # no folder of this machine to look for libraries in
        settings["CMAKE_SKIP_RPATH"] = "ON"
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    # The shaders' generator is a cmake project inside this one, which looks for ninja in PATH.
    path = os.pathsep.join([os.fspath(Path(ninja).parent), os.environ.get("PATH", "")])
    env = {"SOURCE_DATE_EPOCH": "0", "LC_ALL": "C", "PATH": path}
    toolchain.outlive(tree)
    run(
        [toolchain.program("cmake"), "-S", source, "-B", os.fspath(tree), "-G", "Ninja", *definitions],
        env=env,
    )
    run(
        [ninja, "-C", os.fspath(tree), "-j", str(toolchain.jobs()), *pin.parts[part].targets],
        env=env,
        watch=_Counter(f"compile llama.cpp: {part}"),
    )


def identity(part: str) -> dict[str, str]:
    """What a runtime's note says: which runtime it is, for what processor, and from which source with which settings."""
    own = load().parts[part]
    pin = f"{load().id}-{own.settings}"
    gpu = {"accelerator": own.words["accelerator"]} if "accelerator" in own.words else {}
    return {"runtime": own.tree, "arch": own.words["arch"], "isa": own.words["isa"], "pin": pin, **gpu}


def _note(part: str, compiler: str) -> Path:
    """The object file with the note, linked into every program of the part's tree."""
    source = _folder(part).parent / "note.s"
    source.write_text(note.assembler(identity(part)), encoding="ascii")
    run([compiler, "-c", os.fspath(source), "-o", os.fspath(source.with_suffix(".o"))])
    return source.with_suffix(".o")


class _Counter:
    """Reports what ninja counts. The shaders' generator has a ninja of its own, whose few steps are not counted."""

    def __init__(self, what: str) -> None:
        self._what, self._total = what, 0

    def __call__(self, line: str) -> None:
        if not (counted := re.match(r"\[(\d+)/(\d+)\]", line)):
            return
        done, total = int(counted[1]), int(counted[2])
        if done and 2 * total >= self._total:  # [0/2] is ninja looking for new files
            self._total = max(total, self._total)
            progress.report(self._what, done, total, unit="files")


def _identify(pin: Pin) -> None:
    """Ask the libraries, in a process of its own, who they are. Raises ToolError when they are not the pin."""
    ask = (
        "import ctypes, sys\n"
        "def say(library, *names):\n"
        "    library = ctypes.CDLL(f'{sys.argv[1]}/{library}')\n"
        "    for name in names:\n"
        "        getattr(library, name).restype = ctypes.c_char_p\n"
        "        print(name, getattr(library, name)().decode())\n"
        "say('libggml-base.so', 'ggml_version', 'ggml_commit')\n"
        "say('libllama.so', 'llama_version')\n"
    )
    said = dict(
        line.split(" ", 1) for line in run([sys.executable, "-c", ask, os.fspath(binaries())]).splitlines()
    )
    expected = {"ggml_version": pin.ggml, "ggml_commit": pin.commit, "llama_version": pin.llama}
    if said != expected:
        raise ToolError(f"the llama.cpp built in {binaries()} says it is {said}, pinned is {expected}")


def _mark(part: str) -> None:
    files: dict[str, Any] = {}
    for name in load().parts[part].files:
        path = _folder(part) / name
        if not path.is_file():
            raise ToolError(f"compiling llama.cpp's {part} succeeded but made no {name}")
        stat = path.stat()
        files[name] = {"sha256": _sha256(path), "stat": [stat.st_size, stat.st_mtime_ns]}
    aside = _marker(part).with_suffix(".part")
    with aside.open("w", encoding="utf-8") as stream:
        json.dump({"pin": load().id, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(_marker(part))


def _marker(part: str) -> Path:
    return _folder(part).parent / f"{part}.built.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _processor() -> str:
    """A short hash of what the compiler's -march=native will see; a foreign library would die of SIGILL."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return hashlib.sha256(platform.processor().encode()).hexdigest()[:8]
    features = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(encoding="utf-8"), re.MULTILINE)
    names = sorted(features[1].split()) if features else []
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:8]
