"""Which steps a recipe has, and what each of them stands on: branches, replacements, tables shared by several stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.errors import RecipeError
from edgeft.plan import plan, standing, why
from edgeft.recipe import Tables, load
from edgeft.stage import Params, Stage, Where
from edgeft.stages import STAGES

RECIPE = """
[base]
path = "base"
[data]
source = "rows.jsonl"
[train]
method = "{method}"
[[quantize]]
kind = "gguf"
type = "Q4_0"
[[quantize]]
kind = "gguf"
type = "Q8_0"
"""


@pytest.fixture
def planned(tmp_path: Path):
    """The plan of a recipe with this training method."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def made(method: str, more: str = "", **options):
        (tmp_path / "r.toml").write_text(RECIPE.format(method=method) + more)
        return plan(load(tmp_path / "r.toml"), **options)

    return made


def titles(steps):
    return [s.title for s in steps]


def step(steps, title):
    return next(s for s in steps if s.title == title)


def inputs(steps, title):
    """The inputs of a step: under which name it takes which step."""
    return {name: source.title for name, source in step(steps, title).inputs.items()}


PLAIN = [
    "base", "serve", "preflight", "data", "train", "reference", "merge", "gguf", "imatrix",
    "quantize/gguf [q4_0]", "quantize/gguf [q8_0]", "verify [q4_0]", "verify [q8_0]", "gate [q4_0]", "gate [q8_0]",
]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_plain_methods_have_no_step_of_the_others(planned, method):
    steps = planned(method)
    assert titles(steps) == PLAIN
    assert inputs(steps, "verify [q4_0]") == {
        "reference": "reference", "merge": "merge", "gguf": "gguf", "quantize/gguf": "quantize/gguf [q4_0]",
    }  # fmt: skip


def test_a_share_that_a_method_does_not_know_is_not_part_of_its_key(planned):
    identity = step(planned("lora"), "train").identity
    assert "grid_share" not in identity["params"] and identity["inputs"].keys() == {
        "base",
        "preflight",
        "data",
    }
    tuned = step(planned("grid-merged"), "train").identity
    assert tuned["params"]["grid_share"] == 0.75


def test_with_grid_merged_the_tuned_file_stands_for_the_quantized_one_and_its_reference(planned):
    steps = planned("grid-merged")
    assert set(titles(steps)) - set(PLAIN) == {
        "start [q4_0]", "start [q8_0]", "tune [q4_0]", "tune [q8_0]", "reference/tuned [q4_0]", "reference/tuned [q8_0]"
    }  # fmt: skip
    assert inputs(steps, "start [q4_0]") == {
        "reference": "reference",
        "quantize/gguf": "quantize/gguf [q4_0]",
    }
    assert inputs(steps, "verify [q4_0]") == {
        "reference": "reference/tuned [q4_0]", "quantize/gguf": "tune [q4_0]", "start": "start [q4_0]",
    }  # fmt: skip
    assert inputs(steps, "gate [q4_0]") == {
        "reference": "reference/tuned [q4_0]", "quantize/gguf": "tune [q4_0]", "verify": "verify [q4_0]",
    }  # fmt: skip
    assert {v: s.title for v, s in standing("quantize/gguf", steps).items()} == {
        "q4_0": "tune [q4_0]", "q8_0": "tune [q8_0]",
    }  # fmt: skip


def test_with_grid_adapter_the_file_comes_before_the_training_and_each_has_its_own(planned):
    steps = planned("grid-adapter")
    assert titles(steps) == [
        "base", "serve", "preflight", "data", "gguf/base", "imatrix/base", "quantize/grid [q4_0]", "quantize/grid [q8_0]",
        "train [q4_0]", "train [q8_0]", "reference [q4_0]", "reference [q8_0]", "pack [q4_0]", "pack [q8_0]",
        "verify [q4_0]", "verify [q8_0]", "gate [q4_0]", "gate [q8_0]",
    ]  # fmt: skip
    assert inputs(steps, "quantize/grid [q8_0]") == {"gguf": "gguf/base", "imatrix": "imatrix/base"}
    assert inputs(steps, "train [q8_0]")["quantize/grid"] == "quantize/grid [q8_0]"
    assert inputs(steps, "verify [q8_0]") == {
        "reference": "reference [q8_0]", "gguf": "gguf/base", "quantize/gguf": "pack [q8_0]",
    }  # fmt: skip
    assert step(steps, "gate [q8_0]").find("quantize/gguf").params.type == "Q8_0"


def test_a_stage_that_shares_a_table_is_configured_by_it(planned):
    one = planned("grid-adapter", "[imatrix]\nchunks = 3\n[gguf]\nname = 'mine'\n")
    assert step(one, "imatrix/base").params.chunks == 3 and step(one, "gguf/base").params.name == "mine"
    two = planned("grid-adapter", "[imatrix]\nchunks = 4\n")
    assert step(one, "train [q4_0]").key != step(two, "train [q4_0]").key


@pytest.mark.parametrize("method", ["grid-adapter", "grid-merged"])
def test_upto_a_variant_keeps_what_stands_for_it(planned, method):
    steps = planned(method, upto="q8_0")
    assert "gate [q8_0]" in titles(steps) and not any("q4_0" in title for title in titles(steps))


def test_why_names_what_changed_in_a_step_that_took_a_replacement(planned):
    before = step(planned("grid-merged"), "verify [q4_0]")
    after = step(planned("grid-merged", "[tune]\nrank = 4\n"), "verify [q4_0]")
    assert why(after, [{**before.identity, "finished": 0}]) == [
        "inputs.reference changed",
        "inputs.quantize/gguf changed",
    ]


def test_every_step_stands_after_its_inputs(planned):
    for method in ("qlora", "grid-adapter", "grid-merged"):
        steps = planned(method)
        for n, one in enumerate(steps):
            assert {s.key for s in one.inputs.values()} <= {s.key for s in steps[:n]}, one.title


def test_names_in_the_stages_records_are_those_of_earlier_stages():
    for i, stage in enumerate(STAGES):
        above = {name for s in STAGES[:i] for name in (s.name, s.id, *s.replaces)}
        # A listed stage may name what it stands for itself: "quantize/served" is no stage of its own.
        replaces = () if stage.listed else stage.replaces
        assert {*stage.needs, *stage.takes, *replaces, *stage.hides} <= above, stage.id
        assert not stage.table or any(s.id == stage.table and s.params is stage.params for s in STAGES)
        if stage.when:
            table = next(s for s in STAGES if s.id == stage.when.table)
            assert getattr(table.params(), stage.when.key), stage.id


class Plain(Params):
    mode: str = "a"


def _nothing(job):
    return {}


def _tables(*rows):
    return Tables("toy", Path("toy.toml"), rows)


def test_what_replaces_a_result_does_so_for_its_own_variants_only():
    class Listed(Params):
        name: str

        def label(self):
            return self.name

    source = Stage(name="source", params=Plain, run=_nothing)
    cut = Stage(name="cut", params=Listed, run=_nothing, needs=("source",), listed=True)
    better = Stage(
        name="better", params=Plain, run=_nothing, needs=("cut",), replaces=("source",), hides=("extra",)
    )
    extra = Stage(name="extra", params=Plain, run=_nothing)
    end = Stage(name="end", params=Plain, run=_nothing, needs=("cut", "source"), takes=("extra", "nowhere"))
    stages = (source, extra, cut, better, end)
    given = _tables(*((s, Plain()) for s in stages if s is not cut), (cut, Listed(name="x")))
    steps = plan(given, stages=stages)
    assert inputs(steps, "end [x]") == {"cut": "cut [x]", "source": "better [x]"}
    without = replace(better, when=Where(table="source", key="mode", values=("b", "c")))
    steps = plan(
        _tables(*((s if s is not better else without, p) for s, p in given.rows)),
        stages=(source, extra, cut, without, end),
    )
    assert inputs(steps, "end [x]") == {"cut": "cut [x]", "source": "source", "extra": "extra"}
    assert str(without.when) == 'source.mode = "b" or "c"'


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("lora", "[tune]\n", '[tune]: this recipe has no such step; it would with train.method = "grid-merged"'),
        ("grid-adapter", "[merge]\n", '[merge]: this recipe has no such step; it would with train.method = "qlora", "lora"'),
        ("grid-adapter", "[start]\n", "[start]: no such table"),
    ],
)  # fmt: skip
def test_a_table_of_a_step_that_the_recipe_does_not_have_is_refused(planned, method, more, said):
    with pytest.raises(RecipeError) as e:
        planned(method, more)
    assert said in str(e.value)


@pytest.mark.parametrize("method", ["grid-adapter", "grid-merged"])
def test_a_method_that_needs_a_file_to_train_on_is_refused_without_one(planned, tmp_path, method):
    text = RECIPE.format(method=method)
    (tmp_path / "none.toml").write_text(text[: text.index("[[quantize]]")])
    with pytest.raises(RecipeError, match=r"train: as it is set up it needs a \[\[quantize\]\] table"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('method = "lora"\ngrid_share = 0.3', "grid_share is the share of method"),
        ('method = "grid-merged"\ngrid_share = 1.0', "train.grid_share: Input should be less than 1"),
        ('method = "grid-merged"\ngrid_share = 0.0', "train.grid_share: Input should be greater than 0"),
        ('method = "grid-merged"\ndropout = 0.1', "dropout = 0.1 cannot go with method"),
    ],
)
def test_settings_that_a_method_cannot_have_are_refused(planned, tmp_path, more, said):
    (tmp_path / "bad.toml").write_text(RECIPE.replace('method = "{method}"', more))
    with pytest.raises(RecipeError) as e:
        load(tmp_path / "bad.toml")
    assert said in str(e.value)


class Packed(Params):
    group: int = 64

    def label(self) -> str:
        return f"other-g{self.group}"


OTHER = Stage(
    name="quantize", kind="other", params=Packed, run=lambda job: {}, needs=("merge",), listed=True, makes=("model/x",),
    replaces=("quantize/served",), when=Where(table="train", key="method", values=("qlora", "lora")),
)  # fmt: skip
"""A format that another runtime than llama.cpp serves, as one file and one line make it."""


def served_stages():
    at = next(i for i, s in enumerate(STAGES) if s.id == "quantize/gguf") + 1
    return (*STAGES[:at], OTHER, *STAGES[at:])


@pytest.fixture
def served(tmp_path: Path):
    """The plan of a recipe with GGUF files and folders of another format."""
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def made(method: str, *groups: int, more: str = ""):
        tables = "".join(f'[[quantize]]\nkind = "other"\ngroup = {g}\n' for g in groups)
        (tmp_path / "r.toml").write_text(RECIPE.format(method=method) + tables + more)
        return plan(load(tmp_path / "r.toml", stages=served_stages()), stages=served_stages())

    return made


def test_a_format_of_another_runtime_is_measured_and_judged_without_a_line_about_it(served):
    steps = served("lora", 64, 32)
    assert inputs(steps, "verify/served [other-g64]") == {
        "reference": "reference", "quantize/served": "quantize/other [other-g64]", "merge": "merge", "base": "base",
    }  # fmt: skip
    assert inputs(steps, "gate/served [other-g32]") == {
        "reference": "reference", "quantize/served": "quantize/other [other-g32]",
        "verify/served": "verify/served [other-g32]", "merge": "merge",
    }  # fmt: skip
    assert "verify [other-g64]" not in titles(steps) and "gate [other-g64]" not in titles(steps)
    assert [t for t in titles(steps) if t.startswith("gate [")] == ["gate [q4_0]", "gate [q8_0]"]


def test_files_keep_their_keys_when_a_folder_stands_beside_them(served):
    before = {s.title: s.key for s in served("qlora")}
    after = {s.title: s.key for s in served("qlora", 64, more='[verify]\nawq = "transformers"\n')}
    assert all(after[title] == key for title, key in before.items())
    (was,) = {s.key for s in served("qlora", 64) if s.title == "verify/served [other-g64]"}
    assert after["verify/served [other-g64]"] != was, "another runtime gives other numbers"


@pytest.mark.parametrize("method", ["grid-adapter", "grid-merged"])
def test_a_recipe_whose_training_ends_in_a_gguf_files_codes_refuses_other_formats_at_load(served, method):
    wanted = r'quantize with kind = \'other\': this recipe has no such step; it would with train.method = "qlora" or "lora"'
    with pytest.raises(RecipeError, match=wanted):
        served(method, 64)


def test_two_formats_with_one_name_would_hide_each_other_and_are_refused(served, monkeypatch):
    twin = replace(OTHER, kind="twin")
    monkeypatch.setattr(f"{__name__}.served_stages", lambda: (*STAGES[:14], OTHER, twin, *STAGES[14:]))
    with pytest.raises(RecipeError, match="given twice with the same name 'other-g64'"):
        served("lora", 64, more='[[quantize]]\nkind = "twin"\n')
