"""From the broker into the database, and only then the acknowledgement.

Invariants: a batch is committed before anything of it is acknowledged, to the device (`down/ack`) and to the
broker, in that order; inserts are idempotent, so that what comes again leaves no trace. Only accepted devices
are listened to, whatever the broker lets through. A message that is not valid is counted, logged once,
acknowledged, and forgotten: it never blocks those behind it. A database that fails blocks everything, and
nothing is lost: the broker keeps what was not acknowledged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeward_cloud import rollout
from edgeward_cloud.mqtt import SESSION_LOST, Inbox, Link, Message
from edgeward_cloud.store import commands, devices, rollouts, streams
from edgeward_cloud.store.database import Store
from edgeward_wire import topics
from edgeward_wire.ack import Ack, Stream
from edgeward_wire.command import MAX_RESPONSE_BYTES, CommandResponse
from edgeward_wire.document import Document, parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.event import MAX_EVENT_BYTES, Event, Finished, StateChanged
from edgeward_wire.reported import Reported, Update
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth, Status
from edgeward_wire.telemetry import MAX_WINDOW_BYTES, Window

MAX_BATCH = 500
LINGER_S = 0.05
"""How long a batch waits for company: flash wears by commits."""

MAX_RESULTS = 64
"""Sources of one device whose newest result is kept."""

_MAX_SEQS = 1000
_MAX_COMPLAINTS = 1000
_RETRY_S = (0.5, 15.0)
_KINDS: dict[str, tuple[type[Document], int]] = {
    "status": (Status, 4 << 10),
    "birth": (Birth, 64 << 10),
    "reported": (Reported, topics.MAX_PAYLOAD_BYTES),
    "telemetry": (Window, MAX_WINDOW_BYTES),
    "event": (Event, MAX_EVENT_BYTES),
    "result": (ResultMessage, 64 << 10),
    "response": (CommandResponse, MAX_RESPONSE_BYTES),
}
_log = logging.getLogger(__name__)


def decode(topic: str, payload: bytes) -> tuple[str, Document]:
    """The device and the valid document of a message.

    Raises:
        Rejected: the topic is not ours, or the payload is not what the topic says, or speaks for another.
    """
    place = topics.parse_topic(topic)
    if place.direction != "up" or place.kind not in _KINDS:
        raise Rejected(f"Nothing is expected on {topic[:200]!r}.")
    kind, limit = _KINDS[place.kind]
    document = parse(kind, payload, limit=limit)
    if isinstance(document, Birth | Reported) and document.device != place.device:
        raise Rejected(f"It says that it is of {document.device}.")
    if isinstance(document, CommandResponse) and document.n != place.number:
        raise Rejected(f"It says that it answers command {document.n}.")
    return place.device, document


def salvage(topic: str, payload: bytes) -> tuple[str, str, Stream, int] | None:
    """(device, boot_id, stream, seq) of an invalid message of a stream, if that much can be read.

    The device must forget it: it would send it for ever.
    """
    try:
        place = topics.parse_topic(topic)
        body = json.loads(payload)
        seqs = (body["seq"],)
        ack = Ack.model_validate({"boot_id": body["boot_id"], "stream": place.kind, "seqs": seqs})
    except (Rejected, ValueError, KeyError, TypeError, RecursionError):
        return None
    return place.device, ack.boot_id, ack.stream, ack.seqs[0]


@dataclass
class Batch:
    """What a batch of messages comes to, before the database is asked."""

    now: float
    session_lost: bool = False
    seen: set[str] = field(default_factory=set)
    windows: list[tuple[str, Window]] = field(default_factory=list)
    events: list[tuple[str, Event]] = field(default_factory=list)
    results: list[tuple[str, ResultMessage]] = field(default_factory=list)
    states: list[tuple[str, Status | Birth | Reported]] = field(default_factory=list)
    responses: list[tuple[str, CommandResponse]] = field(default_factory=list)
    forgotten: list[tuple[str, str, Stream, int]] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(topic, why) of what was not valid."""
    live: set[str] = field(default_factory=set)
    """Devices that sent something just now: not retained."""
    speaking: set[str] = field(default_factory=set)
    """Those of them that did so themselves: a status may be a will."""


def sort_out(messages: Iterable[Message], now: float) -> Batch:
    """Parse a batch; what is not valid becomes a fault of it."""
    batch = Batch(now)
    for message in messages:
        if message is SESSION_LOST:
            batch.session_lost = True
            continue
        try:
            device, document = decode(message.topic, message.payload)
        except Rejected as error:
            batch.faults.append((message.topic, error.what))
            lost = salvage(message.topic, message.payload)
            if lost:
                batch.forgotten.append(lost)
            continue
        batch.seen.add(device)
        if not message.retained:
            batch.live.add(device)
            if not isinstance(document, Status):
                batch.speaking.add(device)
        _place(batch, device, document)
    return batch


def _place(batch: Batch, device: str, document: Document) -> None:
    if isinstance(document, Window):
        batch.windows.append((device, document))
    elif isinstance(document, Event):
        batch.events.append((device, document))
    elif isinstance(document, ResultMessage):
        batch.results.append((device, document))
    elif isinstance(document, CommandResponse):
        batch.responses.append((device, document))
    elif isinstance(document, Status | Birth | Reported):
        batch.states.append((device, document))


def device_changes(batch: Batch, known: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """Fields to set per device. `known` maps each device that there is to its present boot_id."""
    changes: dict[str, dict[str, Any]] = {d: {"last_seen": batch.now} for d in batch.live if d in known}
    for device in batch.speaking & changes.keys():
        # One that was rejected and accepted again on one connection does not say so a second time.
        changes[device]["online"] = True
    for device, document in batch.states:
        if device not in known:
            continue
        fields = changes.setdefault(device, {})
        if isinstance(document, Birth):
            fields["birth"] = plain(document)
        elif isinstance(document, Reported):
            fields["reported"] = plain(document)
        elif document.state == "online":
            fields |= {"online": True, "boot_id": document.boot_id}
        elif document.boot_id == fields.get("boot_id", known[device]) or known[device] is None:
            # The will of an earlier life must not put the present one offline.
            fields["online"] = False
    return {device: fields for device, fields in changes.items() if fields}


def updates(batch: Batch) -> list[tuple[str, str, Update]]:
    """(device, pipeline, update) that rollouts should hear of, in order."""
    heard: list[tuple[str, str, Update]] = []
    for device, event in batch.events:
        if isinstance(event.what, StateChanged | Finished):
            heard.append((device, event.what.pipeline, event.what.update))
    for device, document in batch.states:
        if isinstance(document, Reported):
            heard += [(device, name, p.update) for name, p in document.pipelines.items() if p.update]
    return heard


def acks(batch: Batch, known: Iterable[str]) -> list[tuple[str, topics.Told, Ack]]:
    """What each device may forget, now that it is stored."""
    there = set(known)
    stored: dict[tuple[str, str, Stream], list[int]] = {}
    for device, window in batch.windows:
        stored.setdefault((device, window.boot_id, "telemetry"), []).append(window.seq)
    for device, event in batch.events:
        stored.setdefault((device, event.boot_id, "event"), []).append(event.seq)
    for device, boot_id, stream, seq in batch.forgotten:
        stored.setdefault((device, boot_id, stream), []).append(seq)
    return [
        (device, "ack", Ack(boot_id=boot_id, stream=stream, seqs=tuple(seqs[i : i + _MAX_SEQS])))
        for (device, boot_id, stream), seqs in stored.items()
        if device in there
        for i in range(0, len(seqs), _MAX_SEQS)
    ]


def window_row(device: str, window: Window, now: float) -> dict[str, Any]:
    """The columns of a window. One whose clock was wrong ends when it came, and none ends in the future."""
    ended = window.start + window.duration_s if window.clock == "trusted" else now
    body = window.model_dump(mode="json", exclude_none=True)
    same = ("boot_id", "seq", "first_seq", "pipeline", "source", "variant", "provider", "clock")
    counted = ("duration_s", "frames", "dropped", "errors", "stages", "labels")
    return {
        "device": device,
        "model_path": window.model.path,
        "model_sha256": window.model.sha256,
        "ended_at": min(ended, now),
        "received_at": now,
        **{name: body[name] for name in same + counted},
    }


def event_row(device: str, event: Event, now: float) -> dict[str, Any]:
    """The columns of an event."""
    place = {"device": device, "boot_id": event.boot_id, "seq": event.seq}
    return {**place, "body": plain(event), "received_at": now}


def plain(document: Document) -> dict[str, Any]:
    """A document as JSON would have it."""
    return document.model_dump(mode="json", exclude_none=True)


class Ingest:
    """The one consumer of the inbox."""

    def __init__(
        self, store: Store, link: Link, inbox: Inbox, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._link = link
        self._inbox = inbox
        self._clock = clock
        self._stopping = False
        self._results: dict[str, dict[tuple[str, str], ResultMessage]] = {}
        self._complained: set[tuple[str, str]] = set()
        self.counts: Counter[str] = Counter()
        """How many messages were handled: `telemetry`, `event`, and `invalid` ones."""
        self.fault: str | None = None
        """Why nothing can be stored at this moment."""

    def results(self, device: str) -> tuple[ResultMessage, ...]:
        """The newest result of each source of a device."""
        return tuple(self._results.get(device, {}).values())

    def stop(self) -> None:
        """Let `run` end after the batch that it is at."""
        self._stopping = True
        self._inbox.wake()

    async def run(self) -> None:
        """Store batches until `stop`."""
        while not self._stopping:
            await self._inbox.wait()
            if not self._stopping:
                await asyncio.sleep(LINGER_S)
            messages = self._inbox.take(MAX_BATCH)
            if messages:
                await self._handle(messages)

    async def _handle(self, messages: Sequence[Message]) -> None:
        batch = sort_out(messages, self._clock())
        known = await self._persist(batch)
        if known is None:
            return  # stopped while the database failed: nothing is acknowledged, all of it comes again
        self._remember(batch, known)
        if await self._link.deliver(acks(batch, known)):
            self._link.acknowledge(messages)

    async def _persist(self, batch: Batch) -> set[str] | None:
        failures = 0
        while True:
            try:
                known = await commit(self._store, batch)
            except Unavailable as error:
                if self.fault is None:
                    _log.error("Nothing can be stored: %s", error)
                self.fault, failures = error.what, failures + 1
                if self._stopping:
                    return None
                low, high = _RETRY_S
                await asyncio.sleep(random.uniform(low / 2, min(high, low * 2.0**failures)))
                continue
            if self.fault is not None:
                _log.info("Storing again.")
                self.fault = None
            return known

    def _remember(self, batch: Batch, known: set[str]) -> None:
        for topic, why in batch.faults:
            self._complain(topic, why)
        for device in batch.seen - known:
            self._complain(f"{topics.ROOT}/{device}", "No such device is accepted.")
        for device, result in batch.results:
            kept = self._results.setdefault(device, {}) if device in known else {}
            place = (result.pipeline, result.source)
            if place in kept or len(kept) < MAX_RESULTS:
                kept[place] = result
        self.counts += Counter(
            telemetry=len(batch.windows), event=len(batch.events), invalid=len(batch.faults)
        )

    def _complain(self, topic: str, why: str) -> None:
        place = (topic, why[:80])
        if place not in self._complained and len(self._complained) < _MAX_COMPLAINTS:
            self._complained.add(place)
            _log.warning("A message on %r is not valid and was dropped: %s", topic[:200], why[:500])


async def commit(store: Store, batch: Batch) -> set[str]:
    """Store a batch in one transaction; the devices of it that are accepted.

    Raises:
        Unavailable: the database cannot be written.
    """
    async with store.write() as session:
        if batch.session_lost:
            await devices.all_offline(session)
        known = await devices.known(session, batch.seen | {place[0] for place in batch.forgotten})
        await streams.add_windows(
            session, [window_row(d, w, batch.now) for d, w in batch.windows if d in known]
        )
        await streams.add_events(session, [event_row(d, e, batch.now) for d, e in batch.events if d in known])
        for device, response in batch.responses:
            if device in known:
                await commands.answer(session, device, response)
        for device, fields in device_changes(batch, known).items():
            await devices.change(session, device, fields)
            if fields.get("boot_id", known[device]) != known[device]:
                await commands.give_up(session, device, "The agent was restarted.", but=fields["boot_id"])
        heard = [one for one in updates(batch) if one[0] in known]
        touched = await rollouts.touched(session, {update.rollout for _, _, update in heard})
        for before in touched:
            after = before
            for device, pipeline, update in heard:
                if pipeline == before.pipeline:
                    after = rollout.advance(after, {device: update}, batch.now)
            await rollouts.save(session, before, after)
    return set(known)
