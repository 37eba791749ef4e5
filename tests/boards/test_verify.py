"""`edgeft verify` on a real build of a tiny model: certificate, report and exit code; a damaged file fails at the board."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeft.boards.place import EMULATOR, Here
from edgeft.commands import verifying
from edgeft.errors import DataError, EdgeftError, ParityError, SetupError
from tests.boards.conftest import edgeft

pytestmark = pytest.mark.slow

Q8_0 = "q8_0"


def document(project):
    return json.loads((project / ".edgeft/reports/tiny/certificate.json").read_text())


def verified(project):
    """The file that the tests look at: one of two."""
    return document(project)["files"][0]


def test_the_step_served_goes_into_certificate_and_report_and_a_next_build_keeps_it(project):
    done = edgeft("verify", "tiny.toml", "--variant", Q8_0, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    file = verified(project)
    assert [s["text"] for s in file["served"]] == ["domain", "general"] and file["steps"][-1][
        "step"
    ] == "served"
    assert all(abs(s["moved"]) < 1e-5 for s in file["served"])
    assert any("was run on this machine" in note for note in file["notes"])
    again = edgeft("build", "tiny.toml", cwd=project)
    assert again.returncode == 0 and "0 steps ran" in again.stdout
    assert verified(project)["served"] == file["served"]
    report = (project / ".edgeft/reports/tiny/report.md").read_text()
    assert "## On the device" in report and "| q8_0 | local: " in report


def test_a_file_with_a_zeroed_tensor_over_there_fails_at_served_with_exit_code_5(project, monkeypatch):
    from edgeft.llamacpp import header

    whole = Here.put

    def damaged(self, files):
        whole(self, files)
        for name, path in files.items():
            if path.name == "model.gguf":
                found = header.read(path)
                tensor = next(t for t in found.tensors if t.name == "token_embd.weight")
                content, start = bytearray(path.read_bytes()), found.data_offset + tensor.offset
                content[start : start + tensor.bytes] = bytes(tensor.bytes)
                (self.folder / name).unlink()
                (self.folder / name).write_bytes(content)

    monkeypatch.setattr(Here, "put", damaged)
    monkeypatch.chdir(project)
    with pytest.raises(ParityError, match=r"on the board the KL divergence moved by .* at fault is 'served'"):
        verifying.verify(Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="local", variant=Q8_0))
    assert document(project)["verdict"] == "FAIL"
    assert "| FAIL |" in (project / ".edgeft/reports/tiny/report.md").read_text()


def test_fewer_windows_are_held_against_the_same_windows_here(project, monkeypatch):
    monkeypatch.chdir(project)
    verifying.verify(Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="local", windows=4, variant=Q8_0))
    file = verified(project)
    assert [s["windows"] for s in file["served"]] == [4, 4] and all(
        abs(s["moved"]) < 1e-5 for s in file["served"]
    )
    assert any("scored the first 4 of 5 windows" in note for note in file["notes"])
    with pytest.raises(DataError, match="3 windows of 64 tokens are too few"):
        verifying.verify(
            Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="local", windows=3, variant=Q8_0)
        )


def test_places_that_are_none_and_files_that_are_not_made_are_refused(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SetupError, match="is no place"):
        verifying.verify(Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="cloud"))
    with pytest.raises(EdgeftError, match="makes no file 'q2_k'"):
        verifying.verify(Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="local", variant="q2_k"))


def test_under_emulation_the_boards_kernels_are_judged_and_its_speed_is_marked(project, monkeypatch):
    from edgeft import runtimes

    if not shutil.which(EMULATOR) or not runtimes.for_device("arm64", "armv8.2-a+dotprod+fp16").built():
        pytest.skip("needs qemu-user-static and the compiled runtime arm64-cortex-a76")
    monkeypatch.chdir(project)
    verifying.verify(Path("tiny.toml"), Path(".edgeft"), verifying.Asked(on="qemu", variant=Q8_0))
    file = verified(project)
    assert all("NEON" in s["kernels"] for s in file["served"])
    assert "(emulated: no promise)" in (project / ".edgeft/reports/tiny/report.md").read_text()
