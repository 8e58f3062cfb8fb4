"""Ingest: what a batch comes to, purely; then with the real Mosquitto, real certificates and real SQLite."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.kit import make_cloud
from cloud.mqttkit import PATIENCE_S, MqttDevice, broker_running, need_mosquitto, until
from cloud.test_broker import Peer
from cloud.test_store import BOOT, MODEL, seed, window
from edgeward_cloud import ingest as ingest_module
from edgeward_cloud.broker import Broker
from edgeward_cloud.ingest import Batch, Ingest, acks, decode, device_changes, salvage, sort_out, updates
from edgeward_cloud.mqtt import Inbox, Link, Message
from edgeward_cloud.pki import Pki
from edgeward_cloud.rollout import Rollout, Target
from edgeward_cloud.settings import Settings
from edgeward_cloud.store import devices, rollouts, streams
from edgeward_cloud.store.database import Store, open_store
from edgeward_wire import topics
from edgeward_wire.ack import Refresh
from edgeward_wire.document import Document
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.event import Event, Fault, Finished
from edgeward_wire.reported import PipelineReport, Reported, Update
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth, Status

OTHER_BOOT = "c" * 32
NOW = 5000.0


def message(device: str, kind: topics.Up, document: Document | bytes, *, retained: bool = False) -> Message:
    raw = document if isinstance(document, bytes) else document.to_bytes()
    return Message(topics.up(device, kind), raw, retained, qos=topics.qos(kind))


def status(state: Any, boot_id: str = BOOT) -> Status:
    return Status(state=state, boot_id=boot_id)


def birth(device: str = "d1") -> Birth:
    return Birth(device=device, boot_id=BOOT, time=1, agent="0", arch="x86_64", cores=1, memory_mb=1)


def update(rollout: str, result: Any = None) -> Update:
    return Update(rollout=rollout, model=MODEL, attempt=1, state="idle", result=result)


def reported(one: Update | None = None, device: str = "d1") -> Reported:
    report = PipelineReport(update=one)
    return Reported(device=device, boot_id=BOOT, time=1.0, pipelines={"main": report})


def event(seq: int, what: Any = None) -> Event:
    return Event(boot_id=BOOT, seq=seq, time=1.0, what=what or Fault(subject="disk"))


# --- pure


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("edgeward/v1/d1/up/telemetry", b"{"),
        ("edgeward/v1/d1/up/telemetry", b"x" * 70_000),
        ("edgeward/v1/d1/up/metrics", b"{}"),
        ("edgeward/v1/d1/down/ack", b"{}"),
        ("other/topic", b"{}"),
        ("edgeward/v1/d1/up/birth", birth("d2").to_bytes()),
        ("edgeward/v1/d1/up/reported", reported(device="d2").to_bytes()),
        ("\ufffd", b""),
    ],
)
def test_what_is_not_valid_is_refused(topic: str, payload: bytes) -> None:
    with pytest.raises(Rejected):
        decode(topic, payload)


@given(st.binary(max_size=300) | st.from_regex(rb'\{"boot_id":.{0,40}', fullmatch=True), st.text(max_size=60))
def test_rubbish_becomes_a_fault_and_nothing_else(payload: bytes, topic: str) -> None:
    for place in (topic, *(topics.up("d1", kind) for kind in topics.UP)):
        batch = sort_out([Message(place, payload, qos=1)], NOW)
        assert len(batch.faults) == 1
        assert batch == Batch(NOW, faults=batch.faults)


def test_a_stream_forgets_what_can_never_be_stored() -> None:
    raw = json.dumps({"boot_id": BOOT, "seq": 7, "frames": -1}).encode()
    assert salvage("edgeward/v1/d1/up/telemetry", raw) == ("d1", BOOT, "telemetry", 7)
    assert salvage("edgeward/v1/d1/up/reported", raw) is None
    assert salvage("edgeward/v1/d1/up/telemetry", b"[" * 100_000) is None
    batch = sort_out([message("d1", "telemetry", raw), message("d1", "telemetry", window(3))], NOW)
    [(device, kind, ack)] = acks(batch, {"d1"})
    assert (device, kind, ack.stream, ack.seqs) == ("d1", "ack", "telemetry", (3, 7))
    assert acks(batch, {"d2"}) == []


@pytest.mark.parametrize(
    ("known", "heard", "fields"),
    [
        (None, [status("online")], {"online": True, "boot_id": BOOT}),
        (BOOT, [status("offline")], {"online": False}),
        (BOOT, [status("offline", OTHER_BOOT)], {}),  # the will of an earlier life
        (None, [status("offline")], {"online": False}),
        (OTHER_BOOT, [status("online"), status("offline", OTHER_BOOT)], {"online": True, "boot_id": BOOT}),
        (OTHER_BOOT, [status("online"), status("offline")], {"online": False, "boot_id": BOOT}),
        (BOOT, [status("online"), status("online", OTHER_BOOT)], {"online": True, "boot_id": OTHER_BOOT}),
    ],
)
def test_status_follows_the_present_life(
    known: str | None, heard: list[Status], fields: dict[str, Any]
) -> None:
    batch = sort_out([message("d1", "status", s, retained=True) for s in heard], NOW)
    assert device_changes(batch, {"d1": known}).get("d1", {}) == fields


def test_only_what_is_sent_now_counts_as_seen() -> None:
    live = sort_out([message("d1", "birth", birth())], NOW)
    kept = sort_out([message("d1", "birth", birth(), retained=True)], NOW)
    assert device_changes(live, {"d1": None})["d1"]["last_seen"] == NOW
    assert "last_seen" not in device_changes(kept, {"d1": None})["d1"]
    assert device_changes(live, {}) == {}


def test_who_speaks_is_online() -> None:
    """Also one that was rejected and accepted again meanwhile: its connection has not ended."""
    for document in (birth(), reported(), window(1), event(1)):
        kind: Any = {Birth: "birth", Reported: "reported", Event: "event"}.get(type(document), "telemetry")
        said = sort_out([message("d1", kind, document)], NOW)
        assert device_changes(said, {"d1": BOOT})["d1"]["online"] is True
        kept = sort_out([message("d1", kind, document, retained=True)], NOW)
        assert "online" not in device_changes(kept, {"d1": BOOT}).get("d1", {})
    gone = sort_out([message("d1", "event", event(1)), message("d1", "status", status("offline"))], NOW)
    assert device_changes(gone, {"d1": BOOT})["d1"]["online"] is False
    old = sort_out([message("d1", "status", status("offline", OTHER_BOOT))], NOW)
    assert "online" not in device_changes(old, {"d1": BOOT})["d1"], "the will of an earlier life"


def test_rollouts_hear_of_reports_and_events() -> None:
    done = Finished(pipeline="main", update=update("r1", "succeeded"))
    batch = sort_out(
        [message("d1", "reported", reported(update("r2"))), message("d1", "event", event(1, done))], NOW
    )
    assert [(d, p, u.rollout) for d, p, u in updates(batch)] == [("d1", "main", "r1"), ("d1", "main", "r2")]


@pytest.mark.anyio
async def test_the_inbox_keeps_all_of_qos_1_and_the_newest_of_qos_0() -> None:
    inbox = Inbox()
    for n in range(3000):
        inbox.put(Message("t", str(n).encode(), qos=0))
    sure = [Message("t", str(n).encode(), qos=1) for n in range(2000)]
    assert all(inbox.put(one) for one in sure)
    assert not inbox.put(Message("t", b"one too many", qos=1))
    await inbox.wait()
    first = inbox.take(500)
    assert first[:500] == sure[:500]
    assert first[-1].payload == b"2999"
    rest = [one for _ in range(3) for one in inbox.take(500)]
    assert rest == sure[500:]
    assert inbox.take(500) == []


# --- with a broker


@dataclass
class Cloud:
    """The cloud's half of MQTT over a database."""

    settings: Settings
    store: Store
    link: Link
    ingest: Ingest
    parts: list[asyncio.Task[None]]

    async def rows(self) -> list[tuple[str, int]]:
        async with self.store.read() as session:
            return sorted((row.device, row.seq) for row in await streams.windows(session, 0.0, 10_000))

    async def device(self, name: str) -> Any:
        async with self.store.read() as session:
            return await devices.get(session, name)

    async def stored(self, n: int) -> bool:
        return len(await self.rows()) == n


@asynccontextmanager
async def ingesting(settings: Settings, store: Store) -> AsyncIterator[Cloud]:
    inbox = Inbox()
    link = Link(settings.broker_connect, Pki(settings.pki), inbox)
    one = Ingest(store, link, inbox)
    parts = [asyncio.create_task(link.run()), asyncio.create_task(one.run())]
    try:
        assert await link.until_connected(20)
        yield Cloud(settings, store, link, one, parts)
    finally:
        one.stop()
        await parts[1]
        parts[0].cancel()
        await asyncio.gather(parts[0], return_exceptions=True)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    need_mosquitto()
    return make_cloud(tmp_path / "cloud")


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    with broker_running(settings) as one:
        yield one


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[Store]:
    async with open_store(settings.database_url) as one:
        await seed(one, "d1", "d2")
        yield one


@pytest.mark.anyio
async def test_an_answer_is_not_retained_for_long(
    settings: Settings, broker: Broker, store: Store, tmp_path: Path
) -> None:
    """There are as many topics for answers as there are numbers, and the device chooses them."""
    broker.stop()
    broker.start(viewers=["_viewer-eye"])
    before, while_up = topics.response("d1", 7), topics.response("d1", 8)
    as_junk = "edgeward/v1/d1/up/response/x"
    with MqttDevice(settings, "d1", tmp_path / "d1") as d1, Peer(settings, "_viewer-eye") as eye:

        def retain(topic: str) -> None:
            d1.client.publish(topic, b"{}", qos=1, retain=True).wait_for_publish(PATIENCE_S)

        eye.subscribe("edgeward/v1/+/up/response/+")
        retain(before)
        async with ingesting(settings, store):
            retain(while_up)
            retain(as_junk)
            heard = [await asyncio.to_thread(eye.next) for _ in range(6)]
        cleared = {topic for topic, payload in heard if not payload}
        assert cleared == {before, while_up, as_junk}
    with MqttDevice(settings, "d1", tmp_path / "d1") as d1, Peer(settings, "_viewer-eye") as eye:
        eye.subscribe("edgeward/v1/+/up/#")
        d1.send("event", b"{}")
        assert eye.next()[0] == topics.up("d1", "event"), "nothing is left"


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_everything_that_devices_say_arrives(settings: Settings, store: Store, tmp_path: Path) -> None:
    rollout = Rollout(
        "r1", "edge", "main", MODEL, attempt=1, created_at=1.0, created_by="", targets=(Target("d1"),)
    )
    async with store.write() as session:
        await rollouts.add(session, rollout)
    result = ResultMessage(
        pipeline="main", source="cam", time=1, model="net", version="1", latency_ms=2, top=()
    )
    async with ingesting(settings, store) as cloud:
        with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
            await asyncio.to_thread(_speak, d1, result)
            await until(lambda: d1.acked() == {1, 2, 5} and d1.acked("event") == {1}, "acks")
            await until(lambda: cloud.ingest.results("d1") == (result,), "the result")
            row = await cloud.device("d1")
            assert (row.online, row.boot_id, row.birth["arch"]) == (True, BOOT, "x86_64")
            assert row.reported["pipelines"]["main"]["update"]["result"] == "succeeded"
            assert row.last_seen > 0
            assert await cloud.link.deliver([("d1", "refresh", Refresh(revision=3))])
            await until(lambda: d1.refreshes, "the refresh")
            assert await cloud.rows() == [("d1", 1), ("d1", 2)]
            assert cloud.ingest.counts == {"telemetry": 3, "event": 1, "invalid": 2}
        async with store.read() as session:
            found = await rollouts.get(session, "r1")
            assert found is not None
            assert (found.state, found.targets[0].result) == ("finished", "succeeded")


def _speak(d1: MqttDevice, result: ResultMessage) -> None:
    d1.send("status", status("online"))
    d1.send("birth", birth())
    d1.send("reported", reported(update("r1", "succeeded")))
    d1.send("telemetry", b"{poison")
    d1.send("telemetry", json.dumps({"boot_id": BOOT, "seq": 5}).encode())
    d1.send("telemetry", window(1))
    d1.send("telemetry", window(2))
    d1.send("telemetry", window(1))
    d1.send("event", event(1))
    d1.send("result", result)


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_only_accepted_devices_are_listened_to(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    """Somebody else's broker may go on taking what a rejected device sends."""
    async with store.write() as session:
        await devices.change(session, "d2", {"admission": "rejected"})
    async with ingesting(settings, store) as cloud:
        with (
            MqttDevice(settings, "d1", tmp_path / "d1") as d1,
            MqttDevice(settings, "d2", tmp_path / "d2") as d2,
        ):
            await asyncio.to_thread(d2.send, "status", status("online"))
            await asyncio.to_thread(d2.send, "telemetry", window(1))
            await asyncio.to_thread(d1.send, "telemetry", window(1))
            await until(lambda: d1.acked() == {1}, "the ack")
            assert d2.acked() == set()
        assert await cloud.rows() == [("d1", 1)]
        assert not (await cloud.device("d2")).online
        assert (await cloud.device("d2")).last_seen is None


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_what_is_sent_while_the_cloud_is_away_is_stored_when_it_is_back(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
        async with ingesting(settings, store):
            pass
        await asyncio.to_thread(lambda: [d1.send("telemetry", window(n)) for n in range(50)])
        assert d1.acked() == set()
        async with ingesting(settings, store) as cloud:
            await until(lambda: d1.acked() == set(range(50)), "all acks")
            assert await cloud.stored(50)


@pytest.mark.anyio
async def test_ingest_goes_on_when_the_broker_comes_back(
    settings: Settings, store: Store, broker: Broker, tmp_path: Path
) -> None:
    async with ingesting(settings, store) as cloud:
        with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
            await asyncio.to_thread(d1.send, "status", status("online"))
            await until(lambda: _online(cloud), "online")
        await asyncio.to_thread(broker.stop)
        await until(lambda: not cloud.link.connected, "the loss")
        assert not await cloud.link.deliver([("d1", "refresh", Refresh())])
        for saved in settings.mosquitto.glob("*.db"):
            saved.unlink()  # a broker that has lost its memory
        await asyncio.to_thread(broker.start)
        assert await cloud.link.until_connected(60)
        await until(lambda: _offline(cloud), "nobody to be taken for online")
        with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
            await asyncio.to_thread(d1.send, "telemetry", window(1))
            await until(lambda: d1.acked() == {1}, "the ack")


async def _online(cloud: Cloud) -> bool:
    return bool((await cloud.device("d1")).online)


async def _offline(cloud: Cloud) -> bool:
    return not await _online(cloud)


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_a_database_that_fails_blocks_and_loses_nothing(
    settings: Settings, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, failures = ingest_module.commit, 0

    async def failing(on: Store, batch: Batch) -> set[str]:
        nonlocal failures
        if failures < 3:
            failures += 1
            raise Unavailable("The database cannot be used: disk full.")
        return await commit(on, batch)

    monkeypatch.setattr(ingest_module, "commit", failing)
    monkeypatch.setattr(ingest_module, "_RETRY_S", (0.01, 0.05))
    async with ingesting(settings, store) as cloud:
        with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
            await asyncio.to_thread(d1.send, "telemetry", window(1))
            await until(lambda: d1.acked() == {1}, "the ack")
            assert failures == 3
            assert cloud.ingest.fault is None


DYING = """
import asyncio, os, signal, sys
from edgeward_cloud.ingest import Ingest
from edgeward_cloud.mqtt import Inbox, Link
from edgeward_cloud.pki import Pki
from edgeward_cloud.settings import Settings
from edgeward_cloud.store.database import open_store

class Dying(Link):
    async def deliver(self, downs):
        if downs:
            os.kill(os.getpid(), signal.SIGKILL)  # committed, and nothing acknowledged
        return True

async def main():
    settings = Settings.load(sys.argv[1])
    async with open_store(settings.database_url) as store:
        inbox = Inbox()
        link = Dying(settings.broker_connect, Pki(settings.pki), inbox)
        running = asyncio.gather(link.run(), Ingest(store, link, inbox).run())
        print(await link.until_connected(20), flush=True)
        await running

asyncio.run(main())
"""


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_killed_between_commit_and_acknowledgement_nothing_is_lost_nor_doubled(
    settings: Settings, store: Store, tmp_path: Path
) -> None:
    with MqttDevice(settings, "d1", tmp_path / "d1") as d1:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DYING, str(settings.dir), stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        assert await asyncio.wait_for(child.stdout.readline(), 60) == b"True\n"
        await asyncio.to_thread(d1.send, "telemetry", window(1))
        assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
        await asyncio.to_thread(lambda: [d1.send("telemetry", window(n)) for n in (2, 3)])
        async with store.read() as session:
            assert [row.seq for row in await streams.windows(session, 0.0, 10)] == [1]
        assert d1.acked() == set()
        async with ingesting(settings, store) as cloud:
            await until(lambda: d1.acked() == {1, 2, 3}, "all acks")
            assert await cloud.rows() == [("d1", 1), ("d1", 2), ("d1", 3)]
        # Everything was acknowledged to the broker as well: it delivers none of it again.
        async with ingesting(settings, store) as cloud:
            await asyncio.to_thread(d1.send, "telemetry", window(4))
            await until(lambda: 4 in d1.acked(), "the ack")
            assert cloud.ingest.counts["telemetry"] == 1
