"""The folder of keys: who may sign, where their private halves lie, and how one key takes the place of another.

    DIR/root.json             the newest root; what a device is given to trust
    DIR/metadata/N.root.json  all roots; every update carries them
    DIR/private/ROLE-ID.pem   private keys that are kept here
    DIR/issued.json           which sequence numbers were given to what (ledger.py)

Root keys can lie elsewhere (`offline`), on a medium that is put away: making updates takes the targets key alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import SetupError
from edgeft.updates import disk, keys, metadata
from edgeft.updates.keys import Ask

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner
    from tuf.api.metadata import Root


@dataclass(frozen=True, kw_only=True)
class Held:
    """One key that a root names."""

    role: str
    keyid: str
    fingerprint: str
    """The public key itself, hex."""
    path: Path | None
    """Its private half, where it is within reach."""
    encrypted: bool
    exposed: bool
    """Whether others than its owner may read the file."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a folder of keys says of itself."""

    folder: Path
    version: int
    thresholds: dict[str, int]
    keys: tuple[Held, ...]
    unused: tuple[Path, ...]
    """Private keys that no longer sign anything."""


def new(
    folder: Path, *, threshold: int = 1, roots: int = 1, offline: Sequence[Path] = (), passphrase: bytes = b""
) -> State:
    """Make root keys and a targets key, and root 1. `offline`: where the root keys go, in turn, instead of the folder.

    The folder appears with everything in it or not at all. Raises SetupError when something is there already: keys are
    never overwritten.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SetupError(
            f"{folder} is not empty, and nothing in it is overwritten", hint="name another folder"
        )
    if not 1 <= threshold <= roots:
        raise SetupError(
            f"{threshold} of {roots} root keys can never sign", hint="--threshold N --roots M with N <= M"
        )
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True, mode=0o700)
    made: list[Path] = []
    try:
        signers = []
        for i in range(roots):
            place = offline[i % len(offline)] if offline else aside / "private"
            signers.append(keys.new(place, metadata.ROOT, passphrase))
            made.append(keys.file_of(place, metadata.ROOT, signers[-1].public_key.keyid))
        targets = keys.new(aside / "private", metadata.TARGETS, passphrase)
        first = metadata.first_root([s.public_key for s in signers], targets.public_key, threshold)
        _publish(aside, 1, metadata.signed_root(first, signers, None))
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
        disk.flush(folder.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for path in made:
            path.unlink(missing_ok=True)  # made a moment ago, and no root names it
        raise
    return show(folder, offline=offline)


def rotate(
    folder: Path, role: str, ask: Ask, *, key: str = "", offline: Sequence[Path] = (), passphrase: bytes = b""
) -> State:
    """Put new keys in the place of a role's keys, or of the one whose id begins with `key`, as the next root.

    It takes as many root keys as the root demands, in the folder or in `offline`; those that are lost may be among the
    replaced. Raises SetupError when they are too few; then nothing has changed.
    """
    _, root = metadata.chain(folder / "metadata")[-1]
    if role not in (metadata.ROOT, metadata.TARGETS):
        raise SetupError(f"--role {role!r} has no keys", hint="root or targets")
    gone = [keyid for keyid in root.roles[role].keyids if keyid.startswith(key)]
    if not gone or (key and len(gone) > 1):
        raise SetupError(
            f"{key!r} is not the beginning of one {role} key's id", hint=f"edgeft keys show {folder}"
        )
    found = (
        _signer(folder, offline, metadata.ROOT, keyid, ask) for keyid in root.roles[metadata.ROOT].keyids
    )
    signers = [signer for signer in found if signer]
    if len(signers) < (least := root.roles[metadata.ROOT].threshold):
        raise SetupError(
            f"{len(signers)} of the {least} root keys that it takes are in {', '.join(map(str, _places(folder, offline)))}",
            hint="name the folders with the others: --offline FOLDER, once for each",
        )
    for keyid in gone:
        there = _find(folder, offline, role, keyid)
        if there and keys.encrypted(there.read_bytes()) and not passphrase:
            raise SetupError(
                f"{there} is encrypted, and the key in its place would not be",
                hint="--passphrase asks for one, --passphrase-env NAME takes it from an environment variable",
            )
    made: list[CryptoSigner] = []
    written: list[Path] = []
    try:
        for keyid in gone:
            place = _place(folder, offline, role, keyid)
            made.append(keys.new(place, role, passphrase))
            written.append(keys.file_of(place, role, made[-1].public_key.keyid))
        following = metadata.next_root(root, role, gone, [s.public_key for s in made])
        both = [*signers, *made] if role == metadata.ROOT else signers
        content = metadata.signed_root(following, both, root)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)  # made a moment ago, and no root names it
        raise
    _publish(folder, following.signed.version, content)
    return show(folder, offline=offline)


def show(folder: Path, *, offline: Sequence[Path] = ()) -> State:
    """The newest root's keys, and where their private halves are. Raises as `metadata.chain` does."""
    _, root = metadata.chain(folder / "metadata")[-1]
    held = tuple(
        _held(root, role, keyid, _find(folder, offline, role, keyid))
        for role in (metadata.ROOT, metadata.TARGETS) for keyid in root.roles[role].keyids
    )  # fmt: skip
    used = {one.path for one in held}
    there = (path for place in _places(folder, offline) for path in sorted(place.glob("*.pem")))
    return State(
        folder=folder, version=root.version, keys=held, unused=tuple(p for p in there if p not in used),
        thresholds={role: root.roles[role].threshold for role in (metadata.ROOT, metadata.TARGETS)},
    )  # fmt: skip


def roots(folder: Path) -> list[tuple[bytes, Root]]:
    """All roots of a folder of keys, oldest first."""
    return metadata.chain(folder / "metadata")


def targets_signer(folder: Path, ask: Ask) -> CryptoSigner:
    """The key that signs updates. Raises SetupError when its private half is not in the folder."""
    _, root = roots(folder)[-1]
    for keyid in root.roles[metadata.TARGETS].keyids:
        if signer := _signer(folder, (), metadata.TARGETS, keyid, ask):
            return signer
    raise SetupError(
        f"{folder / 'private'} has no private key that may sign updates",
        hint=f"if it is lost, the root keys replace it: edgeft keys rotate {folder} --role targets",
    )


def _place(folder: Path, offline: Sequence[Path], role: str, keyid: str) -> Path:
    """Where the key that follows this one goes: to where it lies, or for one that is lost to a medium without another,
    since whoever finds a medium with two has two signatures."""
    if path := _find(folder, offline, role, keyid):
        return path.parent
    if role == metadata.TARGETS or not offline:
        return folder / "private"
    for place in offline:
        if not list(place.glob(f"{metadata.ROOT}-*.pem")):
            return place
    raise SetupError(
        f"the new root key in the place of {keyid[:16]} needs a folder of its own",
        hint="--offline FOLDER, a new one",
    )


def _signer(folder: Path, offline: Sequence[Path], role: str, keyid: str, ask: Ask) -> CryptoSigner | None:
    path = _find(folder, offline, role, keyid)
    return keys.load(path, keyid, ask) if path else None


def _find(folder: Path, offline: Sequence[Path], role: str, keyid: str) -> Path | None:
    found = (keys.file_of(place, role, keyid) for place in _places(folder, offline))
    return next((path for path in found if path.is_file()), None)


def _places(folder: Path, offline: Sequence[Path]) -> Iterator[Path]:
    yield folder / "private"
    yield from offline


def _held(root: Root, role: str, keyid: str, path: Path | None) -> Held:
    return Held(
        role=role, keyid=keyid, fingerprint=str(root.keys[keyid].keyval["public"]), path=path,
        encrypted=bool(path and keys.encrypted(path.read_bytes())),
        exposed=bool(path and path.stat().st_mode & 0o077),
    )  # fmt: skip


def _publish(folder: Path, version: int, content: bytes) -> None:
    """Write a root, then the copy that devices are given."""
    disk.write(folder / "metadata" / f"{version}.root.json", content)
    disk.write(folder / "root.json", content)
