from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile

import pytest

from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp import pin, source


def archive(path):
    """A source package with as much in it as unpacking looks at."""
    with tarfile.open(path, "w:gz") as tar:
        for name in (
            "llama_cpp/__init__.py",
            "vendor/llama.cpp/gguf-py/gguf/__init__.py",
            "tests/__init__.py",
        ):
            info = tarfile.TarInfo(f"llama_cpp_python-0.3.36/{name}")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"x=1\n"))
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path / "ein Cache"))
    return tmp_path


def test_the_pin_names_one_source_and_every_flag_enters_its_id():
    found = pin.load()
    assert len(found.sha256) == 64
    assert len(found.commit) == 40
    assert found.id.startswith(f"{found.version}-{found.commit[:9]}-")
    changed = dataclasses.replace(found, cmake={**found.cmake, "GGML_NATIVE": "OFF"})
    assert changed.id != found.id
    assert dataclasses.replace(found, optimize_ggml="-O2").id != found.id
    assert dataclasses.replace(found, commit="f" * 40).id != found.id


def test_an_archive_that_is_not_the_pinned_one_is_refused_with_both_hashes(empty_cache, monkeypatch):
    wrong = archive(empty_cache / "llama_cpp_python-0.3.36.tar.gz")
    monkeypatch.setenv(source.SDIST, str(wrong))
    with pytest.raises(ToolError) as caught:
        source.source()
    assert sha256(wrong) in str(caught.value)
    assert pin.load().sha256 in str(caught.value)
    assert not (source.home() / "source").exists()
    assert not (source.home() / "source.part").exists()


def test_the_right_archive_is_unpacked_whole_with_nothing_else_importable(empty_cache, monkeypatch):
    right = archive(empty_cache / "sdist.tar.gz")
    monkeypatch.setenv(source.SDIST, str(right))
    known = dataclasses.replace(pin.load(), sha256=sha256(right))
    monkeypatch.setattr(source, "load", lambda: known)
    folder = source.source()
    assert sorted(p.name for p in source.python_path().iterdir()) == ["gguf", "llama_cpp"]
    assert (source.python_path() / "gguf" / "__init__.py").read_text() == "x=1\n"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["lock", "source"]


def test_a_named_archive_that_is_absent_is_the_users_mistake(empty_cache, monkeypatch):
    monkeypatch.setenv(source.SDIST, str(empty_cache / "absent.tar.gz"))
    with pytest.raises(SetupError, match=r"names .*absent\.tar\.gz, which is not a file"):
        source.source()


def test_an_index_that_cannot_be_reached_is_a_setup_error_with_the_way_around(empty_cache, monkeypatch):
    monkeypatch.delenv(source.SDIST, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(SetupError, match="could not fetch llama-cpp-python") as caught:
        source.source()
    assert source.SDIST in caught.value.hint


def test_two_processes_do_not_prepare_at_the_same_time(empty_cache):
    """Each notes when it enters and leaves; the notes of one must not stand inside the other's."""
    notes = empty_cache / "notes"
    work = (
        "import sys, time\n"
        "from edgeft.llamacpp import source\n"
        "with source.locked():\n"
        "    open(sys.argv[1], 'a').write('in ')\n"
        "    time.sleep(0.3)\n"
        "    open(sys.argv[1], 'a').write('out ')\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", work, str(notes)]) for _ in range(2)]
    assert [process.wait(20) for process in both] == [0, 0]
    assert notes.read_text() == "in out in out "
