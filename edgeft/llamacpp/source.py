"""Fetches the pinned source package once a machine and unpacks it into the cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from edgeft import progress, resources
from edgeft.errors import SetupError, ToolError
from edgeft.llamacpp.pin import Pin, load
from edgeft.tool import run

log = logging.getLogger(__name__)

SDIST = "EDGEFT_LLAMACPP_SDIST"
"""Environment variable: a copy of the source package that is already on this machine."""


def home() -> Path:
    """The cache folder of the pinned llama.cpp. Not created here."""
    return resources.cache() / "llama.cpp" / load().id


def source() -> Path:
    """The unpacked source package, fetched and checked if it is not there yet.

    Raises SetupError when it cannot be fetched, ToolError when what came is not what is pinned.
    """
    folder = home() / "source"
    if not folder.is_dir():
        with locked():
            if not folder.is_dir():
                _fetch(load(), folder)
    return folder


def python_path() -> Path:
    """The folder to put first on sys.path: it holds the pinned `llama_cpp` and `gguf`, and nothing else."""
    return source() / "python"


def llama_cpp_tree() -> Path:
    """The root of llama.cpp's own source, where its converter lies."""
    return source() / "vendor" / "llama.cpp"


@contextlib.contextmanager
def locked(name: str = "lock") -> Iterator[None]:
    """Only one process at a time fetches or builds; the others wait and then find it done. `name`: what does not stand in
    a compiler's way has a lock of its own."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / name).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing llama.cpp; waiting for it")
            progress.report("wait for another build of llama.cpp")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(pin: Pin, folder: Path) -> None:
    aside = folder.with_name("source.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        archive = _local_archive() or _download(pin, aside)
        check_archive(archive, pin)
        progress.report("unpack llama.cpp")
        _unpack(archive, aside / "tree")
        os.sync()  # some thousand files: cheaper than one fsync each
        (aside / "tree").rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_archive(archive: Path, pin: Pin) -> None:
    """Raises ToolError, with both hashes, when the file is not the pinned source package."""
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != pin.sha256:
        raise ToolError(
            f"{archive} is not {pin.package} {pin.version}: its sha256 is {found}, pinned is {pin.sha256}",
            hint=f"unset {SDIST}, or check the package index that pip is configured to use",
        )


def _local_archive() -> Path | None:
    if not (named := os.environ.get(SDIST)):
        return None
    archive = Path(named).expanduser()
    if not archive.is_file():
        raise SetupError(f"{SDIST} names {archive}, which is not a file")
    return archive


def _download(pin: Pin, folder: Path) -> Path:
    """Through the user's own pip, so that mirrors, proxies and certificates are whatever pip is set to."""
    if importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"{sys.executable} has no pip, so the source of llama.cpp cannot be fetched",
            hint=f"run `{sys.executable} -m ensurepip`, or let {SDIST} name {pin.package}-{pin.version}.tar.gz",
        )
    progress.report(f"fetch {pin.package} {pin.version}")
    argv = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", pin.package,
        "--progress-bar", "off", "--dest", os.fspath(folder), f"{pin.package}=={pin.version}",
    ]  # fmt: skip
    try:
        run(argv, env={"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    except ToolError as error:
        raise SetupError(
            f"could not fetch {pin.package} {pin.version}: {error}",
            hint=f"check the network; or fetch the .tar.gz elsewhere and let {SDIST} name it",
        ) from error
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise ToolError(f"pip downloaded {len(archives)} archives for {pin.package}, one was expected")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    """The archive's single top folder becomes `folder`, with python/ added for sys.path."""
    aside = folder.with_name("unpack")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # absent before 3.11.4
        tar.extractall(aside)
    tops = list(aside.iterdir())
    if len(tops) != 1:
        raise ToolError(f"{archive} has {len(tops)} folders at its top, one was expected")
    # The package's root also holds tests/, docs/ and scripts/, which would become importable names.
    python = tops[0] / "python"
    python.mkdir()
    (python / "llama_cpp").symlink_to("../llama_cpp")
    (python / "gguf").symlink_to("../vendor/llama.cpp/gguf-py/gguf")
    tops[0].rename(folder)
