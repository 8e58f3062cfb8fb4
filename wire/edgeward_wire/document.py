"""The two kinds of document, and how their bytes are read and written.

Invariant: bytes from outside become a document only through `parse`, which bounds their length
first and turns every fault of theirs into one short `Rejected`.
"""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeward_wire.errors import Rejected

MAX_DOCUMENT_BYTES = 1 << 20
_SHOWN_FAULTS = 3

D = TypeVar("D", bound="Document")


class Document(BaseModel):
    """A frozen value that knows its canonical bytes."""

    model_config = ConfigDict(
        frozen=True,
        populate_by_name=True,
        serialize_by_alias=True,
        allow_inf_nan=False,
        str_max_length=65536,
    )

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no white space, UTF-8, absent fields left out."""
        plain = self.model_dump(mode="json", exclude_none=True)
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Signed(Document):
    """A document under a signature: a field that we do not know is refused, never skipped."""

    model_config = ConfigDict(extra="forbid")


class Open(Document):
    """A document between neighbours of different versions: unknown fields are tolerated."""

    model_config = ConfigDict(extra="ignore")


def parse(kind: type[D], raw: bytes | str, *, limit: int = MAX_DOCUMENT_BYTES, name: str = "") -> D:
    """Read one document of at most `limit` bytes.

    Raises:
        Rejected: it is too long, not JSON, or not a valid `kind`.
    """
    what = name or kind.__name__
    if len(raw) > limit:
        raise Rejected(f"{what} is {len(raw)} bytes long; at most {limit} are read.")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise Rejected(f"{what} is not valid: {faults(error)}.") from error


def faults(error: ValidationError) -> str:
    """The first few faults of a document on one line, without pydantic's addresses."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    shown = [f"{'.'.join(str(part) for part in e['loc']) or 'document'}: {e['msg']}" for e in found]
    more = f" (and {len(shown) - _SHOWN_FAULTS} more)" if len(shown) > _SHOWN_FAULTS else ""
    return "; ".join(shown[:_SHOWN_FAULTS]) + more
