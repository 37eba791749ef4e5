"""A file for the wrong processor is refused: by hand-made headers, by files of this machine, by freshly linked ones."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from edgeft.errors import DataError
from edgeft.llamacpp import note
from edgeft.runtimes import Isa, check_elf, read_elf
from tests.runtimes.elves import AMD64, ARM64, elf, interpreter, ours, raw_note, x86

PI4, PI5 = "armv8-a+crc", "armv8.2-a+dotprod+fp16"


@pytest.fixture
def made(tmp_path):
    def write(*args, **kwargs) -> Path:
        (tmp_path / "program").write_bytes(elf(*args, **kwargs))
        return tmp_path / "program"

    return write


def test_a_program_for_the_pi_5_is_refused_for_a_pi_4_and_the_other_way_round_it_is_taken(made):
    for_pi5 = made(segments=(ours(arch="arm64", isa=PI5, runtime="x"),))
    assert check_elf(for_pi5, "arm64", PI5).note == {"arch": "arm64", "isa": PI5, "runtime": "x"}
    with pytest.raises(
        DataError, match=r"needs armv8\.2-a\+dotprod\+fp16, as its edgeft note says, and .* has armv8-a"
    ):
        check_elf(for_pi5, "arm64", PI4)
    assert check_elf(made(segments=(ours(arch="arm64", isa=PI4),)), "arm64", PI5)


def test_a_program_of_another_architecture_is_refused_by_its_header(made):
    program = made(AMD64, segments=(x86(4),))
    with pytest.raises(DataError, match="is a program for amd64, and the device is arm64"):
        check_elf(program, "arm64", PI5)
    with pytest.raises(DataError, match="is a program for RISC-V, and the device is arm64"):
        check_elf(made(243), "arm64", PI5)
    with pytest.raises(DataError, match="is a program for machine 258"):
        check_elf(made(258), "amd64", "x86-64-v3")


@pytest.mark.parametrize(("mask", "level"), [(1, "x86-64"), (2, "x86-64-v2"), (3, "x86-64-v2"), (4, "x86-64-v3"),
                                             (8, "x86-64-v4"), (15, "x86-64-v4")])  # fmt: skip
def test_the_level_of_an_x86_program_is_the_highest_in_its_isa_note(made, mask, level):
    other_property = struct.pack("<IIII", 0xC0000002, 4, 3, 0)  # IBT and shadow stack
    program = made(AMD64, segments=(x86(mask, before=other_property),))
    assert check_elf(program, "amd64", level).x86_isa == level
    for below in {"x86-64-v4": "x86-64-v3", "x86-64-v3": "x86-64-v2", "x86-64-v2": "x86-64"}.get(
        level, ""
    ).split():
        with pytest.raises(
            DataError, match=f"needs {level}, as its x86 ISA note says, and the device has {below}"
        ):
            check_elf(program, "amd64", below)


def test_our_note_cannot_talk_the_linkers_one_down(made):
    program = made(AMD64, segments=(x86(8), ours(arch="amd64", isa="x86-64-v2")))
    with pytest.raises(DataError, match="needs x86-64-v4, as its x86 ISA note says"):
        check_elf(program, "amd64", "x86-64-v3")


def test_a_note_for_another_architecture_than_the_header_is_refused(made):
    with pytest.raises(DataError, match=r"says in its edgeft note .*amd64.*, in its header arm64"):
        check_elf(made(segments=(ours(arch="amd64", isa="x86-64-v2"),)), "arm64", PI5)


def test_a_program_that_does_not_say_what_it_needs_is_refused(made):
    for program in (made(), made(ARM64, segments=(interpreter("/lib/ld-linux-aarch64.so.1"), x86(4)))):
        with pytest.raises(DataError, match="does not say which instructions it needs") as caught:
            check_elf(program, "arm64", PI5)
        assert "let edgeft compile it" in caught.value.hint


def test_what_is_no_64_bit_little_endian_program_is_refused(made, tmp_path):
    with pytest.raises(DataError, match="is 32-bit and little-endian"):
        read_elf(made(bits=1))
    with pytest.raises(DataError, match="is 64-bit and big-endian"):
        read_elf(made(order=2))
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    with pytest.raises(DataError, match="is no program"):
        read_elf(tmp_path / "run.sh")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_elf(tmp_path / "nothing")


def test_every_cut_of_a_program_is_refused_or_says_the_same(made, tmp_path):
    whole = made(segments=(interpreter("/lib/ld.so"), ours(arch="arm64", isa=PI5))).read_bytes()
    expected = read_elf(tmp_path / "program")
    said = []
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        try:
            said.append(read_elf(tmp_path / "cut"))
        except DataError:
            continue
    assert all(elf == expected for elf in said)
    assert len(said) < 8  # only padding at the end may go


def test_a_note_that_is_no_table_of_texts_is_damage(made):
    for text in ([1], {"isa": 3}, "armv8-a"):
        with pytest.raises(DataError, match=r"is a damaged ELF file: its edgeft note"):
            read_elf(made(segments=(raw_note(text),)))


def test_programs_of_this_machine_are_read_as_readelf_reads_them():
    shell = Path("/bin/sh").resolve()
    elf = read_elf(shell)
    assert elf.arch == {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    assert elf.interpreter.startswith("/lib") and elf.note is None
    if readelf := shutil.which("readelf"):
        notes = subprocess.run([readelf, "-nW", shell], capture_output=True, text=True, check=True).stdout
        assert bool(elf.x86_isa) == ("x86 ISA needed" in notes)


@pytest.mark.parametrize(("compiler", "arch", "isa", "flags"), [
    ("aarch64-linux-gnu-gcc", "arm64", PI5, []),
    ("x86_64-linux-gnu-gcc", "amd64", "x86-64-v3", ["-Wl,-z,x86-64-v3"]),
])  # fmt: skip
def test_the_note_survives_the_linker_and_strip(tmp_path, compiler, arch, isa, flags):
    if not (gcc := shutil.which(compiler)):
        pytest.skip(f"{compiler} is not installed")
    said = {"runtime": "hello", "arch": arch, "isa": isa, "pin": "1-2-3"}
    (tmp_path / "note.s").write_text(note.assembler(said))
    (tmp_path / "hello.c").write_text("int main(void) { return 0; }\n")
    command = [gcc, "-static", "-s", "-Wl,--gc-sections", *flags, "hello.c", "note.s", "-o", "hello"]
    subprocess.run(command, cwd=tmp_path, check=True)
    elf = check_elf(tmp_path / "hello", arch, isa)
    assert (elf.note, elf.interpreter) == (said, "")
    assert elf.x86_isa == (isa if arch == "amd64" else "")
    if readelf := shutil.which("readelf"):
        headers = subprocess.run(
            [readelf, "-lW", tmp_path / "hello"], capture_output=True, text=True, check=True
        )
        stack = next(line for line in headers.stdout.splitlines() if "GNU_STACK" in line)
        assert " RWE " not in stack


@pytest.mark.parametrize(("program", "device", "runs"), [
    ("armv8-a+crc", "armv8.2-a", True),                  # 8.1 brings crc
    ("armv8.2-a+dotprod", "armv8.4-a", True),            # 8.4 brings dotprod
    ("armv8.2-a+dotprod+fp16", "armv8.4-a", False),      # but not fp16
    ("armv8.2-a+dotprod+fp16", "armv9-a", True),         # which SVE cannot be without
    ("armv8.6-a", "armv9-a", False),                     # 9.0 is 8.5 and more
    ("armv8.6-a", "armv9.1-a", True),
    ("armv9-a", "armv8.9-a", False),
    ("armv8-a+crc", "armv8-a", False),
])  # fmt: skip
def test_what_an_arm_level_contains(program, device, runs):
    assert Isa.parse("arm64", program).runs_on(Isa.parse("arm64", device)) == runs


@pytest.mark.parametrize("text", ["", "armv7-a", "x86-64-v5", "armv8.2-a+", "armv8.2-a+nofp", "cortex-a76"])
def test_what_is_no_instruction_set_is_refused(text):
    with pytest.raises(DataError, match="is no level of arm64"):
        Isa.parse("arm64", text)
    with pytest.raises(DataError, match="arch 'riscv64' is not known; known are amd64, arm64"):
        Isa.parse("riscv64", text)
