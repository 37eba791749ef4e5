"""Debian packages, written through dpkg-deb: the control files, the maintainer scripts, and the same bytes twice.

No maintainer script runs a foreign program, and each honours DPKG_ROOT, so that a package can be installed into a root file
system of another architecture: `dpkg --root=R --force-script-chrootless --force-architecture -i X.deb`.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeft import tool
from edgeft.errors import RecipeError
from edgeft.export.files import EPOCH, Entry, Files, size, write_folder
from edgeft.export.service import UNITS

DPKG_DEB = tool.Tool(
    name="dpkg-deb",
    hint='sudo apt install dpkg (dnf and brew have it too), or take [export] kind = "bundle", which needs no program',
)
_WANTS = '"$DPKG_ROOT"/etc/systemd/system/multi-user.target.wants'
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~]*")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package. Fields are those of deb-control(5)."""

    name: str
    version: str
    architecture: str
    """amd64, arm64, or all."""
    maintainer: str
    summary: str
    description: Sequence[str]
    files: Files
    depends: str = ""
    recommends: str = ""
    provides: str = ""
    conflicts: str = ""
    foreign: bool = False
    """Whether packages of other architectures may depend on it, as those that call a program may."""
    licence: bytes = b""
    """What stands in its `copyright` file."""
    unit: str = ""
    """A service that is enabled when the package is installed first, and started where a system runs."""
    owns: Sequence[str] = ()
    """Folders with what the device made for itself, which go when this package is purged: the API key, updates."""


def build(package: Package, out: Path) -> None:
    """Write the package to `out`. Needs dpkg-deb (SetupError); raises RecipeError for a version that Debian does not take.

    zstd at level 3 in one thread: xz takes seventy times as long for one per cent, and several threads give other bytes.
    dpkg reads zstd from 1.21.18 on (Debian 12, Ubuntu 22.04).
    """
    if not _VERSION.fullmatch(package.version):
        raise RecipeError(
            f"export.version: {package.version!r} must start with a digit and hold letters, digits and .+~"
        )
    program = DPKG_DEB.find()
    files = {**package.files, **_papers(package)}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".deb-") as aside:
        root = Path(aside) / "root"
        write_folder(root, files)
        write_folder(root / "DEBIAN", _control(package, files))
        tool.run(
            [program, "--root-owner-group", "-Zzstd", "-z3", "--threads-max=1", "--build", os.fspath(root), os.fspath(out)],
            env={"SOURCE_DATE_EPOCH": str(EPOCH)},
        )  # fmt: skip


def _papers(p: Package) -> dict[str, Entry]:
    doc = f"usr/share/doc/{p.name}"
    log = f"{p.name} ({p.version}) stable; urgency=medium\n\n  * Built by edgeft.\n\n -- {p.maintainer}  Wed, 01 Jan 2020 00:00:00 +0000\n"
    return {
        f"{doc}/changelog.gz": Entry(content=gzip.compress(log.encode(), 9, mtime=0)),
        f"{doc}/copyright": Entry(content=p.licence),
    }


def _control(p: Package, files: Files) -> dict[str, Entry]:
    fields = {
        "Package": p.name, "Version": p.version, "Architecture": p.architecture, "Maintainer": p.maintainer,
        "Installed-Size": str(-(-size(files) // 1024)), "Depends": p.depends, "Recommends": p.recommends, "Provides": p.provides,
        "Conflicts": p.conflicts, "Replaces": p.conflicts, "Multi-Arch": "foreign" if p.foreign else "",
        "Section": "misc", "Priority": "optional",
    }  # fmt: skip
    text = "".join(f"{key}: {value}\n" for key, value in fields.items() if value)
    text += f"Description: {p.summary}\n" + "".join(f" {line or '.'}\n" for line in p.description)
    sums = "".join(
        f"{_md5(entry)}  {name}\n" for name, entry in sorted(files.items()) if not name.startswith("etc/")
    )
    settings = "".join(f"/{name}\n" for name in sorted(files) if name.startswith("etc/"))
    found = {"control": Entry(content=text.encode()), "md5sums": Entry(content=sums.encode())}
    if settings:
        found["conffiles"] = Entry(content=settings.encode())
    return found | {name: Entry(content=script, mode=0o755) for name, script in _scripts(p).items()}


def _scripts(p: Package) -> Mapping[str, bytes]:
    """postinst, prerm and postrm, as deb-maintainer-script(7) calls them."""
    scripts: dict[str, list[str]] = {}
    if p.unit:
        link = f"{_WANTS}/{p.unit}"
        scripts["postinst"] = [
            '[ "$1" = configure ] || exit 0',
            "# Enabled at the first installation only: who disabled it wants it so after an update too.",
            'if [ -z "${2:-}" ]; then',
            f"    mkdir -p {_WANTS}",
            f"    ln -sf /{UNITS}/{p.unit} {link}",
            "fi",
            'if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then',
            "    systemctl daemon-reload",
            f"    if systemctl --quiet is-enabled {p.unit}; then",
            f"        systemctl restart {p.unit} || echo 'it did not start: journalctl --namespace=edgeft -u {p.unit}' >&2",
            "    fi",
            "fi",
            *(f'[ ! -L "$DPKG_ROOT/{folder}/current" ] || echo "{p.name}: an update is served, not this version;'
              f' edgeft-update rollback --factory {folder.rpartition("/")[2]} returns to it"' for folder in p.owns),
        ]  # fmt: skip
        scripts["prerm"] = [
            '[ "$1" = remove ] || exit 0',
            'if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then',
            f"    systemctl stop {p.unit} || true",
            "fi",
            f"rm -f {link}",
        ]
    if p.unit or p.owns:
        scripts["postrm"] = [
            *(f'[ "$1" != purge ] || rm -rf "$DPKG_ROOT/{folder}"' for folder in p.owns),
            'if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then',
            "    systemctl daemon-reload || true",
            "fi",
        ]
    head = ["#!/bin/sh", "set -eu", "DPKG_ROOT=${DPKG_ROOT:-}"]
    return {name: ("\n".join([*head, *lines]) + "\n").encode() for name, lines in scripts.items()}


def _md5(entry: Entry) -> str:
    """What `dpkg --verify` compares; no protection against anybody."""
    if isinstance(entry.content, bytes):
        return hashlib.md5(entry.content, usedforsecurity=False).hexdigest()
    with entry.content.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
