"""edgeft's AWQ against llm-compressor's AWQModifier, on one checkpoint, one calibration text and one group size. Prints a table.

python benchmarks/awq_reference.py --data DATA --merge MERGE --reference REFERENCE --llmcompressor PYTHON
    [--chunks 16] [--own 16 --base BASE] [--group 64] [--out FOLDER] [--texts domain general]
    [--methods nearest awq full]

DATA, MERGE, REFERENCE and BASE are results of a build: folders `data-…`, `merge-…`, `reference-…` and `base-…` in `.edgeft/done`. With
--own the base writes as many windows beside the training text, for both. PYTHON is an
interpreter in which `pip install llmcompressor` was done (0.14; it pins another transformers than edgeft's). Without it the table
has edgeft's own rows. Both get the same token ids, window by window; both quantize the linear layers of the blocks to 4 bits with
zero points; llm-compressor otherwise has its defaults, and computes in float32. Every folder is read by edgeft.awq.session and scored against
REFERENCE as `verify` does. Folders and scores that are there already in FOLDER are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = {
    "plain rounding": "nearest", "edgeft, scales and clipping": "awq", "edgeft, as shipped": "full",
}  # fmt: skip
OTHER = "llm-compressor"


def main() -> None:
    args = _arguments()
    if args.worker:
        by_llmcompressor(*args.worker)
        return
    import torch

    from edgeft import awq

    torch.set_num_threads(1)
    windows = _windows(args)
    source, seconds = args.merge / "model", {}
    for title, method in ROWS.items():
        folder = args.out / method
        if method in args.methods and not (folder / "config.json").is_file():
            begun = time.monotonic()
            settings: Any = awq.Settings(group=args.group, method=method)
            awq.quantize(source, folder, windows, settings)
            seconds[title] = time.monotonic() - begun
    if args.llmcompressor and not (args.out / OTHER / "config.json").is_file():
        begun = time.monotonic()
        _apart(args, source)
        seconds[OTHER] = time.monotonic() - begun
    _table(args, seconds)


def _windows(args: argparse.Namespace) -> list[list[int]]:
    """The calibration text: what lies in the folder from an earlier run, or made now."""
    from edgeft.awq import own_text
    from edgeft.corpus import load_rows

    kept = args.out / "windows.json"
    if not kept.is_file():
        ids = [i for row in load_rows(args.data / "train.jsonl") for i in row.ids]
        windows = [ids[i : i + 512] for i in range(0, len(ids) - 511, 512)][: args.chunks]
        own = own_text.write(args.base / "model", args.own, 512) if args.own else []
        args.out.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([*windows, *own]))
    found: list[list[int]] = json.loads(kept.read_text())
    return found


def by_llmcompressor(source: str, ids: str, out: str, group: str) -> None:
    """In the other interpreter: quantize by AWQModifier and write what it gives."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # 0.14 pins memory for a GPU that is not there
    windows = json.loads(Path(ids).read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": int(group),
    }
    oneshot(
        model=model, processor=tokenizer, max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]}),
        recipe=[
            AWQModifier(),
            QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]),
        ],
    )  # fmt: skip
    aside = Path(out + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, save_compressed=True)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


def _apart(args: argparse.Namespace, source: Path) -> None:
    from edgeft import tool

    tool.run(
        [args.llmcompressor, __file__, "--worker", str(source), str(args.out / "windows.json"),
         str(args.out / OTHER), str(args.group)],
    )  # fmt: skip


def _table(args: argparse.Namespace, seconds: dict[str, float]) -> None:
    import numpy as np

    from edgeft.awq.session import Session
    from edgeft.parity import evidence, statistics
    from edgeft.parity.served import Served

    reference = evidence.Reference.of(dict(np.load(args.reference / "reference.npz")))
    folders = {**{title: args.out / method for title, method in ROWS.items()}, OTHER: args.out / OTHER}
    scores: dict[str, Any] = {}
    print(
        f"\n{len(_windows(args))} windows of 512 tokens, {args.own} of them the base's own, groups of {args.group}\n"
    )
    print(
        "| | text | MB | KLD | 95 % bound | PPL ratio | same top | KLD over llm-compressor's, 95 % interval | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for title, folder in sorted(folders.items(), key=lambda item: item[0] != OTHER):
        if not (folder / "config.json").is_file():
            continue
        kept = folder.with_suffix(".npz")
        if kept.is_file():
            found = evidence.scores_of(dict(np.load(kept)))
        else:
            with Session(folder, context=512) as session:
                found = evidence.measure(Served(session), reference, args.reference, texts=args.texts)
            np.savez(kept, **evidence.as_arrays(found))
        scores[title] = found
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        for text, c in reference.compare(found).items():
            paired = ""
            if title != OTHER and OTHER in scores:
                counted = reference.texts[text].counted
                gap = statistics.interval(found[text].kld - scores[OTHER][text].kld, counted)
                paired = f"{gap.mean:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})"
            print(
                f"| {title} | {text} | {size:,.1f} | {c.kld:.4f} | {c.kld_bound:.4f} | {c.ppl_ratio:.4f} | {c.same_top:.1%} | "
                f"{paired} | {seconds.get(title, 0):,.0f} |",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    for name in ("data", "merge", "reference"):
        parser.add_argument(f"--{name}", type=Path, required="--worker" not in sys.argv)
    parser.add_argument("--llmcompressor", default="")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--own", type=int, default=0)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(ROWS.values()), choices=list(ROWS.values()))
    parser.add_argument("--texts", nargs="+", default=["domain", "general"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "awq_reference")
    return parser.parse_args()


if __name__ == "__main__":
    main()
