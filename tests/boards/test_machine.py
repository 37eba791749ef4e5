"""What a machine says of itself, and what is refused because of it."""

from __future__ import annotations

import pytest

from edgeft.boards import machine, record, step
from edgeft.boards.machine import Machine
from edgeft.boards.place import here
from edgeft.boards.program import best_isa
from edgeft.boards.ssh import _parts
from edgeft.errors import SetupError

PI = """Welcome to the workshop!
edgeft machine=aarch64
edgeft system=Linux 6.6.31
edgeft board=Raspberry Pi 5 Model B Rev 1.0
edgeft part=0xd0b
edgeft features=fp asimd evtstrm aes crc32 atomics fphp asimdhp asimddp
edgeft cores=4
edgeft memory_kb=8245180
edgeft free_kb=7000000
edgeft disk_kb=1000
"""


def test_a_board_says_what_it_is_below_its_login_message():
    found = machine.read(PI)
    assert (found.arch, found.cores, found.disk) == ("arm64", 4, 1_024_000)
    assert found.processor == "Raspberry Pi 5 Model B Rev 1.0, Cortex-A76"
    assert best_isa(found) == "armv8.2-a+dotprod+fp16"
    with pytest.raises(SetupError, match="did not say what it is"):
        machine.read("bash: uname: command not found\n")


def test_a_board_whose_kernel_is_another_processors_is_emulated():
    for line in ("edgeft kernel=x86_64", "edgeft model=AMD EPYC\nedgeft features=fpu sse avx2"):
        found = machine.read(f"edgeft machine=aarch64\n{line}\n")
        assert found.emulated and found.processor == "emulated aarch64" and not found.features
        assert machine.missing("armv8.2-a+dotprod+fp16", found) == []
    assert not machine.read(PI).emulated
    assert not machine.read("edgeft machine=x86_64\nedgeft kernel=x86_64\nedgeft features=fpu sse\n").emulated


def test_this_machine_answers_the_same_script():
    with here() as place:
        found = machine.read(place.shell(machine.LOOK))
    assert found.arch and found.features and found.memory and found.disk


def test_a_processor_that_lacks_the_targets_features_is_refused():
    pi4 = Machine(machine="aarch64", features=("asimd", "crc32", "fp"))
    assert machine.missing("armv8.2-a+dotprod+fp16", pi4) == ["asimddp", "asimdhp"]
    with pytest.raises(SetupError, match=r"lacks asimddp, asimdhp, which the program for armv8\.2-a"):
        machine.refuse(pi4, "armv8.2-a+dotprod+fp16", memory=0, disk=0)
    assert best_isa(pi4) == "armv8-a+crc"
    old = Machine(machine="x86_64", features=("popcnt", "sse4_2", "ssse3"))
    assert machine.missing("x86-64-v3", old) == ["avx2", "fma", "f16c", "bmi2", "movbe"]
    assert machine.missing("x86-64-v2", old) == [] and best_isa(old) == "x86-64-v2"


def test_too_little_disk_or_memory_is_refused_before_anything_is_sent():
    board = machine.read(PI)
    with pytest.raises(SetupError, match="500 MB are to be sent, and 1 MB are free"):
        machine.refuse(board, "armv8-a", memory=0, disk=500_000_000)
    with pytest.raises(SetupError, match="needs about 9,000 MB of memory, and 7,168 MB are free"):
        machine.refuse(board, "armv8-a", memory=9_000_000_000, disk=0)


@pytest.mark.parametrize(
    "url", ["board", "http://a@b", "ssh://", "ssh://-oProxyCommand=x", "ssh://a@b/path", "ssh://a@b:x", "ssh://a;b@c"]
)  # fmt: skip
def test_what_is_no_address_of_a_board_is_refused(url):
    with pytest.raises(SetupError, match="is no address of a board"):
        _parts(url)


def test_an_address_with_a_password_is_refused():
    assert _parts("ssh://pi@board:2222") == ("pi@board", 2222, "board")
    with pytest.raises(SetupError, match="holds no password"):
        _parts("ssh://pi:raspberry@board")


def test_speed_and_throttling_are_read_and_absent_ones_are_none():
    log = (
        "0.12.2 I llama_perf_context_print: prompt eval time =    2000.00 ms /  1024 tokens (x)\n"
        "0.12.2 I llama_perf_context_print:        eval time =       0.00 ms /     1 runs   (    0.00 ms per token, inf)\n"
    )
    assert step._speed(log, "prompt eval") == 512 and step._speed(log, "eval") is None
    assert step._throttled("0x0") == "not throttled" and step._throttled("") == ""
    assert step._throttled("0x50005") == "under-voltage, throttled"
    assert step._throttled("0x20000") == "frequency capped since it was switched on"


def test_the_report_marks_emulated_speed_and_keeps_the_newer_of_two_runs(tmp_path):
    one = {
        "file_sha256": "a", "variant": "q4_0", "where": "qemu", "emulated": True, "moved": {"domain": 1e-3}, "limit": {"domain": 8e-3},
        "machine": {"processor": "QEMU", "machine": "aarch64"}, "prompt": 1.0, "decode": None, "peak_scoring": None,
        "peak_decoding": None, "hottest_c": None, "throttled": "", "verdict": "PASS",
    }  # fmt: skip
    newer = {**one, "prompt": 2.0}
    assert record.merged([one], [newer]) == [newer]
    assert "QEMU (emulated: no promise) | +1.0e-03 (± 8.0e-03) | 2.0 | — |" in record.as_markdown([newer])[-2]
    assert record.as_markdown([]) == [] and record.known(tmp_path / "no.json") == []
