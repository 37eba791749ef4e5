"""The update agent as one executable file: edgeft/agent with the libraries that check signatures, as a zip that Python runs.

`tuf` and `securesystemslib` go in as they are installed here, with their licences; `cryptography`, which is compiled, is the
device's own (Debian: python3-cryptography). Stored, not compressed: the same bytes with every version of zlib.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path, PurePosixPath

import edgeft
from edgeft.agent.errors import AgentError
from edgeft.errors import RecipeError, SetupError

PATH = "usr/lib/edgeft/edgeft-update"
WRAPPER = "usr/sbin/edgeft-update"
PACKAGES = ("python3", "python3-cryptography")
"""Of Debian, which it needs. Recommended and not required: a model is served where they are missing."""
_SHEBANG = b"#!/usr/bin/env python3\n"
_WITHOUT = ("ngclient", "repository", "test_data")
"""Folders of the libraries that nothing imports here; the first needs an HTTP library, the last is 2 MB of test vectors."""
_MAIN = b"import sys\n\nfrom edgeft.agent.main import main\n\nsys.exit(main())\n"


@dataclass(frozen=True)
class _Agent:
    """The agent as a tool of a stage: another agent gives another package."""

    name: str = "update agent"

    @property
    def pin(self) -> str:
        return sha256(zipapp()).hexdigest()[:16]

    def find(self) -> str:
        zipapp()
        return ""


AGENT = _Agent()


@lru_cache
def zipapp() -> bytes:
    """The program. Raises SetupError where the libraries are not installed."""
    out = io.BytesIO(_SHEBANG)
    out.seek(0, io.SEEK_END)
    files = _files()
    # Folders are named too: without, zipimport finds no package that has no __init__.py.
    files |= {f"{folder}/": b"" for name in files for folder in PurePosixPath(name).parents[:-1]}
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            info.external_attr = (0o40755 if name.endswith("/") else 0o100644) << 16
            info.create_system = 3
            archive.writestr(info, content)
    return out.getvalue()


def check_trust(path: Path) -> None:
    """Raises RecipeError unless a file is root metadata that a device can start from."""
    from edgeft.agent import trust

    try:
        trust.anchor(path.read_bytes())
    except AgentError as error:
        hint = "take root.json from the folder that `edgeft keys new` made"
        raise RecipeError(f"{path} is no root of trust: {error}", hint=hint) from None


def licence() -> bytes:
    """Whose work is in it, and under which terms."""
    files = _files()
    return b"".join(
        f"{name.removeprefix('licences/')}\n\n".encode() + files[name] + b"\n"
        for name in sorted(files)
        if name.startswith("licences/")
    )


def _files() -> dict[str, bytes]:
    init = f'"""edgeft, of which only the agent is here."""\n\n__version__ = "{edgeft.__version__}"\n'
    found = {"__main__.py": _MAIN, "edgeft/__init__.py": init.encode()}
    found |= {f"edgeft/agent/{p.name}": p.read_bytes() for p in _folder("edgeft.agent").glob("*.py")}
    for package in ("tuf", "securesystemslib"):
        folder = _folder(package)
        for path in folder.rglob("*.py"):
            inner = path.relative_to(folder)
            if not set(inner.parts) & set(_WITHOUT) and not path.name.startswith("test_"):
                found[f"{package}/{inner.as_posix()}"] = path.read_bytes()
        for path in folder.rglob("LICENSE*"):  # of what it brings itself
            found[f"licences/{package}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
        for file in metadata.files(package) or ():
            if "licenses" in file.parts:
                name = f"licences/{package}-{metadata.version(package)}/{file.name}"
                found[name] = Path(str(file.locate())).read_bytes()
    return found


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise SetupError(f"{package} is not installed", hint="pip install 'edgeft[train]'")
    return Path(spec.origin).parent
