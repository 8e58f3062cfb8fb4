"""TUF keys on disk and elsewhere: the only importer of securesystemslib in the cloud.

A private key is a securesystemslib URI (`file2:PATH`, `hsm:`, `awskms:` ...), so that a YubiKey or a
KMS works without a line of ours. Beside it stands its public half as `<name>.pub.json`: TUF's key form
plus its `keyid`.

Invariants: a private key file is 0600 and is never overwritten; a signer's key is the one that its
public half says.
"""

from __future__ import annotations

import json
from pathlib import Path

from securesystemslib.exceptions import Error as SecuresystemslibError
from securesystemslib.signer import CryptoSigner, Key, Signer

from edgeward_cloud.files import PRIVATE, read_bounded, write_atomic
from edgeward_wire.errors import Rejected

__all__ = ["Key", "Signer", "load_public", "load_signer", "new_key", "public_path"]

FILE_SCHEME = "file2:"
MAX_KEY_BYTES = 64 << 10


def new_key(private: Path) -> Signer:
    """Make an Ed25519 key: `private` (PKCS8 PEM, 0600) and its public half beside it.

    Raises:
        Rejected: there is one already.
    """
    if private.exists():
        raise Rejected(f"{private} exists already.", "Move it away first: a lost key cannot be made again.")
    signer = CryptoSigner.generate_ed25519()
    write_atomic(private, signer.private_bytes, mode=PRIVATE)
    public = {**signer.public_key.to_dict(), "keyid": signer.public_key.keyid}
    write_atomic(public_path(private), json.dumps(public, indent=1, sort_keys=True).encode() + b"\n")
    return signer


def public_path(private: Path) -> Path:
    """Where the public half of a key file lies."""
    return private.with_name(f"{private.stem}.pub.json")


def load_public(path: Path) -> Key:
    """Read a public key.

    Raises:
        Rejected: it is missing or damaged.
    """
    hint = "Restore it from a backup."
    try:
        plain = json.loads(read_bounded(path, MAX_KEY_BYTES))
        keyid = plain.pop("keyid")
        return Key.from_dict(keyid, plain)
    except OSError as error:
        raise Rejected(f"Cannot read the public key {path}: {error.strerror}.", hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Rejected(f"{path} is not a public key.", hint) from error


def load_signer(uri: str, public: Path, *, base: Path) -> Signer:
    """The signer behind a URI; a relative `file2:` path is relative to `base`.

    Raises:
        Rejected: the key is missing, is another one than `public` says, or its library is not installed.
    """
    key = load_public(public)
    if uri.startswith(FILE_SCHEME):
        uri = f"{FILE_SCHEME}{base / uri.removeprefix(FILE_SCHEME)}"
    try:
        return Signer.from_priv_key_uri(uri, key)
    except OSError as error:
        raise Rejected(f"Cannot read the key {uri}.", "Check that it is there and yours to read.") from error
    except (SecuresystemslibError, ValueError) as error:
        raise Rejected(
            f"Cannot use the key {uri}: {error}.", "Check the address and its public half."
        ) from error
