"""Certifies a file against a reference, neither of which edgeft need have made.

The chain is reference → what is given in between → shipped file. Everything is compared with the reference's
log-probabilities, which lie in a file on the disk while the certificate is made.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import edgeft
from edgeft import progress
from edgeft.errors import DataError
from edgeft.llamacpp import header, tensor_types
from edgeft.llamacpp.score import Scores
from edgeft.parity import board, collected, evidence, noise, reference, served
from edgeft.parity.certificate import LLAMA_CPP, Certificate, File, Word, overall
from edgeft.parity.checks import packed_kinds
from edgeft.parity.checks.check import Check
from edgeft.parity.checks.tensors import config
from edgeft.parity.gates import Limits
from edgeft.parity.opening import Opened, is_gguf, name_of, opened
from edgeft.parity.questions import Prompt, Sample, sample
from edgeft.parity.speakers import Reply


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be certified, and on what."""

    reference: Path
    """A checkpoint folder or a GGUF file: the model that the shipped one should be. With `adapter`, its base."""
    shipped: Path
    """A GGUF file, or a folder that another runtime serves: AWQ, ONNX."""
    via: tuple[Path, ...] = ()
    """Models on the way, in order: a merged checkpoint, a 16-bit GGUF. Each is measured, so that a loss gets a name."""
    adapter: Path | None = None
    """A PEFT folder to attach to the reference."""
    method: Literal["lora", "qlora"] = "lora"
    """How the adapter's base is held: "qlora" in NF4, as in training."""
    base: Path | None = None
    """The model before training, as a checkpoint or GGUF: what the gain is measured from. An adapter brings its own."""
    text: Path | None = None
    """Domain text: conversations (JSON, JSONL, CSV, Parquet), of which the answers count, or a .txt file."""
    general: Path | None = None
    """General text; edgeft's own without it."""
    calibration: Path | None = None
    """What the quantizer's importance matrix was computed on. Refused when it shares its text with the test."""
    windows: int = 32
    general_windows: int = 16
    n_ctx: int = 512
    questions: int = 6
    answer_tokens: int = 96
    floor_windows: int = 2
    runtime: str = "auto"
    """Who scores a folder, of `served.RUNTIMES`."""
    board_logs: tuple[Path, ...] = ()
    """What llama-perplexity printed on a board, scoring the shipped file against the domain.kld or general.kld of an
    earlier certificate of the same request."""
    seed: int = 0
    """Which part of the texts is taken, when there is more than needed."""
    command: str = ""
    """How to make it again."""


def certify(request: Request, limits: Limits, folder: Path) -> Certificate:
    """Measure, check and judge. `folder` takes the reference's log-probabilities, `domain.kld` and `general.kld`.

    Raises DataError for models or texts that cannot be read or compared, ParityError when the calibration text is the
    test text.
    """
    kind = _kind(request)
    if request.board_logs and not request.floor_windows:
        raise DataError(
            "a board's log is held against the noise floor of this machine's kernels",
            hint="--floor-windows 2",
        )
    logs = [board.read(path) for path in request.board_logs]
    n_ctx = max(request.n_ctx, 1024)
    with opened(request.reference, n_ctx=n_ctx, adapter=request.adapter, method=request.method) as first:
        taken = sample(request, first)
        said, replies = _reference(request, first, taken, folder)
    said = replace(said, base=_base(request, said, n_ctx)) if request.base and said.base is None else said
    chain = []
    for path in request.via:
        with opened(path, n_ctx=n_ctx) as model:
            scores = evidence.measure(model.speaker, said, folder, ("domain",))
        chain.append(("gguf" if is_gguf(path) else "merged", path.name, scores["domain"]))
    hear = _hear_folder if kind else _hear_gguf
    heard = hear(request, kind, said, taken, folder, n_ctx)
    replies["shipped"], scores = heard.replies, heard.scores
    title = f"{request.shipped.name}, served by {heard.runtime}" if kind else request.shipped.name
    chain.append(("quantized", title, scores["domain"]))
    manners = [evidence.manners(who, given) for who, given in replies.items()]
    by_model = {m.model: m for m in manners}
    checks = [*taken.checks, *heard.checks, *evidence.behaviour(by_model["trained"], by_model["shipped"])]
    file = _file(request, kind, said, chain, scores, checks, limits)
    file = replace(
        file, worst=heard.worst, manners=manners, answers=_answers(taken.prompts, replies),
        notes=[*heard.notes, *taken.notes], floor=heard.floor, runtime=heard.runtime,
    )  # fmt: skip
    comparisons, kept = said.compare(scores), said.retention(scores["domain"])
    file = evidence.judged(file, comparisons, kept, limits)
    file = board.held(
        file, said, scores, logs, lambda name: file.floor if name == "domain" else _floor(request, said, name)
    )
    return Certificate(
        name=name_of(request.shipped), verdict=overall([file]), command=request.command, edgeft=edgeft.__version__,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), machine=collected.machine(),
        reference=first.title, target={}, texts=[t.facts() for t in said.texts.values()], files=[file], merges={},
        provenance={**_provenance(request), **collected.scored_by([file])},
    )  # fmt: skip


def _kind(request: Request) -> str:
    """The format of a folder that ships, "" for a GGUF file. Raises DataError for what cannot be certified."""
    if not request.shipped.is_dir():
        is_gguf(request.shipped)
        return ""
    kind = served.format_of(request.shipped)
    served.insist(kind, request.runtime)
    if request.board_logs:
        raise DataError(
            "a board's log is of a GGUF file, in llama.cpp; a folder is scored by its own runtime"
        )
    if all(is_gguf(path) for path in (request.reference, *request.via)):
        raise DataError(
            f"{request.shipped} is held against the checkpoint that it was made from, and none is given",
            hint="name it as reference, or with --via",
        )
    return kind


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """What the shipped thing said, by the runtime that serves it."""

    scores: dict[str, Scores]
    worst: list[Word]
    replies: list[Reply]
    checks: list[Check]
    floor: dict[str, Any] | None
    runtime: str = LLAMA_CPP
    notes: Sequence[str] = ()


def _hear_gguf(
    request: Request, kind: str, said: evidence.Reference, taken: Sample, folder: Path, n_ctx: int
) -> _Heard:
    from edgeft.parity.checks import exactness

    native = folder / "native.f32" if request.floor_windows else None
    with opened(request.shipped, n_ctx=n_ctx) as model:
        scores = evidence.measure(
            model.speaker, said, folder, floor=(request.floor_windows, native) if native else None
        )
        spell = model.speaker.decoder.detokenize  # type: ignore[attr-defined]
        replies = evidence.ask(model.speaker, [p.ids for p in taken.prompts], request.answer_tokens)
    return _Heard(
        scores=scores, worst=evidence.worst(said, scores, spell), replies=replies,
        checks=exactness.checks(request, taken.plain), floor=_floor(request, said, native=native),
    )  # fmt: skip


def _hear_folder(
    request: Request, kind: str, said: evidence.Reference, taken: Sample, folder: Path, n_ctx: int
) -> _Heard:
    from edgeft.parity.checks import exactness

    with served.open_served(kind, request.shipped, n_ctx=n_ctx, runtime=request.runtime) as session:
        speaker = served.Served(session)
        checks = exactness.of_folder(request, kind, session, taken.plain)
        native, few = folder / "native.f32", request.floor_windows
        scores = evidence.measure(speaker, said, folder, floor=(few, native) if few else None)
        worst, who = evidence.worst(said, scores, session.detokenize), session.said
        replies = evidence.ask(speaker, [p.ids for p in taken.prompts], request.answer_tokens)
    windows = said.texts["domain"].ids[:few]
    floor = noise.floor(kind, request.shipped, windows, native, who, folder) if windows else None
    return _Heard(
        scores=scores, worst=worst, checks=checks, floor=floor, replies=replies, runtime=who,
        notes=[collected.runtime_note(who, floor)],
    )  # fmt: skip


def _reference(
    request: Request, first: Opened, taken: Sample, folder: Path
) -> tuple[evidence.Reference, dict[str, list[Reply]]]:
    prompts = [p.ids for p in taken.prompts]
    nll = {
        name: reference.write(first.speaker, text, folder / f"{name}.kld")
        for name, text in taken.texts.items()
    }
    replies = {"trained": evidence.ask(first.speaker, prompts, request.answer_tokens)}
    before = None
    if first.without_adapter:
        with first.without_adapter():
            before = reference.losses(first.speaker, taken.texts["domain"], doing="score the base")
            replies = {"base": evidence.ask(first.speaker, prompts, request.answer_tokens), **replies}
    return evidence.Reference(texts=taken.texts, nll=nll, base=before), replies


def _base(request: Request, said: evidence.Reference, n_ctx: int) -> Any:
    """What the model before training loses on the domain text."""
    assert request.base
    with opened(request.base, n_ctx=n_ctx) as model:
        return reference.losses(model.speaker, said.texts["domain"], doing="score the base")


def _file(
    request: Request, kind: str, said: evidence.Reference, chain: Sequence[tuple[str, str, Scores]],
    scores: Mapping[str, Scores], checks: list[Check], limits: Limits,
) -> File:  # fmt: skip
    comparisons = said.compare(scores)
    found = packed_kinds.inside(kind, request.shipped) if kind else tensor_types.types_in(request.shipped)
    return File(
        name=request.shipped.name, title=request.shipped.name if kind else request.shipped.stem,
        sha256=_sha256(request.shipped), bytes=found.file_bytes, bits_per_weight=found.bits_per_weight,
        types=dict(found.counts), memory_mb=None,
        verdict="UNDECIDED", because=[], culprit="", more_windows=None, tier="", limits=limits,
        domain=comparisons["domain"], general=comparisons.get("general"), retention=said.retention(scores["domain"]),
        findings=[], checks=checks, steps=evidence.step_costs(said, chain, trained="the reference"),
        bins=evidence.bins(said, scores), worst=[], answers=[], manners=[], floor=None,
    )  # fmt: skip


def _answers(prompts: Sequence[Prompt], replies: Mapping[str, Sequence[Reply]]) -> list[Any]:
    return [
        evidence.answer(p.question, p.expected, {who: given[i] for who, given in replies.items()})
        for i, p in enumerate(prompts)
    ]


def _floor(
    request: Request, said: evidence.Reference, text: str = "domain", *, native: Path | None = None
) -> dict[str, Any] | None:
    from edgeft.llamacpp import kernels

    if not request.floor_windows:
        return None
    progress.report("measure the kernels' noise")
    windows = said.texts[text].ids[: request.floor_windows]
    return kernels.floor(request.shipped, windows, native=native).facts()


def _provenance(request: Request) -> dict[str, str]:
    """Hashes of everything that was read, and the versions that computed it."""
    import importlib.metadata as packages

    files = {
        "reference": request.reference, "adapter": request.adapter, "base": request.base, "text": request.text,
        "general text": request.general, "calibration": request.calibration, "shipped": request.shipped,
        **{f"via {p.name}": p for p in request.via}, **{f"board log {p.name}": p for p in request.board_logs},
    }  # fmt: skip
    versions = {name: packages.version(name) for name in ("torch", "transformers", "numpy")}
    hashes = {name: f"{path.name}, sha256 {_sha256(path)}" for name, path in files.items() if path}
    if request.shipped.is_dir():
        checkpoint = next(p for p in (request.reference, *request.via) if not is_gguf(p))
        kind = config(checkpoint).get("model_type")
    else:
        kind = header.read(request.shipped).keys.get("general.architecture")
    return {"architecture": str(kind), **hashes, **collected.provenance(), **versions}


def _sha256(path: Path) -> str:
    """Of a file, or of a folder's weights and configuration by name."""
    from edgeft.corpus.reading import sha256

    return sha256(path)
