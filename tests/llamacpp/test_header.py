from __future__ import annotations

import ctypes
import hashlib

import pytest

from edgeft.errors import DataError
from edgeft.llamacpp import header, runtime


def data_of(path):
    return hashlib.sha256(path.read_bytes()[header.read(path).data_offset :]).hexdigest()


def test_the_table_of_types_is_the_pinned_librarys(library):
    ggml = runtime.ggml()
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    count = runtime.native().GGML_TYPE_COUNT
    known = {}
    for number in range(count):
        name = ggml.ggml_type_name(number)
        if name and ggml.ggml_blck_size(number):
            known[number] = (name.decode().upper(), ggml.ggml_blck_size(number), ggml.ggml_type_size(number))
    assert known == header.GGML_TYPES


def test_keys_tensors_and_data_are_found_where_gguf_py_finds_them(library, tmp_path):
    path = tmp_path / "many.gguf"
    words = [f"Wörter {i}" for i in range(1500)]  # longer than what is kept: walked over
    tensors = {"a.weight": ((3, 5), bytes(60)), "b.weight": ((2, 1, 4), bytes(32)), "c": ((7,), bytes(28))}
    header.write(
        path, {"general.architecture": "llama", "w": words, "n": list(range(100)), "z": True}, tensors
    )
    ours, theirs = header.read(path), runtime.gguf().GGUFReader(path)
    assert ours.data_offset == theirs.data_offset
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    assert [t.shape for t in ours.tensors] == [tuple(t.shape.tolist()) for t in theirs.tensors]
    assert [t.bytes for t in ours.tensors] == [int(t.n_bytes) for t in theirs.tensors]
    assert [ours.data_offset + t.offset for t in ours.tensors] == [int(t.data_offset) for t in theirs.tensors]
    assert set(ours.keys) == {name for name in theirs.fields if not name.startswith("GGUF.")}
    assert (ours.keys["general.architecture"], ours.keys["w"], ours.keys["z"]) == ("llama", None, True)
    assert theirs.fields["w"].contents() == words


def test_setting_keys_changes_the_keys_and_not_one_byte_of_data(library, tmp_path):
    path = tmp_path / "mit Leerzeichen.gguf"
    header.write(
        path, {"general.name": "was", "x.kept": [1, 2, 3]}, {"a.weight": ((2, 3), bytes(range(24))), "b": ((1,), b"1234")}
    )  # fmt: skip
    before = data_of(path)
    header.set_keys(path, {
        "general.license": "apache-2.0", "general.languages": ["en", "zh"], "general.name": "ein neuer Name ☃",
        "tokenizer.ggml.add_space_prefix": False, "x.number": 7, "x.part": 0.5,
    })  # fmt: skip
    assert data_of(path) == before
    assert list(tmp_path.iterdir()) == [path]
    reader = runtime.gguf().GGUFReader(path)
    assert {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} == {
        "general.license": "apache-2.0", "general.languages": ["en", "zh"], "general.name": "ein neuer Name ☃",
        "tokenizer.ggml.add_space_prefix": False, "x.number": 7, "x.part": 0.5, "x.kept": [1, 2, 3],
    }  # fmt: skip
    assert [bytes(t.data.view("uint8").ravel()) for t in reader.tensors] == [bytes(range(24)), b"1234"]


@pytest.mark.parametrize("keep", [4, 20, 4000, -100])
def test_a_file_that_is_cut_off_is_refused_by_name(tiny, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny(64).read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cut\.gguf is not a complete GGUF file"):
        header.read(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "zip.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(DataError, match="it starts with b'PK"):
        header.read(path)
