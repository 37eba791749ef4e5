"""A container image as an OCI layout in one tar, written without a daemon and without any tool.

Layers are plain tars, so that digest and diff_id are the same and the bytes do not hang on a compressor's version:
programs, settings, then each model file in a layer of its own, so that an update of one does not move the others.
Formats: image-spec v1.1 (image-layout.md, manifest.md, config.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from edgeft import progress
from edgeft.export.files import EPOCH, Files, size, write_tar

_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_BLOCK = 1 << 20
NOBODY = 65532
"""User and group in the image; no account of any system has this number by default."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    said: str
    """What the image's history says of it."""
    files: Files
    folders: Mapping[str, int]
    """Empty folders with their modes."""


@dataclass(frozen=True, kw_only=True)
class Image:
    name: str
    """The reference it is loaded under, as `edgeft/tiny:1.0`."""
    architecture: str
    """amd64 or arm64, as Go and the image-spec call them."""
    entrypoint: Sequence[str]
    environment: Mapping[str, str]
    port: int
    labels: Mapping[str, str]
    layers: Sequence[Layer]


def write(image: Image, out: Path) -> dict[str, Any]:
    """Write the image to the tar `out`; returns its digest and those of the layers with their sizes in bytes.

    The file appears under its name only when it is whole. The model is read twice, for its digest and to be copied.
    """
    layers, done, total = [], 0, sum(size(layer.files) for layer in image.layers)
    for layer in image.layers:
        progress.report("hash the layers", done, total, unit="bytes")
        layers.append(_descriptor(_LAYER, *_measure(layer)))
        done += size(layer.files)
    config = _json(_config(image, [layer["digest"] for layer in layers]))
    config_at = _descriptor(_CONFIG, hashlib.sha256(config).hexdigest(), len(config))
    manifest = _json({
        "schemaVersion": 2, "mediaType": _MANIFEST, "config": config_at, "layers": layers,
        "annotations": dict(image.labels),
    })  # fmt: skip
    manifest_at = _descriptor(_MANIFEST, hashlib.sha256(manifest).hexdigest(), len(manifest))
    index = _json({
        "schemaVersion": 2, "mediaType": _INDEX, "manifests": [{
            **manifest_at, "platform": _platform(image.architecture),
            "annotations": {"org.opencontainers.image.ref.name": image.name},
        }],
    })  # fmt: skip
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with aside.open("wb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
                _add(tar, "index.json", index)
                _add(tar, _blob(manifest_at), manifest)
                _add(tar, _blob(config_at), config)
                for layer, at in zip(image.layers, layers, strict=True):
                    _add_layer(tar, raw, layer, at)
            raw.flush()
            os.fsync(raw.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return {"digest": manifest_at["digest"], "config": config_at["digest"],
            "layers": [{"digest": at["digest"], "bytes": at["size"]} for at in layers]}  # fmt: skip


def _config(image: Image, diff_ids: Sequence[str]) -> dict[str, Any]:
    created = datetime.fromtimestamp(EPOCH, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "created": created, **_platform(image.architecture),
        "config": {
            "User": f"{NOBODY}:{NOBODY}", **({"Entrypoint": list(image.entrypoint)} if image.entrypoint else {}), "WorkingDir": "/",
            "Env": [f"{key}={value}" for key, value in sorted(image.environment.items())],
            **({"ExposedPorts": {f"{image.port}/tcp": {}}} if image.port else {}), "Labels": dict(image.labels), "StopSignal": "SIGTERM",
        },
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [{"created": created, "created_by": f"edgeft: {layer.said}"} for layer in image.layers],
    }  # fmt: skip


def _platform(architecture: str) -> dict[str, str]:
    """arm64 is v8 for every tool; x86-64's levels are known to few, and stand in a label instead."""
    return {
        "architecture": architecture,
        "os": "linux",
        **({"variant": "v8"} if architecture == "arm64" else {}),
    }


def _descriptor(media: str, sha256: str, length: int) -> dict[str, Any]:
    return {"mediaType": media, "digest": f"sha256:{sha256}", "size": length}


def _blob(at: Mapping[str, Any]) -> str:
    return "blobs/" + str(at["digest"]).replace(":", "/")


class _Meter(io.RawIOBase):
    """Counts and hashes what is written into it, and passes it on where there is somewhere to."""

    def __init__(self, onward: IO[bytes] | None = None) -> None:
        self.sha256, self.length, self._onward = hashlib.sha256(), 0, onward

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.sha256.update(block)
        self.length += len(block)
        if self._onward:
            self._onward.write(block)
        return len(block)

    def tell(self) -> int:
        return self.length


def _measure(layer: Layer) -> tuple[str, int]:
    meter = _Meter()
    write_tar(meter, layer.files, layer.folders)  # type: ignore[arg-type]
    return meter.sha256.hexdigest(), meter.length


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_info(name, len(content)), io.BytesIO(content))


def _add_layer(tar: tarfile.TarFile, raw: IO[bytes], layer: Layer, at: Mapping[str, Any]) -> None:
    """A tar inside the tar: its head, then its bytes straight into the file, padded to whole records."""
    progress.report("pack the image")
    head = _info(_blob(at), at["size"]).tobuf(tarfile.PAX_FORMAT)
    raw.write(head)
    meter = _Meter(raw)
    write_tar(meter, layer.files, layer.folders)  # type: ignore[arg-type]
    raw.write(b"\0" * (-meter.length % tarfile.BLOCKSIZE))
    tar.offset += len(head) + meter.length + -meter.length % tarfile.BLOCKSIZE
    if f"sha256:{meter.sha256.hexdigest()}" != at["digest"]:
        raise OSError(f"a file of the layer {layer.said!r} changed while it was packed")


def _info(name: str, length: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = length, EPOCH, 0o644
    return info


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
