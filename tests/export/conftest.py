"""A finished build of a tiny model, with a shell script in llama-server's place that says how it was called."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgeft import staging
from edgeft.stage import Job
from tests.test_bundle import make_job

SERVER = b'#!/bin/sh\nprintf "%s\\n" "$@"\n'


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """`job("name", params, serve={...})`: the same build again, under another name; a script is the target's runtime."""
    folder = tmp_path_factory.mktemp("builds")
    (folder / "llama-server").write_bytes(SERVER)
    runtime = SimpleNamespace(
        name="arm64-cortex-a72",
        arch="arm64",
        isa="armv8-a+crc",
        pin="0123",
        ensure=lambda: folder,
        find=lambda: "",
        debian=lambda: (),
        kind="cpu",
    )
    make = make_job(folder)

    def of(name, params, **serve):
        made = make(name)
        facts = {**made.inputs["serve"].facts, **serve}
        return Job(params, {**made.inputs, "serve": replace(made.inputs["serve"], facts=facts)}, made.out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "runtime", lambda device: runtime)
        yield of
