"""What reaches the device of what fine-tuning gained: the usual path, an adapter on the file, and training through the file.

  A  LoRA on 16-bit weights, merged, quantized with an importance matrix of its own
  B  LoRA on the quantized base, shipped beside it            (train.method = "grid-adapter")
  C  A's path for a part of the steps, then training through the rounding of A's file   (train.method = "grid-merged")

Every arm sees the same number of tokens. Retention is the share of the reference's gain (base to 16-bit LoRA) that is left
on held-out text. One process for each --workers on each GPU; a plan that was cut off goes on where it stopped.

python benchmarks/ship_what_you_train.py MODEL.gguf --train medquad_train.jsonl --heldout medquad_val.jsonl --work FOLDER
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]


def arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("model", type=Path, help="a Llama-like GGUF file; what it stands for is the 16-bit base")
    cli.add_argument("--train", type=Path, required=True, help="JSON lines with instruction and output")
    cli.add_argument("--heldout", type=Path, required=True, help="the same, held out")
    cli.add_argument("--general", type=Path, default=REPOSITORY / "edgeft/parity/general.txt")
    cli.add_argument("--work", type=Path, required=True, help="a folder for what is computed")
    cli.add_argument(
        "--wide", type=Path, nargs="+", help="texts: widen the model to 768 and train it on them first"
    )
    cli.add_argument("--ggml", default="", help="libggml-base.so; that of the pinned llama.cpp without it")
    cli.add_argument("--plan", type=Path, help="arms as JSON instead of the whole comparison")
    cli.add_argument("--types", nargs="+", default=["Q4_0"], help="for every seed")
    cli.add_argument(
        "--once", nargs="*", default=["Q4_K_M", "Q3_K_M", "IQ4_XS", "Q2_K", "Q8_0"], help="for one seed"
    )
    cli.add_argument("--seeds", type=int, default=3)
    cli.add_argument("--steps", type=int, default=800, help="of 16 x 256 tokens, for every arm")
    cli.add_argument("--share", type=float, default=0.75, help="of C's steps that go through the rounding")
    cli.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 2e-3],
        help="learning rates of A; the first is the reference's too",
    )
    cli.add_argument("--adapter-rate", type=float, default=1e-3, help="of B")
    cli.add_argument("--tune-rate", type=float, default=1e-3, help="of C's second part")
    cli.add_argument("--rank", type=int, default=64, help="of every adapter")
    cli.add_argument(
        "--tune-rank", type=int, default=128, help="of the one that C trains through the rounding"
    )
    cli.add_argument("--learn-scales", action="store_true", help="C trains the blocks' float16 numbers too")
    cli.add_argument("--workers", type=int, default=2, help="processes a GPU")
    cli.add_argument("--minutes", type=float, default=60, help="take no further arm after that")
    return cli.parse_args()


def comparison(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The arms of the table; longest first, starting points before all."""
    tuned, rate, types = int(args.steps * args.share), args.rates[0], args.types + args.once
    plan: list[dict[str, Any]] = [{"way": "base", "name": "base", "types": types, "seed": 0}]
    for seed in range(args.seeds):
        plan.append(
            {
                "way": "lora",
                "name": f"start-{seed}",
                "steps": args.steps - tuned,
                "lr": rate,
                "seed": seed,
                "rank": args.rank,
            }
        )
    for seed in range(args.seeds):
        for i, r in enumerate(args.rates):
            name = f"lora-{seed}" if i == 0 else f"lora-{r:g}-{seed}"
            plan.append({"way": "lora", "name": name, "steps": args.steps, "lr": r, "seed": seed, "types": types, "rank": args.rank,
                         "keep": i == 0})  # fmt: skip
    for seed in range(args.seeds):
        for label in types if seed == 0 else args.types:
            same = {"seed": seed, "type": label, "rank": args.rank}
            plan.append({"way": "merged", "name": f"C {label}-{seed}", "start": f"start-{seed}", "steps": tuned,
                         "skip": args.steps - tuned, "lr": args.tune_rate, "learn": args.learn_scales, **same, "rank": args.tune_rank})  # fmt: skip
            plan.append({"way": "adapter", "name": f"B {label}-{seed}", "start": "imatrix", "steps": args.steps,
                         "lr": args.adapter_rate, **same})  # fmt: skip
    return plan


def worker(folder: Path, plan: list[dict[str, Any]], ggml: str, gpu: int, deadline: float) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    from shipping.arms import Worker

    Worker(folder, ggml, deadline).work(plan)


def table(folder: Path, args: argparse.Namespace) -> None:
    """Print what is there: the mean over seeds, its 95 % bounds over chunks, and the seeds' own numbers."""
    from edgeft.parity import statistics

    done = folder / "done"
    base, counted = _read(done, "base"), None
    print(
        f"{'arm':<14} {'held-out ppl':>12} {'retention':>9} {'95 % bounds':>16}  {'by seed':<20} {'KLD':>7} {'general ppl':>11} {'KLD':>7}"
    )
    names = [("16-bit LoRA", "lora-{}")]
    for label in args.types + args.once:
        names += [(f"A {label}", f"A_{label}_of_lora-{{}}")]
        names += [(f"A {label} {r:g}", f"A_{label}_of_lora-{r:g}-{{}}") for r in args.rates[1:]]
        names += [(f"{mode} {label}", f"{mode}_{label}-{{}}") for mode in "BC"]
    for title, pattern in names:
        pairs = [(_read(done, pattern.format(s)), _read(done, f"lora-{s}")) for s in range(args.seeds)]
        pairs = [(shipped, trained) for shipped, trained in pairs if shipped and trained]
        if not pairs or base is None:
            continue
        counted = np.ones(base["heldout"].shape, bool)

        def mean(key: str, which: int = 0, pairs: Any = pairs) -> Any:
            found = [pair[which][key] for pair in pairs if key in pair[which]]
            return np.mean(found, axis=0) if found else np.full(1, np.nan)

        kept = statistics.retention(base["heldout"], mean("heldout", 1), mean("heldout"), counted)
        seeds = [
            statistics.retention(base["heldout"], t["heldout"], s["heldout"], counted).retention or 0
            for s, t in pairs
        ]
        print(f"{title:<14} {np.exp(mean('heldout').mean()):>12.3f} {kept.retention or 0:>9.3f} "
              f"{kept.retention_bound or 0:>7.3f} .. {kept.retention_high or 0:.3f}  {' '.join(f'{s:.3f}' for s in seeds):<20} "
              f"{mean('heldout_kld').mean():>7.4f} {np.exp(mean('general').mean()):>11.2f} {mean('general_kld').mean():>7.4f}")  # fmt: skip


def _read(done: Path, name: str) -> dict[str, Any] | None:
    path = done / f"{name}.npz"
    return dict(np.load(path)) if path.exists() else None


def main() -> None:
    args = arguments()
    sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]
    import torch
    from shipping import prepare

    folder = args.work / "narrow"
    if not (folder / "tokens.pt").exists():
        prepare.prepare(args.model, args.train, args.heldout, args.general, folder)
    if args.wide:
        folder, narrow = args.work / "wide", folder
        if not (folder / "settle.pt").exists():
            prepare.widen(narrow, folder)
            prepare.text_chunks(args.model, args.wide, folder)
            before, after = prepare.settle(folder)
            print(
                f"widened to 768: loss on general text {before:.4f}, after training {after:.4f}", flush=True
            )
    ggml = args.ggml or _pinned()
    plan = json.loads(args.plan.read_text()) if args.plan else comparison(args)
    for mark in [*(folder / "done").glob("*.claim"), *(folder / "done").glob("*.failed")]:
        mark.unlink()  # of a run that was cut off
    plan = [arm for arm in plan if not (folder / "done" / f"{arm['name'].replace(' ', '_')}.npz").exists()]
    deadline, gpus = time.time() + 60 * args.minutes, max(1, torch.cuda.device_count())
    spawn = multiprocessing.get_context("spawn")
    crew = [
        spawn.Process(target=worker, args=(folder, plan, ggml, n % gpus, deadline)) for n in range(args.workers * gpus)
    ]  # fmt: skip
    for one in crew:
        one.start()
    for one in crew:
        one.join()
    if not args.plan:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(
            f"\n{gpus} x {name}, {args.model.name}{', 768 wide' if args.wide else ''}, {args.steps} steps of 16 x 256 tokens, {args.seeds} seeds"
        )
        table(folder, args)


def _pinned() -> str:
    from edgeft import llamacpp

    return str(next(Path(llamacpp.ensure("library")).glob("libggml-base.so")))


if __name__ == "__main__":
    main()
