"""Pack the model and all it needs into one file for a board; refuse, before training, what cannot fit there."""

from __future__ import annotations

import importlib.metadata

from pydantic import Field

from edgeft import bundle, estimates, staging
from edgeft.bundle import papers
from edgeft.stage import Facts, Job, Params, Stage, digest
from edgeft.staging import check

FILE = "bundle.tar.zst"


class Bundle(Params):
    level: int = Field(3, ge=1, le=19)
    """zstd's level. Quantized weights hardly compress at any."""


def run(job: Job[Bundle]) -> Facts:
    tree = staging.collect(job.inputs)
    settings, adapter = tree.settings, bool(tree.adapter)
    contents: dict[str, bundle.Content] = {
        **tree.models, **tree.papers,
        "Modelfile": bundle.modelfile(settings, tree.stop, adapter=adapter),
        "README.txt": papers.readme(
            name=settings.name, board=tree.device["name"], llama_cpp=tree.llama_cpp["commit"], port=settings.port,
            host=settings.host, system=settings.system, adapter=adapter, numbers=tree.numbers,
        ),
    }  # fmt: skip
    made_with = {**tree.about["made_with"], "zstandard": importlib.metadata.version("zstandard")}
    about = {**tree.about, "made_with": made_with}
    manifest = bundle.write_bundle(job.out / FILE, contents, about, level=job.params.level)
    (job.out / "manifest.json").write_bytes(bundle.manifest_text(manifest))
    size = (job.out / FILE).stat().st_size
    return {
        "summary": f"{size / 1e6:,.1f} MB for {tree.device['name']}; predicted there: {tree.need['total']:,.0f} MB, "
        f"{tree.rate}",
        "file": FILE, "bytes": size, "sha256": digest(job.out / FILE), "name": settings.name,
        "memory_mb": tree.need, "answering": tree.rate, "files": sorted(contents),
    }  # fmt: skip


STAGE = Stage(
    name="export", kind="bundle", params=Bundle, run=run, per_target=True, extra="train",
    needs=staging.NEEDS, makes=(FILE, "manifest.json"),
    check=check, estimate=estimates.bundle, version=3,
)  # fmt: skip
