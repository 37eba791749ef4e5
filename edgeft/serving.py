"""What the exporter for servers packs: a model folder that is no GGUF file, with its settings, papers and certificate.

`staging.py` does the same for GGUF files. Also the question asked before the training: whether the target can hold it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgeft
from edgeft import bundle, estimates, staging
from edgeft.bundle import papers
from edgeft.bundle.launch import slug
from edgeft.errors import FitError, RecipeError, StageError
from edgeft.fit import served
from edgeft.fit.board import Board
from edgeft.fit.served import ServedNeed
from edgeft.fit.shape import ModelShape, read_config
from edgeft.servers.launch import BATCH, Launch, cache_tokens, with_sampling
from edgeft.stage import Artifact, Facts, Step

NEEDS = ("device", "serve", "base", "data", "quantize/served", "gate/served")
"""The steps whose results are packed."""
FOLDER = "model"
GENERATION = f"{FOLDER}/generation_config.json"


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A finished model folder for one target."""

    launch: Launch
    system: str
    device: Facts
    format: str
    """`awq` or `onnx`."""
    provider: str
    """Of ONNX: what computes it, `cpu`, `cuda` or `dml`."""
    type: str
    model: dict[str, bundle.Content]
    """Files of the folder, under model/."""
    papers: dict[str, bundle.Content]
    need: dict[str, float]
    """Memory predicted on the target, MB, by part and in `total`."""
    measured: str
    """What the certificate was measured with."""
    about: dict[str, Any]

    @property
    def numbers(self) -> dict[str, str]:
        return {
            "memory": f"{self.need['total']:,.0f} MB",
            "context": f"{self.launch.context} tokens"
            + (f" for each of {self.launch.parallel} conversations" if self.launch.parallel > 1 else ""),
        }


def collect(inputs: Mapping[str, Artifact]) -> Tree:
    """The tree of a finished build, from the results of NEEDS. The same results give the same bytes."""
    made, base, data = inputs["quantize/served"], inputs["base"], inputs["data"]
    device, serve, kind = inputs["device"].facts, inputs["serve"].facts, str(made.facts["format"])
    folder, board = made.path / FOLDER, staging.board_of(device)
    config = _config(folder, base.path)
    shape = read_config(config)
    on_gpu = _on_gpu(device, kind, str(made.facts.get("provider", "cpu")))
    need = _predicted(
        shape,
        board,
        kind,
        on_gpu,
        weights_mb=_bytes(folder) / 1e6,
        context=serve["context"],
        parallel=serve["parallel"],
    )
    launch = _launch(
        device,
        serve,
        shape,
        kind,
        name=f"{_name(config, str(base.facts.get('source', '')))}-{made.facts['type']}",
    )
    files = {
        f"{FOLDER}/{p.relative_to(folder).as_posix()}": p for p in sorted(folder.rglob("*")) if p.is_file()
    }
    model: dict[str, bundle.Content] = {**files}
    if kind == "awq":
        given = files.get(GENERATION)
        model[GENERATION] = with_sampling(given.read_text(encoding="utf-8") if given else "", launch)
    total = {
        **{key: round(getattr(need, key), 1) for key in ServedNeed.__dataclass_fields__},
        "total": round(need.total, 1),
    }
    found: dict[str, bundle.Content] = {
        "settings.json": _settings(launch, str(serve.get("system", ""))),
        **staging.certificate_for(inputs["gate/served"], device, need.total),
        "NOTICE.txt": papers.notice(base.facts, data.facts),
        **papers.data_card(data.path),
        **papers.notices(base.path, "notices/base"),
        **papers.notices(data.path, "notices/data"),
    }
    about = {
        "format": 1, "name": launch.name, "target": device, "type": made.facts["type"], "predicted": {"memory_mb": total},
        "made_with": {"edgeft": edgeft.__version__, **staging.versions_of(made.path)},
        "sources": {name: {"key": a.key, **staging.stable(a.facts)} for name, a in sorted(inputs.items())},
        "data_files": staging.data_files(data.path),
    }  # fmt: skip
    return Tree(
        launch=launch, system=str(serve.get("system", "")), device=device, format=kind, provider=str(made.facts.get("provider", "")), type=str(made.facts["type"]), model=model,
        papers=found, need=total, measured=_measured(inputs["gate/served"]), about=about,
    )  # fmt: skip


def check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse a context the model was not trained for (RecipeError) and a folder that the target cannot hold while it is served
    (FitError). Says nothing as long as nothing of the base is on this machine."""
    shape, quantize = estimates.shape_for(step, artifacts), step.inputs["quantize/served"]
    serve, device = step.find("serve"), step.find("device")
    if shape is None or serve is None or device is None:
        return
    p = serve.params
    context, parallel, board = int(p.context), int(p.parallel), device.params.board()  # type: ignore[attr-defined]
    if shape.context_length and context > shape.context_length:
        raise RecipeError(
            f"serve.context: {context} tokens, but the base was trained for {shape.context_length}",
            hint=f"set [serve] context = {shape.context_length} or less",
        )
    kind, weights = quantize.stage.kind, weights_mb(step, artifacts)
    on_gpu = _on_gpu(device.params.model_dump(mode="json"), kind, getattr(quantize.params, "provider", "cpu"))

    def need(tokens: int) -> ServedNeed:
        return _predicted(shape, board, kind, on_gpu, weights_mb=weights, context=tokens, parallel=parallel)

    room = served.available_mb(board, on_gpu)[0]
    if need(context).total > room:
        longest = max((c for c in range(256, context, 256) if need(c).total <= room), default=0)
        message, hint = served.refusal(
            need(context),
            board,
            on_gpu=on_gpu,
            label=kind.upper(),
            context=context,
            parallel=parallel,
            longest=longest,
        )
        raise FitError(message, hint=hint)


def weights_mb(step: Step, artifacts: Mapping[str, Artifact]) -> float:
    """Size of the model folder that an exporter packs, from its result or as predicted; 0 where nothing is known."""
    quantize = step.inputs["quantize/served"]
    if made := artifacts.get(quantize.key):
        return float(made.facts["bytes"]) / 1e6
    shape = estimates.shape_for(step, artifacts)
    return served.folder_mb(shape, quantize.stage.kind) if shape else 0.0


def _on_gpu(device: Mapping[str, Any], kind: str, provider: str) -> bool:
    """Whether the target's GPU computes. vLLM takes the one that there is; an ONNX graph is made for one provider."""
    return bool(device["gpu"] or device["vram_mb"]) and (kind == "awq" or provider != "cpu")


def _predicted(
    shape: ModelShape,
    board: Board,
    kind: str,
    on_gpu: bool,
    *,
    weights_mb: float,
    context: int,
    parallel: int,
) -> ServedNeed:
    tokens = cache_tokens(context, parallel) if kind == "awq" else context
    return served.predict(
        shape, board, kind=kind, on_gpu=on_gpu, weights_mb=weights_mb, tokens=tokens,
        batch=BATCH if kind == "awq" else context,
        rows=parallel if kind == "awq" else context,
    )  # fmt: skip


def _launch(device: Facts, serve: Facts, shape: ModelShape, kind: str, *, name: str) -> Launch:
    known = {key: serve[key] for key in Launch.__dataclass_fields__ if key in serve}
    tokens = cache_tokens(serve["context"], serve["parallel"])
    return Launch(
        **known, name=slug(name), gpu=bool(device["gpu"] or device["vram_mb"]),
        cache_bytes=served.kv_bytes_per_token(shape, kind) * tokens,
    )  # fmt: skip


def _config(folder: Path, base: Path) -> Path:
    """The configuration of the folder, or of its base, whose dimensions it has."""
    for place in (folder / "config.json", base / "model" / "config.json"):
        if place.is_file():
            return place
    raise StageError(f"{folder} has no config.json, nor has its base")


def _name(config: Path, source: str) -> str:
    """What the model is called: the name its configuration carries, else the end of what the base came from (`stages/base.py`)."""
    found = json.loads(config.read_text(encoding="utf-8"))
    given = found.get("_name_or_path") or found.get("_model_name_or_path")
    end = source.partition(" (sha256 ")[0].rpartition(": ")[2].partition("@")[0]
    return Path(str(given or end or "model")).name.removesuffix(".gguf")


def _settings(launch: Launch, system: str) -> bytes:
    document = {key: getattr(launch, key) for key in Launch.__dataclass_fields__}
    return (
        json.dumps({**document, "system": system}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    ).encode()


def _measured(gate: Artifact) -> str:
    found = json.loads((gate.path / "certificate.json").read_text(encoding="utf-8"))
    said = [str(f.get("runtime", "")) for f in found.get("files", [])]
    return next((s for s in said if s), "the runtime that it names")


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
