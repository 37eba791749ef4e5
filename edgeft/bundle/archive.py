"""Writes and checks a bundle: a tar in zstd, the same bytes for the same contents, with its manifest inside."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from edgeft import progress
from edgeft.errors import DataError
from edgeft.llamacpp.adapter import ADAPTER, MODEL, check_base, tensor_bytes

MANIFEST = "manifest.json"
EXECUTABLE = {"run.sh"}
Content = Path | bytes
_BLOCK = 1 << 20


def write_bundle(
    out: Path, contents: Mapping[str, Content], about: Mapping[str, Any], *, level: int = 3
) -> dict[str, Any]:
    """Pack `contents` (name in the bundle -> file or bytes) and a manifest, and return the manifest.

    The manifest is `about` and the size and sha256 of every file. Beside `model.gguf`, an `adapter.gguf` must be for
    this very model (DataError); `adapter` in the manifest then says which weights that are. Names are sorted, owners and times zero,
    and zstd runs in one thread at a fixed level, so the same contents give the same bytes with the same
    version of zstd. The file appears under its name only when it is whole.
    """
    import zstandard

    manifest = manifest_of(contents, about)
    text = manifest_text(manifest)
    total = sum(f["bytes"] for f in manifest["files"].values())
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    compressor = zstandard.ZstdCompressor(
        level=level, threads=0, write_checksum=True, write_content_size=False
    )
    done = 0
    try:
        with aside.open("wb") as raw:
            with (
                compressor.stream_writer(raw, closefd=False) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                _add(tar, MANIFEST, text)
                for name in sorted(contents):
                    progress.report("pack the bundle", done, total, unit="bytes")
                    _add(tar, name, contents[name])
                    done += manifest["files"][name]["bytes"]
            raw.flush()
            os.fsync(raw.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return manifest


def manifest_of(contents: Mapping[str, Content], about: Mapping[str, Any]) -> dict[str, Any]:
    """`about`, the size and sha256 of every file, and `adapter`: for which weights the one beside the model is.

    Raises DataError for an adapter of another base.
    """
    files = {name: _fingerprint(contents[name]) for name in sorted(contents)}
    return {**about, "files": files, **_pair(contents)}


def manifest_text(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as its file."""
    return (json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def verify_bundle(path: Path) -> dict[str, Any]:
    """Read a bundle to its end, check every file against the manifest in it, and return the manifest.

    Raises DataError naming the first file that is damaged, missing, unlisted, given twice, or whose name
    leads out of the folder.
    """
    import zstandard

    try:
        with path.open("rb") as raw:
            unpacked = _Unpacked(raw, zstandard.ZstdDecompressor().decompressobj())
            manifest, found = _read(unpacked, path)
            unpacked.finish()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as e:
        raise DataError(f"{path} is not a whole tar.zst: {e}", hint=_AGAIN) from None
    listed = manifest["files"]
    if missing := sorted(set(listed) - set(found)):
        raise DataError(f"{path} lacks {missing[0]}, which its manifest lists", hint=_AGAIN)
    for name, fingerprint in found.items():
        if name not in listed:
            raise DataError(f"{path} holds {name}, which its manifest does not list", hint=_AGAIN)
        if fingerprint != listed[name]:
            raise DataError(
                f"{name} in {path} is damaged: its sha256 is {fingerprint['sha256']}, "
                f"the manifest says {listed[name]['sha256']}",
                hint=_AGAIN,
            )
    return manifest


_AGAIN = "copy the bundle again, or build it again"


class _Unpacked:
    """A zstd frame as a file to read. zstandard's own reader takes a frame that is cut off for a whole one."""

    def __init__(self, raw: IO[bytes], frame: Any) -> None:
        self._raw, self._frame, self._ready = raw, frame, b""

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and not self._frame.eof and (packed := self._raw.read(_BLOCK)):
            self._ready += self._frame.decompress(packed)
        given, self._ready = self._ready[:size], self._ready[size:]
        return given

    def finish(self) -> None:
        """Read to the end, where zstd's own checksum stands. Raises EOFError when the end is another."""
        while self.read(_BLOCK):
            pass
        if not self._frame.eof:
            raise EOFError("it is cut off")
        if self._frame.unused_data or self._raw.read(1):
            raise EOFError("something follows its end")


def _read(unpacked: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    manifest: dict[str, Any] | None = None
    found: dict[str, Any] = {}
    with tarfile.open(fileobj=unpacked, mode="r|") as tar:
        for member in tar:
            name = member.name
            if name.startswith("/") or ".." in name.split("/") or not member.isfile():
                raise DataError(
                    f"{path} holds {name!r}, which is no plain file inside the bundle", hint=_AGAIN
                )
            if name in found or (name == MANIFEST and manifest is not None):
                raise DataError(f"{path} holds {name} twice", hint=_AGAIN)
            file = tar.extractfile(member)
            assert file is not None
            if name == MANIFEST:
                manifest = _manifest(file.read(), path)
            else:
                found[name] = _of_stream(file)
    if manifest is None:
        raise DataError(f"{path} has no {MANIFEST}: it is no bundle of edgeft", hint=_AGAIN)
    return manifest, found


def _manifest(text: bytes, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except ValueError as e:
        raise DataError(f"{MANIFEST} in {path} is not JSON: {e}", hint=_AGAIN) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{MANIFEST} in {path} lists no files", hint=_AGAIN)
    return manifest


def _pair(contents: Mapping[str, Content]) -> dict[str, Any]:
    """What the manifest says of an adapter, nothing without one. Raises DataError when it is for another base."""
    if ADAPTER not in contents:
        return {}
    base, adapter = contents.get(MODEL), contents[ADAPTER]
    if not isinstance(base, Path) or not isinstance(adapter, Path):
        raise DataError(f"a bundle with {ADAPTER} needs both files on the disk, it and its base {MODEL}")
    return {
        "adapter": {"base_tensors_sha256": check_base(base, adapter), "tensor_bytes": tensor_bytes(adapter)}
    }


def _add(tar: tarfile.TarFile, name: str, content: Content) -> None:
    info = tarfile.TarInfo(name)
    info.mode = 0o755 if name in EXECUTABLE else 0o644
    if isinstance(content, bytes):
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        return
    info.size = content.stat().st_size
    with content.open("rb") as file:
        tar.addfile(info, file)


def _fingerprint(content: Content) -> dict[str, Any]:
    if isinstance(content, bytes):
        return _of_stream(io.BytesIO(content))
    with content.open("rb") as file:
        return _of_stream(file)


def _of_stream(file: IO[bytes]) -> dict[str, Any]:
    whole, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        whole.update(block)
        size += len(block)
    return {"bytes": size, "sha256": whole.hexdigest()}
