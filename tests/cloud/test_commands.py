"""Commands in the cloud: how one stands, the routes, the rows, and the way over the real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.apikit import Api, running_api
from cloud.kit import make_cloud
from cloud.mqttkit import MqttDevice, broker_running, need_mosquitto, until
from cloud.test_ingest import ingesting, sort_out
from cloud.test_store import BOOT, MODEL, seed
from edgeward_cloud import commanding
from edgeward_cloud.broker import Broker
from edgeward_cloud.commanding import GRACE_S, LIFE_S, next_number, standing
from edgeward_cloud.ingest import commit
from edgeward_cloud.mqtt import Message
from edgeward_cloud.services import _undelivered
from edgeward_cloud.settings import Settings
from edgeward_cloud.store import commands, devices, operations
from edgeward_cloud.store.database import Store, open_store
from edgeward_cloud.store.models import CommandRow
from edgeward_wire import topics
from edgeward_wire.command import FINAL, MAX_RESPONSE_BYTES, Bench, Command, CommandResponse
from edgeward_wire.manifest import ModelRef
from edgeward_wire.status import Status
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict

OTHER_BOOT = "c" * 32
NOW = 5000.0


def row(n: int = 1, **changes: Any) -> CommandRow:
    columns: dict[str, Any] = {
        "device": "d1",
        "n": n,
        "boot_id": BOOT,
        "kind": "bench",
        "model_path": MODEL.path,
        "model_sha256": MODEL.sha256,
        "seconds": 300.0,
        "state": "sent",
        "reason": "",
        "issued_at": NOW,
        "expires_at": NOW + LIFE_S,
        "created_by": "ann",
    }
    return CommandRow(**{**columns, **changes})


def verdict() -> Verdict:
    plan = Plan(provider="CPUExecutionProvider", variant="int8")
    outcome = PlanOutcome(plan=plan, outcome="chosen", p50_ms=3.5, p99_ms=4, parity=0.99)
    return Verdict(model_sha256=MODEL.sha256, key="0" * 64, chosen=plan, plans=(outcome,), took_s=2)


def response(n: int = 1, state: Any = "running", **more: Any) -> CommandResponse:
    return CommandResponse(**{"n": n, "boot_id": BOOT, "state": state, **more})


# --- pure


@pytest.mark.parametrize(
    ("state", "later_s", "seen"),
    [
        ("sent", 0, "sent"),
        ("sent", LIFE_S + GRACE_S, "sent"),
        ("sent", LIFE_S + GRACE_S + 1, "expired"),
        ("accepted", LIFE_S + GRACE_S + 1, "accepted"),
        ("running", LIFE_S + 300 + GRACE_S, "running"),
        ("running", LIFE_S + 300 + GRACE_S + 1, "failed"),
        ("done", 1e9, "done"),
        ("refused", 1e9, "refused"),
    ],
)
def test_silence_ends_a_command(state: str, later_s: float, seen: str) -> None:
    found, reason = standing(row(state=state), NOW + later_s)
    assert found == seen
    assert bool(reason) == (found != state)


@given(st.integers(0, 10**14), st.floats(0, 1e11))
def test_numbers_grow_and_start_at_the_clock(last: int, now: float) -> None:
    assert next_number(last, now) > last
    assert next_number(last, now) >= int(now)


def test_an_answer_must_be_on_its_own_topic() -> None:
    right = Message(topics.response("d1", 1), response().to_bytes(), qos=1)
    wrong = Message(topics.response("d1", 2), response().to_bytes(), qos=1)
    long = Message(topics.response("d1", 1), b" " * (MAX_RESPONSE_BYTES + 1), qos=1)
    batch = sort_out([right, wrong, long], NOW)
    assert batch.responses == [("d1", response())]
    assert len(batch.faults) == 2
    assert "answers command 1" in batch.faults[0][1]


# --- rows


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(f"sqlite+aiosqlite:///{tmp_path / 'edgeward.db'}") as one:
        await seed(one, "d1", "d2")
        yield one


async def held(store: Store, device: str = "d1", n: int = 1) -> CommandRow:
    async with store.read() as session:
        found = await commands.get(session, device, n)
    assert found is not None
    return found


async def hear(store: Store, *said: CommandResponse | Status, device: str = "d1") -> None:
    """As ingest does it."""
    messages = [
        Message(topics.response(device, one.n), one.to_bytes(), qos=1)
        if isinstance(one, CommandResponse)
        else Message(topics.up(device, "status"), one.to_bytes(), retained=True, qos=1)
        for one in said
    ]
    await commit(store, sort_out(messages, NOW))


@pytest.mark.anyio
async def test_a_device_keeps_its_newest_rows_only(store: Store) -> None:
    async with store.write() as session:
        for n in range(1, commands.KEEP + 11):
            await commands.add(session, row(n))
        await commands.add(session, row(3, device="d2"))
        found = await commands.newest(session, "d1", 1000)
        assert [r.n for r in found] == list(range(commands.KEEP + 10, 10, -1))
        assert await commands.last_number(session, "d1") == commands.KEEP + 10
        assert await commands.last_number(session, "d2") == 3
        assert await commands.last_number(session, "d3") == 0


@pytest.mark.anyio
async def test_answers_move_a_command_until_its_last_word(store: Store) -> None:
    async with store.write() as session:
        await commands.add(session, row())
    await hear(store, response(state="accepted"), response(progress=0.5, phase="measuring"))
    assert (await held(store)).state == "running"
    await hear(store, response(state="done", verdict=verdict()), response(progress=0.9), response(n=2))
    found = await held(store)
    assert found.state == "done"
    assert found.response is not None
    assert CommandResponse.model_validate(found.response).verdict == verdict()


@pytest.mark.anyio
async def test_the_answer_of_another_run_or_device_is_not_this_ones(store: Store) -> None:
    async with store.write() as session:
        await commands.add(session, row())
    await hear(store, response(state="done").model_copy(update={"boot_id": OTHER_BOOT}))
    await hear(store, response(state="done"), device="d2")
    assert (await held(store)).state == "sent"


@pytest.mark.anyio
async def test_a_restart_of_the_agent_ends_what_was_open(store: Store) -> None:
    async with store.write() as session:
        for n, changes in ((1, {"state": "done"}), (2, {}), (3, {"boot_id": OTHER_BOOT})):
            await commands.add(session, row(n, **changes))
        await devices.change(session, "d1", {"boot_id": BOOT})
    await hear(store, Status(state="online", boot_id=BOOT))
    assert [(await held(store, n=n)).state for n in (1, 2, 3)] == ["done", "sent", "sent"]
    await hear(store, Status(state="online", boot_id=OTHER_BOOT))
    assert [(await held(store, n=n)).state for n in (1, 2, 3)] == ["done", "failed", "sent"]
    assert (await held(store, n=2)).reason == "The agent was restarted."


# --- the routes


@pytest.fixture
async def the(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(tmp_path / "cloud") as one:
        await one.enrol("d1")
        one.told.clear()
        yield one


async def online(the: Api, *, online: bool = True, **fields: Any) -> None:
    async with the.services.store.write() as session:
        await devices.change(session, "d1", {"online": online, "boot_id": BOOT, **fields})


def body(ref: ModelRef, **more: Any) -> dict[str, Any]:
    return {"model": ref.model_dump(), **more}


@pytest.mark.anyio
async def test_a_command_is_stored_sent_and_answered(the: Api) -> None:
    ref = the.release("1")
    await online(the)
    sent = await the.call("POST", "/v1/devices/d1/commands", 201, json=body(ref, threads=2, seconds=60))
    assert (sent["state"], sent["kind"], sent["created_by"], sent["online"]) == ("sent", "bench", "ann", True)
    [(device, kind, command)] = the.told
    assert (device, kind) == ("d1", "cmd")
    assert isinstance(command, Command)
    assert (command.n, command.boot_id) == (sent["n"], BOOT)
    assert command.what == Bench(model=ref, threads=2, seconds=60)
    path = f"/v1/devices/d1/commands/{sent['n']}"
    assert await the.call("GET", path) == sent
    await hear(the.services.store, response(sent["n"], "done", verdict=verdict(), took_s=2.5))
    done = await the.call("GET", path)
    assert (done["state"], done["response"]["took_s"]) == ("done", 2.5)
    assert done["response"]["verdict"]["plans"][0]["p50_ms"] == 3.5
    again = await the.call("POST", "/v1/devices/d1/commands", 201, json=body(ref))
    assert again["n"] > sent["n"]
    listed = await the.call("GET", "/v1/devices/d1/commands")
    assert [c["n"] for c in listed] == [again["n"], sent["n"]]
    async with the.services.store.read() as session:
        audit = await operations.audit(session, 1)
    assert (audit[0].action, audit[0].subject, audit[0].detail["n"]) == ("command", "device d1", again["n"])


@pytest.mark.anyio
async def test_who_cannot_be_asked_is_said_with_what_to_do(the: Api) -> None:
    ref = the.release("1")
    path = "/v1/devices/d1/commands"
    offline = await the.problem("POST", path, 409, json=body(ref))
    assert "offline" in offline["detail"]
    assert "agent-ctl devices" in offline["next_step"]
    await online(the, admission="rejected")
    assert "rejected" in (await the.problem("POST", path, 409, json=body(ref)))["detail"]
    await online(the, admission="accepted")
    other = ref.model_copy(update={"sha256": "0" * 64})
    unknown = ModelRef(path="models/nobody/1.json", sha256=ref.sha256)
    for one in (other, unknown):
        assert "released" in (await the.problem("POST", path, 422, json=body(one)))["detail"]
    await the.problem("POST", path, 422, json=body(ref, kind="shell"))
    await the.problem("POST", path, 422, json=body(ref, seconds=1e9))
    await the.problem("POST", path, 401, json=body(ref), headers={})
    for method, place in (("POST", "d9/commands"), ("GET", "d9/commands"), ("GET", "d9/commands/1")):
        more = {"json": body(ref)} if method == "POST" else {}
        assert "no device d9" in (await the.problem(method, f"/v1/devices/{place}", 404, **more))["detail"]
    assert "no command 7" in (await the.problem("GET", f"{path}/7", 404))["detail"]
    await the.problem("GET", f"{path}/0", 422)
    assert the.told == []


@pytest.mark.anyio
async def test_one_open_command_a_device(the: Api) -> None:
    ref = the.release("1")
    await online(the)
    path = "/v1/devices/d1/commands"
    answers = await asyncio.gather(
        *(the.http.post(path, json=body(ref), headers=the.operator) for _ in range(4))
    )
    assert sorted(a.status_code for a in answers) == [201, 409, 409, 409]
    busy = await the.problem("POST", path, 409, json=body(ref))
    assert "bench of net 1, by ann" in busy["detail"]
    the.clock.ahead = LIFE_S + GRACE_S + 5  # it never answered
    await the.call("POST", path, 201, json=body(ref))
    states = [c["state"] for c in await the.call("GET", path)]
    assert states == ["sent", "expired"]


@pytest.mark.anyio
async def test_what_the_broker_does_not_take_has_failed(tmp_path: Path) -> None:
    async with running_api(tmp_path / "cloud") as the:
        await the.enrol("d1")
        ref = the.release("1")
        await online(the)

        object.__setattr__(the.services, "deliver", _undelivered)  # as it is without a broker
        said = await the.problem("POST", "/v1/devices/d1/commands", 503, json=body(ref))
        assert "broker" in said["detail"]
        assert said["next_step"]
        [failed] = await the.call("GET", "/v1/devices/d1/commands")
        assert (failed["state"], failed["reason"]) == ("failed", "The broker did not take the command.")


# --- over the broker


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    need_mosquitto()
    return make_cloud(tmp_path / "cloud")


@pytest.fixture
def broker(settings: Settings) -> Iterator[Broker]:
    with broker_running(settings) as one:
        yield one


@pytest.mark.anyio
@pytest.mark.usefixtures("broker")
async def test_there_and_back_over_the_broker(settings: Settings, tmp_path: Path) -> None:
    async with open_store(settings.database_url) as store:
        await seed(store, "d1", "d2")
        async with store.write() as session:
            await commands.add(session, row(7))
        async with ingesting(settings, store) as cloud:
            with (
                MqttDevice(settings, "d1", tmp_path / "d1") as d1,
                MqttDevice(settings, "d2", tmp_path / "d2") as d2,
            ):
                issued = Command(
                    n=7, boot_id=BOOT, issued_at=NOW, expires_at=NOW + LIFE_S, what=Bench(model=MODEL)
                )
                assert await cloud.link.deliver([("d1", "cmd", issued)])
                await until(lambda: d1.commands, "the command")
                [came] = d1.commands
                assert came.topic == topics.command("d1", 7)
                assert Command.model_validate_json(came.payload) == issued
                assert (came.qos, came.retain) == (1, False)
                properties = came.properties
                assert properties.CorrelationData == topics.correlation(BOOT, 7)
                assert properties.ResponseTopic == topics.response("d1", 7)
                assert 0 < properties.MessageExpiryInterval <= LIFE_S
                assert d2.commands == []

                # The broker's ACL: nobody answers for another.
                d2.answer(response(7, "failed"), of="d1")
                d1.answer(response(7, "done", verdict=verdict()))

                async def done() -> bool:
                    return (await held(store, n=7)).state in FINAL

                await until(done, "the answer to be stored")
                found = await held(store, n=7)
                assert found.state == "done"
                assert json.loads(json.dumps(found.response))["verdict"]["plans"][0]["p50_ms"] == 3.5


def test_a_commands_life_is_within_what_devices_take() -> None:
    assert 0 < commanding.LIFE_S <= 3600
