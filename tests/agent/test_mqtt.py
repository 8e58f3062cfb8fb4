from __future__ import annotations

import json
import queue
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from edgeward_agent import mqtt, mqtt_connection
from edgeward_agent.mqtt import IN_FLIGHT, Link, backoff
from edgeward_agent.spool import Spool
from edgeward_wire import topics
from edgeward_wire.ack import Refresh
from edgeward_wire.command import CommandResponse
from edgeward_wire.event import Fault
from edgeward_wire.topics import MAX_PAYLOAD_BYTES
from sim.broker import Broker, CloudClient, KickingBroker, eventually, find_mosquitto
from sim.device import DEVICE, write_identity
from sim.pki import Authority

BOOT = "0" * 31 + "1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "_BACKOFF_FIRST_S", 0.05)
    monkeypatch.setattr(mqtt, "_BACKOFF_MOST_S", 0.2)


@dataclass
class Side:
    """A device's link with its spool, and what its hooks were told."""

    spool: Spool
    refreshes: queue.Queue[Refresh] = field(default_factory=queue.Queue)
    failures: list[BaseException] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    refusals: list[bool] = field(default_factory=list)
    beats: list[bool] = field(default_factory=list)
    greetings: list[bool] = field(default_factory=list)
    commands: queue.Queue[tuple[int, bytes]] = field(default_factory=queue.Queue)
    link: Link = field(init=False)

    def greet(self) -> None:
        self.greetings.append(self.link.publish("birth", b'{"birth":1}'))


Make = Callable[..., Side]


@pytest.fixture
def side(tmp_path: Path, server_authority: Authority, device_authority: Authority) -> Iterator[Make]:
    """Makes device sides, and stops them."""
    made: list[Side] = []

    def make(port: int, servers: Authority = server_authority, devices: Authority = device_authority) -> Side:
        state = tmp_path / f"device-{len(made)}"
        identity = write_identity(state, servers, devices, broker_port=port)
        one = Side(Spool(state / "spool", BOOT, 1 << 20))
        one.link = Link(
            identity,
            BOOT,
            one.spool,
            on_refresh=one.refreshes.put,
            on_connected=one.greet,
            failed=one.failures.append,
            on_disconnected=one.troubles.append,
            on_refused=lambda: one.refusals.append(True),
            beat=lambda: one.beats.append(True),
            on_command=lambda number, payload: one.commands.put((number, payload)),
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.link.stop()
        assert not one.link._thread.is_alive()


@pytest.fixture
def broker(tmp_path: Path, server_authority: Authority, device_authority: Authority) -> Iterator[Broker]:
    """A running Mosquitto."""
    if find_mosquitto() is None:
        missing("mosquitto")
    broker = Broker(tmp_path / "broker", server_authority, device_authority)
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def cloud(
    broker: Broker, tmp_path: Path, server_authority: Authority, device_authority: Authority
) -> Iterator[CloudClient]:
    """A cloud that acknowledges all."""
    cloud = CloudClient(tmp_path / "cloud", broker.port, server_authority, device_authority, acks=True)
    yield cloud
    cloud.close()


def states(cloud: CloudClient) -> list[str]:
    return [json.loads(p)["state"] for p in cloud.of("status")]


def add_events(spool: Spool, n: int) -> None:
    for k in range(n):
        spool.append_event(Fault(subject="spool", detail=str(k)), time=1e9)


def event_seqs(cloud: CloudClient) -> list[int]:
    return [json.loads(p)["seq"] for p in cloud.of("event")]


def test_it_says_online_and_calls_the_hook(side: Make, broker: Broker, cloud: CloudClient) -> None:
    one = side(broker.port)
    one.link.start()
    eventually(lambda: cloud.of("birth"))
    assert one.link.connected
    assert one.greetings == [True]
    assert states(cloud) == ["online"]
    beats = len(one.beats)
    one.link.wake()
    eventually(lambda: len(one.beats) > beats)
    assert json.loads(cloud.of("status")[0])["boot_id"] == BOOT


def test_an_orderly_stop_says_offline(side: Make, broker: Broker, cloud: CloudClient) -> None:
    one = side(broker.port)
    one.link.start()
    eventually(lambda: one.link.connected)
    one.link.stop()
    eventually(lambda: states(cloud) == ["online", "offline"])
    assert not one.link.connected
    assert one.failures == []


def test_the_will_says_offline_when_the_device_just_goes(
    side: Make, broker: Broker, cloud: CloudClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "_WILL_DELAY_S", 1)
    monkeypatch.setattr(Link, "_say_goodbye", lambda self, connection: None)
    one = side(broker.port)
    one.link.start()
    eventually(lambda: one.link.connected)
    one.link.stop()
    eventually(lambda: states(cloud) == ["online", "offline"])


def test_retained_topics_are_retained_and_results_are_not(
    side: Make, broker: Broker, cloud: CloudClient, tmp_path: Path,
    server_authority: Authority, device_authority: Authority,
) -> None:  # fmt: skip
    one = side(broker.port)
    one.link.start()
    eventually(lambda: one.link.connected)
    for kind in ("reported", "result", "metrics"):
        assert one.link.publish(kind, b"{}")  # type: ignore[arg-type]
    eventually(lambda: cloud.of("metrics"))
    cloud.close()
    later = CloudClient(tmp_path / "later", broker.port, server_authority, device_authority, acks=False)
    eventually(lambda: len(later.heard) >= 3)
    later.close()
    assert {m.topic.rpartition("/")[2] for m in later.heard} == {"status", "birth", "reported"}


def test_a_refresh_reaches_the_hook(side: Make, broker: Broker, cloud: CloudClient) -> None:
    one = side(broker.port)
    one.link.start()
    eventually(lambda: cloud.of("birth"))
    cloud.tell(DEVICE, "refresh", Refresh(revision=7))
    assert one.refreshes.get(timeout=10).revision == 7


def test_rubbish_from_the_cloud_is_ignored(side: Make, broker: Broker, cloud: CloudClient) -> None:
    one = side(broker.port)
    one.link.start()
    eventually(lambda: cloud.of("birth"))
    for kind in ("ack", "refresh", "unheard-of"):
        for payload in (b"", b"{", b"\xff", b"[]", b'{"revision":-1,"seqs":[]}'):
            cloud.tell(DEVICE, kind, payload)
    cloud.tell(DEVICE, "refresh", Refresh(revision=8))
    assert one.refreshes.get(timeout=10).revision == 8
    assert one.failures == []


def test_what_was_spooled_arrives_in_order_and_leaves_when_stored(
    side: Make, broker: Broker, cloud: CloudClient
) -> None:
    one = side(broker.port)
    add_events(one.spool, 300)
    one.link.start()
    eventually(lambda: one.spool.waiting_bytes == 0)
    assert event_seqs(cloud) == list(range(300))


def test_what_is_appended_later_goes_out_at_once(
    side: Make, broker: Broker, cloud: CloudClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is woken: nobody would look again within the hour."""
    monkeypatch.setattr(mqtt, "_TURN_S", 3600.0)
    monkeypatch.setattr(mqtt, "RESEND_S", 3600.0)
    one = side(broker.port)
    one.link.start()
    eventually(lambda: one.link.connected)
    for count in range(1, 5):  # what comes of the greeting wakes it too, for the first ones
        add_events(one.spool, 1)
        one.link.wake()
        eventually(lambda count=count: event_seqs(cloud) == list(range(count)))  # type: ignore[misc]
        eventually(lambda: one.spool.waiting_bytes == 0)


def test_no_more_than_the_bound_is_under_way(side: Make, broker: Broker, cloud: CloudClient) -> None:
    cloud.acks = False
    one = side(broker.port)
    add_events(one.spool, IN_FLIGHT + 50)
    one.link.start()
    eventually(lambda: len(event_seqs(cloud)) == IN_FLIGHT)
    one.link.publish("result", b"{}")
    eventually(lambda: cloud.of("result"))
    assert event_seqs(cloud) == list(range(IN_FLIGHT))
    for message in cloud.messages("event"):
        cloud.ack(DEVICE, message)
    eventually(lambda: len(event_seqs(cloud)) == IN_FLIGHT + 50)


def test_what_is_not_acknowledged_is_sent_again(
    side: Make, broker: Broker, cloud: CloudClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "RESEND_S", 0.5)
    cloud.acks = False
    one = side(broker.port)
    add_events(one.spool, 2)
    one.link.start()
    eventually(lambda: len(event_seqs(cloud)) == 2)
    cloud.acks = True
    eventually(lambda: one.spool.waiting_bytes == 0)
    assert set(event_seqs(cloud)) == {0, 1}


def test_a_broker_that_restarts_loses_nothing(
    side: Make, broker: Broker, cloud: CloudClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even what it takes before the cloud is back, and so drops, is sent again."""
    monkeypatch.setattr(mqtt, "RESEND_S", 0.5)
    cloud.acks = False
    one = side(broker.port)
    one.link.start()
    add_events(one.spool, 3)
    one.link.wake()
    eventually(lambda: event_seqs(cloud) == [0, 1, 2])
    broker.stop()
    eventually(lambda: one.troubles)
    assert not one.link.connected
    assert not one.link.publish("result", b"{}")
    add_events(one.spool, 2)
    cloud.acks = True
    broker.start()
    eventually(lambda: one.spool.waiting_bytes == 0)
    assert Counter(event_seqs(cloud)).keys() == {0, 1, 2, 3, 4}
    eventually(lambda: len(one.greetings) == 2)


def test_a_broker_that_is_away_at_the_start_is_waited_for(side: Make, broker: Broker, tmp_path: Path) -> None:
    broker.stop()
    one = side(broker.port)
    one.link.start()
    eventually(lambda: one.troubles)
    assert "Connection refused" in one.troubles[0]
    broker.start()
    eventually(lambda: one.link.connected)
    assert len(one.troubles) == 1, "the same trouble is told once"
    assert one.refusals == [], "nobody was there to refuse it"
    assert len(one.beats) > len(one.troubles), "waiting is progress"
    assert one.link.trouble == ""


# paho leaves the socket of a failed handshake to the garbage collector
handshake_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@handshake_fails
def test_a_broker_of_another_ca_is_not_trusted(side: Make, broker: Broker) -> None:
    one = side(broker.port, servers=Authority.make("Someone else"))
    one.link.start()
    eventually(lambda: one.troubles)
    assert "CERTIFICATE_VERIFY_FAILED" in one.troubles[0]
    assert not one.link.connected


@handshake_fails
def test_a_device_of_another_ca_is_told_that_it_was_not_accepted(side: Make, broker: Broker) -> None:
    one = side(broker.port, devices=Authority.make("Someone else"))
    one.link.start()
    eventually(lambda: one.troubles)
    assert "before it accepted this device" in one.troubles[0] or "reset by peer" in one.troubles[0]
    assert one.link.trouble == one.troubles[0]
    eventually(lambda: one.refusals)


def test_a_hook_that_raises_stops_the_link_and_is_reported(
    side: Make, broker: Broker, cloud: CloudClient
) -> None:
    one = side(broker.port)
    bug = RuntimeError("bug")

    def raise_it(refresh: Refresh) -> None:
        raise bug

    one.link.on_refresh = raise_it
    one.link.start()
    eventually(lambda: cloud.of("birth"))
    cloud.tell(DEVICE, "refresh", Refresh())
    eventually(lambda: one.failures)
    assert one.failures == [bug]
    eventually(lambda: not one.link._thread.is_alive())
    assert not one.link.connected


def test_what_is_too_long_for_the_broker_is_not_sent(
    side: Make, tmp_path: Path, server_authority: Authority, device_authority: Authority
) -> None:
    if find_mosquitto() is None:
        missing("mosquitto")
    settings = ("max_packet_size 2000",)
    broker = Broker(tmp_path / "small", server_authority, device_authority, settings=settings)
    broker.start()
    cloud = CloudClient(tmp_path / "cloud", broker.port, server_authority, device_authority, acks=True)
    one = side(broker.port)
    one.spool.append_event(Fault(subject="a", detail="x" * 2000), time=1e9)
    add_events(one.spool, 1)
    one.link.start()
    eventually(lambda: one.spool.waiting_bytes == 0)
    assert event_seqs(cloud) == [1]
    assert one.spool.dropped == 1
    one.link.publish("reported", b"x" * 3000)
    one.link.publish("reported", b"short")
    eventually(lambda: cloud.of("reported") == [b"short"])
    assert len(one.greetings) == 1, "nobody was kicked"
    cloud.close()
    one.link.stop()
    broker.stop()


def test_a_payload_above_our_own_bound_is_refused(side: Make) -> None:
    assert not side(1).link.publish("reported", b"x" * (MAX_PAYLOAD_BYTES + 1))


def test_only_the_message_that_breaks_the_connection_is_set_aside(
    side: Make, tmp_path: Path, server_authority: Authority
) -> None:
    broker = KickingBroker(tmp_path / "kicking", server_authority, b"poison")
    one = side(broker.port)
    add_events(one.spool, 5)
    one.spool.append_event(Fault(subject="a", detail="poison"), time=1e9)
    add_events(one.spool, 5)
    one.link.start()
    eventually(lambda: one.spool.dropped == 1)
    eventually(lambda: {k for k in range(11) if any(b'"seq":%d,' % k in a for a in broker.arrived)} >= {10})
    arrived = {json.loads(a[a.index(b'{"') :])["seq"] for a in broker.arrived if b"event/1" in a}
    one.link.stop()
    broker.close()
    assert arrived == set(range(11)) - {5}
    assert one.spool.dropped == 1
    assert b"poison" in (tmp_path / "device-0/spool/quarantine.jsonl").read_bytes()


def test_nothing_waits_behind_results_that_a_slow_uplink_does_not_take(
    side: Make, tmp_path: Path, server_authority: Authority
) -> None:
    broker = KickingBroker(tmp_path / "slow", server_authority, b"poison")
    one = side(broker.port)

    def turn() -> None:
        beats = len(one.beats)
        one.link.wake()
        eventually(lambda: len(one.beats) > beats)

    one.link.start()
    eventually(lambda: any(b"/up/birth" in body for body in broker.arrived))
    broker.reads.clear()
    for n in range(3000):  # 30 MB
        one.link.publish("result", b'{"n":%d,"x":"%s"}' % (n, b"x" * 10_000))
        if n % 50 == 0:
            turn()
            turn()  # what was there before the first one has been looked at
        if n == 2000:
            one.link.publish("reported", b"old")
            one.link.publish("reported", b"new")
            assert one.link.respond(CommandResponse(n=12, boot_id=BOOT, state="done"))
            add_events(one.spool, 1)
    broker.reads.set()
    eventually(lambda: b'"n":2999,' in broker.arrived[-1][:200])
    one.link.stop()
    arrived = list(broker.arrived)
    broker.close()
    topics_of = [body[2 : 2 + int.from_bytes(body[:2], "big")].decode() for body in arrived]
    kinds = [topic.split("/up/")[1].partition("/")[0] for topic in topics_of]
    assert one.greetings == [True], "it is still the first connection"
    assert kinds.count("result") < 1500, "what waits is bounded"
    assert [body[-3:] for body, kind in zip(arrived, kinds, strict=True) if kind == "reported"] == [b"new"]
    for kind in ("reported", "response", "event"):
        after = kinds[kinds.index(kind) :]
        assert after.count("result") <= mqtt._QUEUE_MOST, f"{kind} waits for what was on its way alone"


@given(attempt=st.integers(0, 10_000))
def test_backoff_has_full_jitter_below_a_bound_that_doubles(attempt: int) -> None:
    bounds: list[tuple[float, float]] = []
    backoff(attempt, lambda low, high: bounds.append((low, high)) or 0.0)  # type: ignore[func-returns-value]
    first, most = mqtt._BACKOFF_FIRST_S, mqtt._BACKOFF_MOST_S
    assert bounds == [(0.0, min(most, first * 2 ** min(attempt, 16)))]


def test_a_command_arrives_as_it_is_and_its_answer_carries_the_correlation(
    side: Make, broker: Broker, cloud: CloudClient
) -> None:
    one = side(broker.port)
    answer = CommandResponse(n=12, boot_id=BOOT, state="refused", reason="Not now.")
    assert not one.link.respond(answer), "nobody is there to hear it"
    one.link.start()
    eventually(lambda: cloud.of("birth"))  # published after it had subscribed
    cloud._client.publish(topics.command(DEVICE, 12), b"whatever", qos=1)
    assert one.commands.get(timeout=20) == (12, b"whatever")
    assert one.link.respond(answer)
    eventually(lambda: any("/up/response/" in m.topic for m in cloud.heard))
    [message] = [m for m in cloud.heard if "/up/response/" in m.topic]
    assert message.topic == topics.response(DEVICE, 12)
    assert (message.qos, message.retain) == (1, False)
    assert message.properties.CorrelationData == topics.correlation(BOOT, 12)
    assert CommandResponse.model_validate_json(message.payload) == answer
    assert one.failures == []
