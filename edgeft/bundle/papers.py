"""What a bundle says for people: the README for whoever stands at the board, the notices, the data card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeft.bundle.archive import Content

_NOTICES = ("notice", "licence", "license", "copying")
_LARGEST_PAPER = 4_000_000
_ABOUT_ADAPTER = (
    "  adapter.gguf    what was trained; it fits this model.gguf alone. llama.cpp does not check that, and answers",
    "                  with nonsense over another base: copy both files together.",
)


def notices(folder: Path, under: str) -> dict[str, Content]:
    """Licence and notice files that lie in a result (one level deep), under their place in the bundle."""
    return {f"{under}/{p.name}": p for p in _papers(folder) if p.name.lower().startswith(_NOTICES)}


def data_card(folder: Path) -> dict[str, Content]:
    """The data card of a data result: every `card.*` or `data_card.*` in it."""
    found = [
        p for p in _papers(folder) if p.stem.lower().replace("-", "_") in ("card", "data_card", "datacard")
    ]
    return {f"data-card{p.suffix}": p for p in found}


def notice(base: Mapping[str, str], data: Mapping[str, str]) -> bytes:
    """NOTICE.txt: what the model was made from, and under which licences."""

    def part(title: str, facts: Mapping[str, str], folder: str) -> list[str]:
        licence = facts.get("licence") or "not stated by its files; ask whoever gave it to you"
        return [
            f"{title}: {facts.get('source') or 'see manifest.json'}", f"Licence: {licence}",
            f"Texts, where the source carried any: notices/{folder}/", "",
        ]  # fmt: skip

    text = ["This model was made by fine-tuning. It is a work derived from:", ""]
    text += part("Base model", base, "base") + part("Training data", data, "data")
    return "\n".join(text).encode()


def readme(
    *, name: str, board: str, llama_cpp: str, port: int, host: str, system: str, numbers: Mapping[str, str],
    adapter: bool = False,
) -> bytes:  # fmt: skip
    """README.txt for the person at the board; `adapter`: the model is two files, base and adapter."""
    message = f'{{"role": "system", "content": "{_json(system)}"}}, ' if system else ""
    lines = [
        f"{name}: a fine-tuned language model for {board}",
        "",
        "START",
        "  ./run.sh                   serves the OpenAI API and, where the server has one, a chat page",
        f"  address                    http://{host}:{port}",
        "  ./run.sh --port 9000       any option of llama-server may follow",
        "  ./run.sh --host 0.0.0.0 --api-key SECRET     opens it to the network; never without a key",
        "",
        f"It needs llama-server of llama.cpp {llama_cpp}",
        "beside run.sh, on PATH, or named by LLAMA_SERVER. An older one may not know the model or the options.",
        "Compile it for this processor: a program for a newer one stops with 'Illegal instruction'.",
        "",
        "ASK",
        f"  curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f'    -d \'{{"messages": [{message}{{"role": "user", "content": "your question"}}]}}\'',
        "",
        "WHAT TO EXPECT (predicted from the board's published figures, not measured on yours)",
        *(f"  {key}: {value}" for key, value in numbers.items()),
        "",
        "WHAT IS HERE",
        "  model.gguf      the model                 settings.json   what run.sh tells the server",
        "  Modelfile       for Ollama; read its head  manifest.json   sha256 and origin of every file",
        "  NOTICE.txt      base, data, licences       data-card.*     what it was trained on",
        *(_ABOUT_ADAPTER if adapter else ()),
        "",
        "CHECK",
        "  edgeft's verify_bundle checks the packed file; unpacked, compare sha256sum with manifest.json.",
        "",
    ]
    return "\n".join(lines).encode()


def _papers(folder: Path) -> list[Path]:
    found = [p for pattern in ("*", "*/*") for p in folder.glob(pattern)]
    return sorted(p for p in found if p.is_file() and p.stat().st_size <= _LARGEST_PAPER)


def _json(text: str) -> str:
    """Inside a JSON string that stands between single quotes in a shell."""
    import json

    return json.dumps(text)[1:-1].replace("'", "'\\''")
