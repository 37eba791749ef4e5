"""How the certificate says numbers, verdicts and text that a model wrote; the same on the page and in the terminal."""

from __future__ import annotations

from edgeft.parity.certificate import LLAMA_CPP, Certificate, File, Served
from edgeft.parity.checks.check import failed
from edgeft.parity.gates import ON_BOARD, Finding

NONE = "–"
MARKS = {"PASS": "✓", "FAIL": "✗", "UNDECIDED": "?"}
"""Stand beside the word, so that nothing is said by colour alone."""

STEPS = {
    "base": "before training", "text": "text and tokens", "trained": "training", "merged": "merge",
    "gguf": "conversion to GGUF", "quantized": "quantization", "served": "serving",
}  # fmt: skip
"""What a step of the chain is called in a sentence."""


def nats(value: float | None) -> str:
    """A loss or a KL divergence in nats: 24.76, 3.2070, 0.0034, 0.00080, 1.2e-06."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    digits = ".1e" if size < 1e-4 else ".5f" if size < 1e-3 else ".4f" if size < 10 else ".2f"
    return _minus(f"{value:{digits}}")


def signed(value: float | None) -> str:
    """A difference in nats, always with its sign."""
    return ("+" if value is not None and value > 0 else "") + nats(value)


def ratio(value: float | None) -> str:
    """A perplexity ratio: 1.0213."""
    return NONE if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share of a whole in per cent, with two decimals near both ends: 91.2%, 99.97%, 0.31%."""
    if value is None:
        return NONE
    near = abs(value) < 0.01 or 0.995 < value < 1
    return _minus(f"{value:.2%}" if near and value else f"{value:.1%}")


def chance(value: float) -> str:
    """A probability, roughly: 87%, 0.3%, <0.01%."""
    if value < 1e-4:
        return "<0.01%"
    return f"{value:.2%}" if value < 1e-3 else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def megabytes(count: int) -> str:
    """A file's size: 0.4 MB, 144.8 MB, 4,921 MB."""
    return mb(count / 1e6)


def mb(value: float) -> str:
    """Memory or size that is counted in MB already."""
    return f"{value:,.1f} MB" if value < 1000 else f"{value:,.0f} MB"


def measured(finding: Finding, value: float) -> str:
    """A finding's value, bound or limit in the form that suits its metric."""
    kinds = {"KL divergence": nats, "perplexity ratio": ratio, ON_BOARD: signed}
    return kinds.get(finding.metric, share)(value)


def limit(finding: Finding) -> str:
    """A finding's limit: ±0.0062 where it holds either way."""
    if finding.metric == ON_BOARD:
        return f"±{nats(finding.limit)}" if finding.limit else NONE
    return measured(finding, finding.limit)


def clean(text: str) -> str:
    """Text that can be shown anywhere: control characters become their Unicode pictures, broken ones U+FFFD.

    Newlines and tabs stay. So an escape sequence in a model's answer cannot drive a terminal, nor an override of the
    writing direction turn a line around.
    """
    return "".join(_picture(c) for c in text)


def visible(token: str) -> str:
    """A token on its own, with its white space to be seen: "␣word", "↵"; a very long one is cut."""
    if not token:
        return "nothing"
    token = token if len(token) <= 48 else token[:47] + "…"
    return clean(token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣"))


def inline(text: str) -> str:
    """Several tokens in one line: newlines are marked, not broken at."""
    return clean(text.replace("\r", "").replace("\n", " ↵ "))


def sentence(text: str) -> str:
    """A reason as the modules beside this one give it, as a sentence for people."""
    step, colon, rest = text.partition(": ")
    text = inline(STEPS[step] + colon + rest if colon and step in STEPS else text).strip()
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    return text.replace("95 %", "95\u00a0%")


def headline(certificate: Certificate) -> str:
    """What came out for each file, in one sentence."""
    files = certificate.files
    if len(files) == 1:
        return meaning(files[0])
    words = {
        "PASS": ("passes", "pass"),
        "UNDECIDED": ("is undecided", "are undecided"),
        "FAIL": ("fails", "fail"),
    }
    parts = []
    for verdict, (one, many) in words.items():
        names = [clean(f.title) for f in files if f.verdict == verdict]
        if names and len(names) == len(files):
            return f"Both files {many}." if len(files) == 2 else f"All {len(files)} files {many}."
        if names:
            parts.append(f"{_listed(names)} {one if len(names) == 1 else many}")
    return ", ".join(parts) + "." if parts else "No file was measured."


def meaning(file: File) -> str:
    """What the verdict means for somebody who has to decide."""
    limits = f"the limits of tier {clean(file.limits.said)}"
    if file.verdict == "PASS":
        return f"It says what the trained model says, within {limits}."
    if file.verdict == "UNDECIDED":
        return f"It may or may not be within {limits}: what was measured does not settle it."
    wrong = len(failed(file.checks))
    if wrong:
        return f"{'Something that must be exact is not' if wrong == 1 else f'{wrong} things that must be exact are not'}."
    if all(f.metric == ON_BOARD for f in file.findings if f.verdict == "FAIL"):
        return "On the board it is not what it is on this machine: the difference is more than kernels make."
    return f"It strays from the trained model further than {limits} allow."


def more(file: File) -> str:
    """For UNDECIDED: what would decide."""
    if file.more_windows is None:
        return "It is too close to a limit to be told apart by measuring more: choose more bits or another limit."
    return f"About {file.more_windows:,} more windows of text would decide."


def fault(file: File) -> str:
    """Which step is at fault, or lost most; "" when nothing is wrong."""
    if not file.culprit:
        return ""
    name = STEPS.get(file.culprit, clean(file.culprit))
    return f"Step at fault: {name}" if file.verdict == "FAIL" else f"Most is lost in: {name}"


def floor(file: File) -> str:
    """What the noise floor says about this file, in one or two sentences."""
    pairs = (file.floor or {}).get("pairs") or ()
    if not file.floor or not pairs:
        return "The noise of this machine's kernels on this file was not measured."
    worst = max(pairs, key=lambda pair: float(pair["kld"]))
    kld = float(worst["kld"])
    if kld == 0:
        return "All kernels that this machine can run give the same bits on this file, which says nothing of another machine's."
    tokens = f" on {int(file.floor['tokens']):,} tokens" if file.floor.get("tokens") else ""
    said = (
        f"This very file, computed by two correct sets of kernels ({clean(str(worst['what']))}), differs from itself by a KL "
        f"divergence of {nats(kld)}{tokens}, and finds the same top token in {share(float(worst['same_top']))} of cases."
    )
    limit = file.limits.max_kld
    return f"{said} " + (
        f"The limit of {nats(limit)} is {limit / kld:.1f} times that, so the verdict is not made by kernel noise."
        if limit > 2 * kld
        else f"That is not far from the limit of {nats(limit)}: on another processor the verdict could come out differently."
    )


def runtime(file: File) -> str:
    """Who gave a file's numbers and answers; "" for llama.cpp, which gives those of every GGUF file."""
    return "" if file.runtime == LLAMA_CPP else f"scored by what serves it, {clean(file.runtime)}"


def board(served: Served) -> str:
    """What a board's log says, in two sentences."""
    said = (
        f"On {served.tokens:,} tokens of {served.text} text the board's KL divergence is {nats(served.kld)}, this machine's "
        f"{nats(served.kld_here)}: it moved by {signed(served.moved)} ({signed(served.moved_low)} to {signed(served.moved_high)})."
    )
    top = f"It finds the reference's top token in {share(served.same_top)} of cases, this machine in {share(served.same_top_here)}."
    if served.limit is None:
        return f"{said} {top} No limit can be set: {clean(served.limit_from)}."
    return f"{said} {top} {nats(served.limit)} either way is allowed, {clean(served.limit_from)}."


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _minus(number: str) -> str:
    """A real minus sign in front, a plain hyphen in an exponent, as programs print it."""
    return "−" + number[1:] if number.startswith("-") else number


def _picture(c: str) -> str:
    code = ord(c)
    if code < 0x20 and c not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    broken = 0x80 <= code < 0xA0 or 0xD800 <= code <= 0xDFFF or code in (0x202D, 0x202E)
    return "\ufffd" if broken else c
