"""Pack the model and all it needs into one file for a board; refuse, before training, what cannot fit there."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

import edgeft
from edgeft import bundle, estimates
from edgeft.bundle import papers
from edgeft.bundle.launch import slug
from edgeft.errors import FitError, RecipeError
from edgeft.fit import memory, speed
from edgeft.fit.board import Board
from edgeft.fit.memory import Serving
from edgeft.fit.shape import ModelShape, from_gguf
from edgeft.llamacpp import header as gguf_header
from edgeft.llamacpp.adapter import adapter_beside, tensor_bytes
from edgeft.stage import Artifact, Facts, Job, Params, Stage, Step, digest

FILE = "bundle.tar.zst"


class Bundle(Params):
    level: int = Field(3, ge=1, le=19)
    """zstd's level. Quantized weights hardly compress at any."""


def run(job: Job[Bundle]) -> Facts:
    inputs = job.inputs
    gguf = inputs["quantize/gguf"].path / "model.gguf"
    device, serve, label = (
        inputs["device"].facts,
        inputs["serve"].facts,
        inputs["quantize/gguf"].facts["type"],
    )
    header = gguf_header.read(gguf, arrays=("tokenizer.ggml.tokens",))
    settings = _settings(device, serve, str(header.keys.get("general.name", "")))
    adapter = adapter_beside(gguf)
    need, rate = predicted(gguf, label, device, serve)
    pin = _llama_cpp()
    base, data = inputs["base"], inputs["data"]
    contents: dict[str, bundle.Content] = {
        "model.gguf": gguf,
        **({"adapter.gguf": adapter} if adapter else {}),
        "settings.json": settings.as_json(),
        "run.sh": bundle.run_script(settings, llama_cpp=pin["commit"], adapter=bool(adapter)),
        "Modelfile": bundle.modelfile(settings, _stop(header.keys), adapter=bool(adapter)),
        **_certificate(inputs["gate"], device, need["total"]),
        "NOTICE.txt": papers.notice(base.facts, data.facts),
        **papers.data_card(data.path),
        **papers.notices(base.path, "notices/base"),
        **papers.notices(data.path, "notices/data"),
    }
    contents["README.txt"] = papers.readme(
        name=settings.name, board=device["name"], llama_cpp=pin["commit"], port=settings.port, host=settings.host,
        system=settings.system, adapter=bool(adapter),
        numbers={"memory": f"{need['total']:,.0f} MB", "answering": rate, "context": f"{settings.context} tokens"},
    )  # fmt: skip
    about = {
        "format": 1, "name": settings.name, "target": device, "type": label,
        "predicted": {"memory_mb": need, "answering": rate},
        "made_with": {"edgeft": edgeft.__version__, "llama.cpp": pin,
                      "zstandard": importlib.metadata.version("zstandard"), **_versions(inputs["quantize/gguf"].path)},
        "sources": {name: {"key": a.key, **_stable(a.facts)} for name, a in sorted(inputs.items())},
        "data_files": _data_files(data.path),
    }  # fmt: skip
    manifest = bundle.write_bundle(job.out / FILE, contents, about, level=job.params.level)
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (job.out / "manifest.json").write_text(text, encoding="utf-8")
    size = (job.out / FILE).stat().st_size
    return {
        "summary": f"{size / 1e6:,.1f} MB for {device['name']}; predicted there: {need['total']:,.0f} MB, {rate}",
        "file": FILE, "bytes": size, "sha256": digest(job.out / FILE), "name": settings.name,
        "memory_mb": need, "answering": rate, "files": sorted(contents),
    }  # fmt: skip


def check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse a context the model was not trained for (RecipeError) and a model the board cannot hold (FitError).

    Says nothing as long as nothing of the base is on this machine.
    """
    known = _known(step, artifacts)
    if known is None:
        return
    shape, label, serving, board = known
    if shape.context_length and serving.context > shape.context_length:
        raise RecipeError(
            f"serve.context: {serving.context} tokens, but the base was trained for {shape.context_length}",
            hint=f"set [serve] context = {shape.context_length} or less",
        )
    fit = memory.fits(shape, label, serving, board, adapter_mb=estimates.adapter_gguf_mb(step, artifacts))
    if not fit.fits:
        message, hint = memory.refusal(shape, fit)
        raise FitError(message, hint=hint)


def _known(step: Step, artifacts: Mapping[str, Artifact]) -> tuple[ModelShape, str, Serving, Board] | None:
    found: list[Any] = [step.find(name) for name in ("quantize/gguf", "serve", "device")]
    shape = estimates.shape_for(step, artifacts)
    if shape is None or None in found:
        return None
    quantize, serve, device = found
    return shape, quantize.params.type, serve.params.serving(), device.params.board()


def _certificate(gate: Artifact, device: Facts, memory_mb: float) -> dict[str, bundle.Content]:
    """The gate's certificate for this target, as page and as data."""
    from edgeft.parity import certificate, collected, page

    found = certificate.load(json.loads((gate.path / "certificate.json").read_text(encoding="utf-8")))
    files = [replace(file, memory_mb=memory_mb) for file in found.files]
    found = collected.aimed(replace(found, files=files), target(device))
    text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
    return {"certificate.json": text.encode(), "certificate.html": page.render(found).encode()}


def target(device: Facts) -> Facts:
    """What the certificate says of a device: its name, its kind, and what it leaves for a model, in MB."""
    board = Board(**{key: device[key] for key in Board.__dataclass_fields__})
    return {"name": board.name, "arch": device["arch"], "memory_mb": board.available_mb}


def _settings(device: Facts, serve: Facts, name: str) -> bundle.Settings:
    wanted = set(bundle.Settings.__dataclass_fields__)
    given = {key: value for key, value in serve.items() if key in wanted}
    return bundle.Settings(
        **given, name=slug(name), threads=device["threads"], gpu=bool(device["gpu"] or device["vram_mb"])
    )


def predicted(gguf: Path, label: str, device: Facts, serve: Facts) -> tuple[dict[str, float], str]:
    """Memory in MB, by part and in total, and the decoding speed in words, of a file on a device, with the adapter that
    lies beside it."""
    shape = from_gguf(gguf)
    board = Board(**{key: device[key] for key in Board.__dataclass_fields__})
    serving = Serving(**{key: serve[key] for key in Serving.__dataclass_fields__})
    beside = adapter_beside(gguf)
    need = memory.predict(
        shape, label, serving, board, adapter_mb=tensor_bytes(beside) / 1e6 if beside else 0.0
    )
    parts = {key: round(getattr(need, key), 1) for key in memory.Need.__dataclass_fields__}
    rate = speed.decode(shape, label, board, used=serving.context // 4, kv_type=serving.kv_type)
    return {**parts, "total": round(need.total, 1)}, str(rate)


def _stop(metadata: Mapping[str, Any]) -> list[str]:
    """The texts that end an answer, as the file's own vocabulary spells them."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return [tokens[i] for i in ids if isinstance(i, int) and i < len(tokens)]


def _llama_cpp() -> dict[str, str]:
    from edgeft.llamacpp import pin

    found = pin.load()
    return {
        "package": found.package,
        "version": found.version,
        "commit": found.commit,
        "sha256": found.sha256,
    }


def _versions(folder: Path) -> dict[str, str]:
    """The versions that the store wrote down when the model was quantized, if it did."""
    try:
        versions = json.loads((folder / "edgeft.json").read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(versions)


def _data_files(folder: Path) -> list[dict[str, str]]:
    """Name, sha256 and licence of every source, as the data card has them; empty without a card."""
    try:
        sources = json.loads((folder / "card.json").read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        {key: str(s.get(key) or "") for key in ("name", "sha256", "revision", "licence")} for s in sources
    ]


def _stable(facts: Facts) -> Facts:
    """Facts without what differs between two builds of the same thing: times and places."""
    return {
        key: value
        for key, value in facts.items()
        if not key.endswith(("seconds", "_s", "finished", "path"))
        and not (isinstance(value, str) and value.startswith("/"))
    }


STAGE = Stage(
    name="export", kind="bundle", params=Bundle, run=run, per_target=True, extra="train",
    needs=("device", "serve", "base", "data", "quantize/gguf", "gate"), makes=(FILE, "manifest.json"),
    check=check, estimate=estimates.bundle, version=2,
)  # fmt: skip
