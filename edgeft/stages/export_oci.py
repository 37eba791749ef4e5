"""A container image with llama-server and the model, as one tar that podman, skopeo, umoci and docker load."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from edgeft import bundle, estimates, staging
from edgeft.bundle.launch import server_arguments
from edgeft.export import oci, service, web
from edgeft.export.files import Entry, plain
from edgeft.export.oci import Image, Layer
from edgeft.stage import Artifact, Facts, Job, Params, Stage, Step, digest
from edgeft.staging import Tree

FILE = "image.oci.tar"
MODELS = "models"
SECRET = "/run/secrets/edgeft-api-key"


class Oci(Params):
    tag: str = Field("latest", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    """The image is loaded as edgeft/NAME:TAG."""
    web_chat: web.WebChat = False
    """Whether llama-server's own web chat goes along; its first build needs npm."""


def run(job: Job[Oci]) -> Facts:
    tree = staging.collect(job.inputs)
    runtime = staging.runtime(tree.device)
    contents = {**tree.models, **tree.papers}
    manifest = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
    image = Image(
        name=f"edgeft/{tree.settings.name}:{job.params.tag}", architecture=runtime.arch, port=tree.settings.port,
        entrypoint=_entrypoint(tree, job.params),
        environment={"LLAMA_ARG_HOST": tree.settings.host, "LLAMA_ARG_PORT": str(tree.settings.port), "HOME": "/tmp"},
        labels=_labels(tree, job.params, runtime.isa),
        layers=(
            Layer(said=f"llama-server for {runtime.isa}", folders={"tmp": 0o1777}, files={
                f"{service.PROGRAMS}/llama-server": Entry(content=runtime.ensure() / "llama-server", mode=0o755),
                **web.entries(job.params.web_chat),
                "usr/share/doc/llama.cpp/copyright": Entry(content=staging.runtime_licence()),
                "etc/passwd": Entry(content=f"edgeft:x:{oci.NOBODY}:{oci.NOBODY}::/tmp:/sbin/nologin\n".encode()),
                "etc/group": Entry(content=f"edgeft:x:{oci.NOBODY}:\n".encode()),
            }),
            Layer(said="settings and papers", folders={},
                  files=plain({**tree.papers, "manifest.json": manifest}, service.models_folder(tree.settings.name))),
            *(Layer(said=name, folders={}, files={f"{MODELS}/{name}": Entry(content=path)})
              for name, path in tree.models.items()),
        ),
    )  # fmt: skip
    written = oci.write(image, job.out / FILE)
    size = (job.out / FILE).stat().st_size
    return {
        "summary": f"{image.name} for linux/{runtime.arch}, {size / 1e6:,.1f} MB in {len(written['layers'])} layers",
        "file": FILE, "bytes": size, "sha256": digest(job.out / FILE), "image": image.name, **written,
        "memory_mb": tree.need, "answering": tree.rate,
    }  # fmt: skip


def _entrypoint(tree: Tree, params: Oci) -> list[str]:
    """llama-server with all options but the address, which the environment gives: 127.0.0.1 reaches the host under
    `--network=host` alone. For another address a key is demanded, and without that file the server does not start."""
    s = tree.settings
    return [
        f"/{service.PROGRAMS}/llama-server", "--model", f"/{MODELS}/model.gguf",
        *(("--lora", f"/{MODELS}/adapter.gguf") if tree.adapter else ()),
        *server_arguments(s, address=False),
        *(("--path", f"/{web.FOLDER}") if params.web_chat else ()),
        *(("--api-key-file", SECRET) if s.host not in service.LOOPBACK else ()),
    ]  # fmt: skip


def _labels(tree: Tree, params: Oci, isa: str) -> dict[str, str]:
    return {
        "org.opencontainers.image.title": tree.settings.name, "org.opencontainers.image.version": params.tag,
        "org.opencontainers.image.description": f"{tree.type} for {tree.device['name']}, made by edgeft",
        "edgeft.isa": isa, "edgeft.target": str(tree.device["name"]),
        "edgeft.memory-mb": f"{tree.need['total']:.0f}", "edgeft.llama.cpp": tree.llama_cpp["commit"],
    }  # fmt: skip


def _check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    staging.runnable(step, artifacts)
    web.check(step.params.web_chat)  # type: ignore[attr-defined]


STAGE = Stage(
    name="export", kind="oci", params=Oci, run=run, per_target=True, extra="train", needs=staging.NEEDS,
    makes=(FILE,), tools=(staging.RUNTIMES,), check=_check, estimate=estimates.bundle,
)  # fmt: skip
