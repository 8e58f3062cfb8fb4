"""Telemetry and events that the cloud has not stored yet: in memory while connected, else on disk.

Invariants: order within a stream is kept. A message leaves only when the cloud says that it is stored, or
merged into a coarser window, or dropped and counted. (device, boot_id, stream, seq) names a message for ever:
only windows that were never sent are merged. Safe to share between threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeward_wire.ack import Ack, Stream
from edgeward_wire.event import Event, Happening
from edgeward_wire.telemetry import Measures, Window


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to send: `payload` goes to the topic of `stream`."""

    boot_id: str
    stream: Stream
    seq: int
    payload: bytes


class Spool:
    """The directory `<state>/spool`. Nothing here raises for a full disk: see `fault`."""

    def __init__(self, directory: Path, boot_id: str, max_bytes: int) -> None:
        raise NotImplementedError

    @property
    def dropped(self) -> int:
        """Messages dropped so far, earlier boots included."""
        raise NotImplementedError

    @property
    def fault(self) -> str:
        """Empty, or why the disk does not take messages now."""
        raise NotImplementedError

    def append_window(
        self, measures: Measures, *, clock: Literal["trusted", "untrusted"] = "trusted"
    ) -> Window | None:
        """Add one window; None when it is too long and was dropped."""
        raise NotImplementedError

    def append_event(self, what: Happening, *, time: float) -> Event | None:
        """Add one event; `time` in Unix seconds; None when it is too long and was dropped."""
        raise NotImplementedError

    def next_batch(self, n: int) -> list[Outgoing]:
        """Up to `n` of the oldest messages that are not under way; they are from now on."""
        raise NotImplementedError

    def acked(self, ack: Ack) -> None:
        """The cloud has stored these."""
        raise NotImplementedError

    def on_connect(self) -> None:
        """From now on appended messages stay in memory."""
        raise NotImplementedError

    def rewind(self) -> None:
        """All that is under way is to be sent again."""
        raise NotImplementedError

    def on_disconnect(self) -> None:
        """`rewind`, and all that is in memory goes to disk."""
        raise NotImplementedError

    def quarantine(self, message: Outgoing) -> None:
        """Set a message aside that breaks the connection each time; it counts as dropped."""
        raise NotImplementedError

    def close(self) -> None:
        """Put all on disk."""
        raise NotImplementedError
