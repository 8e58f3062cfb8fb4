from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from edgeward_agent.segments import Outgoing, Segments, merge_pairs, new_segment
from edgeward_wire.document import parse
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import Window

BOOT = "0" * 32
MODEL = ModelRef(path="models/toy/1.json", sha256="0" * 64)


def window(seq: int, source: str, boot: str = BOOT, duration_s: float = 30) -> Outgoing:
    made = Window(
        pipeline="main",
        source=source,
        model=MODEL,
        variant="int8",
        provider="CPU",
        start=1e9,
        duration_s=duration_s,
        frames=1,
        boot_id=boot,
        seq=seq,
        first_seq=seq,
    )
    return Outgoing(boot, "telemetry", seq, made.to_bytes())


@given(st.binary(max_size=300))
def test_any_bytes_on_disk_are_read_without_a_fault(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "0000000001-0000000001.jsonl").write_bytes(data)
        disk = Segments(Path(directory))
        [segment] = disk.recover()
        damaged = disk.load(segment)
        assert damaged <= data.count(b"\n") + 1
        assert segment.messages is not None


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([BOOT, "f" * 32])), max_size=20))
def test_merging_loses_no_frame_and_keeps_order(row: list[tuple[str, str]]) -> None:
    row.sort(key=lambda item: item[1])
    messages = [window(seq, source, boot) for seq, (source, boot) in enumerate(row)]
    merged = [parse(Window, m.payload) for m in merge_pairs(messages)]
    assert sum(w.frames for w in merged) == len(row)
    assert [w.seq for w in merged] == sorted({w.seq for w in merged})
    assert all(w.first_seq <= w.seq for w in merged)
    assert {(w.source, w.boot_id) for w in merged} == set(row)


def test_windows_are_not_merged_beyond_a_day() -> None:
    long = [window(seq, "a", duration_s=50_000) for seq in range(3)]
    assert merge_pairs(long) == long


def test_what_cannot_be_read_as_a_window_is_passed_on() -> None:
    odd = Outgoing(BOOT, "telemetry", 0, b'{"schema":"edgeward.telemetry/1","boot_id":"0","seq":0}')
    assert merge_pairs([odd, window(1, "a")]) == [odd, window(1, "a")]


def test_a_merge_that_was_cut_short_counts_nothing_twice(tmp_path: Path) -> None:
    """The power goes after the rename, before the merged segments are removed."""
    disk = Segments(tmp_path)
    parts = []
    for number in (1, 2, 3):
        segment = new_segment(number, number, sent=False)
        disk.append(segment, [window(number, "a")])
        parts.append(segment)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    merged = disk.replace(parts[:2], merge_pairs([window(1, "a"), window(2, "a")]))
    for path, data in before.items():
        path.write_bytes(data)
    (tmp_path / ".x.jsonl.new").write_bytes(b"half")

    again = disk.recover()

    assert [s.name for s in again] == [merged.name, parts[2].name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [merged.name, parts[2].name]


def test_a_sent_segment_stays_sent(tmp_path: Path) -> None:
    disk = Segments(tmp_path)
    segment = new_segment(1, 1, sent=False)
    disk.append(segment, [window(1, "a")])
    disk.mark_sent(segment)
    [again] = disk.recover()
    assert again.sent
    assert not again.growing


def test_a_line_that_no_acknowledgement_can_name_is_damaged(tmp_path: Path) -> None:
    good = window(1, "a").payload
    strange = good.replace(BOOT.encode(), b"zz")
    (tmp_path / "0000000001-0000000001.jsonl").write_bytes(good + b"\n" + strange + b"\n")
    disk = Segments(tmp_path)
    [segment] = disk.recover()
    assert disk.load(segment) == 1
    assert segment.messages
    assert list(segment.messages) == [(BOOT, "telemetry", 1)]
