"""Two Debian packages: the programs for the processor, and the model with the service that serves it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pydantic import Field

import edgeft
from edgeft import bundle, estimates, staging
from edgeft.bundle.launch import slug
from edgeft.export import agent, deb, service, web
from edgeft.export.deb import Package
from edgeft.export.files import Entry, plain
from edgeft.stage import Artifact, Facts, InputPath, Job, Params, Stage, Step, digest
from edgeft.staging import Tree

PROGRAMS, MODEL = "runtime.deb", "model.deb"


class Deb(Params):
    version: str = Field("1.0", pattern=r"^[0-9][A-Za-z0-9.+~]*$")
    """Version of the model's package, without a dash. Raise it with every update: dpkg compares it."""
    maintainer: str = Field("edgeft <edgeft@localhost>", pattern=r"^[^<>\n]+ <[^<>\s]+@[^<>\s]+>$")
    """Whom to ask, as `Name <address>`."""
    trust: InputPath | None = None
    """root.json of `edgeft keys new`: whose updates the device takes. Without it, it takes none until somebody puts one
    into /etc/edgeft/trust."""
    web_chat: web.WebChat = False
    """Whether llama-server's own web chat goes along; its first build needs npm."""


def run(job: Job[Deb]) -> Facts:
    tree = staging.collect(job.inputs)
    programs = _programs(tree, job.params)
    model = _model(tree, job.params)
    deb.build(programs, job.out / PROGRAMS)
    deb.build(model, job.out / MODEL)
    sizes = {name: (job.out / name).stat().st_size for name in (PROGRAMS, MODEL)}
    return {
        "summary": f"{model.name} {sizes[MODEL] / 1e6:,.1f} MB, {programs.name} {sizes[PROGRAMS] / 1e6:,.1f} MB",
        "packages": [
            {"file": file, "package": p.name, "version": p.version, "architecture": p.architecture,
             "bytes": sizes[file], "sha256": digest(job.out / file)}
            for file, p in ((PROGRAMS, programs), (MODEL, model))
        ],
        "unit": model.unit, "memory_max_mb": _limit(tree), "memory_mb": tree.need, "answering": tree.rate,
    }  # fmt: skip


def _programs(tree: Tree, params: Deb) -> Package:
    """Moves only with llama.cpp, its settings, the update agent, whom it trusts, and edgeft's start script."""
    runtime = staging.runtime(tree.device)
    trust = params.trust.read_bytes() if params.trust else b""
    files = {
        f"{service.PROGRAMS}/llama-server": Entry(content=runtime.ensure() / "llama-server", mode=0o755),
        **service.shared(trust),
        **web.entries(params.web_chat),
    }
    page = params.model_dump(mode="json")["web_chat"]
    made_of = (runtime.pin, edgeft.__version__, agent.AGENT.pin, hashlib.sha256(trust).hexdigest(), page)
    build = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    version = f"{tree.llama_cpp['version']}+{tree.llama_cpp['commit'][:8]}.{build}"
    return Package(
        name=f"edgeft-runtime-{slug(runtime.name)}", version=version, architecture=runtime.arch,
        maintainer=params.maintainer, summary=f"llama-server for {runtime.isa}",
        description=(
            f"llama.cpp's server, compiled for {runtime.arch} processors with {runtime.isa}.",
            "On an older one it stops with an illegal instruction.",
        ),
        provides=f"edgeft-runtime (= {version})", conflicts="edgeft-runtime", foreign=True, files=files,
        depends=", ".join(runtime.debian()), recommends=", ".join(agent.PACKAGES),
        licence=staging.runtime_licence() + b"\n\n" + agent.licence(), owns=("var/lib/edgeft",),
    )  # fmt: skip


def _model(tree: Tree, params: Deb) -> Package:
    s = tree.settings
    groups = service.VULKAN_GROUPS if staging.runtime(tree.device).kind == "vulkan" else ()
    contents = {**tree.models, **tree.papers}
    manifest = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
    files = {
        **plain({**contents, "manifest.json": manifest}, service.models_folder(s.name)),
        **service.of_model(s, memory_max_mb=_limit(tree), groups=groups),
        f"usr/share/doc/edgeft-{s.name}/README.txt": Entry(
            content=service.readme(s, board=tree.device["name"], numbers=tree.numbers)
        ),
    }
    notice = tree.papers["NOTICE.txt"]
    return Package(
        name=f"edgeft-{s.name}", version=f"{params.version}+{hashlib.sha256(manifest).hexdigest()[:8]}",
        architecture="all", maintainer=params.maintainer, summary=f"fine-tuned language model {s.name} ({tree.type})",
        description=(
            f"Made by edgeft for {tree.device['name']}. llama-server answers on {s.host}:{s.port}.",
            f"Predicted there: {tree.need['total']:,.0f} MB of memory.",
        ),
        depends=f"edgeft-runtime (>= {tree.llama_cpp['version']})", files=files, licence=notice if isinstance(notice, bytes) else b"",
        unit=f"edgeft-{s.name}.service", owns=(service.versions_folder(s.name),),
    )  # fmt: skip


def _check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    staging.runnable(step, artifacts)
    params: Deb = step.params  # type: ignore[assignment]
    web.check(params.web_chat)
    if params.trust:
        agent.check_trust(params.trust)


def _limit(tree: Tree) -> int:
    """In a card's memory nothing is limited by this; what the host needs beside it is not predicted."""
    available = staging.target(tree.device)["memory_mb"]
    if tree.device["vram_mb"]:
        available = tree.device["ram_mb"] - tree.device["os_reserve_mb"]
    return service.memory_limit_mb(tree.need["total"], available)


STAGE = Stage(
    name="export", kind="deb", params=Deb, run=run, per_target=True, extra="train", needs=staging.NEEDS,
    makes=(PROGRAMS, MODEL), tools=(deb.DPKG_DEB, staging.RUNTIMES, agent.AGENT), check=_check, estimate=estimates.bundle,
)  # fmt: skip
