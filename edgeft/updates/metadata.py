"""The signed metadata, in the format of The Update Framework, through python-tuf: a chain of roots, and targets.

Two of TUF's four roles are used. Root names the keys; targets says what an update consists of. Snapshot and timestamp,
which say what a server's newest state is, have no keys, so nobody can sign for them: an update that comes on a stick has
no server. Nothing expires, since a board without a clock cannot tell, and the order is that of the numbers (docs/updates.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import DataError, SetupError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key
    from tuf.api.metadata import Metadata, Root, Targets

SPECIFICATION = "1.0.31"
"""Of TUF, written into all metadata: a newer python-tuf must not change the bytes of an update."""
NEVER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
ROOT, TARGETS = "root", "targets"


def first_root(roots: Sequence[Key], targets: Key, threshold: int) -> Metadata[Root]:
    """Version 1, not yet signed."""
    from tuf.api.metadata import Metadata, Root

    root = Root(version=1, spec_version=SPECIFICATION, expires=NEVER, consistent_snapshot=False)
    for key in roots:
        root.add_key(key, ROOT)
    root.roles[ROOT].threshold = threshold
    root.add_key(targets, TARGETS)
    return Metadata(root)


def next_root(root: Root, role: str, gone: Sequence[str], added: Sequence[Key]) -> Metadata[Root]:
    """The next version, not yet signed: a role's keys `gone` (by id) are replaced by those `added`."""
    from tuf.api.metadata import Metadata

    found = copy.deepcopy(root)
    found.version, found.spec_version, found.expires = root.version + 1, SPECIFICATION, NEVER
    for keyid in gone:
        found.revoke_key(keyid, role)
    for key in added:
        found.add_key(key, role)
    return Metadata(found)


def targets(version: int, files: Mapping[str, tuple[int, str]], signer: CryptoSigner) -> bytes:
    """Signed targets metadata for files: name -> bytes, sha256."""
    from tuf.api.metadata import Metadata, TargetFile, Targets

    listed = {
        name: TargetFile(size, {"sha256": sha256}, name) for name, (size, sha256) in sorted(files.items())
    }
    found = Metadata(Targets(version=version, spec_version=SPECIFICATION, expires=NEVER, targets=listed))
    found.sign(signer)
    return found.to_bytes()


def signed_root(found: Metadata[Root], signers: Sequence[CryptoSigner], previous: Root | None) -> bytes:
    """The root with all signatures that can be given, checked as a device will check it: by enough keys of the root
    before it and by enough of its own. Raises SetupError when they are not enough."""
    for signer in signers:
        found.sign(signer, append=True)
    for root in (previous, found.signed) if previous else (found.signed,):
        result = root.get_verification_result(ROOT, found.signed_bytes, found.signatures)
        if not result.verified:
            raise SetupError(
                f"root {found.signed.version} has {len(result.signed)} of the {result.threshold} signatures that root "
                f"{root.version} demands",
                hint="name the folders with the other root keys: --offline FOLDER, once for each",
            )
    return found.to_bytes()


def chain(folder: Path) -> list[tuple[bytes, Root]]:
    """All roots in a folder of N.root.json, each signed by the one before it. Raises DataError for any that is not, and
    SetupError where there is none."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    found: list[tuple[bytes, Root]] = []
    while (path := folder / f"{len(found) + 1}.root.json").is_file():
        content = path.read_bytes()
        try:
            metadata: Metadata[Root] = Metadata.from_bytes(content)
            if not isinstance(metadata.signed, Root) or metadata.signed.version != len(found) + 1:
                raise ValueError(f"it is not version {len(found) + 1} of root")
            for root in (found[-1][1] if found else metadata.signed, metadata.signed):
                root.verify_delegate(ROOT, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise DataError(f"{path} is no root that can be trusted: {error}") from None
        found.append((content, metadata.signed))
    if not found:
        raise SetupError(f"{folder} holds no root of trust", hint="edgeft keys new DIR")
    return found


def verified_targets(content: bytes, root: Root) -> Targets:
    """Targets metadata that enough of a root's targets keys have signed. Raises DataError."""
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Targets

    try:
        metadata: Metadata[Targets] = Metadata.from_bytes(content)
        if not isinstance(metadata.signed, Targets):
            raise ValueError("it is not targets metadata")  # noqa: TRY004  a sentence, as for any other content
        root.verify_delegate(TARGETS, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise DataError(f"the metadata is not signed by a key of root {root.version}: {error}") from None
    return metadata.signed
