"""What each format keeps of a fine-tune, at which size: one table out of a build's certificate. Prints Markdown.

    edgeft build RECIPE.toml        # with [[quantize]] tables of several kinds
    python benchmarks/format_quality.py .edgeft/reports/RECIPE/certificate.json

All rows are held to the same reference on the same windows; each by the runtime that serves it, which the last column
names. In brackets the one-sided 95 % bound. Noise: KL divergence between two right computations of the same file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgeft.parity import certificate
from edgeft.parity.certificate import File


def row(file: File) -> list[str]:
    """One file's cells."""
    d, general, kept = file.domain, file.general, file.retention
    share = "–"
    if kept and kept.retention is not None and kept.retention_bound is not None:
        share = f"{kept.retention:.1%} ({kept.retention_bound:.1%})"
    return [
        file.title, f"{file.bytes / 1e6:,.1f}", f"{file.bits_per_weight:.2f}", f"{d.kld:.4f} ({d.kld_bound:.4f})",
        f"{d.ppl_ratio:.4f}", f"{d.same_top:.1%}", share, f"{general.kld:.4f}" if general else "–",
        f"{file.floor['largest']:.1e}" if file.floor else "–", file.verdict, file.runtime,
    ]  # fmt: skip


def main() -> None:
    """Read the certificate, print the table in order of size."""
    found = certificate.load(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    texts = "; ".join(f"{t['name']}: {t['windows']} windows, {t['counted']:,} tokens" for t in found.texts)
    print(f"{found.name}, against {found.reference}. {texts}. {found.machine}\n")
    head = ["file", "MB", "bits/weight", "KLD", "PPL ratio", "same top", "gain kept", "KLD, general", "noise", "verdict", "scored by"]  # fmt: skip
    for cells in (head, ["---"] * len(head), *map(row, sorted(found.files, key=lambda f: f.bytes))):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
