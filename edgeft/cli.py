"""The command line: read files, make a plan, hand it on, show what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeft.commands import boarding, releasing, starting
from edgeft.commands.options import STORE, Model, Recipe, StoreDir, Target, Threads, Upto, Variant
from edgeft.errors import EdgeftError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune a small model, prove that it survived quantization, ship it to a device.",
)  # fmt: skip


@app.command()
def build(
    recipe: Recipe,
    target: Target = "",
    upto: Upto = "",
    store: StoreDir = STORE,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log on the terminal.")] = False,
) -> None:
    """Make the model a recipe describes: run whatever is not yet done."""
    from edgeft.commands import building

    building.build(recipe, target, upto, store, verbose=verbose)


@app.command()
def plan(
    recipe: Recipe,
    target: Target = "",
    upto: Upto = "",
    store: StoreDir = STORE,
    why: Annotated[bool, typer.Option("--why", help="Say which input changed since the last build.")] = False,
) -> None:
    """Show the steps a build would take, which are done, and what the others will need."""
    from edgeft.commands import building

    building.plan(recipe, target, upto, store, why=why)


@app.command()
def show(
    recipe: Recipe,
    step: Annotated[str, typer.Argument(help="One step, such as train or verify.")] = "",
    target: Target = "",
    store: StoreDir = STORE,
    svg: Annotated[Path | None, typer.Option(help="Draw the report into this SVG file instead.")] = None,
) -> None:
    """Show what a build made: its report, or everything one step recorded."""
    from edgeft.commands import building

    building.show(recipe, step, target, store, svg)


@app.command()
def chat(
    model: Model,
    question: Annotated[str, typer.Argument(help="Ask this and stop; without it, a conversation.")] = "",
    variant: Variant = "",
    store: StoreDir = STORE,
    threads: Threads = 0,
    max_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 256,
) -> None:
    """Talk to a built model."""
    from edgeft.commands import talking

    talking.chat(model, question, variant, store, threads, max_tokens)


@app.command()
def serve(
    model: Model,
    variant: Variant = "",
    store: StoreDir = STORE,
    threads: Threads = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    api_key: Annotated[str, typer.Option(envvar="EDGEFT_API_KEY", help="Required beyond localhost.")] = "",
    web: Annotated[
        bool, typer.Option("--web", help="Build llama-server's web chat first (needs npm).")
    ] = False,
) -> None:
    """Serve a built model: llama-server with a web chat, or vLLM or SGLang for an AWQ folder; OpenAI's API."""
    from edgeft.commands import talking

    talking.serve(model, variant, store, threads, host, port, api_key, web=web)


@app.command()
def certify(
    reference: Annotated[
        Path,
        typer.Argument(
            help="The model as it should be: a checkpoint folder or a GGUF file.", show_default=False
        ),
    ],
    shipped: Annotated[
        Path, typer.Argument(help="What ships: a GGUF file, or an AWQ or ONNX folder.", show_default=False)
    ],
    via: Annotated[
        list[Path] | None,
        typer.Option(help="A model on the way (merged checkpoint, 16-bit GGUF); may be repeated."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter to attach to REFERENCE.")] = None,
    qlora: Annotated[bool, typer.Option("--qlora", help="The adapter was trained on NF4 weights.")] = False,
    base: Annotated[
        Path | None, typer.Option(help="The model before training, to measure the gain from.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Test text of the domain: conversations, or a .txt file.")
    ] = None,
    general: Annotated[Path | None, typer.Option(help="General text, instead of edgeft's own.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What the importance matrix was computed on.")
    ] = None,
    board_log: Annotated[
        list[Path] | None,
        typer.Option(
            help="What llama-perplexity printed on the board for the kept base file; may be repeated."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of domain text.", min=2)] = 32,
    general_windows: Annotated[int, typer.Option(help="Windows of general text.", min=0)] = 16,
    n_ctx: Annotated[int, typer.Option(help="Tokens in a window.", min=32)] = 512,
    questions: Annotated[int, typer.Option(help="Questions to answer side by side.", min=0)] = 6,
    floor_windows: Annotated[
        int, typer.Option(help="Windows for the kernels' noise; 0: not measured.", min=0)
    ] = 2,
    runtime: Annotated[
        str, typer.Option(help="What scores an AWQ folder: vllm or transformers; auto: what is there.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Which part of the texts is taken.")] = 0,
    tier: Annotated[str, typer.Option(help="near-lossless, parity or degraded.")] = "parity",
    max_kld: Annotated[float | None, typer.Option(help="Replaces the tier's limit.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(help="Replaces the tier's limit.")] = None,
    min_same_top: Annotated[float | None, typer.Option(help="Replaces the tier's limit.")] = None,
    min_retention: Annotated[float | None, typer.Option(help="Replaces the tier's limit.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and the numbers.")] = Path("certificate"),
    keep_base: Annotated[
        bool,
        typer.Option(
            "--keep-base", help="Keep the reference's log-probabilities, for llama-perplexity on a board."
        ),
    ] = False,
) -> None:
    """Is the file what the reference is? Measures, checks, and says PASS (0), FAIL (5) or UNDECIDED (6)."""
    from edgeft.commands import certifying

    given = {
        "via": via or [], "adapter": adapter, "base": base, "text": text, "general": general, "calibration": calibration,
        "windows": windows, "general_windows": general_windows, "n_ctx": n_ctx, "questions": questions,
        "floor_windows": floor_windows, "runtime": runtime, "seed": seed, "board_logs": board_log or [],
    }  # fmt: skip
    numbers = {
        "max_kld": max_kld, "max_ppl_ratio": max_ppl_ratio, "min_same_top": min_same_top,
        "min_retention": min_retention,
    }  # fmt: skip
    certifying.certify(
        reference, shipped, given, numbers, tier=tier, qlora=qlora, out=out, keep_base=keep_base
    )


@app.command()
def doctor(store: StoreDir = STORE) -> None:
    """Check GPU, driver, compiler, llama.cpp and disk, and say what repairs each gap."""
    from edgeft.commands import looking

    looking.doctor(store)


@app.command()
def targets() -> None:
    """List the devices that edgeft knows."""
    from edgeft.commands import looking

    looking.targets()


@app.command()
def fit(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint folder, a GGUF file, a recipe, or a hub model in the cache.",
            show_default=False,
        ),
    ],
    target: Annotated[
        list[str] | None, typer.Option(help="A target's name or file; may be repeated. All by default.")
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens of a conversation; 0: the recipe's, else 4096.", min=0)
    ] = 0,
    kv_type: Annotated[str, typer.Option(help="f16, q8_0 or q4_0; the recipe's, else f16.")] = "",
    parallel: Annotated[int, typer.Option(help="Conversations at once; 0: the recipe's, else 1.", min=0)] = 0,
    adapter_rank: Annotated[
        int, typer.Option(help="Rank of an adapter beside the file; -1: the recipe's, else none.", min=-1)
    ] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict which quantization fits which device, with which context, and how fast it would answer."""
    from edgeft.commands import fitting

    fitting.fit(
        model, target or [], context=context, kv_type=kv_type, parallel=parallel, adapter_rank=adapter_rank,
        as_json=as_json,
    )  # fmt: skip


@app.command()
def init(
    data: Annotated[
        Path, typer.Argument(help="A data file: JSON, JSONL, CSV or Parquet.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(help="The recipe to write; beside the data by default.")] = None,
) -> None:
    """Look at a data file and write a commented recipe for it."""
    from edgeft.commands import looking

    looking.init(data, out)


@app.command()
def verify(
    recipe: Recipe,
    on: Annotated[str, typer.Option(help="local, qemu, or ssh://user@board[:port].")] = "local",
    variant: Variant = "",
    target: Target = "",
    store: StoreDir = STORE,
    windows: Annotated[
        int, typer.Option(help="Windows of each text; 0 takes all, a few under emulation.", min=0)
    ] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes the target's.", min=0)] = 0,
    folder: Annotated[str, typer.Option(help="Work folder on the board, absolute; emptied afterwards.")] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Leave what was sent on the board.")] = False,
    ssh_option: Annotated[
        list[str] | None, typer.Option(help="For ssh, such as IdentityFile=KEY; may be repeated.")
    ] = None,
) -> None:
    """Run a built model where it will live, and hold what it says there against the certificate."""
    from edgeft.commands import verifying

    asked = verifying.Asked(
        on=on, variant=variant, target=target, windows=windows, threads=threads, folder=folder, keep=keep,
        ssh_options=tuple(ssh_option or ()),
    )  # fmt: skip
    verifying.verify(recipe, store, asked)


@app.command()
def clean(
    recipes: Annotated[
        list[Path] | None, typer.Argument(help="Keep what these need; all built ones by default.")
    ] = None,
    store: StoreDir = STORE,
    everything: Annotated[bool, typer.Option("--all", help="Delete every result.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Delete results that no recipe needs any more."""
    from edgeft.commands import building

    building.clean(recipes or [], store, everything=everything, dry_run=dry_run)


app.command()(boarding.deploy)
app.command()(starting.boot)
app.command()(releasing.update)
app.add_typer(releasing.keys, name="keys")


def main() -> None:
    """Run a command; an EdgeftError becomes its sentence, its hint and its exit code."""
    try:
        app()
    except EdgeftError as e:
        from edgeft.console import say_error

        say_error(e)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
