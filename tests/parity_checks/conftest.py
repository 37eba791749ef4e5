from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_gguf(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint as an F32 file."""
    from edgeft.llamacpp import convert

    out = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert.to_gguf(tiny_checkpoint, out, outtype="f32")
    return out


@pytest.fixture
def planted(tiny_gguf, tmp_path):
    """A copy of the tiny file with some of its keys replaced."""
    from edgeft.llamacpp import header

    def plant(**keys) -> Path:
        path = tmp_path / f"planted-{len(list(tmp_path.iterdir()))}.gguf"
        shutil.copy(tiny_gguf, path)
        header.set_keys(path, keys)
        return path

    return plant


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copied")
