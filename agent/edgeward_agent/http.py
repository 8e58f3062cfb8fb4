"""HTTPS to the cloud. Only importer of httpx.

Invariants: every request has a bound in bytes and in time. A minimum rate holds for headers and bodies
alike, so that a server that drips cannot hold a thread. Errors become Rejected or Unavailable. The server
is trusted through one CA file, never the system's.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeward_wire.document import Document

if TYPE_CHECKING:
    from edgeward_agent.identity import Identity

Token = Callable[[float], str]
"""Unix seconds -> bearer token (`Identity.token`)."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Bounds in time. `rate` is the fewest bytes per second over `window_s` seconds of waiting."""

    connect_s: float = 10.0
    read_s: float = 30.0
    window_s: float = 30.0
    rate: float = 256.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, of any status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Body:
    """An answer whose body is still to come."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


class Http:
    """One connection pool to one cloud. For one thread at a time: give each thread its own.

    `stop` ends a request that is under way within a second.
    """

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext,
        *,
        stop: threading.Event | None = None,
        patience: Patience = Patience(),
    ) -> None:
        raise NotImplementedError

    @classmethod
    def of(cls, identity: Identity, *, stop: threading.Event | None = None) -> Http:
        """The cloud of this identity, trusted through its server CA only."""
        raise NotImplementedError

    def get(self, path: str, *, limit: int, token: Token | None = None) -> Answer:
        """GET at most `limit` bytes, whatever the status.

        Raises:
            Unavailable: no whole answer came.
            Rejected: the answer is longer than `limit`.
        """
        raise NotImplementedError

    def post(self, path: str, document: Document, *, limit: int, token: Token | None = None) -> Answer:
        """POST a document as JSON. Raises like `get`."""
        raise NotImplementedError

    def stream(
        self, path: str, *, offset: int = 0, token: Token | None = None, stop: threading.Event | None = None
    ) -> AbstractContextManager[Body]:
        """GET whose body is read in chunks as they come, from byte `offset` (a Range request when above 0)."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all connections."""
        raise NotImplementedError
