"""certify: a file held against the model it was made from, whoever made them."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeft import console, llamacpp, progress
from edgeft.errors import ParityError, RecipeError, UndecidedError
from edgeft.isolate import isolated
from edgeft.parity.certificate import Certificate, load
from edgeft.parity.gates import TIERS, Limits
from edgeft.progress import Progress
from edgeft.stage import Facts, Job, Params, Stage
from edgeft.store import write_atomically

LISTS = ("via", "board_logs")
"""Options that may be repeated."""
FLAGS = {"board_logs": "board-log"}
"""What an option is called where that does not follow from its name."""


class Certify(Params):
    """What the child process is told; `request` and `limits` as the parity package takes them."""

    request: dict[str, Any]
    limits: dict[str, Any]


def certify(
    reference: Path, shipped: Path, given: dict[str, Any], numbers: dict[str, float | None], *, tier: str, qlora: bool,
    out: Path, keep_base: bool,
) -> None:  # fmt: skip
    """Make the certificate, write it into `out`, draw it, and end with the verdict's exit code.

    `given` are the other options by name, `numbers` the limits that replace the tier's. `keep_base` leaves the
    reference's log-probabilities beside the page, for `llama-perplexity` on a board.
    """
    options = {**given, "qlora": qlora, "tier": tier, **numbers, "out": out, "keep-base": keep_base}
    request = {
        **{k: [str(p) for p in v] if k in LISTS else str(v) if isinstance(v, Path) else v for k, v in given.items()},
        "reference": str(reference), "shipped": str(shipped), "method": "qlora" if qlora else "lora",
        "command": command_line(reference, shipped, options),
    }  # fmt: skip
    if tier not in TIERS:
        raise RecipeError(f"there is no tier {tier!r}", hint=f"choose from {', '.join(TIERS)}")
    limits = Limits.of(tier, **numbers)
    out.mkdir(parents=True, exist_ok=True)
    # Beside the result, not in /tmp, which may be memory: these are 25 MB a window for 49,152 tokens.
    scratch = Path(tempfile.mkdtemp(prefix=".certify-", dir=out))
    try:
        job = Job(Certify(request=request, limits=limits.facts()), {}, scratch)
        with console.watching("certify"):
            facts = isolated(STAGE, job, out / "certify.log", _hand_on)
        found = load(facts)
        if keep_base:
            for file in scratch.glob("*.kld"):
                file.replace(out / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _write(found, out)
    from edgeft.parity.page.table import table

    console.out.print(table(found))
    console.out.print(f"page     {out / 'certificate.html'}", markup=False, highlight=False)
    _end(found)


def command_line(reference: Path, shipped: Path, options: dict[str, Any]) -> str:
    """The command that makes the same certificate again; options that are not set are left out."""
    words = ["edgeft", "certify", str(reference), str(shipped)]
    for name, value in options.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if one not in (None, False, ""):
                flag = f"--{FLAGS.get(name, name.replace('_', '-'))}"
                words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)


def _hand_on(said: Progress) -> None:
    progress.report(said.what, said.done, said.total, unit=said.unit, numbers=said.numbers)


def _write(found: Certificate, out: Path) -> None:
    from edgeft.parity import page

    text = json.dumps(found.as_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(out / "certificate.json", text)
    write_atomically(out / "certificate.html", page.render(found))


def _end(found: Certificate) -> None:
    """Raise what the verdict's exit code is, with its first reason."""
    (file,) = found.files
    if file.verdict == "FAIL":
        at = f" The step at fault is {file.culprit!r}." if file.culprit else ""
        raise ParityError(f"{file.title} FAILED: {file.because[0]}.{at}", hint="see the page")
    if file.verdict == "UNDECIDED":
        more = file.more_windows
        raise UndecidedError(
            f"{file.title} is UNDECIDED: {file.because[0]}",
            hint=f"about {more} more windows would decide: --windows, with a longer --text" if more
            else "the number is as close to its limit as can be measured",
        )  # fmt: skip


def _run(job: Job[Certify]) -> Facts:
    llamacpp.activate()
    llamacpp.ensure("library")
    from edgeft.parity.certify import Request
    from edgeft.parity.certify import certify as make

    given = dict(job.params.request)
    paths = ("reference", "shipped", "adapter", "base", "text", "general", "calibration")
    given |= {name: Path(given[name]) for name in paths if given.get(name)}
    given |= {name: tuple(Path(p) for p in given.get(name, ())) for name in LISTS}
    return asdict(make(Request(**given), Limits(**job.params.limits), job.out))


STAGE = Stage(name="certify", params=Certify, run=_run, extra="train")
"""Not part of the pipeline: it only runs in a process of its own, as the heavy stages do."""
