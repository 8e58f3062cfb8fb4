from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from conftest import missing
from edgeward_agent import spool as spool_module
from edgeward_agent.segments import Outgoing, merge_pairs
from edgeward_agent.spool import BATCH, Spool
from edgeward_wire.ack import Ack
from edgeward_wire.document import parse
from edgeward_wire.event import MAX_EVENT_BYTES, Event, Fault, Finished
from edgeward_wire.histogram import Histogram, Recorder
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Update
from edgeward_wire.telemetry import Measures, Window

BOOT = "0" * 31 + "1"
MODEL = ModelRef(path="models/toy/1.json", sha256="0" * 64)


def latency(value: float) -> Histogram:
    recorder = Recorder()
    recorder.record(value)
    return recorder.take()


def measures(source: str = "cam", frames: int = 1) -> Measures:
    return Measures(
        pipeline="main",
        source=source,
        model=MODEL,
        variant="int8",
        provider="CPU",
        start=1e9,
        duration_s=30,
        frames=frames,
        stages={"inference": latency(5.0)},
    )


FAULT = Fault(subject="source:cam", detail="gone")


def drain(spool: Spool) -> list[Outgoing]:
    """All that it would send, without acknowledging."""
    spool.rewind()
    return spool.next_batch(1_000_000)


def stored(spool: Spool, messages: list[Outgoing]) -> None:
    for message in messages:
        spool.acked(Ack(boot_id=message.boot_id, stream=message.stream, seqs=(message.seq,)))


def seqs(messages: list[Outgoing], stream: str = "telemetry") -> list[int]:
    return [m.seq for m in messages if m.stream == stream]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path, BOOT, 1 << 20)


def test_messages_come_in_order_and_carry_their_seq(spool: Spool) -> None:
    for _ in range(3):
        spool.append_window(measures())
        spool.append_event(FAULT, time=1e9)
    batch = spool.next_batch(100)
    assert seqs(batch) == [0, 1, 2]
    assert seqs(batch, "event") == [0, 1, 2]
    window = parse(Window, batch[0].payload)
    assert (window.boot_id, window.seq, window.first_seq) == (BOOT, 0, 0)
    assert all(parse(Event, m.payload).what == FAULT for m in batch if m.stream == "event")


def test_a_message_is_under_way_once_until_it_is_rewound(spool: Spool) -> None:
    for _ in range(4):
        spool.append_window(measures())
    assert seqs(spool.next_batch(3)) == [0, 1, 2]
    assert seqs(spool.next_batch(3)) == [3]
    assert spool.next_batch(3) == []
    spool.acked(Ack(boot_id=BOOT, stream="telemetry", seqs=(1,)))
    spool.rewind()
    assert seqs(spool.next_batch(9)) == [0, 2, 3]


def test_nothing_is_on_disk_while_connected(spool: Spool, tmp_path: Path) -> None:
    spool.on_connect()
    for _ in range(50):
        spool.append_window(measures())
    assert not list(tmp_path.glob("*.jsonl"))
    spool.on_disconnect()
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_windows_go_to_disk_in_batches_while_disconnected(spool: Spool, tmp_path: Path) -> None:
    for _ in range(BATCH - 1):
        spool.append_window(measures())
    assert not list(tmp_path.glob("*.jsonl"))
    spool.append_window(measures())
    assert len(drain(Spool(tmp_path, BOOT, 1 << 20))) == BATCH


def test_an_event_goes_to_disk_at_once_while_disconnected(spool: Spool, tmp_path: Path) -> None:
    spool.append_window(measures())
    spool.append_event(FAULT, time=1e9)
    assert len(drain(Spool(tmp_path, BOOT, 1 << 20))) == 2


def test_earlier_boots_come_first_under_their_own_boot_id(spool: Spool, tmp_path: Path) -> None:
    spool.append_window(measures())
    spool.close()
    later = Spool(tmp_path, "f" * 32, 1 << 20)
    later.append_window(measures())
    assert [(m.boot_id, m.seq) for m in later.next_batch(9)] == [(BOOT, 0), ("f" * 32, 0)]


def test_what_is_stored_leaves_the_disk(spool: Spool, tmp_path: Path) -> None:
    for _ in range(30):
        spool.append_window(measures())
    spool.close()
    again = Spool(tmp_path, BOOT, 1 << 20)
    stored(again, again.next_batch(100))
    assert again.waiting_bytes == 0
    assert not list(tmp_path.glob("*.jsonl"))


def test_an_acknowledgement_of_a_spilled_message_under_way_counts(spool: Spool, tmp_path: Path) -> None:
    spool.on_connect()
    spool.append_window(measures())
    batch = spool.next_batch(9)
    for _ in range(2000):
        spool.append_window(measures())
    assert list(tmp_path.glob("*.jsonl")), "too much for memory alone"
    stored(spool, batch)
    assert min(seqs(drain(spool))) == 1


def test_a_torn_last_line_is_left_out(spool: Spool, tmp_path: Path) -> None:
    for _ in range(BATCH):
        spool.append_window(measures())
    [path] = tmp_path.glob("*.jsonl")
    os.truncate(path, path.stat().st_size - 20)
    again = Spool(tmp_path, "f" * 32, 1 << 20)
    again.append_event(FAULT, time=1e9)
    assert seqs(drain(again)) == list(range(BATCH - 1))
    assert seqs(drain(again), "event") == [0]
    assert again.dropped == 1


@pytest.mark.parametrize(
    "rubbish", [b"", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"schema":"x"}\n']
)
def test_a_damaged_segment_does_not_block_the_others(spool: Spool, tmp_path: Path, rubbish: bytes) -> None:
    spool.append_event(FAULT, time=1e9)
    spool.close()
    (tmp_path / "0000000000-0000000000.jsonl").write_bytes(rubbish)
    again = Spool(tmp_path, "f" * 32, 1 << 20)
    assert seqs(drain(again), "event") == [0]
    assert not (tmp_path / "0000000000-0000000000.sent.jsonl").exists()


def test_when_it_is_full_it_merges_before_it_drops(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BOOT, 64 << 10)
    for n in range(600):
        spool.append_window(measures("left" if n % 2 else "right"))
        assert spool.waiting_bytes <= 64 << 10
    windows = [parse(Window, m.payload) for m in drain(spool)]
    assert spool.dropped == 0
    assert len(windows) < 300
    assert sum(w.frames for w in windows) == 600
    assert sum(w.stages["inference"].count for w in windows) == 600
    assert [w.seq for w in windows] == sorted({w.seq for w in windows})
    assert windows[0].duration_s > windows[-1].duration_s, "the oldest are the coarsest"


def test_windows_that_were_sent_are_never_merged(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BOOT, 64 << 10)
    for _ in range(BATCH):
        spool.append_window(measures())
    sent = spool.next_batch(100)
    spool.on_disconnect()
    for _ in range(100):
        spool.append_window(measures())
    assert drain(spool)[: len(sent)] == sent


def test_when_nothing_can_be_merged_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, BOOT, 32 << 10)
    for _ in range(600):
        spool.append_event(FAULT, time=1e9)
    left = seqs(drain(spool), "event")
    assert left == list(range(600 - len(left), 600))
    assert spool.dropped == 600 - len(left) > 0
    spool.close()
    assert Spool(tmp_path, BOOT, 32 << 10).dropped == spool.dropped


def test_a_message_that_is_too_long_is_dropped_and_counted(spool: Spool) -> None:
    update = Update(rollout="r", model=MODEL, attempt=1, state="idle", numbers={}, reason="x" * 2000)
    long = Finished(pipeline="main", update=update.model_copy(update={"detail": "x" * MAX_EVENT_BYTES}))
    assert spool.append_event(long, time=1e9) is None
    assert spool.dropped == 1
    event = spool.append_event(FAULT, time=1e9)
    assert event is not None
    assert event.seq == 0, "a stream has no gap for it"


def test_a_message_can_be_set_aside(spool: Spool, tmp_path: Path) -> None:
    for _ in range(2):
        spool.append_window(measures())
    spool.quarantine(spool.next_batch(1)[0])
    assert seqs(drain(spool)) == [1]
    assert spool.dropped == 1
    assert b'"seq":0' in (tmp_path / "quarantine.jsonl").read_bytes()


def test_merging_keeps_order_and_leaves_events_where_they_are() -> None:
    spool = Spool(Path(tempfile.mkdtemp()), BOOT, 1 << 20)
    spool.on_connect()
    for source in ("a", "b", "a", "b", "a"):
        spool.append_window(measures(source))
        spool.append_event(FAULT, time=1e9)
    merged = merge_pairs(spool.next_batch(100))
    windows = [parse(Window, m.payload) for m in merged if m.stream == "telemetry"]
    assert [(w.source, w.first_seq, w.seq, w.frames) for w in windows] == [
        ("a", 0, 2, 2),
        ("b", 1, 3, 2),
        ("a", 4, 4, 1),
    ]
    assert seqs(merged, "event") == [0, 1, 2, 3, 4]


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of its own; needs root."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        missing("the right to mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_survived_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "_RETRY_S", 0.0)
    with small_disk(tmp_path / "disk", "64k") as disk:
        filler = disk / "filler"
        filler.write_bytes(b"x" * (40 << 10))
        spool = Spool(disk / "spool", BOOT, 256 << 10)
        for _ in range(100):
            spool.append_window(measures())
        spool.on_disconnect()
        assert "No space left" in spool.fault
        assert [parse(Window, m.payload).seq for m in drain(spool)] == list(range(100))
        filler.unlink()
        spool.rewind()
        spool.on_disconnect()
        assert spool.fault == ""


def test_a_full_disk_merges_and_drops_in_memory(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "filler").write_bytes(b"x" * 4096)
        spool = Spool(disk / "spool", BOOT, 64 << 10)
        for n in range(1000):
            spool.append_window(measures(frames=n))
            spool.append_event(FAULT, time=1e9)
        assert spool.waiting_bytes <= 64 << 10
        assert spool.dropped > 0
        left = seqs(drain(spool), "event")
        assert left == list(range(1000 - len(left), 1000))


class SpoolMachine(RuleBasedStateMachine):
    """Append, send, store, lose the link, spill, crash, tear: nothing is lost uncounted, nothing twice."""

    max_bytes = 1 << 20

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.boots = 0
        self.cloud: dict[tuple[str, str, int], Outgoing] = {}
        self.flying: list[Outgoing] = []
        self.appended: dict[str, dict[str, list[int]]] = {}
        self.safe: dict[str, dict[str, list[int]]] = {}
        """What was on disk for certain, by boot and stream."""
        self.start()

    def start(self) -> None:
        self.boots += 1
        self.boot = f"{self.boots:032x}"
        self.spool = Spool(self.directory, self.boot, self.max_bytes)
        self.connected = False
        self.flying = []
        self.appended[self.boot] = {"telemetry": [], "event": []}
        self.safe[self.boot] = {"telemetry": [], "event": []}

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.finish()
            shutil.rmtree(self.directory)

    def all_is_safe(self) -> None:
        self.safe[self.boot] = {stream: list(s) for stream, s in self.appended[self.boot].items()}

    @rule(source=st.sampled_from(["a", "b"]), n=st.sampled_from([1, 3, 12, 40]))
    def window(self, source: str, n: int) -> None:
        for _ in range(n):
            made = self.spool.append_window(measures(source))
            assert made is not None
            self.appended[self.boot]["telemetry"].append(made.seq)

    @rule()
    def event(self) -> None:
        made = self.spool.append_event(FAULT, time=1e9)
        assert made is not None
        self.appended[self.boot]["event"].append(made.seq)
        if not self.connected:
            self.all_is_safe()

    @rule()
    def link(self) -> None:
        """It comes or goes."""
        self.connected = not self.connected
        if self.connected:
            self.spool.on_connect()
        else:
            self.spool.on_disconnect()
            self.flying = []
            self.all_is_safe()

    @precondition(lambda self: self.connected)
    @rule(n=st.integers(1, 20), arrived=st.sampled_from([0, 0.5, 1]), acked=st.booleans())
    def exchange(self, n: int, arrived: float, acked: bool) -> None:
        """Some go out; the cloud stores some of what is under way, and acknowledges some of that."""
        self.flying += self.spool.next_batch(n)
        assert len({m.key for m in self.flying}) == len(self.flying), "nothing is under way twice"
        arriving = self.flying[: int(len(self.flying) * arrived)]
        for message in arriving:
            self.store(message)
        done = arriving if acked else []
        stored(self.spool, done)
        self.flying = self.flying[len(done) :]

    def store(self, message: Outgoing) -> None:
        known = self.cloud.setdefault(message.key, message)
        assert known == message, "a key names one message for ever"

    @rule()
    def rewind(self) -> None:
        self.spool.rewind()
        self.flying = []

    @rule(how=st.sampled_from(["crash", "torn", "stop"]))
    def restart(self, how: str) -> None:
        paths = sorted(self.directory.glob("[0-9]*.jsonl"))
        if how == "torn" and paths:
            with paths[-1].open("ab") as file:
                file.write(b'{"schema":"edgeward.telem')
        if how == "stop":
            self.spool.close()
            self.all_is_safe()
        self.start()

    @invariant()
    def bounded(self) -> None:
        if hasattr(self, "spool"):
            assert self.spool.waiting_bytes <= self.max_bytes

    def finish(self) -> None:
        """The cloud gets all that is left, in order."""
        last: dict[tuple[str, str], int] = {}
        for message in drain(self.spool):
            stream = (message.boot_id, message.stream)
            assert message.seq > last.get(stream, -1), "order is kept"
            last[stream] = message.seq
            self.store(message)
        self.judge()

    def judge(self) -> None:
        for boot, safe in self.safe.items():
            arrived = self.arrived(boot)
            for stream, wanted in safe.items():
                assert set(wanted) <= set(arrived[stream]), "nothing safe is lost"
                assert set(arrived[stream]) <= set(self.appended[boot][stream])

    def arrived(self, boot: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"telemetry": [], "event": []}
        for b, stream, seq in self.cloud:
            if b == boot:
                found[stream].append(seq)
        return found


class FullSpoolMachine(SpoolMachine):
    """The same with so little room that windows are merged and dropped."""

    max_bytes = 8 << 10

    def judge(self) -> None:
        for boot, safe in self.safe.items():
            windows = [
                parse(Window, m.payload) for m in self.cloud.values() if m.key[:2] == (boot, "telemetry")
            ]
            counted = sum(w.frames for w in windows)
            assert counted <= len(self.appended[boot]["telemetry"]), "nothing is counted twice"
            if self.spool.dropped == 0:
                assert counted >= len(safe["telemetry"]), "nothing safe is lost uncounted"
                assert set(safe["event"]) <= set(self.arrived(boot)["event"])


SpoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
FullSpoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSpoolMachine: Any = SpoolMachine.TestCase
TestFullSpoolMachine: Any = FullSpoolMachine.TestCase
