"""Debian's part: which archive is asked, under what name the answer is kept, and what is unpacked of it."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from edgeft.errors import SetupError, StageError
from edgeft.export.files import EPOCH
from edgeft.image import rootfs, tree

APT = """\
http://deb.example/debian/ bookworm Debian
http://deb.example/debian/ bookworm-updates Debian
http://deb.example/debian-security/ bookworm-security Debian
http://deb.example/debian/ trixie Debian
http://other.example/node nodistro Other
"""


def test_this_machines_own_sources_are_used_for_the_suite_alone():
    assert rootfs.sources("", APT) == [
        "deb http://deb.example/debian bookworm main non-free-firmware",
        "deb http://deb.example/debian bookworm-updates main non-free-firmware",
        "deb http://deb.example/debian-security bookworm-security main non-free-firmware",
    ]


def test_a_mirror_that_is_named_replaces_them_and_a_security_archive_has_its_own_suite():
    named = "http://a.example/debian/20261101T000000Z/ http://a.example/debian-security/20261101T000000Z/"
    lines = rootfs.sources(named, APT)
    assert lines[0] == "deb http://a.example/debian/20261101T000000Z bookworm main non-free-firmware"
    assert lines[2].split()[1:3] == ["http://a.example/debian-security/20261101T000000Z", "bookworm-security"]
    assert not any("deb.example" in line for line in lines)


@pytest.mark.parametrize(
    "apt", ["", "http://u.example/ubuntu noble Ubuntu\n", "http://d.example/d trixie Debian\n"]
)
def test_a_machine_without_an_archive_of_the_suite_is_told_what_to_set(apt):
    with pytest.raises(SetupError) as caught:
        rootfs.sources("", apt)
    assert rootfs.MIRROR in caught.value.hint


def test_the_cache_tells_architectures_packages_and_dated_archives_apart_but_not_mirrors():
    plain = rootfs.key_of("amd64", ["a", "b"], "")
    assert plain == rootfs.key_of("amd64", ["b", "a", "a"], "http://near.example/debian")
    dated = rootfs.key_of("amd64", ["a", "b"], "http://near.example/20261101T000000Z")
    others = {plain, dated, rootfs.key_of("arm64", ["a", "b"], ""), rootfs.key_of("amd64", ["a"], "")}
    assert len(others) == 4


def test_every_package_is_listed_with_version_and_hash():
    found = rootfs.packages_of(
        f"{'b' * 64}  zlib1g_1%3a1.2.13_arm64.deb\n{'a' * 64}  adduser_3.134_all.deb\n"
    )
    assert [p["name"] for p in found] == ["adduser", "zlib1g"]
    assert found[1] == {"name": "zlib1g", "version": "1:1.2.13", "architecture": "arm64", "sha256": "b" * 64}


def packed(path: Path, members: list[tuple[str, bytes | str | None, int]]) -> Path:
    """A tar.zst of (name, contents | link's target | None for a folder, mode)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content, mode in members:
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.gid = mode, 0, 42
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    path.write_bytes(zstandard.compress(raw.getvalue()))
    return path


def test_what_names_the_build_machine_or_manages_packages_is_not_unpacked(tmp_path):
    archive = packed(tmp_path / "r.tar.zst", [
        ("./usr/", None, 0o755), ("./lib", "usr/lib", 0o777), ("./usr/lib/", None, 0o755), ("./etc/", None, 0o755),
        ("./etc/apt/sources.list", b"deb http://here", 0o644), ("./etc/hostname", b"builder", 0o644),
        ("./etc/resolv.conf", b"nameserver 10.0.0.1", 0o644), ("./usr/bin/apt-get", b"x", 0o755),
        ("./lib/inside", b"x", 0o644), ("./usr/bin/su", b"x", 0o4755), ("./var/log/apt.log", b"http://here", 0o644),
    ])  # fmt: skip
    root = tmp_path / "root"
    tree.unpack(archive, root)
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    assert files == ["usr/bin/su", "usr/lib/inside"]
    assert (root / "usr/bin/su").stat().st_mode & 0o7777 == 0o4755
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777 and (root / "var").is_dir()


@pytest.mark.parametrize(
    "members",
    [
        [("../outside", b"x", 0o644)],
        [("./usr/../../outside", b"x", 0o644)],
        [("./out", "/", 0o777), ("./out/tmp/outside", b"x", 0o644)],
    ],
)
def test_a_member_that_would_land_outside_is_refused(tmp_path, members):
    with pytest.raises(StageError, match="outside"):
        tree.unpack(packed(tmp_path / "r.tar.zst", members), tmp_path / "root")
    assert not (tmp_path / "outside").exists() and not Path("/tmp/outside").exists()


@pytest.mark.skipif(not shutil.which("mksquashfs"), reason="needs squashfs-tools")
def test_a_squashfs_has_the_same_bytes_twice_and_belongs_to_root(tmp_path):
    for turn in ("a", "b"):
        root = tmp_path / turn
        (root / "etc").mkdir(parents=True)
        (root / "etc/shadow").write_text("x")
        (root / "etc/shadow").chmod(0o600)
        (root / "big").write_bytes(bytes(300_000))
        tree.squash(root, tmp_path / f"{turn}.squashfs")
    assert (tmp_path / "a.squashfs").read_bytes() == (tmp_path / "b.squashfs").read_bytes()
    listed = subprocess.run(
        ["unsquashfs", "-UTC", "-lln", tmp_path / "a.squashfs"], capture_output=True, text=True, check=True
    ).stdout
    assert "-rw------- 0/0" in listed and "2020-01-01 00:00" in listed and EPOCH == 1577836800
