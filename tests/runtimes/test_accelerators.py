"""Runtimes for GPUs: which one a device gets, what this machine must have to make it, and what its programs ask the system for."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys

import pytest

from edgeft import llamacpp, progress, runtimes, staging
from edgeft.errors import DataError, SetupError, ToolError
from edgeft.llamacpp import build, note, pin, toolchain
from edgeft.runtimes import Needs, read_needs

NAMED = {runtime.name: runtime for runtime in runtimes.available()}
OLD = "#define VK_HEADER_VERSION 239\n#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, 1, 3, VK_HEADER_VERSION)\n"
NEW = OLD.replace("239", "309").replace("1, 3", "1, 4") + "#define VK_EXT_layer_settings 1\n"
NVCC = """#!/bin/sh
case "$1" in
--version) echo 'Cuda compilation tools, release 12.6, V12.6.68' ;;
--list-gpu-code) printf 'sm_80\\nsm_86\\nsm_87\\n' ;;
*) echo '#$ TOP='"$(dirname "$0")"/.. ;;
esac
"""


@pytest.mark.parametrize(("arch", "isa", "accelerator", "name"), [
    ("amd64", "x86-64-v3", "vulkan", "amd64-v3-vulkan"),
    ("amd64", "x86-64-v4", "vulkan", "amd64-v3-vulkan"),
    ("arm64", "armv8.2-a+dotprod+fp16", "vulkan", "arm64-armv8_2-vulkan"),
    ("amd64", "x86-64-v3", "cuda:8.6", "amd64-v3-cuda-8_6"),
    ("amd64", "x86-64-v3", "cuda:8.9", "amd64-v3-cuda-8_6"),       # the same major version, and newer
    ("arm64", "armv8.2-a+dotprod+fp16", "cuda:8.7", "arm64-cuda-8_7"),
    ("amd64", "x86-64-v3", "cpu", "amd64-v3"),
])  # fmt: skip
def test_the_accelerator_chooses_the_runtime(arch, isa, accelerator, name):
    runtime = runtimes.for_device(arch, isa, accelerator=accelerator)
    assert runtime.name == name
    assert runtime.static == (accelerator == "cpu")
    assert build.identity(runtime.part).get("accelerator", "cpu") == runtime.accelerator


@pytest.mark.parametrize(("arch", "isa", "accelerator", "said"), [
    ("amd64", "x86-64-v3", "cuda:9.0", "no runtime for amd64 with cuda:9.0: its machine code runs on that kind of GPU only"),
    ("amd64", "x86-64-v3", "cuda:8.0", "there is cuda:8.6"),       # older than what there is code for
    ("arm64", "armv8.2-a+dotprod+fp16", "cuda:8.9", "there is cuda:8.7"),
    ("amd64", "x86-64-v3", "cuda", "names no compute capability"),
    ("amd64", "x86-64-v3", "cuda:86", "names no compute capability"),
    ("amd64", "x86-64-v2", "vulkan", r"no vulkan runtime for amd64 with x86-64-v2: .*amd64-v3-vulkan \(x86-64-v3\)"),
    ("amd64", "x86-64-v3", "npu", "'npu' is no accelerator"),
    ("amd64", "x86-64-v3", "vulkan:1.3", "'vulkan:1.3' is no accelerator"),
])  # fmt: skip
def test_a_gpu_without_a_runtime_is_refused_with_the_reason(arch, isa, accelerator, said):
    with pytest.raises(SetupError, match=said) as caught:
        runtimes.for_device(arch, isa, accelerator=accelerator)
    assert caught.value.hint


def test_a_target_with_a_gpu_says_how_it_is_programmed(monkeypatch):
    device = {"name": "box", "arch": "amd64", "isa": "x86-64-v3", "gpu": "some", "vram_mb": 0}
    monkeypatch.setattr(toolchain, "check", lambda part: None)
    with pytest.raises(SetupError, match="box computes on a GPU, and the target does not say how") as caught:
        staging.runtime(device)
    assert '[export] kind = "bundle"' in caught.value.hint and '"cuda:8.6"' in caught.value.hint
    assert staging.runtime({**device, "accelerator": "cpu"}).name == "amd64-v3"
    assert staging.runtime({**device, "accelerator": "vulkan"}).name == "amd64-v3-vulkan"
    with pytest.raises(
        SetupError, match="loads the system's libraries for the GPU, and this format has no system"
    ):
        staging.runtime({**device, "accelerator": "vulkan"}, alone=True)


def headers(folder, text, *, spirv=True):
    """An SDK's folder with the files that are looked at."""
    for name in ("vulkan", *(("spirv/unified1",) if spirv else ())):
        (folder / "include" / name).mkdir(parents=True, exist_ok=True)
    (folder / "include/vulkan/vulkan.hpp").touch()
    (folder / "include/vulkan/vulkan_core.h").write_text(text)
    if spirv:
        (folder / "include/spirv/unified1/spirv.hpp").touch()


def program(file, text="#!/bin/sh\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with a C++ compiler, cmake and ninja, and nothing for a GPU."""
    for name in ("g++", "x86_64-linux-gnu-g++", "aarch64-linux-gnu-g++", "cmake", "ninja"):
        program(tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "_SYSTEM", (tmp_path / "usr/include",))
    for name in ("VULKAN_SDK", "CUDACXX"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_vulkan_needs_headers_that_are_new_enough_and_a_shader_compiler(bare, monkeypatch):
    def refused():
        with pytest.raises(SetupError) as caught:
            NAMED["arm64-armv8_2-vulkan"].find()
        assert "glslc libvulkan-dev spirv-headers" in caught.value.hint and "VULKAN_SDK" in caught.value.hint
        return str(caught.value)

    assert "Vulkan's C++ headers are not installed" in refused()
    headers(bare / "usr", OLD, spirv=False)
    assert "headers 1.3.239 in" in (said := refused()) and "lack VK_EXT_layer_settings" in said
    headers(bare / "sdk", NEW, spirv=False)
    monkeypatch.setenv("VULKAN_SDK", str(bare / "sdk"))
    assert "SPIR-V's headers are not installed" in refused()
    headers(bare / "sdk", NEW)
    assert "glslc is not installed" in refused()
    program(bare / "sdk/bin/glslc")
    assert NAMED["arm64-armv8_2-vulkan"].find().endswith("/bin/llama-server")
    assert toolchain.vulkan("arm64-armv8_2-vulkan").glslc == str(bare / "sdk/bin/glslc")


def test_cuda_needs_an_nvcc_that_knows_the_gpu_and_cublas_for_the_machine(bare, monkeypatch):
    def refused(name):
        with pytest.raises(SetupError) as caught:
            NAMED[name].find()
        assert caught.value.hint
        return str(caught.value)

    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **kw: None if name.startswith("/usr/local") else real(name, **kw)
    )
    assert (
        refused("amd64-v3-cuda-8_6")
        == "nvcc is not installed, so llama.cpp's amd64-v3-cuda-8_6 cannot be compiled"
    )
    monkeypatch.setenv("PATH", f"{bare / 'bin'}:/usr/bin:/bin")  # for the script's dirname
    program(bare / "toolkit/bin/nvcc", NVCC)
    monkeypatch.setenv("CUDACXX", str(bare / "toolkit/bin/nvcc"))
    assert "toolkit 12.6" in (said := refused("amd64-v3-cuda-8_6")) and "no cublas_v2.h for x86_64" in said
    for name in ("include/cublas_v2.h", "lib/libcublas.so", "lib/libcudart.so"):
        program(bare / "toolkit/targets/x86_64-linux" / name)
    assert NAMED["amd64-v3-cuda-8_6"].find().endswith("/bin/llama-server")
    assert toolchain.cuda("amd64-v3-cuda-8_6", "8.6").release == "12.6"
    words = toolchain.words("amd64-v3-cuda-8_6", bare, "g++")
    assert words == {"{nvcc}": str(bare / "toolkit/bin/nvcc"), "{cuda}": str(bare / "toolkit")}
    assert (bare / toolchain.CUDA_RELEASE).read_text() == "12.6"
    assert "no cublas_v2.h for aarch64" in refused("arm64-cuda-8_7")
    with pytest.raises(SetupError, match=r"is CUDA 12\.6 and does not compile for sm_120"):
        toolchain.cuda("amd64-v3-cuda-8_6", "12.0")


def test_paths_are_quoted_in_flags_and_nowhere_else(tmp_path, monkeypatch):
    """A shell reads flags; cmake takes a path as it is."""
    said = []

    def run(argv, **options):
        said.append(argv)
        return ""

    home = tmp_path / "a b"
    (home / "source/vendor/llama.cpp").mkdir(parents=True)
    monkeypatch.setattr(build, "home", lambda: home)
    monkeypatch.setattr(build, "llama_cpp_tree", lambda: home / "source/vendor/llama.cpp")
    monkeypatch.setattr(build, "run", run)
    monkeypatch.setattr(toolchain, "compiler", lambda part: "/usr/bin/x86_64-linux-gnu-g++")
    monkeypatch.setattr(
        toolchain, "words", lambda part, tree, cxx: {"{vulkan}": f"{tree}/vulkan", "{glslc}": "/x y/glslc"}
    )
    build._compile("amd64-v3-vulkan")
    cmake = dict(
        word[2:].split("=", 1)
        for word in next(argv for argv in said if "-G" in argv)
        if word.startswith("-D")
    )
    assert cmake["Vulkan_GLSLC_EXECUTABLE"] == "/x y/glslc"
    assert cmake["Vulkan_LIBRARY"].endswith("/vulkan/libvulkan.so") and "'" not in cmake["Vulkan_LIBRARY"]
    assert f"-ffile-prefix-map='{home}/source/vendor/llama.cpp'=llama.cpp" in cmake["CMAKE_CXX_FLAGS"]
    assert (
        "-static " not in cmake["CMAKE_EXE_LINKER_FLAGS"]
        and "-static-libstdc++" in cmake["CMAKE_EXE_LINKER_FLAGS"]
    )


def test_progress_does_not_jump_when_a_build_inside_the_build_counts_too():
    heard = []
    count = build._Counter("compile llama.cpp: x")
    with progress.listen(lambda p: heard.append((p.done, p.total))):
        for line in (
            "[0/2] Re-checking",
            "[1/300] a",
            "[2/300] b",
            "[1/2] inner",
            "[2/2] inner",
            "warning: [1/1]",
            "[3/299] c",
        ):
            count(line)
    assert heard == [(1, 300), (2, 300), (3, 299)]


def test_a_build_waits_for_compilers_that_outlived_another_one(tmp_path):
    """What ninja started goes on when ninja is killed, and would write into the files of the next build."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copy(shutil.which("sleep"), tmp_path / "cc1plus")
    heard = []
    elsewhere = subprocess.Popen([tmp_path / "cc1plus", "60"], cwd=tmp_path)
    orphan = subprocess.Popen([tmp_path / "cc1plus", "60"], cwd=tree)
    shell = subprocess.Popen(["sleep", "60"], cwd=tree)

    def end(p):
        heard.append(p.what)
        orphan.kill()
        orphan.wait()

    try:
        with progress.listen(end):
            toolchain.outlive(tree)
    finally:
        for process in (elsewhere, orphan, shell):
            process.kill()
            process.wait()
    assert heard == ["wait for the compilers of a build that was stopped"]


@pytest.fixture(scope="module")
def gcc():
    if sys.platform != "linux" or platform.machine() != "x86_64" or not (found := shutil.which("g++")):
        pytest.skip("needs g++ on x86-64")
    return found


def compiled(gcc, folder, code, *options, name="program"):
    (folder / f"{name}.cpp").write_text(code)
    subprocess.run([gcc, folder / f"{name}.cpp", "-o", folder / name, *options], check=True)
    return folder / name


def test_what_a_program_needs_is_read_as_readelf_reads_it(gcc, tmp_path):
    if not (readelf := shutil.which("readelf")):
        pytest.skip("readelf is not installed")
    code = 'extern "C" double pow(double, double); int main(int n, char **) { return int(pow(n, 2.5)); }'
    found = compiled(gcc, tmp_path, code, "-lm")
    needs = read_needs(found)
    said = subprocess.run(
        [readelf, "-d", "-V", "-W", found], capture_output=True, text=True, check=True
    ).stdout
    assert set(needs.libraries) == set(re.findall(r"\(NEEDED\).*\[(.*)\]", said)) >= {"libc.so.6"}
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"Name: GLIBC_([\d.]+)", said)}
    assert tuple(map(int, needs.glibc.split("."))) == max(versions)
    assert read_needs(compiled(gcc, tmp_path, "int main() {}", "-static", name="alone")) == Needs()
    data, refused = found.read_bytes(), 0
    for cut in range(0, len(data), 97):
        (tmp_path / "cut").write_bytes(data[:cut])
        try:
            assert read_needs(tmp_path / "cut") == needs
        except DataError as error:
            assert "damaged ELF file, or none" in str(error)
            refused += 1
    assert refused > 10


def test_glibc_versions_are_compared_as_numbers():
    assert (Needs(glibc="2.9", libraries=("b",)) | Needs(glibc="2.34", libraries=("a", "b"))) == Needs(
        glibc="2.34", libraries=("a", "b")
    )
    assert (Needs() | Needs()) == Needs()


def test_the_library_that_stands_for_vulkan_has_its_name_and_no_more_functions_than_are_called(
    gcc, tmp_path, monkeypatch
):
    headers(tmp_path / "sdk", NEW)
    program(tmp_path / "sdk/bin/glslc")
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "sdk"))
    words = toolchain.words("amd64-v3-vulkan", tmp_path, gcc)
    again = toolchain.words("amd64-v3-vulkan", tmp_path, gcc)  # as when a build goes on
    assert words == again and words["{glslc}"].endswith("sdk/bin/glslc")
    assert sorted(p.name for p in (tmp_path / "vulkan/include").iterdir()) == ["spirv", "vulkan"]
    call = 'extern "C" void {0}(); int main() {{ {0}(); }}'
    library = tmp_path / "vulkan/libvulkan.so"
    assert (
        "libvulkan.so.1"
        in read_needs(compiled(gcc, tmp_path, call.format("vkGetInstanceProcAddr"), library)).libraries
    )
    with pytest.raises(subprocess.CalledProcessError):
        compiled(gcc, tmp_path, call.format("vkCreateInstance"), library)


def test_a_program_for_a_gpu_loads_its_library_and_no_other(gcc, tmp_path, monkeypatch):
    runtime = NAMED["amd64-v3-vulkan"]
    headers(tmp_path / "sdk", NEW)
    program(tmp_path / "sdk/bin/glslc")
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "sdk"))
    toolchain.words(runtime.part, tmp_path, gcc)
    (tmp_path / "note.s").write_text(note.assembler(build.identity(runtime.part)))
    code = 'extern "C" void vkGetInstanceProcAddr(); int *made; int main() { vkGetInstanceProcAddr(); made = new int; }'
    options = [tmp_path / "note.s", tmp_path / "vulkan/libvulkan.so", "-Wl,-z,x86-64-v3"]
    made = compiled(gcc, tmp_path, code, *options, "-static-libstdc++", "-static-libgcc")
    for name in pin.load().parts[runtime.part].files:
        shutil.copy(made, tmp_path / name)
    monkeypatch.setattr(llamacpp, "ensure", lambda part: tmp_path)
    glibc = read_needs(made).glibc
    assert runtime.debian() == (f"libc6 (>= {glibc})", "libvulkan1", "mesa-vulkan-drivers | vulkan-icd")
    assert "libvulkan.so.1" in runtime.needs().libraries
    shutil.copy(compiled(gcc, tmp_path, code, *options), tmp_path / "llama-bench")
    with pytest.raises(
        ToolError, match=r"llama-bench asks for lib(stdc\+\+|gcc_s)\.so\.\d, which its device may not have"
    ):
        runtime.ensure()
    found = compiled(gcc, tmp_path, code, *options, "-static-libstdc++", "-static-libgcc", "-Wl,-rpath,/a:/b")
    shutil.copy(found, tmp_path / "llama-bench")
    with pytest.raises(ToolError, match=r"llama-bench would look for libraries in /a, /b"):
        runtime.ensure()
