"""Debian's part of an image: packages of any architecture, extracted into a tar without running one of their programs.

mmdebstrap resolves, checks the archive's signature, downloads and extracts; nothing is mounted and nothing foreign runs.
The tar is kept in the cache under a hash of what was asked for. Without a dated archive the same question has another
answer next month, so every package is recorded with its version and sha256.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft import progress, resources, tool
from edgeft.errors import SetupError, ToolError
from edgeft.export.files import EPOCH

MIRROR = "EDGEFT_DEBIAN_MIRROR"
"""Environment variable: addresses of Debian archives, separated by blanks, instead of those in this machine's apt sources.
A date in an address (20261101T000000Z, as snapshot archives have it) becomes part of the cache's key."""
SUITE = "bookworm"
RECIPE = 1
"""Raise it when what is extracted changes other than by the package list."""
TOOL = tool.Tool(name="mmdebstrap", hint="sudo apt install mmdebstrap debian-archive-keyring")
APT = tool.Tool(name="apt-get", hint=f"set {MIRROR} to the address of a Debian archive")
_LIST = "edgeft-packages"
_DATE = re.compile(r"/(\d{8}T\d{6}Z)")
_EXCLUDED = (
    "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*", "/usr/share/bash-completion/*",
    "/usr/share/zsh/*", "/usr/share/doc/*", "/usr/lib/udev/hwdb.d/*",
    *(f"/*lib/modules/*/kernel/{name}/*" for name in (
        "sound", "drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/iio", "drivers/comedi", "drivers/staging",
        "drivers/net/wireless", "drivers/bluetooth", "drivers/isdn", "drivers/input/joystick",
    )),
)  # fmt: skip
"""Never wanted on a box without a screen. The rest of the kernel's modules is chosen later, by dependency (modules.py)."""
_KEPT = ("/usr/share/doc/*/copyright",)


@dataclass(frozen=True, kw_only=True)
class Rootfs:
    tar: Path
    """What the packages contain, zstd-compressed, nothing configured."""
    packages: list[dict[str, str]]
    """name, version, architecture and sha256 of every .deb, sorted by name."""
    key: str


def fetch(arch: str, packages: Sequence[str]) -> Rootfs:
    """The packages with all they depend on, from the cache or from a Debian archive.

    `arch` is Debian's name (amd64, arm64). Raises SetupError without mmdebstrap or an archive, ToolError when
    mmdebstrap fails: no network, an unknown package, a wrong signature.
    """
    home = resources.cache() / "rootfs"
    key = key_of(arch, packages, os.environ.get(MIRROR, ""))
    folder = home / f"{arch}-{key}"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not folder.is_dir():
                _make(arch, packages, folder)
    listed = json.loads((folder / "packages.json").read_text(encoding="utf-8"))
    return Rootfs(tar=folder / "root.tar.zst", packages=listed, key=key)


def key_of(arch: str, packages: Iterable[str], mirror: str) -> str:
    """What the cache calls the answer: architecture, suite, package list, recipe, and the archive's date if it has one."""
    wanted = [arch, SUITE, sorted(set(packages)), RECIPE, _DATE.findall(mirror), _EXCLUDED, _KEPT]
    return hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]


def sources(mirror: str, targets: str, *, suite: str = SUITE) -> list[str]:
    """Lines of a sources.list. `mirror`: addresses, separated by blanks (one whose path ends in -security has the security
    suite); without one `targets` counts: what apt-get says of this machine's own sources, as "ADDRESS SUITE ORIGIN" lines.

    Raises SetupError when neither names an archive of this suite.
    """
    parts = "main non-free-firmware"
    found: dict[str, None] = {}
    for address in mirror.split():
        bare = address.rstrip("/")
        plain = _DATE.sub("", bare)
        if plain.endswith("-security"):
            found[f"deb {bare} {suite}-security {parts}"] = None
        else:
            found[f"deb {bare} {suite} {parts}"] = None
            found[f"deb {bare} {suite}-updates {parts}"] = None
    for line in () if found else targets.splitlines():
        address, name, origin = [*line.split(" ", 2), "", ""][:3]
        if origin.strip() == "Debian" and name in {suite, f"{suite}-updates", f"{suite}-security"}:
            found[f"deb {address.rstrip('/')} {name} {parts}"] = None
    if not any(line.split()[2] == suite for line in found):
        raise SetupError(
            f"no archive of Debian {suite} is known here: it is not among this machine's apt sources",
            hint=f"set {MIRROR} to the address of a Debian archive",
        )
    return list(found)


def packages_of(listing: str) -> list[dict[str, str]]:
    """From sha256sum's lines on apt's archive folder: `SHA256  NAME_VERSION_ARCH.deb`, a version's colon written as %3a."""
    found = []
    for line in listing.splitlines():
        sha256, file = line.split(maxsplit=1)
        name, version, arch = file.removesuffix(".deb").split("_")
        found.append(
            {"name": name, "version": version.replace("%3a", ":"), "architecture": arch, "sha256": sha256}
        )
    return sorted(found, key=lambda package: package["name"])


def _make(arch: str, packages: Sequence[str], folder: Path) -> None:
    mirror = os.environ.get(MIRROR, "")
    targets = "" if mirror else APT("indextargets", "--format", "$(REPO_URI) $(CODENAME) $(ORIGIN)")
    lines = sources(mirror, targets)
    dated = bool(_DATE.search(mirror))
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    aside.chmod(0o755)
    try:
        progress.report(f"download Debian {SUITE} for {arch}")
        tool.run(
            [
                TOOL.find(), f"--arch={arch}", "--variant=extract", "--skip=check/qemu",
                f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
                "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", f"--include={','.join(sorted(set(packages)))}",
                f'--extract-hook=cd "$1"/var/cache/apt/archives && sha256sum *.deb >"$1"/{_LIST}',
                '--aptopt=Apt::Install-Recommends "false"', "--aptopt=Acquire::Languages none",
                '--aptopt=Acquire::Retries "5"',
                # What a dated archive serves was signed for a time that has passed; its signature is checked as ever.
                *(['--aptopt=Acquire::Check-Valid-Until "false"'] if dated else []),
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
                *(f"--dpkgopt=path-include={pattern}" for pattern in _KEPT),
                SUITE, str(aside / "root.tar.zst"), *lines,
            ],
            env={"SOURCE_DATE_EPOCH": str(EPOCH)},
            watch=_watch(arch),
        )  # fmt: skip
        listed = packages_of(_listing(aside / "root.tar.zst"))
        (aside / "packages.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        os.sync()
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _listing(archive: Path) -> str:
    import zstandard

    with (
        archive.open("rb") as raw,
        zstandard.ZstdDecompressor().stream_reader(raw) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        for member in tar:
            if member.name.removeprefix("./") == _LIST and (file := tar.extractfile(member)):
                return file.read().decode()
    raise ToolError("mmdebstrap left no list of the packages it extracted")


def _watch(arch: str) -> Callable[[str], None]:
    def said(line: str) -> None:
        if line.startswith("I: "):
            progress.report(f"Debian {SUITE} for {arch}: {line[3:].strip()}")

    return said
