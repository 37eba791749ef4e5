"""A model folder for vLLM and SGLang, or for ONNX Runtime GenAI, as a tar, and as an image that only holds the model."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from edgeft import bundle, serving
from edgeft.export import oci, ollama, server
from edgeft.export.files import Entry, plain
from edgeft.export.oci import Image, Layer
from edgeft.serving import Tree
from edgeft.stage import Artifact, Facts, Job, Needs, Params, Stage, Step, digest

FILE, IMAGE = "server.tar", "model.oci.tar"


class Server(Params):
    image: bool = False
    """Also write the folder as a container image without programs, to be mounted into the vendor's."""
    tag: str = Field("latest", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    """That image is loaded as edgeft/NAME:TAG."""


def run(job: Job[Server]) -> Facts:
    tree = serving.collect(job.inputs)
    reference = f"edgeft/{tree.launch.name}:{job.params.tag}" if job.params.image else ""
    contents = {**tree.model, **tree.papers, **_programs(tree, reference)}
    manifest = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
    ollama.write(plain({**contents, "manifest.json": manifest}, tree.launch.name), job.out / FILE)
    size = (job.out / FILE).stat().st_size
    written = _image(tree, reference, manifest, job) if reference else {}
    return {
        "summary": f"{size / 1e6:,.1f} MB, {tree.type} for {tree.device['name']}; predicted there: {tree.need['total']:,.0f} MB"
        + (f"; image {reference}" if reference else ""),
        "file": FILE, "bytes": size, "sha256": digest(job.out / FILE), "name": tree.launch.name, "memory_mb": tree.need,
        "files": sorted(contents), **written,
    }  # fmt: skip


def _programs(tree: Tree, image: str) -> dict[str, bundle.Content]:
    """What starts the model, and the README."""
    board = str(tree.device["name"])
    if tree.format == "onnx":
        return {
            "answer.py": server.answer_program(),
            "README.txt": server.readme_genai(
                name=tree.launch.name, board=board, label=tree.type, provider=tree.provider, measured=tree.measured, image=image,
                numbers=tree.numbers,
            ),
        }  # fmt: skip
    notes = (
        "Keys and values of the context are kept in 16 bits, as they were measured; [serve] kv_type is llama.cpp's.",
    )
    return {
        "run.sh": server.run_vllm(tree.launch), "run-sglang.sh": server.run_sglang(tree.launch),
        "compose.yaml": server.compose(tree.launch, image),
        "README.txt": server.readme_server(
            tree.launch, board=board, label=tree.type, measured=tree.measured, image=image, system=tree.system, notes=notes,
            numbers=tree.numbers,
        ),
    }  # fmt: skip


def _image(tree: Tree, reference: str, manifest: bytes, job: Job[Server]) -> Facts:
    """The folder alone: papers in one layer, the model in the next, no program and no user."""
    image = Image(
        name=reference, architecture=str(tree.device["arch"]), entrypoint=(), environment={}, port=0,
        labels={
            "org.opencontainers.image.title": tree.launch.name, "org.opencontainers.image.version": job.params.tag,
            "org.opencontainers.image.description": f"{tree.type}, a model without programs, made by edgeft",
            "edgeft.target": str(tree.device["name"]), "edgeft.memory-mb": f"{tree.need['total']:.0f}",
        },
        layers=(
            Layer(said="papers", folders={}, files={n: Entry(content=c) for n, c in {**tree.papers, "manifest.json": manifest}.items()}),
            Layer(said="model", folders={}, files={n: Entry(content=c) for n, c in tree.model.items()}),
        ),
    )  # fmt: skip
    written = oci.write(image, job.out / IMAGE)
    return {"image": reference, "image_sha256": digest(job.out / IMAGE), **written}


def _estimate(step: Step, artifacts: Mapping[str, Artifact]) -> Needs:
    size = serving.weights_mb(step, artifacts)
    return Needs(disk_mb=round(size * (2 if step.params.image else 1)) + 1 if size else 0)  # type: ignore[attr-defined]


STAGE = Stage(
    name="export", kind="server", params=Server, run=run, per_target=True, extra="train", needs=serving.NEEDS, makes=(FILE,),
    check=serving.check, estimate=_estimate,
)  # fmt: skip
