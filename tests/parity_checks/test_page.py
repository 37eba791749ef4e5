"""The certificate's page and terminal table: complete, self-contained, safe, the same each time."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import pytest
from rich.console import Console

from edgeft.parity import evidence, page
from edgeft.parity.certificate import load
from edgeft.parity.page import document, plots, wording
from edgeft.parity.page.table import table
from tests.parity_checks import sample

KEPT = {"verdict", "step", "text", "metric", "codes", "model", "culprit"}
"""Fields with a fixed vocabulary; all other text may come from anywhere."""


class Elements(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        if self.tags and self.tags[-1] != "style":
            self.text.append(data)

    def all(self, name: str) -> list[str]:
        return [value for n, value in self.attributes if n == name]


@pytest.fixture(scope="module")
def html() -> str:
    return page.render(sample.certificate())


@pytest.fixture(scope="module")
def bare() -> str:
    return page.render(sample.bare())


def words(html: str) -> str:
    return " ".join(" ".join(Elements(html).text).split())


def printed(certificate, width: int = 80) -> str:
    to = io.StringIO()
    Console(file=to, width=width).print(table(certificate))
    return to.getvalue()


def assert_inert(html: str):
    """No script, and nothing that a browser would fetch or follow outside the page."""
    found = Elements(html)
    assert not {"script", "iframe", "object", "embed", "img", "form", "base", "foreignobject"} & set(
        found.tags
    )
    assert not [
        name for name, _ in found.attributes if name.startswith("on") or name in ("src", "srcset", "action")
    ]
    assert all(link.startswith("#") or link == "data:," for link in found.all("href"))
    styles = "".join(re.findall(r"<style.*?</style>", html, re.DOTALL)) + " ".join(found.all("style"))
    assert "@import" not in styles
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", styles))


def test_the_page_asks_nothing_of_any_network_and_runs_no_script(html, bare):
    assert_inert(html)
    assert_inert(bare)
    assert "default-src 'none'" in html
    assert html.count("<style") == 1  # matplotlib's own sheet would hold for the whole page


def test_whatever_a_model_or_a_file_says_stays_text():
    def hostile(value, key=""):
        if isinstance(value, dict):
            names = (
                {k: k for k in value}
                if key not in ("types", "provenance")
                else {k: sample.HOSTILE + k for k in value}
            )
            return {names[k]: hostile(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [hostile(v, key) for v in value]
        return (
            sample.HOSTILE + "\x00\x1b[31m\ud800" + value
            if isinstance(value, str) and key not in KEPT
            else value
        )

    certificate = load(hostile(json.loads(json.dumps(sample.certificate().as_json()))))
    html = page.render(certificate)
    assert_inert(html)
    html.encode("utf-8")  # a lone surrogate could not be written
    assert "alert('x')" in words(html) and "\x00" not in html and "\x1b" not in html
    assert "\x1b" not in printed(certificate)


def test_what_a_model_says_is_shown_whole(html):
    shown = words(html)
    for said in (sample.EMOJI, sample.LONG, "مرحبا بالعالم", "</td></table>&lt;b&gt; is not markup"):
        assert said in shown
    assert "\u202e" not in html  # an override of the writing direction


def test_ids_are_unique_and_every_link_finds_its_place(html):
    found = Elements(html)
    ids = found.all("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in found.all("href") if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_the_same_certificate_gives_the_same_bytes_whatever_matplotlib_is_set_to(bare):
    before = matplotlib.rcParams["font.size"]
    with matplotlib.rc_context({"font.size": 31, "svg.fonttype": "path", "axes.linewidth": 9}):
        again = page.render(load(json.loads(json.dumps(sample.bare().as_json()))))
        assert matplotlib.rcParams["font.size"] == 31
    assert again == bare
    assert matplotlib.rcParams["font.size"] == before


def test_the_verdict_comes_first_and_every_file_has_its_own(html):
    shown = words(html)
    assert (
        shown.index("FAIL")
        < shown.index("Q8_0 passes, Q4_K_M is undecided, Q2_K fails.")
        < shown.index("Compared with")
    )
    for file in sample.certificate().files:
        head = rf'<bdi>{file.title}</bdi></h[23]>.*?class="badge {file.verdict.lower()}">'
        # in the overview and over its own part
        assert len(re.findall(head, html, re.DOTALL)) == 2, file.title
    assert re.findall(r'<details class="file" id="(\w+)" open>', html) == ["f3"]  # the one that failed


def test_undecided_says_how_much_more_text_would_decide(html):
    file = sample.certificate().files[1]
    assert file.verdict == "UNDECIDED" and file.more_windows
    assert f"About {file.more_windows} more windows of text would decide." in words(html)
    assert "too close to a limit" in wording.more(replace(file, more_windows=None))


def test_the_step_at_fault_is_named(html):
    assert "Step at fault: conversion to GGUF" in words(html)
    assert "Most is lost in: quantization" in words(html)


def test_numbers_stand_beside_their_bounds_and_limits(html):
    shown = words(html)
    for f in sample.certificate().files:
        for n in f.findings:
            row = f"{wording.measured(n, n.value)} {wording.measured(n, n.bound)} {wording.limit(n)}"
            assert f"{n.metric} {row}" in shown
        for step in f.steps:
            assert f"{wording.nats(step.loss)} {wording.signed(step.cost)}" in shown


def test_all_parts_are_there(html):
    shown, c = words(html), sample.certificate()
    for said in (
        c.reference,
        c.command,
        c.machine,
        *c.provenance.values(),
        *(f.sha256 for f in c.files),
        *(check.said for f in c.files for check in f.checks),
        "its held-out loss is lower by 0.0117",
        "Q5_0 × 150",
        "✂ did not stop by itself",
        "far to the right of this plot: all files fit",
    ):
        assert " ".join(said.split()) in shown
    for term, *_ in document.TERMS:
        assert f'href="#t-{term}"' in html, f"{term} is explained and never used"


def test_plots_come_in_two_widths_say_what_they_show_and_follow_the_colour_scheme(html):
    drawn = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(drawn) == 2 * (1 + 2 * 3)
    assert max(len(svg.encode()) for svg in drawn) < 60_000
    for svg in drawn:
        assert 'role="img"' in svg and 'aria-label="' in svg and "<text" in svg
        assert not re.search(r"#[0-9a-f]{6}", svg), "a colour that does not follow light and dark"
    assert len(html.encode()) < 400_000


def test_a_plain_certificate_without_extras_renders(bare):
    shown = words(bare)
    assert "PASS" in shown and "was not measured" in shown and "could not be told" in shown
    assert "Quality against size" not in shown and "Which weights got the adapter" not in shown
    assert "General text" not in shown and "The same questions" not in shown


def test_the_board_has_its_step_its_row_and_its_log(html, bare):
    shown, file = words(html), sample.certificate().files[0]
    assert "moved on the board +0.00034 +0.00057 ±0.0064" in shown
    assert "8,160 tokens of domain text the board's KL divergence is 0.0044, this machine's 0.0040" in shown
    assert file.served[0].sha256 in shown and "FP16_VA = 1" in shown
    assert len(re.findall(r'aria-label="What each step cost[^"]*on the board', html)) == 2  # wide and narrow
    assert (
        "Q8_0 on the board, domain text: KLD 0.0044, here 0.0040, moved +0.00034, 0.0064 is allowed"
        in " ".join(printed(sample.certificate()).split())
    )
    assert "on the board" not in words(bare).lower().replace("moved on the board the same file", "")


def test_a_file_that_only_the_board_changes_says_so():
    file = sample.certificate().files[0]
    worse = replace(file.served[0], moved=0.02, moved_low=0.018, moved_high=0.023)
    file = evidence.judged(
        replace(file, served=[worse]), {"domain": file.domain}, file.retention, file.limits
    )
    assert file.culprit == "served" and wording.fault(file) == "Step at fault: serving"
    assert wording.meaning(file).startswith("On the board it is not what it is on this machine")


def test_certificates_from_before_boards_were_read_still_load():
    old = json.loads(json.dumps(sample.bare().as_json()))
    del old["files"][0]["served"]
    assert load(old) == sample.bare()


@pytest.mark.parametrize(
    ("memory", "said"), [(300.0, "pi-5-8gb: 300.0 MB"), (240.0, "will not fit"), (None, "")]
)
def test_the_targets_memory_is_a_line_when_it_is_near_and_a_sentence_when_not(memory, said):
    c = replace(sample.certificate(), target={"name": "pi-5-8gb", "memory_mb": memory} if memory else {})
    drawn = plots.quality(c, width=plots.WIDE, prefix="q")
    assert said in drawn + document._reach(c)
    assert ("predicted memory, MB" if memory else "size of the file, MB") in drawn


def test_plots_stand_odd_names_and_no_divergence_at_all():
    file = sample.certificate().files[0]
    same = replace(file.domain, kld=0.0, kld_low=0.0, kld_bound=0.0)
    odd = [
        replace(file, title=title, domain=same) for title in ("$a$b_{", sample.LONG, "#000001", sample.EMOJI)
    ]
    drawn = plots.quality(replace(sample.certificate(), files=odd), width=plots.NARROW, prefix="q")
    assert ">$a$b_{<" in drawn and ">#000001<" in drawn and sample.EMOJI in drawn
    none = [replace(b, kld=0.0, low=0.0, high=0.0) for b in file.bins]
    assert "<svg" in plots.by_position(none, 0.05, width=plots.WIDE, prefix="p")
    assert plots.waterfall(file.steps[:2], width=plots.WIDE, prefix="w") == ""


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_fits_its_terminal_and_says_every_verdict(width):
    c = sample.certificate()
    lines = printed(c, width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert lines[0].startswith("✗ FAIL  medical-qa: Q8_0 passes")
    for file in c.files:
        row = next(line for line in lines if line.startswith(file.title))
        assert row.rstrip().endswith(file.verdict)
        assert f"{wording.nats(file.domain.kld)} ({wording.nats(file.domain.kld_bound)})" in row
    text = " ".join(" ".join(lines).split())
    assert (
        "About 64 more windows of text would decide" in text and "Step at fault: conversion to GGUF" in text
    )


def test_a_long_file_name_costs_the_table_no_number():
    c = sample.bare("Q2_K")
    c = replace(c, files=[replace(c.files[0], title="SmolLM2-135M-Instruct-finetuned.Q2_K.gguf")])
    text = printed(c)
    assert "…" not in text and "0.4127 (0.4455)" in text and "✗ FAIL" in text


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0034, "0.0034"), (1.2e-6, "1.2e-06"), (0.0008, "0.00080"), (-0.0123, "−0.0123"), (24.76, "24.76"), (0.0, "0"), (None, "–")],
)  # fmt: skip
def test_numbers_have_sensible_digits(value, said):
    assert wording.nats(value) == said
