"""Telemetry and events that the cloud has not stored yet: in memory while connected, else on disk.

Invariants: order within a stream is kept. A message leaves only when the cloud says that it is stored, or
merged into a coarser window, or dropped and counted. (device, boot_id, stream, seq) names a message for ever,
so only windows that were never sent are merged. Safe to share between threads.

A crash while connected loses what was in memory and not stored yet; its seqs are then missing in the stream.
"""

from __future__ import annotations

import json
import logging
import threading
from itertools import islice, takewhile
from pathlib import Path
from time import monotonic
from typing import Literal

from edgeward_agent.files import replace_file
from edgeward_agent.segments import Key, Outgoing, Segment, Segments, merge_pairs, new_segment
from edgeward_wire.ack import Ack, Stream
from edgeward_wire.event import MAX_EVENT_BYTES, Event, Happening
from edgeward_wire.telemetry import MAX_WINDOW_BYTES, Measures, Window

__all__ = ["Outgoing", "Spool"]

MEMORY_BYTES = 1 << 20
"""About so much waits in memory at most, connected or not."""

SEGMENT_BYTES = 256 << 10
BATCH = 10
"""While disconnected, windows go to disk in batches of so many, or when the oldest is BATCH_S old."""

BATCH_S = 60.0
QUARANTINE_BYTES = 1 << 20
_MERGE_AT_ONCE = 4
_RETRY_S = 30.0
_WORTHWHILE = 0.9
"""A merge that leaves more than this share was the last of its segment."""

_log = logging.getLogger(__name__)


class Spool:
    """The directory `<state>/spool`. Nothing here raises for a full disk: see `fault`."""

    def __init__(self, directory: Path, boot_id: str, max_bytes: int) -> None:
        self._directory = directory
        self._boot_id = boot_id
        self._max_bytes = max_bytes
        self._memory_bytes = min(MEMORY_BYTES, max_bytes // 4)
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self._lock = threading.RLock()
        self._connected = False
        self._seqs: dict[Stream, int] = {"telemetry": 0, "event": 0}
        self._fault = ""
        self._retry_at = 0.0
        self._tail: dict[Key, Outgoing] = {}
        """In memory only, and newer than all segments."""
        self._tail_flying: set[Key] = set()
        self._tail_sent: set[Key] = set()
        """Sent at least once: always the tail's first messages."""
        self._tail_since = 0.0
        self._disk = Segments(directory)
        self._dropped = self._read_dropped()
        self._segments: list[Segment] = []
        try:
            self._segments = self._disk.recover()
        except OSError as error:
            self._disk_fails(error)
        self._next_number = max((s.last for s in self._segments), default=0) + 1
        self._bound()

    @property
    def dropped(self) -> int:
        """Messages dropped so far, earlier boots included."""
        with self._lock:
            return self._dropped

    @property
    def fault(self) -> str:
        """Empty, or why the disk does not take messages now."""
        with self._lock:
            return self._fault

    @property
    def waiting_bytes(self) -> int:
        """What the cloud has not stored yet, in bytes, in memory and on disk."""
        with self._lock:
            return sum(s.size for s in self._segments) + self._tail_bytes()

    def append_window(
        self, measures: Measures, *, clock: Literal["trusted", "untrusted"] = "trusted"
    ) -> Window | None:
        """Add one window; None when it is too long and was dropped."""
        with self._lock:
            seq = self._seqs["telemetry"]
            window = Window(**dict(measures), boot_id=self._boot_id, seq=seq, first_seq=seq, clock=clock)
            kept = self._append("telemetry", seq, window.to_bytes(), MAX_WINDOW_BYTES)
            return window if kept else None

    def append_event(self, what: Happening, *, time: float) -> Event | None:
        """Add one event; `time` in Unix seconds; None when it is too long and was dropped."""
        with self._lock:
            seq = self._seqs["event"]
            event = Event(boot_id=self._boot_id, seq=seq, time=time, what=what)
            kept = self._append("event", seq, event.to_bytes(), MAX_EVENT_BYTES)
            return event if kept else None

    def next_batch(self, n: int) -> list[Outgoing]:
        """Up to `n` of the oldest messages that are not under way; they are from now on."""
        batch: list[Outgoing] = []
        with self._lock:
            for segment in list(self._segments):
                if len(batch) >= n:
                    break
                self._open(segment)
                batch += _take(segment.messages or {}, segment.flying, n - len(batch))
            fresh = _take(self._tail, self._tail_flying, n - len(batch))
            self._tail_sent.update(m.key for m in fresh)
            return batch + fresh

    def acked(self, ack: Ack) -> None:
        """The cloud has stored these."""
        with self._lock:
            self._forget({(ack.boot_id, ack.stream, seq) for seq in ack.seqs})

    def on_connect(self) -> None:
        """From now on appended messages stay in memory."""
        with self._lock:
            self._connected = True

    def rewind(self) -> None:
        """All that is under way is to be sent again."""
        with self._lock:
            self._tail_flying.clear()
            for segment in self._segments:
                segment.flying.clear()

    def on_disconnect(self) -> None:
        """`rewind`, and all that is in memory goes to disk."""
        with self._lock:
            self._connected = False
            self.rewind()
            self._spill()

    def quarantine(self, message: Outgoing) -> None:
        """Set a message aside that breaks the connection each time; it counts as dropped."""
        path = self._directory / "quarantine.jsonl"
        with self._lock:
            _log.error("A message of %d bytes is set aside in %s.", message.size, path)
            try:
                with path.open("ab") as file:
                    if file.tell() + message.size <= QUARANTINE_BYTES:
                        file.write(message.payload + b"\n")
            except OSError as error:
                self._disk_fails(error)
            self._forget({message.key})
            self._drop(1)

    def close(self) -> None:
        """Put all on disk."""
        self.on_disconnect()

    # --- adding

    def _append(self, stream: Stream, seq: int, payload: bytes, limit: int) -> bool:
        if len(payload) > limit:
            _log.error("A message of %s with %d bytes is longer than %d.", stream, len(payload), limit)
            self._drop(1)
            return False
        self._seqs[stream] = seq + 1
        if not self._tail:
            self._tail_since = monotonic()
        message = Outgoing(self._boot_id, stream, seq, payload)
        self._tail[message.key] = message
        due = stream == "event" or len(self._tail) >= BATCH or monotonic() - self._tail_since >= BATCH_S
        crowded = self._tail_bytes() > self._memory_bytes
        if (crowded or (due and not self._connected)) and monotonic() >= self._retry_at:
            self._spill()
        self._bound()
        return True

    def _spill(self) -> None:
        """Move the tail to disk. What was sent goes to a segment of its own, which is never merged."""
        sent, fresh = self._split_tail()
        try:
            if sent:
                self._store(sent, sent=True)
            if fresh:
                self._store(fresh, sent=False)
        except OSError as error:
            self._disk_fails(error)
            return
        if self._fault and (sent or fresh):
            _log.info("%s takes messages again.", self._directory)
            self._fault = ""

    def _split_tail(self) -> tuple[list[Outgoing], list[Outgoing]]:
        """Those that were sent at least once, and those that never were."""
        sent = [m for m in self._tail.values() if m.key in self._tail_sent]
        fresh = [m for m in self._tail.values() if m.key not in self._tail_sent]
        return sent, fresh

    def _store(self, messages: list[Outgoing], *, sent: bool) -> None:
        """Append to the newest segment, or begin another. Raises OSError; the tail is then as it was."""
        segment = self._segments[-1] if self._segments else None
        if not segment or not segment.growing or segment.sent != sent or segment.size >= self._segment_bytes:
            segment = new_segment(self._next_number, self._next_number, sent=sent)
            if sent:  # its messages may be under way, and their acknowledgements must find them
                segment.messages = {}
        self._disk.append(segment, messages)
        if segment.first == self._next_number:
            self._segments.append(segment)
            self._next_number += 1
        keys = {m.key for m in messages}
        segment.flying |= self._tail_flying & keys
        self._tail_flying -= keys
        self._tail_sent -= keys
        self._tail = {key: m for key, m in self._tail.items() if key not in keys}

    def _disk_fails(self, error: OSError) -> None:
        """Log the first of a row of failures, and give the disk a rest."""
        if not self._fault:
            _log.error("%s takes no messages: %s.", self._directory, error.strerror)
        self._fault = f"{self._directory} takes no messages: {error.strerror}."
        self._retry_at = monotonic() + _RETRY_S

    # --- leaving

    def _open(self, segment: Segment) -> None:
        """Load a segment to send from it. One that cannot be read is left alone until the next start."""
        try:
            if not segment.sent:
                self._disk.mark_sent(segment)
        except OSError as error:
            self._disk_fails(error)
        try:
            damaged = self._disk.load(segment)
        except OSError as error:
            self._disk_fails(error)
            self._segments.remove(segment)
            self._drop(1)
            return
        if damaged:
            _log.warning("%d damaged lines in %s.", damaged, segment.name)
            self._drop(damaged)
        if not segment.messages:
            self._remove(segment)

    def _forget(self, keys: set[Key]) -> None:
        for key in keys:
            self._tail.pop(key, None)
        self._tail_flying -= keys
        self._tail_sent -= keys
        for segment in list(self._segments):
            if segment.messages is None:
                continue
            for key in keys & segment.messages.keys():
                del segment.messages[key]
            segment.flying -= keys
            if not segment.messages:
                self._remove(segment)

    def _remove(self, segment: Segment) -> None:
        self._segments.remove(segment)
        try:
            self._disk.remove(segment)
        except OSError as error:
            self._disk_fails(error)

    # --- staying within bounds

    def _bound(self) -> None:
        while self._segments and self.waiting_bytes > self._max_bytes:
            if not self._merge_oldest():
                self._drop_oldest()
        if self._tail_bytes() > 2 * self._memory_bytes:  # only a disk that fails lets it grow so far
            sent, fresh = self._split_tail()
            self._tail = {m.key: m for m in (*sent, *merge_pairs(fresh))}
            self._drop_from_tail()

    def _merge_oldest(self) -> bool:
        """Merge the windows of some segments that were never sent; False when nothing can be gained."""
        start = next((i for i, s in enumerate(self._segments) if not s.sent and not s.tight), None)
        if start is None:
            return False
        row = self._segments[start : start + _MERGE_AT_ONCE]
        chosen = list(takewhile(lambda segment: not segment.sent, row))
        before = sum(s.size for s in chosen)
        try:
            damaged = sum(self._disk.load(segment) for segment in chosen)
            messages = [m for segment in chosen for m in (segment.messages or {}).values()]
            merged = self._disk.replace(chosen, merge_pairs(messages))
        except OSError as error:
            self._disk_fails(error)
            return False
        merged.tight = merged.size > before * _WORTHWHILE
        self._segments[start : start + len(chosen)] = [merged]
        self._drop(damaged)
        return True

    def _drop_oldest(self) -> None:
        segment = self._segments[0]
        try:
            self._disk.load(segment)
        except OSError as error:
            self._disk_fails(error)
        self._drop(len(segment.messages or {}))
        self._remove(segment)

    def _drop_from_tail(self) -> None:
        excess = self._tail_bytes() - self._memory_bytes
        oldest: set[Key] = set()
        for message in self._tail.values():
            if excess <= 0:
                break
            excess -= message.size
            oldest.add(message.key)
        self._forget(oldest)
        self._drop(len(oldest))

    def _drop(self, count: int) -> None:
        if not count:
            return
        self._dropped += count
        _log.warning("%d messages were dropped; %d in all.", count, self._dropped)
        try:
            replace_file(self._directory / "dropped.json", json.dumps({"dropped": self._dropped}).encode())
        except OSError as error:
            self._disk_fails(error)

    def _read_dropped(self) -> int:
        try:
            return int(json.loads((self._directory / "dropped.json").read_bytes())["dropped"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _tail_bytes(self) -> int:
        return sum(m.size for m in self._tail.values())


def _take(messages: dict[Key, Outgoing], flying: set[Key], n: int) -> list[Outgoing]:
    """The first `n` that are not flying; they are from now on."""
    taken = list(islice((m for key, m in messages.items() if key not in flying), max(n, 0)))
    flying.update(m.key for m in taken)
    return taken
