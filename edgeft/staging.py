"""What every exporter packs: model, settings, start script, papers and certificate, and where all of it came from.

One tree stands behind all formats (docs/exports.md); an exporter only decides where in its format each file lies. Also the
question that every exporter asks before the training: whether the board can hold it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import edgeft
from edgeft import bundle, estimates, runtimes
from edgeft.bundle import papers
from edgeft.bundle.launch import CHECKPOINTS, slug
from edgeft.errors import FitError, RecipeError, SetupError
from edgeft.fit import memory, speed
from edgeft.fit.board import Board
from edgeft.fit.memory import Serving
from edgeft.fit.shape import ModelShape, from_gguf
from edgeft.llamacpp import header as gguf_header
from edgeft.llamacpp.adapter import adapter_beside, tensor_bytes
from edgeft.stage import Artifact, Facts, Step


@dataclass(frozen=True)
class _Runtimes:
    """The programs for all kinds of processor, as a tool: which one a target takes is known when its step runs, and
    `runnable` asks for it before anything does."""

    name: str = "llama-server for the target"

    @property
    def pin(self) -> str:
        pins = sorted(f"{r.name}={r.pin}" for r in runtimes.available())
        return hashlib.sha256("\n".join(pins).encode()).hexdigest()[:16]

    def find(self) -> str:
        return ""


RUNTIMES = _Runtimes()
NEEDS = ("device", "serve", "base", "data", "quantize/gguf", "gate")
"""The steps whose results an exporter packs."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The finished model for one board."""

    settings: bundle.Settings
    device: Facts
    type: str
    """What the file is quantized to."""
    model: Path
    adapter: Path | None
    """adapter.gguf beside the model, where that is part of it."""
    stop: list[str]
    """The texts that end an answer, as the file's own vocabulary spells them."""
    papers: dict[str, bundle.Content]
    """Everything that is neither a model nor made for one format: settings, run.sh, certificate, notices, data card."""
    need: dict[str, float]
    """Memory predicted on the board, MB, by part and in `total`."""
    rate: str
    """Decoding speed predicted there, in words."""
    llama_cpp: dict[str, str]
    about: dict[str, Any]
    """What a manifest says before it lists the files: name, target, prediction, tools, sources."""

    @property
    def numbers(self) -> dict[str, str]:
        """What to expect, for a README."""
        return {
            "memory": f"{self.need['total']:,.0f} MB", "answering": self.rate,
            "context": f"{self.settings.context} tokens",
        }  # fmt: skip

    @property
    def models(self) -> dict[str, Path]:
        return {"model.gguf": self.model, **({"adapter.gguf": self.adapter} if self.adapter else {})}


def collect(inputs: Mapping[str, Artifact]) -> Tree:
    """The tree of a finished build, from the results of NEEDS."""
    gguf = inputs["quantize/gguf"].path / "model.gguf"
    label = str(inputs["quantize/gguf"].facts["type"])
    device, serve = inputs["device"].facts, inputs["serve"].facts
    header = gguf_header.read(gguf, arrays=("tokenizer.ggml.tokens",))
    settings = _settings(device, serve, str(header.keys.get("general.name", "")))
    adapter = adapter_beside(gguf)
    need, rate = predicted(gguf, label, device, serve)
    pin, base, data = _llama_cpp(), inputs["base"], inputs["data"]
    found: dict[str, bundle.Content] = {
        "settings.json": settings.as_json(),
        "run.sh": bundle.run_script(settings, llama_cpp=pin["commit"], adapter=bool(adapter)),
        **certificate_for(inputs["gate"], device, need["total"]),
        "NOTICE.txt": papers.notice(base.facts, data.facts),
        **papers.data_card(data.path),
        **papers.notices(base.path, "notices/base"),
        **papers.notices(data.path, "notices/data"),
    }
    about = {
        "format": 1, "name": settings.name, "target": device, "type": label,
        "predicted": {"memory_mb": need, "answering": rate},
        "made_with": {"edgeft": edgeft.__version__, "llama.cpp": pin, **versions_of(inputs["quantize/gguf"].path)},
        "sources": {name: {"key": a.key, **stable(a.facts)} for name, a in sorted(inputs.items())},
        "data_files": data_files(data.path),
    }  # fmt: skip
    return Tree(
        settings=settings, device=device, type=label, model=gguf, adapter=adapter, stop=_stop(header.keys), papers=found,
        need=need, rate=rate, llama_cpp=pin, about=about,
    )  # fmt: skip


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


def runnable(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """As `check`, for formats that bring llama-server with them: it must be there for this processor or compilable here.

    Raises SetupError otherwise.
    """
    check(step, artifacts)
    if device := step.find("device"):
        runtime(device.params.model_dump(mode="json"), alone=step.stage.kind != "deb")


def runtime(device: Facts, *, alone: bool = False) -> runtimes.Runtime:
    """The programs that run on a device. Raises SetupError where there are none, and says what to do instead.

    `alone`: they have to run without a system's libraries around them.
    """
    accelerator = device.get("accelerator") or ("" if device["gpu"] or device["vram_mb"] else "cpu")
    try:
        if not accelerator:
            raise SetupError(
                f"{device['name']} computes on a GPU, and the target does not say how that is programmed",
                hint='Say it there: [device] accelerator = "vulkan", "cuda:8.6" or "cpu".',
            )
        found = runtimes.for_device(device["arch"], device["isa"], accelerator=accelerator)
        if alone and not found.static:
            raise SetupError(
                f"{found.name} loads the system's libraries for the GPU, and this format has no system around it",
                hint='Or take [export] kind = "deb".',
            )
        found.find()
    except SetupError as error:
        hint = f'take [export] kind = "bundle", which starts the llama-server that is there. {error.hint}'
        raise SetupError(str(error), hint=hint) from None
    return found


def runtime_licence() -> bytes:
    """Whose work llama-server is, and under which terms."""
    from edgeft.llamacpp.source import llama_cpp_tree

    tree = llama_cpp_tree()
    texts = [tree / "LICENSE", *sorted((tree / "licenses").glob("LICENSE*"))]
    parts = [f"{path.name}\n\n{path.read_text(encoding='utf-8')}" for path in texts if path.is_file()]
    return (
        "llama-server of llama.cpp, https://github.com/ggml-org/llama.cpp\n\n" + "\n\n".join(parts)
    ).encode()


def predicted(gguf: Path, label: str, device: Facts, serve: Facts) -> tuple[dict[str, float], str]:
    """Memory in MB, by part and in total, and the decoding speed in words, of a file on a device, with the adapter that
    lies beside it."""
    shape = from_gguf(gguf)
    board = board_of(device)
    known = {key: serve[key] for key in Serving.__dataclass_fields__ if key in serve}
    serving = Serving(**known, checkpoints=CHECKPOINTS)
    beside = adapter_beside(gguf)
    need = memory.predict(
        shape, label, serving, board, adapter_mb=tensor_bytes(beside) / 1e6 if beside else 0.0
    )
    parts = {key: round(getattr(need, key), 1) for key in memory.Need.__dataclass_fields__}
    rate = speed.decode(shape, label, board, used=serving.context // 4, kv_type=serving.kv_type)
    return {**parts, "total": round(need.total, 1)}, str(rate)


def target(device: Facts) -> Facts:
    """What the certificate says of a device: its name, its kind, and what it leaves for a model, in MB."""
    board = board_of(device)
    return {"name": board.name, "arch": device["arch"], "memory_mb": board.available_mb}


def board_of(device: Facts) -> Board:
    """A device's facts, as the fit package takes them."""
    return Board(**{key: device[key] for key in Board.__dataclass_fields__})


def _known(step: Step, artifacts: Mapping[str, Artifact]) -> tuple[ModelShape, str, Serving, Board] | None:
    found: list[Any] = [step.find(name) for name in ("quantize/gguf", "serve", "device")]
    shape = estimates.shape_for(step, artifacts)
    if shape is None or None in found:
        return None
    quantize, serve, device = found
    return shape, quantize.params.type, serve.params.serving(), device.params.board()


def certificate_for(gate: Artifact, device: Facts, memory_mb: float) -> dict[str, bundle.Content]:
    """The gate's certificate for this target, as page and as data."""
    from edgeft.parity import certificate, collected, page

    found = certificate.load(json.loads((gate.path / "certificate.json").read_text(encoding="utf-8")))
    files = [replace(file, memory_mb=memory_mb) for file in found.files]
    found = collected.aimed(replace(found, files=files), target(device))
    text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
    return {"certificate.json": text.encode(), "certificate.html": page.render(found).encode()}


def _settings(device: Facts, serve: Facts, name: str) -> bundle.Settings:
    wanted = set(bundle.Settings.__dataclass_fields__)
    given = {key: value for key, value in serve.items() if key in wanted}
    return bundle.Settings(
        **given, name=slug(name), threads=device["threads"], gpu=bool(device["gpu"] or device["vram_mb"])
    )


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


def versions_of(folder: Path) -> dict[str, str]:
    """The versions that the store wrote down when the model was quantized, if it did."""
    try:
        versions = json.loads((folder / "edgeft.json").read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(versions)


def data_files(folder: Path) -> list[dict[str, str]]:
    """Name, sha256 and licence of every source, as the data card has them; empty without a card."""
    try:
        sources = json.loads((folder / "card.json").read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        {key: str(s.get(key) or "") for key in ("name", "sha256", "revision", "licence")} for s in sources
    ]


def stable(facts: Facts) -> Facts:
    """Facts without what differs between two builds of the same thing: times and places."""
    return {
        key: value
        for key, value in facts.items()
        if not key.endswith(("seconds", "_s", "finished", "path"))
        and not (isinstance(value, str) and value.startswith("/"))
    }
