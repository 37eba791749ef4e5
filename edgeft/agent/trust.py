"""Who may update this device: TUF metadata, checked with python-tuf.

The root that came with the device is the anchor. Each newer root must be signed by enough keys of the one before it and
by enough of its own; the targets metadata by enough targets keys of the newest. Expiry is not looked at: boards without
a network have no clock that could be trusted, and one that is wrong must not end a board's updates; the order is that of
the version numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeft.agent import disk
from edgeft.agent.errors import NotTrusted
from edgeft.agent.places import Places

if TYPE_CHECKING:
    from tuf.api.metadata import Root


@dataclass(frozen=True, kw_only=True)
class Signed:
    """What trusted keys have signed."""

    version: int
    """Of the targets metadata; an update's sequence."""
    files: dict[str, tuple[int, str]]
    """Name below payload/ -> bytes, sha256."""
    signers: tuple[str, ...]
    """Ids of the keys that may sign targets now, sorted."""
    threshold: int
    """How many of them it takes."""


def verified(places: Places, roots: Sequence[tuple[int, bytes]], targets: bytes) -> Signed:
    """Walk from the anchor over the stored roots and those of the file, keep the new ones, and check the targets.

    A verified root stays, whatever comes of the update: it may have been made because a key was lost. Raises NotTrusted.
    """
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Targets

    root = newest(places)
    known = dict(roots)
    if known and root.version not in known and min(known) > root.version + 1:
        raise NotTrusted(f"the file's first root of trust is version {min(known)}, this device's is {root.version}; "
                         "the ones between are missing")  # fmt: skip
    while content := known.get(root.version + 1):
        try:
            root = _next(root, content)
        except (RepositoryError, ValueError, TypeError) as error:
            raise NotTrusted(f"root of trust {root.version + 1} in the file is not signed as root "
                             f"{root.version} demands: {error}") from None  # fmt: skip
        disk.make_folder(places.roots)
        disk.write_whole(places.roots / f"{root.version}.root.json", content)
    try:
        metadata: Metadata[Targets] = Metadata.from_bytes(targets)
        if not isinstance(metadata.signed, Targets):
            raise TypeError("it is not targets metadata")
        root.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError, TypeError) as error:
        raise NotTrusted(f"the update is not signed by whom this device trusts: {error}") from None
    role = root.get_delegated_role(Targets.type)
    files = {name: (f.length, str(f.hashes.get("sha256"))) for name, f in metadata.signed.targets.items()}
    return Signed(version=metadata.signed.version, files=files, signers=tuple(sorted(role.keyids)),
                  threshold=role.threshold)  # fmt: skip


def newest(places: Places) -> Root:
    """The newest root of trust on this device. Raises NotTrusted where there is none."""
    from tuf.api.exceptions import RepositoryError

    try:
        root = anchor(places.anchor.read_bytes())
    except FileNotFoundError:
        raise NotTrusted(
            f"this device takes no updates: it has no root of trust, which is {places.anchor}"
        ) from None
    except (OSError, NotTrusted) as error:
        raise NotTrusted(f"{places.anchor} is no root of trust: {error}") from None
    with suppress(
        OSError, RepositoryError, ValueError, TypeError
    ):  # those of another anchor, or the last one
        while True:
            root = _next(root, (places.roots / f"{root.version + 1}.root.json").read_bytes())
    return root


def anchor(content: bytes) -> Root:
    """Root metadata that is only checked by itself. Raises NotTrusted."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    try:
        metadata: Metadata[Root] = Metadata.from_bytes(content)
        if not isinstance(metadata.signed, Root):
            raise TypeError("it is not root metadata")
        metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError, TypeError) as error:
        raise NotTrusted(str(error)) from None
    return metadata.signed


def outlived(old: Sequence[str], signed: Signed) -> bool:
    """Whether the keys that signed earlier updates can no longer sign any: then no earlier update counts, and numbers may
    begin again (TUF specification, 5.3.11, recovery from a fast-forward attack)."""
    return bool(old) and len(set(old) & set(signed.signers)) < signed.threshold


def _next(root: Root, content: bytes) -> Root:
    """TUF specification, 5.3.4 and 5.3.5: signed by the old root and by itself, and one version higher."""
    from tuf.api.metadata import Metadata, Root

    metadata: Metadata[Root] = Metadata.from_bytes(content)
    if not isinstance(metadata.signed, Root):
        raise TypeError("it is not root metadata")
    root.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    metadata.signed.verify_delegate(Root.type, metadata.signed_bytes, metadata.signatures)
    if metadata.signed.version != root.version + 1:
        raise ValueError(f"it says of itself that it is version {metadata.signed.version}")
    return metadata.signed
