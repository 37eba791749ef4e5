from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from edgeft.llamacpp import pin, runtime, source
from edgeft.llamacpp.threads import allowed_cpus, default_threads
from tests.llamacpp.conftest import ROOT


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_gguf_and_llama_cpp_are_the_pinned_ones(library):
    assert runtime.gguf().__file__.startswith(str(source.python_path()))
    assert runtime.native().__file__.startswith(str(source.python_path()))
    assert runtime.native().__version__ == pin.load().version
    assert hasattr(runtime.native(), "Llama")


@pytest.mark.parametrize("first", ["gguf", "llama_cpp"])
def test_another_copy_that_was_imported_before_is_refused(library, tmp_path, first):
    (tmp_path / first).mkdir()
    (tmp_path / first / "__init__.py").write_text("")
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"import {first}\n"
        "from edgeft.errors import SetupError\nfrom edgeft.llamacpp import activate\n"
        "try: activate()\nexcept SetupError as error: print(error, '|', error.hint)"
    )
    assert f"{first} was imported from {tmp_path}" in done.stdout, done.stderr
    assert "activate()" in done.stdout


def test_activating_first_makes_every_later_import_the_pinned_one(library, tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "__init__.py").write_text("")
    done = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from edgeft.llamacpp import activate\nactivate(); activate()\n"
        "import gguf\nprint(gguf.__file__, sys.path.count(sys.path[0]))"
    )
    assert done.stdout.split() == [str(source.python_path() / "gguf" / "__init__.py"), "1"], done.stderr


def test_importing_the_package_imports_nothing_heavy():
    done = python(
        "import sys, edgeft.llamacpp\n"
        "print(sorted({'numpy', 'gguf', 'llama_cpp', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_what_the_library_says_goes_to_the_log_and_to_listeners(library, tmp_path, caplog):
    bindings = runtime.native()
    caplog.set_level(logging.DEBUG, logger="edgeft.llamacpp")
    with runtime.listening() as said:
        assert not bindings.llama_model_load_from_file(
            b"/no/such/file", bindings.llama_model_default_params()
        )
    assert "/no/such/file" in "".join(said)
    assert "/no/such/file" in caplog.text
    assert runtime.complaint(said)


def test_there_is_never_a_thread_more_than_a_core():
    assert 1 <= default_threads() <= allowed_cpus()
