"""doctor names each gap of a machine, with the command that repairs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import stat
import sys
from pathlib import Path

import pytest

from edgeft import doctor


def found(findings, name):
    return next(f for f in findings if f.name == name)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A PATH that holds only what the test puts there, and a cache where nothing was built."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "bin"


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_path_without_a_compiler_is_named_with_its_repair(bare):
    program(bare, "apt-get", "exit 0")
    gap = found(doctor._compiler(), "C++ compiler")
    assert (gap.ok, gap.repair) == (False, "sudo apt install g++")


def test_the_repair_is_in_the_words_of_this_systems_package_manager(bare):
    program(bare, "dnf", "exit 0")
    assert found(doctor._compiler(), "C++ compiler").repair == "sudo dnf install gcc-c++"


def test_a_compiler_that_cannot_link_is_found_out(bare):
    program(bare, "g++", 'echo "ld: cannot find -lstdc++" >&2; exit 1')
    gap = found(doctor._compiler(), "C++ compiler")
    assert gap.ok is False
    assert "cannot find -lstdc++" in gap.found
    assert "g++" in gap.repair


def test_a_compiler_whose_programs_do_not_run_is_found_out(bare):
    program(
        bare, "g++", 'for o; do last=$o; done; printf "#!/bin/sh\\nexit 3\\n" >"$last"; /bin/chmod +x "$last"'
    )
    assert found(doctor._compiler(), "C++ compiler").ok is False


def test_a_working_compiler_is_seen_to_work(monkeypatch, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("this machine has no g++")
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    assert found(doctor._compiler(), "C++ compiler").ok is True


def test_missing_cmake_is_named_unless_it_lies_beside_python(bare, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(bare / "python"))
    gap = found(doctor._compiler(), "cmake")
    assert (gap.ok, gap.repair) == (False, "pip install cmake")
    program(bare, "cmake", "echo cmake version 9")
    assert found(doctor._compiler(), "cmake").found == "cmake version 9"


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else real(n))
    gap = doctor._packages()
    assert gap.ok is False
    assert "peft" in gap.found
    assert gap.repair == "pip install 'edgeft[train]'"


def test_the_packages_looked_for_are_those_of_the_train_extra():
    required = importlib.metadata.requires("edgeft") if _installed() else None
    if required is None:
        pytest.skip("edgeft is not installed as a package")
    wanted = " ".join(r.lower() for r in required)
    for module in doctor.PACKAGES:
        assert module.lower().replace("_", "-") in wanted, module


def _installed() -> bool:
    try:
        importlib.metadata.distribution("edgeft")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_llama_cpp_that_is_not_built_is_no_fault(bare):
    gap = found(doctor._llama_cpp(), "llama.cpp library")
    assert gap.ok is None
    assert "not built yet" in gap.found


def test_no_gpu_is_no_fault(bare):
    gap = found(doctor._gpu(), "GPU")
    assert (gap.ok, gap.repair) == (None, "")
    assert "training runs on the CPU" in gap.found


def test_a_gpu_is_named_with_its_memory_and_driver(bare):
    program(bare, "nvidia-smi", 'echo "NVIDIA GeForce RTX 3060, 12288 MiB, 580.65.06"')
    gap = found(doctor._gpu(), "GPU")
    assert (gap.ok, gap.found) == (True, "NVIDIA GeForce RTX 3060, 12288 MiB, driver 580.65.06")


def test_a_driver_that_does_not_answer_is_named(bare):
    program(bare, "nvidia-smi", 'echo "NVIDIA-SMI has failed: driver/library version mismatch"; exit 9')
    gap = found(doctor._gpu(), "GPU")
    assert gap.ok is None
    assert "version mismatch" in gap.found
    assert gap.repair


def test_a_torch_that_breaks_on_import_is_found_out(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        'raise ImportError("libcudart.so.12: cannot open shared object")'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gap = found(doctor._torch(has_gpu=False), "torch")
    assert gap.ok is False
    assert "libcudart" in gap.found


def test_a_gpu_that_torch_cannot_use_is_said(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "class version: cuda = None\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings = list(doctor._torch(has_gpu=True))
    assert found(findings, "torch on the GPU").found == "this torch is CPU-only"
    assert found(findings, "bitsandbytes").ok is False  # it cannot work on that torch, and says so
    assert found(findings, "bitsandbytes").repair == "pip install --upgrade bitsandbytes"


def test_a_full_disk_is_a_fault(tmp_path):
    gap = doctor._disk("disk for the store", tmp_path / "not" / "yet", 10**9, "free some space")
    assert (gap.ok, gap.repair) == (False, "free some space")
    assert str(tmp_path) in gap.found


@pytest.mark.slow
def test_this_machine_is_examined_without_torch_in_this_process(tmp_path):
    before = "torch" in sys.modules
    findings = doctor.examine(tmp_path)
    assert ("torch" in sys.modules) == before
    assert {f.name for f in findings} >= {
        "Python",
        "packages",
        "C++ compiler",
        "cmake",
        "ninja",
        "GPU",
        "CPU",
        "memory",
    }
    assert all(f.repair for f in findings if f.ok is False)
