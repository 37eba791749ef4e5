"""A bundle is the same bytes twice, says where everything came from, starts the server, and betrays tampering."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeft.bundle import Settings, modelfile, run_script, server_arguments, verify_bundle, write_bundle
from edgeft.bundle.papers import notices, readme
from edgeft.errors import DataError, FitError, RecipeError
from edgeft.llamacpp import adapter as lora
from edgeft.llamacpp import header
from edgeft.recipe import load
from edgeft.resources import folder
from edgeft.stage import Artifact, Job, Step
from edgeft.stages import base, device, export_bundle, gate, quantize_gguf, serve
from tests.conftest import ensure
from tests.fit.models import LLAMA_8B, SMOLLM2, config_file, tiny_gguf
from tests.parity_checks import sample

zstandard = pytest.importorskip("zstandard")

SETTINGS = Settings(
    name="tiny", context=512, parallel=2, kv_type="q8_0", threads=4, gpu=False, mmap=False, prompt_cache_mb=0,
    temperature=0.2, top_k=40, top_p=0.9, min_p=0.05, repeat_penalty=1.1, system="It's a \"test\".\nBe brief: $HOME.",
    host="127.0.0.1", port=8080,
)  # fmt: skip


def target(name):
    return next(
        p for s, p in load(folder("targets") / f"{name}.toml", per_target=True).rows if s is device.STAGE
    )


@pytest.fixture
def job(tmp_path):
    """A finished build of a tiny model, as the bundle's stage gets it."""
    return make_job(tmp_path)


def make_job(tmp_path):
    where = {
        name: tmp_path / "store with spaces ü" / name for name in ("base", "data", "gguf", "gate", "empty")
    }
    for path in where.values():
        path.mkdir(parents=True)
    tiny_gguf(where["gguf"] / "model.gguf")
    (where["base"] / "model").mkdir()
    (where["base"] / "model" / "LICENSE").write_text("Apache License")
    (where["data"] / "NOTICE.txt").write_text("WordNet 3.0 Copyright")
    source = {
        "name": "medical.jsonl",
        "sha256": "cd" * 32,
        "licence": "Princeton WordNet 3.0",
        "revision": "",
        "read": 9,
    }
    (where["data"] / "card.json").write_text(json.dumps({"sources": [source]}))
    (where["data"] / "card.md").write_text("# Data\n500 questions\n")
    document = json.dumps(sample.bare("Q8_0").as_json())
    (where["gate"] / "certificate.json").write_text(document)
    serve_params = serve.Serve(context=512, system="Answer briefly.")

    def made(stage, path, facts):
        return Artifact(stage, stage.name[:4] * 4, where[path], facts)

    inputs = {
        "device": made(device.STAGE, "empty", target("pi-4-4gb").model_dump(mode="json")),
        "serve": made(serve.STAGE, "empty", serve_params.model_dump(mode="json")),
        "base": made(
            base.STAGE,
            "base",
            {"source": "pkg 1.0: x.gguf (sha256 00)", "licence": "apache-2.0", "fetch_seconds": 3.1},
        ),
        "data": made(SimpleNamespace(name="data"), "data", {"source": "medical.jsonl", "sha256": "ab" * 32}),
        "quantize/gguf": made(quantize_gguf.STAGE, "gguf", {"type": "Q8_0", "bytes": 1}),
        "gate": made(gate.STAGE, "gate", {"tier": "parity"}),
    }

    def make(name):
        (tmp_path / name).mkdir()
        return Job(export_bundle.Bundle(), inputs, tmp_path / name)

    return make


def unpacked(path: Path, into: Path) -> Path:
    with (
        path.open("rb") as raw,
        tarfile.open(fileobj=zstandard.ZstdDecompressor().stream_reader(raw), mode="r|") as tar,
    ):
        # Debian 12's Python 3.11.2 has no filter yet; these are our own bundles.
        tar.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return into


def repacked(path: Path, change) -> None:
    """Pack the bundle again after `change(members)`, with a valid zstd around it."""
    with (
        path.open("rb") as raw,
        tarfile.open(fileobj=zstandard.ZstdDecompressor().stream_reader(raw), mode="r|") as tar,
    ):
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(zstandard.ZstdCompressor().compress(out.getvalue()))


def test_two_bundles_of_one_build_are_byte_identical(job, tmp_path):
    first, second = job("one"), job("two")
    facts, again = export_bundle.run(first), export_bundle.run(second)
    assert (first.out / "bundle.tar.zst").read_bytes() == (second.out / "bundle.tar.zst").read_bytes()
    assert (first.out / "manifest.json").read_bytes() == (second.out / "manifest.json").read_bytes()
    assert facts == again
    assert facts["file"] == "bundle.tar.zst"
    assert not [p for p in first.out.iterdir() if p.name.startswith(".")]


def test_the_manifest_says_what_everything_is_and_where_it_came_from(job):
    done = job("one")
    export_bundle.run(done)
    manifest = verify_bundle(done.out / "bundle.tar.zst")
    assert manifest == json.loads((done.out / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        "model.gguf", "settings.json", "run.sh", "Modelfile", "README.txt", "NOTICE.txt", "data-card.md", "data-card.json",
        "notices/base/LICENSE", "notices/data/NOTICE.txt", "certificate.html", "certificate.json",
    }  # fmt: skip
    assert manifest["sources"]["base"]["source"].startswith("pkg 1.0")
    assert "fetch_seconds" not in manifest["sources"]["base"]
    assert manifest["sources"]["data"]["sha256"] == "ab" * 32
    assert manifest["data_files"] == [
        {"name": "medical.jsonl", "sha256": "cd" * 32, "revision": "", "licence": "Princeton WordNet 3.0"}
    ]
    assert manifest["sources"]["gate"]["tier"] == "parity"
    assert len(manifest["made_with"]["llama.cpp"]["commit"]) == 40
    assert manifest["target"]["name"] == "pi-4-4gb"
    assert "(predicted)" in manifest["predicted"]["answering"]


def test_what_is_unpacked_is_what_was_packed(job, tmp_path):
    done = job("one")
    export_bundle.run(done)
    there = unpacked(done.out / "bundle.tar.zst", tmp_path / "board")
    assert (there / "model.gguf").read_bytes() == (
        done.inputs["quantize/gguf"].path / "model.gguf"
    ).read_bytes()
    assert (there / "run.sh").stat().st_mode & 0o111
    assert not (there / "model.gguf").stat().st_mode & 0o111
    assert json.loads((there / "settings.json").read_text())["system"] == "Answer briefly."
    document = json.loads((there / "certificate.json").read_text())
    assert document["target"]["name"] == "pi-4-4gb" and document["files"][0]["memory_mb"] > 0
    assert document["files"][0]["sha256"] in (there / "certificate.html").read_text()
    assert 'PARAMETER stop "<|im_end|>"' in (there / "Modelfile").read_text()
    assert "apache-2.0" in (there / "NOTICE.txt").read_text()
    assert "not stated" in (there / "NOTICE.txt").read_text()  # the data of this build states no licence


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> bytes:
    """One bundle's bytes, to be tampered with."""
    folder = tmp_path_factory.mktemp("packed")
    done = make_job(folder)("one")
    export_bundle.run(done)
    return (done.out / "bundle.tar.zst").read_bytes()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda m: [(n, c.replace(b"--parallel", b"--evilopts") if n == "run.sh" else c) for n, c in m],
            r"run\.sh .*is damaged",
        ),
        (lambda m: [x for x in m if x[0] != "NOTICE.txt"], r"lacks NOTICE\.txt"),
        (lambda m: [*m, ("extra.sh", b"rm")], r"holds extra\.sh, which its manifest does not list"),
        (lambda m: [*m, ("../../etc/passwd", b"x")], "no plain file inside the bundle"),
        (lambda m: [*m, ("run.sh", b"second")], r"holds run\.sh twice"),
        (lambda m: [x for x in m if x[0] != "manifest.json"], r"has no manifest\.json"),
        (lambda m: [(n, b"{" if n == "manifest.json" else c) for n, c in m], "is not JSON"),
    ],
)
def test_a_tampered_bundle_is_detected(packed, tmp_path, change, sentence):
    path = tmp_path / "bundle.tar.zst"
    path.write_bytes(packed)
    repacked(path, change)
    with pytest.raises(DataError, match=sentence):
        verify_bundle(path)


def test_a_flipped_bit_and_a_cut_file_are_detected(packed, tmp_path):
    path, whole = tmp_path / "bundle.tar.zst", packed
    path.write_bytes(whole)
    verify_bundle(path)
    for position in (40, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        with pytest.raises(DataError):
            verify_bundle(path)
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError):
            verify_bundle(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(DataError, match="something follows its end"):
        verify_bundle(path)


def test_a_bundle_that_could_not_be_finished_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bundle(tmp_path / "b.tar.zst", {"a": b"1", "b": tmp_path / "missing"}, {})
    assert list(tmp_path.iterdir()) == []


def test_run_sh_hands_every_setting_to_the_server_as_it_is(tmp_path):
    folder = tmp_path / "a folder with ü and 'quotes'"
    folder.mkdir()
    (folder / "run.sh").write_bytes(run_script(SETTINGS, llama_cpp="0123abcd"))
    shows = folder / "llama-server"
    shows.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    shows.chmod(0o755)
    said = subprocess.run(
        ["sh", str(folder / "run.sh"), "--port", "9000"], capture_output=True, text=True, check=True
    )
    heard = said.stdout.split("\0")[:-1]
    assert heard == ["--model", str(folder / "model.gguf"), *server_arguments(SETTINGS), "--port", "9000"]
    assert json.loads(heard[heard.index("--ui-config") + 1]) == {"systemMessage": SETTINGS.system}
    assert heard[heard.index("--ctx-size") + 1] == "1024"


def test_run_sh_says_when_there_is_no_server(tmp_path):
    (tmp_path / "run.sh").write_bytes(run_script(SETTINGS, llama_cpp="0123abcd"))
    sh = shutil.which("sh")
    env = {"PATH": str(tmp_path / "nothing"), "LLAMA_SERVER": ""}
    dirname = tmp_path / "nothing" / "dirname"
    dirname.parent.mkdir()
    dirname.symlink_to(shutil.which("dirname"))
    said = subprocess.run(
        [sh, str(tmp_path / "run.sh")], check=False, capture_output=True, text=True, env=env
    )
    assert said.returncode == 127
    assert "llama-server was found neither beside this script nor on PATH" in said.stderr


def test_every_option_is_one_the_pinned_llama_server_knows():
    from edgeft.llamacpp import source

    known = (source.llama_cpp_tree() / "common" / "arg.cpp").read_text()
    for option in server_arguments(replace(SETTINGS, gpu=True)):
        if option.startswith("--"):
            assert f'"{option}"' in known, option


@pytest.mark.slow
def test_the_pinned_server_starts_from_the_bundle_with_its_settings(tmp_path):

    server = ensure("server") / "llama-server"
    (tmp_path / "run.sh").write_bytes(run_script(SETTINGS, llama_cpp="0123abcd"))
    env = {"LLAMA_SERVER": str(server), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        ["sh", str(tmp_path / "run.sh")], check=False, capture_output=True, text=True, env=env, timeout=120
    )  # there is no model.gguf: it must get as far as missing that, past every option
    assert "model.gguf" in said.stdout + said.stderr
    assert "invalid argument" not in said.stdout + said.stderr


def test_the_modelfile_keeps_quotes_and_claims_no_template():
    text = modelfile(SETTINGS, ["<|im_end|>", "</s>", "</s>"]).decode()
    assert text.count("PARAMETER stop") == 2
    assert f'SYSTEM """{SETTINGS.system}"""' in text
    assert not any(line.startswith("TEMPLATE") for line in text.splitlines())
    assert "PARAMETER num_ctx 512" in text


def test_the_readmes_question_can_be_pasted_into_a_shell(tmp_path):
    text = readme(
        name="tiny",
        board="pi",
        llama_cpp="0123",
        port=8080,
        host="127.0.0.1",
        system=SETTINGS.system,
        numbers={},
    ).decode()
    start = text.index("  curl ")
    command = text[start : text.index("\n\n", start)].replace("curl", 'printf "%s\\n"')
    said = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert json.loads(said[-1])["messages"][0] == {"role": "system", "content": SETTINGS.system}


def test_weights_are_never_taken_for_notices(tmp_path):
    (tmp_path / "NOTICE").write_bytes(b"x" * 5_000_000)
    (tmp_path / "LICENSE.txt").write_text("MIT")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    assert notices(tmp_path, "notices/base") == {"notices/base/LICENSE.txt": tmp_path / "LICENSE.txt"}


def step(folder: Path, *, type: str, target_name: str, **settings) -> Step:
    """The bundle's step of a plan, far enough up to be checked."""
    steps = {
        "base": Step(base.STAGE, base.Base.model_construct(path=folder)),
        "quantize/gguf": Step(quantize_gguf.STAGE, quantize_gguf.QuantizeGguf(type=type)),
        "serve": Step(serve.STAGE, serve.Serve(**settings)),
        "device": Step(device.STAGE, target(target_name)),
    }
    return Step(export_bundle.STAGE, export_bundle.Bundle(), inputs=steps)


def test_a_model_too_large_for_its_target_is_refused_with_the_largest_that_would_fit(tmp_path):
    folder = config_file(tmp_path / "8b", LLAMA_8B)
    with pytest.raises(
        FitError, match=r"Q8_0 with a context of 8192 \(KV f16\) needs 9\.8 GB.*pi-4-4gb leaves 3\.4 GB"
    ) as e:
        export_bundle.check(step(folder, type="Q8_0", target_name="pi-4-4gb", context=8192), {})
    assert e.value.exit_code == 9
    assert "take a smaller base or a larger target" in e.value.hint
    export_bundle.check(step(folder, type="Q4_K_M", target_name="pi-5-16gb", context=8192), {})


def test_a_context_longer_than_the_model_was_trained_for_is_refused(tmp_path):
    folder = config_file(tmp_path / "small", SMOLLM2)
    with pytest.raises(RecipeError, match="16384 tokens, but the base was trained for 8192"):
        export_bundle.check(step(folder, type="Q8_0", target_name="pi-4-4gb", context=16384), {})
    export_bundle.check(step(folder, type="Q8_0", target_name="pi-4-4gb", context=8192), {})


def test_nothing_is_said_about_a_base_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    unknown = step(tmp_path / "no", type="Q8_0", target_name="pi-4-4gb", context=8192)
    hub = Step(base.STAGE, base.Base(repo="org/name", revision="a" * 40))
    unknown.inputs["base"] = hub
    export_bundle.check(unknown, {})
    folder = tmp_path / "artifact"
    config_file(folder / "model", LLAMA_8B)
    with pytest.raises(FitError):
        export_bundle.check(unknown, {hub.key: Artifact(base.STAGE, hub.key, folder, {})})


ADAPTER = {
    "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0,
}  # fmt: skip


def two_files(folder, change=b""):
    """A base, and an adapter that says it is for the base before `change` was appended to its weights."""
    folder.mkdir(exist_ok=True)
    base, adapter = folder / "model.gguf", folder / "adapter.gguf"
    header.write(base, {"general.architecture": "llama"}, {"output_norm.weight": ((2,), bytes(8))})
    keys = {**ADAPTER, lora.BASE_KEY: lora.base_hash(base)}
    header.write(adapter, keys, {"x.lora_a": ((2, 1), bytes(8)), "x.lora_b": ((1, 2), bytes(8))})
    if change:
        header.write(base, {"general.architecture": "llama"}, {"output_norm.weight": ((2,), change)})
    return {"model.gguf": base, "adapter.gguf": adapter}


def test_a_bundle_of_two_files_says_which_weights_belong_together(tmp_path):
    files = two_files(tmp_path)
    manifest = write_bundle(tmp_path / "b.tar.zst", files, {"format": 1})
    assert verify_bundle(tmp_path / "b.tar.zst") == manifest
    assert set(manifest["files"]) == {"model.gguf", "adapter.gguf"}
    hashed = lora.base_hash(files["model.gguf"])
    assert manifest["adapter"] == {"base_tensors_sha256": hashed, "tensor_bytes": 16}
    assert "adapter" not in write_bundle(tmp_path / "c.tar.zst", {"model.gguf": files["model.gguf"]}, {})


def test_an_adapter_of_another_base_is_not_packed(tmp_path):
    with pytest.raises(DataError, match="was trained on other weights"):
        write_bundle(tmp_path / "b.tar.zst", two_files(tmp_path, change=b"12345678"), {})
    files = two_files(tmp_path)
    with pytest.raises(DataError, match=r"needs both files on the disk, it and its base model\.gguf"):
        write_bundle(tmp_path / "b.tar.zst", {"adapter.gguf": files["adapter.gguf"]}, {})
    assert not (tmp_path / "b.tar.zst").exists()


def test_the_adapter_is_started_with_its_base(tmp_path):
    script = run_script(SETTINGS, llama_cpp="abc", adapter=True)
    (tmp_path / "run.sh").write_bytes(script)
    echo = tmp_path / "llama-server"
    echo.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done\n')
    echo.chmod(0o755)
    said = subprocess.run(
        ["sh", tmp_path / "run.sh"], env={"PATH": "/usr/bin:/bin"}, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    assert said[:4] == ["--model", f"{tmp_path}/model.gguf", "--lora", f"{tmp_path}/adapter.gguf"]
    assert b"--lora" not in run_script(SETTINGS, llama_cpp="abc")
    ollama = modelfile(SETTINGS, [], adapter=True).decode().splitlines()
    assert ollama.index("ADAPTER ./adapter.gguf") == ollama.index("FROM ./model.gguf") + 1
    assert b"ADAPTER" not in modelfile(SETTINGS, [])
    told = {"name": "x", "board": "y", "llama_cpp": "z", "port": 1, "host": "h", "system": "", "numbers": {}}
    assert b"adapter.gguf" in readme(**told, adapter=True) and b"adapter.gguf" not in readme(**told)
