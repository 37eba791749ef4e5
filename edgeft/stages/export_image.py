"""A disk image that starts the board and answers: system A and B, and the model on a data partition of its own."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

import edgeft
from edgeft import bundle, estimates, progress, staging
from edgeft.errors import DataError, SetupError
from edgeft.export import service, web
from edgeft.export.files import Entry, Files, plain
from edgeft.image import disk, filesystems, kinds, system, units
from edgeft.image.kinds import Kind
from edgeft.stage import Artifact, Facts, InputPath, Job, Needs, Params, Stage, Step
from edgeft.staging import Tree

IMAGE, SUMS, MANIFEST = "image.img.zst", "image.sha256", "image.json"
SYSTEM_MB = 900
"""Two systems, their kernels and room for a third on the disk before it is compressed, and the packed copy."""
BUILD_MB = 1500
"""mksquashfs with its dictionary on two cores."""
_KEPT = ("drivers/input/evdev.ko",)
"""Without it nobody hears the power button."""
T = TypeVar("T")


class Image(Params):
    lan: bool = False
    """Whether the network is answered too, with the key; else this machine alone. The recipe's `[serve] host` counts as well."""
    api_key: InputPath | None = None
    """File with the key that clients send; without it the board makes its own at its first start."""
    authorized_keys: InputPath | None = None
    """Public keys that may log in over ssh as `edgeft` and become root; without it nobody can log in at all."""
    trust: InputPath | None = None
    """root.json of `edgeft keys`: whose updates the board takes; without it, nobody's."""
    hostname: str = Field("edgeft", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    data_mb: int = Field(0, ge=0, le=1 << 20)
    """Least size of the data partition, MiB, on the image. It grows to the card's end at the first start."""
    web_chat: web.WebChat = False
    """Whether llama-server's own web chat goes along; its first build needs npm."""


def run(job: Job[Image]) -> Facts:
    p, seconds = job.params, dict[str, float]()
    tree = staging.collect(job.inputs)
    kind = kinds.of(tree.device["image"], tree.device["name"])
    tree = replace(tree, settings=replace(tree.settings, host="0.0.0.0")) if p.lan else tree
    work = job.out / "work"
    made = _timed(seconds, "system", lambda: system.build(_wanted(tree, kind, p), work))
    data, folders, links = _data(tree, p)
    contents = disk.Contents(
        kind=kind, root=made.root, kernel=made.kernel, initrd=made.initrd, firmware=made.boot, options=made.cmdline,
        data=data, folders=folders, links=links, data_bytes=p.data_mb * disk.MIB,
    )  # fmt: skip
    raw = work / "image.img"
    layout = _timed(seconds, "disk", lambda: disk.assemble(contents, raw))
    packed = _timed(seconds, "compress", lambda: disk.pack(raw, job.out / IMAGE))
    manifest = _manifest(tree, kind, p, made, layout, packed)
    (job.out / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (job.out / SUMS).write_text(f"{packed['sha256']}  {IMAGE}\n", encoding="utf-8")
    shutil.rmtree(work)
    sizes = {**made.sizes, **{f"{part['name']}": part["size"] for part in layout}}
    return {
        "summary": f"{kind.name}, {packed['bytes'] / 1e6:,.0f} MB packed, {packed['raw_bytes'] / 1e6:,.0f} MB on the card",
        "image": kind.name, "packages": len(made.packages), "kernel": made.kernel_version, **packed, "sizes": sizes,
        "memory_mb": tree.need, "answering": tree.rate, **{f"{name}_seconds": s for name, s in seconds.items()},
    }  # fmt: skip


def _wanted(tree: Tree, kind: Kind, p: Image) -> system.Wanted:
    """What edgeft puts into the Debian system, which is the same for A and B."""
    s = tree.settings
    runtime = staging.runtime(tree.device)
    files: dict[str, Entry] = {
        f"{service.PROGRAMS}/llama-server": Entry(content=runtime.ensure() / "llama-server", mode=0o755),
        **service.shared(p.trust.read_bytes() if p.trust else b""), **_of_model(tree), **units.of_image(s.name, s.port),
        **web.entries(p.web_chat),
        "usr/share/doc/edgeft/llama-server.txt": Entry(content=staging.runtime_licence()),
    }  # fmt: skip
    del files[_settings_file(s.name)]
    return system.Wanted(
        arch=kind.arch, model=s.name, files=files, enable=(*service.enabled(s.name), *units.ENABLED),
        packages=kind.packages, boot_files=disk.sources(kind), modules=kind.modules, keep_modules=_KEPT, hostname=p.hostname,
        ssh_keys=_keys(p.authorized_keys),
    )  # fmt: skip


def _data(tree: Tree, p: Image) -> tuple[Files, Mapping[str, int], Mapping[str, str]]:
    """The data partition, which is the device's /var: files, folders with their modes, links."""
    name = tree.settings.name
    contents = {**tree.models, **tree.papers}
    manifest = bundle.manifest_text(bundle.manifest_of(contents, tree.about))
    home = f"lib/edgeft/models/{name}"
    files = {
        **plain({**contents, "manifest.json": manifest}, f"{home}/versions/0"),
        f"lib/edgeft/settings/{name}.env": _of_model(tree)[_settings_file(name)],
    }
    if p.api_key:
        key = p.api_key.read_text(encoding="utf-8").strip()
        if len(key) < 16 or not key.isascii() or any(c.isspace() for c in key):
            raise DataError(
                f"{p.api_key} holds no key: at least 16 ASCII characters on one line, without spaces"
            )
        files[service.KEY.removeprefix("var/")] = Entry(content=f"{key}\n".encode(), mode=0o600)
    return files, system.VAR, {f"{home}/current": "versions/0"}


def _of_model(tree: Tree) -> dict[str, Entry]:
    available = staging.target(tree.device)["memory_mb"]
    return service.of_model(
        tree.settings, memory_max_mb=service.memory_limit_mb(tree.need["total"], available)
    )


def _settings_file(name: str) -> str:
    return f"etc/edgeft/{name}.env"


def _keys(path: Path | None) -> tuple[str, ...]:
    """The lines of an authorized_keys file. Raises DataError when it has none, or when one is a private key's."""
    if path is None:
        return ()
    text = path.read_text(encoding="utf-8")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not lines or "PRIVATE KEY" in text:
        raise DataError(f"{path} holds no public key", hint="its lines begin with ssh-ed25519 or the like")
    return lines


def _manifest(
    tree: Tree,
    kind: Kind,
    p: Image,
    made: system.System,
    layout: list[dict[str, Any]],
    packed: Mapping[str, Any],
) -> dict[str, Any]:
    s = tree.settings
    return {
        "format": 1, "name": s.name, "image": kind.name, "target": tree.device, "serves": {"host": s.host, "port": s.port},
        "api_key": "given" if p.api_key else "made by the board", "updates": bool(p.trust), "predicted": {"memory_mb": tree.need},
        "partitions": layout, "packed": packed, "kernel": made.kernel_version, "packages": made.packages,
        "made_with": {"edgeft": edgeft.__version__, "llama.cpp": tree.llama_cpp},
    }  # fmt: skip


def check(step: Step, artifacts: Mapping[str, Artifact]) -> None:
    """Refuse boards that cannot get an image (SetupError, with what to take instead), then what every exporter refuses."""
    if device := step.find("device"):
        p: Any = device.params
        kinds.of(p.image, p.name)
        if p.gpu or p.vram_mb:
            raise SetupError(
                f"there is no image for {p.name}: its GPU needs a driver of NVIDIA's, which Debian's system does not bring",
                hint='take [[export]] kind = "deb" or "bundle" on the system that has the driver',
            )
    staging.runnable(step, artifacts)
    web.check(step.params.web_chat)  # type: ignore[attr-defined]


def estimate(step: Step, artifacts: Mapping[str, Artifact]) -> Needs:
    """The packed image, and while it is made the disk before that; the model lies in both."""
    model = estimates.bundle(step, artifacts).disk_mb
    return Needs(disk_mb=SYSTEM_MB + 3 * model + step.params.data_mb, ram_mb=BUILD_MB)  # type: ignore[attr-defined]


def _timed(seconds: dict[str, float], name: str, work: Callable[[], T]) -> T:
    progress.report(name)
    begin = time.monotonic()
    result = work()
    seconds[name] = round(time.monotonic() - begin, 1)
    return result


STAGE = Stage(
    name="export", kind="image", params=Image, run=run, per_target=True, extra="train", needs=staging.NEEDS,
    makes=(IMAGE, SUMS, MANIFEST), tools=(*filesystems.TOOLS, *system.TOOLS, staging.RUNTIMES), check=check,
    estimate=estimate,
)  # fmt: skip
