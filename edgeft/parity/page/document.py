"""The certificate as one HTML file that needs nothing else: for a browser, a phone, a sheet of paper.

`page.html.jinja` beside this file is what it looks like. Everything that came from a model or a file is escaped, and a
content policy in the page forbids scripts and every request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgeft.parity.certificate import Certificate, File
from edgeft.parity.checks.check import STEPS, Check
from edgeft.parity.gates import Finding
from edgeft.parity.page import plots, wording
from edgeft.parity.statistics import Comparison

WIDTHS = (plots.WIDE, plots.NARROW)
TEMPLATE = Path(__file__).with_name("page.html.jinja")

TERMS = (
    ("window", "Window", "A stretch of text of fixed length. The model reads the first half and is measured on the second, so that every measured token has enough text before it. Bounds come from drawing whole windows again and again, because neighbouring tokens go wrong together."),
    ("bound", "95 % bound", "Only so much text was measured. If it were measured again on other text of the same kind, the number would be worse than its bound in about 1 of 20 cases. Verdicts are made from bounds: PASS when the bound itself is within the limit, FAIL when even the bound on the other side is beyond it, UNDECIDED in between."),
    ("loss", "Loss, nats per token", "How surprised a model is by the right next token, on average; lower is better. A nat is a unit like a bit, 1.44 times as large."),
    ("kld", "KL divergence", "How far the shipped file's probabilities for the next token are from the trained model's, over the whole vocabulary. 0 means the same; it cannot be better than the trained model, only different. This number decides most verdicts."),
    ("ppl", "Perplexity ratio", "How much more surprised the file is by the text than the trained model: 1.02 is 2 % more, below 1 is less."),
    ("top", "Same top", "How often file and trained model agree on the most probable next token."),
    ("flips", "Flips", "How often the file is wrong about the next token where the trained model was right, and the other way round. When both happen equally often it is noise; when they lean to one side, damage. The McNemar test tells which: below 0.05 they lean."),
    ("dp", "RMS Δp", "The typical change, up or down, of the probability that the right token gets."),
    ("kept", "Gain kept", "Training made the model better at its task. This is the share of that which is still in the file: 100% is all, 0% means that the fine-tune is gone."),
    ("floor", "Noise floor", "Two processors, both correct, round differently and so differ a little on the very same file. A divergence of this size says nothing about the file."),
    ("board", "Moved on the board", "The same file, scored by a board's own kernels on the same text against the same reference: KL divergence there minus here. Correct kernels move it by no more than they differ on the file, so twice the noise floor is allowed, in either direction: much less would mean that another file was run."),
    ("tier", "Tier", "A set of limits. near-lossless: nobody should notice. parity: what a good 4-bit file does to a large model. degraded: to be shipped knowingly."),
)  # fmt: skip
"""What the words mean, once. Linked from where they are used."""


def render(certificate: Certificate) -> str:
    """The whole page. The same certificate gives the same bytes.

    Raises ModuleNotFoundError without jinja2 or matplotlib, which come with `edgeft[train]`.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        name: getattr(wording, name)
        for name in ("nats", "signed", "ratio", "share", "chance", "megabytes", "mb", "sentence", "visible", "inline")
    }  # fmt: skip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        c=certificate, files=[_file(certificate, f, n) for n, f in enumerate(certificate.files, start=1)],
        marks=wording.MARKS, steps=wording.STEPS, headline=wording.headline(certificate), terms=TERMS,
        tiers=sorted({f.limits.said for f in certificate.files}), quality=_quality(certificate), reach=_reach(certificate),
        models={"base": "before training", "trained": "trained", "shipped": "this file"}, measured=wording.measured,
        limit=wording.limit, board=wording.board,
    )  # fmt: skip


def _file(certificate: Certificate, file: File, number: int) -> dict[str, Any]:
    """What the template needs of a file besides its fields."""
    first_bad = next((f for f in certificate.files if f.verdict == "FAIL"), certificate.files[0])
    prefix = f"f{number}"
    return {
        "id": prefix, "f": file, "open": file is first_bad, "meaning": wording.meaning(file), "more": wording.more(file), "fault": wording.fault(file),
        "floor": wording.floor(file), "runtime": wording.runtime(file), "texts": _texts(file), "others": _others(file), "checks": _ordered(file.checks),
        "unequal": len({s.windows for s in file.steps}) > 1,
        "waterfall": _both(plots.waterfall(file.steps, width=w, prefix=f"{prefix}w{w}") for w in WIDTHS),
        "positions": _both(
            plots.by_position(file.bins, file.limits.max_kld, width=w, prefix=f"{prefix}p{w}")
            for w in WIDTHS if len(file.bins) > 1
        ),
    }  # fmt: skip


def _both(drawn: Iterable[str]) -> dict[str, str]:
    """A plot for wide and for narrow pages; empty when there is nothing to draw."""
    return {name: svg for name, svg in zip(("wide", "narrow"), drawn, strict=False) if svg}


def _quality(certificate: Certificate) -> dict[str, str]:
    """Only where there is something to compare."""
    if len(certificate.files) < 2:
        return {}
    return _both(plots.quality(certificate, width=w, prefix=f"q{w}") for w in WIDTHS)


def _reach(certificate: Certificate) -> str:
    """What the target's memory means for the files, in a sentence; "" without a target."""
    memory, name = certificate.target.get("memory_mb"), certificate.target.get("name")
    if not memory or not name:
        return ""
    large = [f.title for f in certificate.files if f.memory_mb is not None and f.memory_mb > memory]
    if large:
        return f"{name} leaves {wording.mb(float(memory))} for a model: {', '.join(large)} will not fit."
    if all(f.memory_mb is None for f in certificate.files):
        return f"{name} leaves {wording.mb(float(memory))} for a model; what the files need there was not predicted."
    fit = "the file fits" if len(certificate.files) == 1 else "all files fit"
    if unknown := [f.title for f in certificate.files if f.memory_mb is None]:
        fit = f"the others fit; what {', '.join(unknown)} would need there was not predicted"
    sizes, known = plots.sizes(certificate)
    far = (
        ", far to the right of this plot"
        if known and len(sizes) > 1 and not plots.in_range(sizes, known)
        else ""
    )
    return f"{name} leaves {wording.mb(float(memory))} for a model{far}: {fit}."


def _texts(file: File) -> list[tuple[str, Comparison, list[Finding]]]:
    """Each text with the numbers that have a limit."""
    texts = [("domain", file.domain), *([("general", file.general)] if file.general else [])]
    return [(name, c, [x for x in file.findings if x.text == name]) for name, c in texts]


def _others(file: File) -> list[tuple[str, str, list[str]]]:
    """Numbers without a limit: the term in the glossary, the name, the value for each text."""
    texts = [c for c in (file.domain, file.general) if c]

    def row(term: str, name: str, show: Callable[[Comparison], str]) -> tuple[str, str, list[str]]:
        return term, name, [show(c) for c in texts]

    return [
        row("kld", "KL divergence, median", lambda c: wording.nats(c.kld_median)),
        row("kld", "KL divergence, 99 %", lambda c: wording.nats(c.kld_p99)),
        row("kld", "KL divergence, 99.9 %", lambda c: wording.nats(c.kld_p999)),
        row("dp", "RMS Δp", lambda c: wording.share(c.rms_dp)),
        row("flips", "flips", lambda c: wording.share(c.flips)),
        row("flips", "right → wrong", lambda c: wording.share(c.right_to_wrong)),
        row("flips", "wrong → right", lambda c: wording.share(c.wrong_to_right)),
        row("flips", "McNemar test, p", lambda c: f"{c.mcnemar_p:.2g}"),
        row("ppl", "perplexity, trained model", lambda c: f"{c.ppl_reference:.3f}"),
        row("ppl", "perplexity, this file", lambda c: f"{c.ppl:.3f}"),
        row("", "entropy, trained model", lambda c: wording.nats(c.entropy_reference)),
        row("", "entropy, this file", lambda c: wording.nats(c.entropy)),
    ]


def _ordered(checks: Iterable[Check]) -> list[Check]:
    """Failed ones first, then those that could not be asked, each in the order of the steps."""
    return sorted(checks, key=lambda c: ({False: 0, None: 1, True: 2}[c.ok], STEPS.index(c.step)))


def _shown(value: Any) -> Any:
    """Jinja's last look at a value before it is escaped."""
    if value is None:
        return wording.NONE
    return wording.clean(value) if type(value) is str else value
