"""Private keys: Ed25519, one PEM file each (PKCS #8), readable by their owner alone, encrypted where a passphrase is given.

No function here logs, prints or puts into an error anything of a private key or a passphrase.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeft.errors import SetupError
from edgeft.updates.disk import flush

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

Ask = Callable[[Path], bytes]
"""Gives the passphrase of an encrypted key file; raises SetupError where nobody can be asked."""


def new(folder: Path, role: str, passphrase: bytes = b"") -> CryptoSigner:
    """Make a key pair and write its private half to `folder`/ROLE-ID.pem. Raises SetupError when the folder cannot be
    written. The file is flushed to the disk before anything else is made with the key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        KeySerializationEncryption,
        NoEncryption,
        PrivateFormat,
    )
    from securesystemslib.signer import CryptoSigner

    private = Ed25519PrivateKey.generate()
    signer = CryptoSigner(private)
    how: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
    path = file_of(folder, role, signer.public_key.keyid)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        flush(folder)
    except OSError as error:
        raise SetupError(f"the private key cannot be written to {folder}: {error.strerror}") from None
    return signer


def load(path: Path, keyid: str, ask: Ask) -> CryptoSigner:
    """The private key in a file, which must be the one with this id. Raises SetupError: no such file, wrong passphrase,
    another key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        pem = path.read_bytes()
    except OSError as error:
        raise SetupError(f"the private key {path} cannot be read: {error.strerror}") from None
    secret = ask(path) if encrypted(pem) else None
    try:
        private = load_pem_private_key(pem, secret)
    except ValueError:
        why = "the passphrase is wrong, or the file is damaged" if secret else "the file is damaged"
        raise SetupError(f"the private key {path} cannot be opened: {why}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise SetupError(f"{path} is no Ed25519 key")
    signer = CryptoSigner(private)
    if signer.public_key.keyid != keyid:
        raise SetupError(f"{path} holds another key than its name says: {signer.public_key.keyid[:16]}")
    return signer


def file_of(folder: Path, role: str, keyid: str) -> Path:
    """Where a role's private key lies in a folder."""
    return folder / f"{role}-{keyid[:16]}.pem"


def encrypted(pem: bytes) -> bool:
    """Whether opening the file takes a passphrase."""
    return pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
