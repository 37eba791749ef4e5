"""Conversations from the recipe's data files, rendered, filtered and split, with a card that says how."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from edgeft.corpus import formats, prepare, reading, rules, template
from edgeft.corpus import sources as corpus_sources
from edgeft.stage import Artifact, Facts, InputPath, Job, Needs, Params, Stage, Step

_QUICK_BYTES = 32 << 20
Decision = Literal["drop", "keep"]
Name = Annotated[str, StringConstraints(strip_whitespace=True)]


class Columns(Params):
    """Names of columns, where edgeft cannot guess them."""

    question: Name = ""
    """What the user asks; Alpaca's instruction."""
    input: Name = ""
    """Appended to the question after an empty line."""
    answer: Name = ""
    """What the model is to say; Alpaca's output."""
    system: Name = ""
    """A system prompt of the row's own."""
    messages: Name = ""
    """The list of turns of ShareGPT and OpenAI rows."""
    history: Name = ""
    """Alpaca's earlier turns, a list of [question, answer]."""


class Source(Params):
    """One `[[data.sources]]` table."""

    path: InputPath | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a folder from `save_to_disk`."""
    dataset: str = ""
    """Instead of `path`: a dataset on the Hugging Face hub; `revision` must pin it."""
    revision: Annotated[str, Field(pattern="^([0-9a-f]{40})?$")] = ""
    """The dataset's commit, 40 hex digits."""
    config: str = ""
    """The dataset's configuration, where it has several."""
    split_name: str = "train"
    """Which split of a dataset or folder to read."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "qa"] = "auto"
    """What the columns mean; "auto" looks at the first rows."""
    columns: Columns = Columns()
    group: Name = ""
    """A column whose equal values stay on one side of the split. Overrides `data.group`."""
    weight: float | None = Field(default=None, gt=0)
    """This source's part of the training rows, relative to the other sources' weights."""
    rows: int | None = Field(default=None, ge=1)
    """At most so many rows, chosen by seed from what the filters leave."""
    licence: str = ""
    """The data's licence, for the notices that go with the model."""
    notice: InputPath | None = None
    """A licence or notice file that must go wherever the data goes."""
    repeat: int = Field(default=1, ge=1, le=100)
    """How often a row may be used to reach the source's weight."""
    split: Literal["train", "heldout"] = "train"
    """"heldout": nothing of this source is trained on; it is the held-out set."""

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (not self.dataset):
            raise ValueError("give either `path` or `dataset`")
        if self.dataset and not self.revision:
            raise ValueError(f"dataset {self.dataset!r} needs a `revision`: the 40 hex digits of a commit")
        if self.repeat > 1 and self.weight is None:
            raise ValueError("`repeat` only makes sense with a `weight`")
        if self.split == "heldout" and self.weight is not None:
            raise ValueError("a held-out source has no `weight`")
        return self


class Filters(Params):
    """Which rules drop rows. "keep" turns a rule off."""

    duplicates: Decision = "drop"
    """Rows that say the same as an earlier one, but for case and white space."""
    near_duplicates: Decision = "drop"
    """Rows that nearly repeat an earlier one, with the same numbers."""
    near_duplicate_threshold: float = Field(default=0.8, gt=0.5, le=1)
    """From this Jaccard index of 5-word runs on, two rows are near duplicates."""
    junk: Decision = "drop"
    """Answers such as "ok", "嗯嗯", "n/a", or only punctuation."""
    truncated: Decision = "drop"
    """Answers that stop in mid-sentence."""
    repeats_question: Decision = "keep"
    """Answers that begin with their whole question."""
    over_long: Literal["drop", "refuse"] = "drop"
    """Rows over `max_tokens`: leave them out, or stop the build. An answer is never cut."""


class Data(Params):
    """The `[data]` table."""

    source: InputPath | None = None
    """Short for one `[[data.sources]]` with this path."""
    licence: str = ""
    """The licence of `source`."""
    notice: InputPath | None = None
    """A licence or notice file of `source` that must go wherever the data goes."""
    sources: tuple[Source, ...] = ()
    """Where the rows come from."""
    system: str = ""
    """A system prompt for conversations that have none."""
    group: Name = ""
    """A column whose equal values stay on one side of the split; without one, clusters of related rows do."""
    holdout: float = Field(default=0.05, gt=0)
    """What to hold out: below 1 a share of the rows, else a number of rows."""
    max_overlap: float = Field(default=0.5, gt=0, le=1)
    """A row is not held out if this share of its answer's 8-word runs stands in training answers."""
    max_tokens: int = Field(default=1024, ge=16)
    """Rows with more tokens, prompt and answer together, are over-long."""
    seed: int = Field(default=0, ge=0)
    """Decides what is held out, sampled and in which order."""
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _some_source(self) -> Data:
        if (self.source is None) == (not self.sources):
            raise ValueError('name the data: source = "file.jsonl", or [[data.sources]] tables, not both')
        if self.sources and (self.licence or self.notice):
            raise ValueError("with [[data.sources]], `licence` and `notice` belong into its tables")
        if "holdout" in self.model_fields_set and any(s.split == "heldout" for s in self.sources):
            raise ValueError('`holdout` and a source with split = "heldout" exclude each other')
        return self

    def plain_sources(self) -> list[corpus_sources.Source]:
        """The sources as the corpus package takes them."""
        short = Source.model_construct(path=self.source, licence=self.licence, notice=self.notice)
        tables = self.sources or (short,)
        return [
            corpus_sources.Source(
                path=s.path, dataset=s.dataset, revision=s.revision, config=s.config, split_name=s.split_name,
                format=s.format, columns=formats.Columns(**s.columns.model_dump()),
                group=s.group or self.group, group_required=bool(s.group),
                weight=s.weight, rows=s.rows, repeat=s.repeat, licence=s.licence, notice=s.notice, heldout=s.split == "heldout",
            )
            for s in tables
        ]  # fmt: skip


def run(job: Job[Data]) -> Facts:
    params = job.params
    card = prepare.prepare(
        params.plain_sources(),
        prepare.Settings(
            holdout=params.holdout, max_tokens=params.max_tokens, seed=params.seed, system=params.system,
            max_overlap=params.max_overlap, filters=rules.Filters(**params.filters.model_dump()),
        ),
        template.load(job.inputs["base"].path / "model"),
        job.out,
    )  # fmt: skip
    split, tokens, leak = card["split"], card["tokens"], card["leak"]["after"]
    unused = sum(card["dropped"].get(rule, 0) for rule in ("rows", "weight"))
    dropped = sum(card["dropped"].values()) - unused
    return {
        "summary": f"{split['train']:,} rows to train on, {split['heldout']:,} held out, {dropped:,} dropped by rule"
        + (f", {unused:,} not needed" if unused else ""),
        "rows": {"train": split["train"], "heldout": split["heldout"]},
        "read": sum(s["read"] for s in card["sources"]),
        "tokens": {side: found["total"] for side, found in tokens.items()},
        "supervised_tokens": {side: found["supervised"] for side, found in tokens.items()},
        "dropped": card["dropped"],
        "max_length": card["max_length"],
        "split": split,
        "leak": {"limit": params.max_overlap, "mean": leak["mean"], "max": leak["max"]},
        "chat_template_sha256": card["template"]["sha256"],
        "end_of_turn": card["template"]["end_of_turn"],
        "end_of_turn_id": card["template"]["end_of_turn_id"],
        "bos_count": card["template"]["bos_count"],
        "source": ", ".join(dict.fromkeys(s["name"] for s in card["sources"])),
        "licence": ", ".join(dict.fromkeys(s["licence"] for s in card["sources"] if s["licence"])),
    }


def check(step: Step, done: Mapping[str, Artifact]) -> None:
    """Read local files before anything runs: a malformed row costs a second, not the download of a base model."""
    assert isinstance(step.params, Data)
    plain = tuple(step.params.plain_sources())
    prepare.check(plain)
    if step.key not in done and all(_is_quick(s) for s in plain):
        _read_once(plain, tuple(s.path.stat().st_mtime_ns for s in plain if s.path))


@lru_cache(maxsize=8)
def _read_once(plain: tuple[corpus_sources.Source, ...], changed_ns: tuple[int, ...]) -> None:
    """A build asks again before each step."""
    corpus_sources.load(plain)


def estimate(step: Step, done: Mapping[str, Artifact]) -> Needs:
    """Ids and labels take about six times a text's bytes; the filters hold it all in memory several times."""
    assert isinstance(step.params, Data)
    size_mb = sum(reading.size(s.path) for s in step.params.plain_sources() if s.path) / 1e6
    return Needs(disk_mb=round(6 * size_mb) + 1, ram_mb=round(40 * size_mb) + 500)


def _is_quick(source: corpus_sources.Source) -> bool:
    path = source.path
    return bool(path and path.is_file() and path.suffix != ".parquet" and path.stat().st_size < _QUICK_BYTES)


STAGE = Stage(
    name="data",
    params=Data,
    run=run,
    needs=("base",),
    extra="train",
    makes=("train.jsonl", "heldout.jsonl", "card.json", "card.md"),
    check=check,
    estimate=estimate,
)
