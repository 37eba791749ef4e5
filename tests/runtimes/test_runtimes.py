"""Which runtime a device gets; and, where one was compiled, that its programs are what they should be."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from edgeft import llamacpp, resources, runtimes
from edgeft.errors import DataError, SetupError, ToolError
from edgeft.llamacpp import build, pin, stock, toolchain
from edgeft.llamacpp.server import Server, _address, running
from edgeft.parity import page
from edgeft.runtimes import Isa
from edgeft.tool import background, run
from tests.llamacpp.conftest import tiny  # noqa: F401  a fixture
from tests.runtimes.elves import elf, ours

TARGETS = {
    path.stem: tomllib.loads(path.read_text())["device"]
    for path in resources.folder("targets").glob("*.toml")
}
EXPECTED = {
    "amd64-uefi": "amd64-v3", "arm64-uefi": "arm64-cortex-a76", "jetson-orin-nano-8gb": "arm64-cuda-8_7", "laptop": "amd64-v3", "n100-mini-pc": "amd64-v3",
    "pi-4-4gb": "arm64-cortex-a72", "pi-4-8gb": "arm64-cortex-a72", "pi-5-16gb": "arm64-cortex-a76",
    "pi-5-8gb": "arm64-cortex-a76", "rtx-3060-box": "amd64-v3-cuda-8_6",
}  # fmt: skip
NAMED = {runtime.name: runtime for runtime in runtimes.available()}


def of(device):
    return runtimes.for_device(device["arch"], device["isa"], accelerator=device.get("accelerator", "cpu"))


def test_every_target_gets_a_runtime_and_which_one_is_written_down_here():
    assert {name: of(device).name for name, device in TARGETS.items()} == EXPECTED


def test_a_runtime_uses_nothing_that_its_device_lacks():
    for device in TARGETS.values():
        runtime = of(device)
        assert Isa.parse(runtime.arch, runtime.isa).runs_on(Isa.parse(device["arch"], device["isa"]))


@pytest.mark.parametrize(("arch", "isa", "name"), [
    ("arm64", "armv8.2-a+dotprod", "arm64-armv8_2"),
    ("arm64", "armv8.1-a", "arm64-cortex-a72"),
    ("arm64", "armv8.2-a+fp16", "arm64-cortex-a72"),       # without dotprod
    ("arm64", "armv9-a", "arm64-cortex-a76"),
    ("amd64", "x86-64-v2", "amd64-v2"),
    ("amd64", "x86-64-v4+avx512vnni", "amd64-v4"),
])  # fmt: skip
def test_the_most_demanding_runtime_that_runs_is_taken(arch, isa, name):
    assert runtimes.for_device(arch, isa).name == name


def test_a_device_below_every_runtime_is_told_so():
    with pytest.raises(SetupError, match=r"no runtime for amd64 with x86-64: .*amd64-v2 \(x86-64-v2\)"):
        runtimes.for_device("amd64", "x86-64")
    with pytest.raises(DataError, match="arch 'riscv64' is not known"):
        runtimes.for_device("riscv64", "rv64gc")


def test_runtimes_have_trees_and_pins_of_their_own_and_the_measuring_part_shares_one():
    folders = {name: build._folder(runtime.part) for name, runtime in NAMED.items()}
    assert len({*folders.values(), build.binaries()}) == len(NAMED) + 1
    assert len({runtime.pin for runtime in NAMED.values()} | {pin.load().id}) == len(NAMED) + 1
    assert build._folder("perplexity-a76") == folders["arm64-cortex-a76"]
    assert set(pin.load().parts["perplexity-a76"].files) < set(pin.load().parts["arm64-cortex-a76"].files)


def test_every_word_of_a_template_is_filled_in_or_left_to_the_build():
    for name, part in pin.load().parts.items():
        left = {word for value in part.cmake.values() for word in re.findall(r"\{(\w*)\}", value)}
        gpu = {"vulkan": {"vulkan", "glslc"}, "cuda": {"nvcc", "cuda", "cxx"}}
        own = gpu.get(part.words.get("accelerator", "").partition(":")[0], set())
        assert left <= {"source", "tree", "note", *own}, name
        assert ("note" in left) == ("arch" in part.words), name


def test_a_machine_without_the_cross_compiler_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    foreign = {"x86_64": "arm64-cortex-a72", "aarch64": "amd64-v3"}[platform.machine()]
    with pytest.raises(
        SetupError, match=rf"-linux-gnu-g\+\+ is not installed, so llama.cpp's {foreign} cannot"
    ) as caught:
        NAMED[foreign].find()
    assert re.fullmatch(r"sudo apt install g\+\+-(aarch64|x86-64)-linux-gnu", caught.value.hint)


def test_a_machine_of_the_runtimes_kind_needs_no_cross_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    for name in ("g++", "gcc", "cmake", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    own = {"x86_64": "amd64-v3", "aarch64": "arm64-cortex-a72"}[platform.machine()]
    assert toolchain.compiler(own) == str(tmp_path / "g++")
    assert toolchain.c_compiler(str(tmp_path / "g++")) == str(tmp_path / "gcc")
    assert toolchain.c_compiler("/usr/bin/aarch64-linux-gnu-g++") == "/usr/bin/aarch64-linux-gnu-gcc"
    assert NAMED[own].find().endswith("/bin/llama-server")


@pytest.mark.parametrize(("said", "wrong"), [
    ({"isa": "armv8.6-a"}, r"made what cannot ship: .*needs armv8\.6-a"),
    ({"pin": "another"}, r"says it is .*'pin': 'another'.*, wanted is"),
    ({}, r"is not static: it asks for /lib/ld\.so"),
])  # fmt: skip
def test_a_compiled_program_that_is_not_what_it_should_be_is_refused(tmp_path, monkeypatch, said, wrong):
    runtime = NAMED["arm64-cortex-a76"]
    identity = build.identity(runtime.part)
    for name in pin.load().parts[runtime.part].files:
        (tmp_path / name).write_bytes(elf(segments=(ours(**{**identity, **said}), (3, b"/lib/ld.so\0", 1))))
    monkeypatch.setattr(llamacpp, "ensure", lambda part: tmp_path)
    with pytest.raises(ToolError, match=wrong):
        runtime.ensure()
    for name in pin.load().parts[runtime.part].files:
        (tmp_path / name).write_bytes(elf(segments=(ours(**identity),)))
    assert runtime.ensure() == tmp_path
    with pytest.raises(ToolError, match=r"made what cannot ship: .* needs armv8\.2"):
        dataclasses.replace(runtime, isa="armv8-a").ensure()


def compiled(name):
    if not NAMED[name].built():
        pytest.skip(f"runtime {name} is not compiled on this machine (9 CPU minutes)")
    return NAMED[name].ensure()


def lavapipe():
    """What stands before a command so that Mesa's Vulkan on the processor is its GPU; llama.cpp takes none by itself."""
    if not (found := [*Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json")]):
        pytest.skip("Mesa's lavapipe is not installed (mesa-vulkan-drivers)")
    return ["env", f"VK_ICD_FILENAMES={found[0]}", "GGML_VK_VISIBLE_DEVICES=0"]


@pytest.mark.slow
@pytest.mark.parametrize("part", [*sorted(NAMED), "perplexity-a76"])
def test_a_compiled_part_is_small_static_unless_it_is_for_a_gpu_and_names_no_path_of_the_machine_that_made_it(
    part,
):
    if not llamacpp.built(part):
        pytest.skip(f"{part} is not compiled on this machine")
    folder, words = llamacpp.ensure(part), pin.load().parts[part].words
    for program in pin.load().parts[part].files:
        elf = runtimes.check_elf(folder / program, words["arch"], words["isa"])
        gpu = "accelerator" in words
        assert elf.note == build.identity(part) and bool(elf.interpreter) == gpu
        data = (folder / program).read_bytes()
        assert len(data) < (80e6 if gpu else 14e6)
        assert os.fspath(resources.cache()).encode() not in data
        assert b"llama.cpp/" in data  # assertions name their files, from the source's root on


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cpu"), [
    ("arm64-cortex-a76", "cortex-a76"), ("arm64-cortex-a72", "cortex-a72"), ("arm64-armv8_2", "cortex-a76"),
])  # fmt: skip
def test_a_runtime_says_its_version_on_its_processor(name, cpu):
    folder = compiled(name)
    if not (qemu := shutil.which("qemu-aarch64-static")):
        pytest.skip("qemu-user-static is not installed")
    command = [qemu, "-cpu", cpu, folder / "llama-server", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"commit {pin.load().commit}" in said.stdout + said.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cpu"), [
    ("arm64-cortex-a76", "cortex-a76"), ("arm64-cortex-a72", "cortex-a72"), ("amd64-v3", ""), ("amd64-v4", ""),
    ("amd64-v3-vulkan", ""),
])  # fmt: skip
def test_a_runtimes_server_completes_a_text_as_this_machines_own_does(name, cpu, tiny):  # noqa: F811
    """In F32, where kernels differ by round-off only, a greedy completion is the same on every processor."""
    folder, emulator = compiled(name), []
    if NAMED[name].kind == "vulkan":
        emulator = lavapipe()
    elif cpu:
        if not (qemu := shutil.which("qemu-aarch64-static")):
            pytest.skip("qemu-user-static is not installed")
        emulator = [qemu, "-cpu", cpu]
    elif name.removeprefix("amd64-v") == "4" and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    arguments = [
        "--ctx-size",
        "128",
        "--parallel",
        "1",
        "--threads",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    asked = {"prompt": "Once upon a time", "n_predict": 8, "temperature": 0, "return_tokens": True}
    with running(tiny(64), arguments) as server:
        expected = server._ask("POST", "/completion", asked)["tokens"]
    command = [*emulator, os.fspath(folder / "llama-server"), "--model", os.fspath(tiny(64)), *arguments]
    with background([*command, "--no-warmup"]) as program:
        host, port = _address(program, time.monotonic() + 120)
        found = Server(host=host, port=port, program=program)._ask("POST", "/completion", asked)["tokens"]
    assert len(expected) == 8 and found == expected


@pytest.mark.slow
def test_the_gpus_logits_are_the_processors(tiny, tmp_path):  # noqa: F811
    """The processor's llama-perplexity writes down what it says, Vulkan's is compared with it."""
    processor, gpu = compiled("amd64-v3"), compiled("amd64-v3-vulkan")
    text = Path(page.__file__).parents[1] / "general.txt"
    base = tmp_path / "base.kld"
    subprocess.run([
        processor / "llama-perplexity", "-m", tiny(64), "-f", text, "-c", "128", "--chunks", "2", "-t", "1",
        "--save-all-logits", base,
    ], check=True, capture_output=True)  # fmt: skip
    program = [*lavapipe(), os.fspath(gpu / "llama-perplexity")]
    log = run(stock.command(program, base, tiny(64), n_ctx=128, threads=1))
    assert "Vulkan0 model buffer" in log
    found = stock.parse(log)
    assert found.kld < 1e-5 and found.same_top > 0.98
