"""The spool's messages on disk: a row of segments, one message a line. What to keep is the spool's business.

A segment's file is `<first>-<last>[.sent].jsonl`; numbers only grow. Invariants: a segment that covers
others (a merge) replaces them from the moment of its rename. `.sent` is set, durably, before the first of its
messages goes out, so a segment without it was never sent, whatever crashed since. A torn line is left out on
reading.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeward_agent.files import replace_file, sync_directory
from edgeward_wire.ack import Ack, Stream
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.telemetry import MAX_WINDOW_BYTES, Window, coarser, same_series

MAX_MERGED_S = 86_400.0
"""A merged window stands for at most a day."""

_NAME = re.compile(r"^(\d{10})-(\d{10})(\.sent)?\.jsonl$")
_SCHEMAS: dict[str, Stream] = {"edgeward.telemetry/1": "telemetry", "edgeward.event/1": "event"}

Key = tuple[str, Stream, int]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to send: `payload` goes to the topic of `stream`."""

    boot_id: str
    stream: Stream
    seq: int
    payload: bytes

    @property
    def key(self) -> Key:
        """What names it, together with the device."""
        return self.boot_id, self.stream, self.seq

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return len(self.payload) + 1


@dataclass(slots=True)
class Segment:
    """Consecutive messages on disk. `messages` is None while only the disk has them."""

    first: int
    last: int
    sent: bool
    name: str
    """Its file's name."""
    size: int = 0
    messages: dict[Key, Outgoing] | None = None
    """Those that are not stored in the cloud yet, in order."""
    flying: set[Key] = field(default_factory=set)
    growing: bool = False
    """May be appended to: it was begun by this process and its last line is whole."""
    tight: bool = False
    """Merging it again gains nothing."""


def new_segment(first: int, last: int, *, sent: bool) -> Segment:
    """An empty segment that may be appended to."""
    return Segment(first, last, sent, _name(first, last, sent), growing=True)


class Segments:
    """The directory of segments. Every method may raise OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def recover(self) -> list[Segment]:
        """All segments in order. Leftovers of a merge that was cut short are removed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        found: list[Segment] = []
        for path in sorted(self._directory.iterdir()):
            name = _NAME.match(path.name)
            if name:
                first, last, sent = int(name[1]), int(name[2]), name[3] is not None
                found.append(Segment(first, last, sent, path.name, path.stat().st_size))
            elif path.name.endswith(".new"):
                path.unlink()
        kept: list[Segment] = []
        for segment in sorted(found, key=lambda s: (s.first, -s.last)):
            if kept and segment.last <= kept[-1].last:  # covered
                self.remove(segment)
            else:
                kept.append(segment)
        return kept

    def load(self, segment: Segment) -> int:
        """Read its messages, unless they are here; returns how many lines were damaged."""
        if segment.messages is not None:
            return 0
        lines = (self._directory / segment.name).read_bytes().split(b"\n")
        read = [_outgoing(line) for line in lines[:-1]]
        segment.messages = {m.key: m for m in read if m is not None}
        return read.count(None) + (lines[-1] != b"")

    def append(self, segment: Segment, messages: Sequence[Outgoing]) -> None:
        """Add to a growing segment (or begin it), durably. On an error the segment is as it was before."""
        path = self._directory / segment.name
        begun = segment.size == 0
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with open(descriptor, "ab", buffering=0) as file:
                _write_all(file.fileno(), b"".join(m.payload + b"\n" for m in messages))
                os.fdatasync(file.fileno())
        except OSError:
            segment.growing = False  # should the truncation fail, nothing may follow a torn line
            with contextlib.suppress(OSError):
                os.truncate(path, segment.size)
                segment.growing = True
            raise
        if begun:
            sync_directory(self._directory)
        segment.size += sum(m.size for m in messages)
        if segment.messages is not None:
            segment.messages.update((m.key, m) for m in messages)

    def mark_sent(self, segment: Segment) -> None:
        """From now on it counts as sent, also after a crash (on an error: only until one)."""
        segment.sent = True
        segment.growing = False
        name = _name(segment.first, segment.last, True)
        os.rename(self._directory / segment.name, self._directory / name)
        segment.name = name
        sync_directory(self._directory)

    def replace(self, old: Sequence[Segment], messages: Sequence[Outgoing]) -> Segment:
        """One segment of these messages instead of several consecutive ones that were never sent."""
        merged = new_segment(old[0].first, old[-1].last, sent=False)
        merged.growing = False
        merged.size = sum(m.size for m in messages)
        replace_file(self._directory / merged.name, b"".join(m.payload + b"\n" for m in messages))
        for segment in old:
            if segment.name != merged.name:
                self.remove(segment)
        return merged

    def remove(self, segment: Segment) -> None:
        """Forget a segment."""
        (self._directory / segment.name).unlink(missing_ok=True)


def merge_pairs(messages: Iterable[Outgoing]) -> list[Outgoing]:
    """Each two neighbouring windows of a series as one, in the place of the second; the rest as it is."""
    merged: list[Outgoing | None] = []
    waiting: list[tuple[int, Window]] = []
    for message in messages:
        place = len(merged)
        merged.append(message)
        window = _window(message)
        if window is None:
            continue
        partner = next((w for w in waiting if _may_merge(w[1], window)), None)
        if partner is None:
            waiting = [w for w in waiting if not same_series(w[1], window)]
            waiting.append((place, window))
            continue
        waiting.remove(partner)
        payload = coarser([partner[1], window]).to_bytes()
        if len(payload) <= MAX_WINDOW_BYTES:
            merged[partner[0]] = None
            merged[place] = Outgoing(window.boot_id, "telemetry", window.seq, payload)
    return [m for m in merged if m is not None]


def _window(message: Outgoing) -> Window | None:
    """A window to merge; None for an event, and for what can only be passed on."""
    if message.stream != "telemetry":
        return None
    try:
        return parse(Window, message.payload)
    except Rejected:
        return None


def _may_merge(a: Window, b: Window) -> bool:
    return (
        a.boot_id == b.boot_id
        and a.seq < b.seq
        and same_series(a, b)
        and a.duration_s + b.duration_s <= MAX_MERGED_S
    )


def _name(first: int, last: int, sent: bool) -> str:
    return f"{first:010d}-{last:010d}{'.sent' if sent else ''}.jsonl"


def _outgoing(line: bytes) -> Outgoing | None:
    """A line as a message; None when it is damaged."""
    try:
        document = json.loads(line)
        # What the cloud could never name in an acknowledgement would stay, and be sent, for ever.
        name = Ack(boot_id=document["boot_id"], stream=_SCHEMAS[document["schema"]], seqs=(document["seq"],))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Outgoing(name.boot_id, name.stream, name.seqs[0], line)


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
