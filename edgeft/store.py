"""Where results live: one directory a key, filled under work/ and committed by a rename.

    .edgeft/
      CACHEDIR.TAG                 backup programs skip the folder; nothing is ever deleted without it
      work/<key>/                  being filled; survives a crash only for a resumable stage
      done/<stage>-<key>/          committed: files, and edgeft.json with what they are and their sha256
      locks/                       held while a recipe is built and while a step runs
      reports/<recipe>/            written by `report`

A committed file that no longer has its recorded sha256 is never used: the result is dropped and made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgeft.errors import BusyError, EdgeftError, StageError
from edgeft.stage import Artifact, Facts, Step, digest

log = logging.getLogger(__name__)

MANIFEST = "edgeft.json"
CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Created by edgeft.\n"
RECORDED = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy", "gguf")
"""Packages whose versions are written into a manifest. They are recorded, not hashed into the key."""


class Store:
    """Finds, fills and commits results. Makes no directory before something is written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, step: Step, *, thorough: bool = False) -> Artifact | None:
        """The committed result of a step, or None.

        Files whose size, time and inode are as committed are taken as unchanged; any other file, and with
        `thorough` every file, is hashed. A result with a wrong hash is dropped, with a warning.
        """
        path = self.path(step)
        manifest = read_manifest(path)
        if manifest is None:
            return None
        if wrong := _damaged(path, manifest, thorough=thorough):
            log.warning("%s in the store is damaged (%s): it will be made again", step.title, wrong)
            with contextlib.suppress(OSError):
                shutil.rmtree(path)
            return None
        return Artifact(step.stage, step.key, path, manifest["facts"])

    @contextmanager
    def workspace(self, step: Step) -> Iterator[Path]:
        """The directory to fill, held by this process alone. A resumable one keeps its files."""
        with self._lock(step.key, wait=True):
            out = self.root / "work" / step.key
            if out.exists() and not step.stage.resumable:
                shutil.rmtree(out)
            out.mkdir(parents=True, exist_ok=True)
            yield out

    def commit(self, step: Step, out: Path, facts: Facts, seconds: float) -> Artifact:
        """Record what was made, flush it to the disk, and rename it into place.

        Raises StageError when a file the stage promised is missing.
        """
        if missing := [name for name in step.stage.makes if not (out / name).exists()]:
            raise StageError(f"{step.title} returned without making {', '.join(missing)}")
        files = {}
        for file in sorted(p for p in out.rglob("*") if p.is_file() and p != out / MANIFEST):
            flush(file)
            files[file.relative_to(out).as_posix()] = {"sha256": digest(file), **_stat(file)}
        manifest = {
            **step.identity, "key": step.key, "facts": facts, "files": files,
            "seconds": round(seconds, 3), "finished": time.time(), "versions": _versions(),
        }  # fmt: skip
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush(out / MANIFEST)
        path = self.path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            shutil.rmtree(path)
        out.replace(path)
        flush(path.parent)
        return Artifact(step.stage, step.key, path, facts)

    def path(self, step: Step) -> Path:
        """Where the step's result stands once it is committed."""
        return self.root / "done" / f"{step.stage.id.replace('/', '-')}-{step.key}"

    def manifests(self, stage_id: str = "") -> list[dict[str, Any]]:
        """Every committed manifest, newest first; of one stage when `stage_id` is given."""
        found = [m for p in (self.root / "done").glob("*") if (m := read_manifest(p))]
        found = [m for m in found if stage_id in ("", m["stage"])]
        return sorted(found, key=lambda m: -float(m["finished"]))

    @contextmanager
    def building(self, recipe: str) -> Iterator[None]:
        """Hold the recipe for the length of a build. Raises BusyError when another build has it."""
        with self._lock(f"build-{recipe}", wait=False):
            yield

    def sweep(self, keep: Collection[str], *, dry: bool = False) -> list[tuple[Path, int]]:
        """Delete every result and workspace whose key is not in `keep`; returns them with their bytes.

        Raises EdgeftError when the folder carries no CACHEDIR.TAG: then edgeft did not make it.
        """
        if not self.root.exists():
            return []
        if not (self.root / "CACHEDIR.TAG").exists():
            raise EdgeftError(
                f"{self.root} has no CACHEDIR.TAG, so edgeft did not make it; nothing was deleted"
            )
        gone = []
        for path in [*(self.root / "done").glob("*"), *(self.root / "work").glob("*")]:
            if path.is_dir() and path.name.rsplit("-", 1)[-1] not in keep:
                gone.append((path, sum(p.stat().st_size for p in path.rglob("*") if p.is_file())))
                if not dry:
                    shutil.rmtree(path)
        return gone

    @contextmanager
    def _lock(self, name: str, *, wait: bool) -> Iterator[None]:
        self._prepare()
        path = self.root / "locks" / f"{name}.lock"
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(lock)
                if not wait:
                    raise BusyError(
                        f"another edgeft process{holder} is already doing {name.removeprefix('build-')} in {self.root}",
                        hint="wait for it to finish, or build into another store with --store DIR",
                    ) from None
                log.warning("waiting for another edgeft process%s that is making the same step", holder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _prepare(self) -> None:
        for name in ("work", "done", "locks"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            write_atomically(tag, CACHEDIR_TAG)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a committed directory, or None when there is none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that nobody ever sees half of it: write aside, flush, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    flush(aside)
    aside.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file or a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _damaged(path: Path, manifest: dict[str, Any], *, thorough: bool) -> str:
    """The first file that is not what was committed, or an empty string."""
    for name, known in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        now = _stat(file)
        if now["bytes"] != known["bytes"]:
            return f"{name} has {now['bytes']} bytes, {known['bytes']} were written"
        same = now["mtime_ns"] == known["mtime_ns"] and now["inode"] == known["inode"]
        if (thorough or not same) and digest(file) != known["sha256"]:
            return f"the sha256 of {name} is not the recorded one"
    return ""


def _stat(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _versions() -> dict[str, str]:
    found = {}
    for name in RECORDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    pid = lock.read().strip()
    return f" (pid {pid})" if pid else ""
