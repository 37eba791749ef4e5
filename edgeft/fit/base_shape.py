"""The shape of the base model that a recipe names, from whatever of it is on this machine. Never the network."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from pathlib import Path
from typing import Any

from edgeft import resources
from edgeft.fit.shape import ModelShape, shape_of


def base_shape(base: Any, artifact: Path | None = None) -> ModelShape | None:
    """The shape of a `[base]` table: from its finished artifact, a path, an installed package, or the hub's cache.

    `base` has some of the attributes path, package, version, file, repo and revision. None means that nothing
    of it is here yet, so nothing can be said. Raises DataError for a file that is here and cannot be read.
    """
    for place in (_in_artifact(artifact), _in_path(base), _in_package(base), _in_hub_cache(base)):
        if place is not None and (shape := shape_of(place)) is not None:
            return shape
    return None


def cached_model(name: str) -> Path | None:
    """The folder of a hub model `owner/name` or `owner/name@revision` whose config.json is in a cache of this machine.

    Without a revision the one that `main` pointed to when it was last fetched, else any. None when there is none.
    """
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")):
        return None
    owner = hub_cache() / f"models--{repo.replace('/', '--')}"
    main = owner / "refs" / "main"
    if not revision and main.is_file():
        revision = main.read_text(encoding="utf-8").strip()
    ours = f"{repo.replace('/', '--')}@{revision or '*'}"
    places = [
        *sorted((owner / "snapshots").glob(revision or "*")),
        *sorted((resources.cache() / "hub").glob(ours)),
    ]
    return next((place for place in places if (place / "config.json").is_file()), None)


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads: $HF_HUB_CACHE, else hub/ in $HF_HOME, else in ~/.cache/huggingface."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME")
    if home is None:
        xdg = os.environ.get("XDG_CACHE_HOME")
        home = os.fspath(Path(xdg) / "huggingface") if xdg else "~/.cache/huggingface"
    return Path(home).expanduser() / "hub"


def _in_artifact(artifact: Path | None) -> Path | None:
    if artifact is None:
        return None
    return next((p for p in (artifact / "model", artifact) if (p / "config.json").is_file()), artifact)


def _in_path(base: Any) -> Path | None:
    path = getattr(base, "path", None)
    return Path(path) if path else None


def _in_package(base: Any) -> Path | None:
    """The file in the installed package of that version, else where the base stage keeps it out of a wheel."""
    package, version, file = (getattr(base, name, None) for name in ("package", "version", "file"))
    if not (package and version and file):
        return None
    places = [resources.cache() / "packages" / f"{package}-{version}" / file]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution(package)
        if installed.version == version:
            places.insert(0, Path(str(installed.locate_file(file))))
    return next((p for p in places if p.is_file()), None)


def _in_hub_cache(base: Any) -> Path | None:
    repo, revision = getattr(base, "repo", None), getattr(base, "revision", None)
    if not (repo and revision):
        return None
    folder = hub_cache() / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    return folder if folder.is_dir() else None
