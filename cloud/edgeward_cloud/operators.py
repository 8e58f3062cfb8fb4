"""Operators' tokens: `<dir>/operators.json`, {name: {"token_sha256": hex, "created": unix seconds}}.

Invariants: the token itself is printed once (or written to the operator's profile) and kept nowhere;
one operator has one token, a new one ends the old one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from pathlib import Path

from pydantic import Field, TypeAdapter, ValidationError

from edgeward_cloud.files import PRIVATE, exclusive, read_bounded, write_atomic
from edgeward_wire.document import Signed, faults
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import FleetName, Sha256, UnixTime

MAX_BYTES = 1 << 20
MAX_TOKEN = 200


class OperatorRecord(Signed):
    """What the cloud remembers of one operator."""

    token_sha256: Sha256
    created: UnixTime = Field(default=0)


_RECORDS = TypeAdapter(dict[FleetName, OperatorRecord])


def load_operators(path: Path) -> dict[str, OperatorRecord]:
    """Read the file; none is no operators.

    Raises:
        Rejected: it is not valid.
    """
    try:
        return _RECORDS.validate_json(read_bounded(path, MAX_BYTES))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise Rejected(f"{path}: {faults(error)}.", "Correct the file, or make new tokens.") from error


def new_token(path: Path, name: str, *, now: float | None = None) -> str:
    """Make a token for an operator, remember its hash, and return it: the only time that it is seen."""
    token = secrets.token_urlsafe(32)
    created = time.time() if now is None else now
    with exclusive(path.with_suffix(".lock")):
        records = load_operators(path)
        try:
            fresh = _RECORDS.validate_python(
                {**records, name: OperatorRecord(token_sha256=token_digest(token), created=created)}
            )
        except ValidationError as error:
            raise Rejected(f"{name!r} cannot be an operator's name: {faults(error)}.") from error
        write_atomic(path, _RECORDS.dump_json(fresh, indent=1) + b"\n", mode=PRIVATE)
    return token


def find_operator(records: dict[str, OperatorRecord], token: str) -> str | None:
    """Whose token it is; None when nobody's. Takes the same time for a near miss as for a far one."""
    if len(token) > MAX_TOKEN:
        return None
    digest = token_digest(token)
    return next((n for n, r in records.items() if hmac.compare_digest(r.token_sha256, digest)), None)


def token_digest(token: str) -> str:
    """sha256 of a token. It has 256 random bits, so that it needs no salt and no slow hash."""
    return hashlib.sha256(token.encode()).hexdigest()
