"""The journal on a real disk: durable in order, and never a reason not to start."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.models import assignment, deployment, manifest, row
from edgeward_agent.journal import MAX_JOURNAL_BYTES, Journal, Saved, read_record
from edgeward_agent.states import Record
from edgeward_wire.errors import Unavailable

ONE, TWO = manifest("1"), manifest("2")
GOOD = Record(
    state="probation",
    row=row(TWO),
    candidate=deployment(TWO, judged=True),
    committed=deployment(ONE, judged=True),
)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.json")


def test_what_is_saved_is_loaded(journal: Journal) -> None:
    saved = Saved(orderly=True, assignment=assignment(3).to_bytes().decode(), pipelines={"main": GOOD})
    journal.save(saved)
    assert journal.load() == saved
    assert journal.fault == ""


def test_nothing_yet(journal: Journal) -> None:
    assert journal.load() == Saved()


def test_a_large_manifest_survives(journal: Journal, tmp_path: Path) -> None:
    large = manifest("3", annotations={f"k{n}": "ü" * 200 for n in range(64)})
    record = Record(committed=deployment(large, judged=True))
    journal.save(Saved(pipelines={"main": record}))
    assert journal.load().pipelines["main"] == record


def test_the_order_on_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Temporary file fsynced, then renamed, then the directory fsynced."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        what = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append("fsync directory" if what == str(tmp_path) else "fsync file")
        fsync(descriptor)

    def seen_replace(a: Any, b: Any) -> None:
        calls.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    journal.save(Saved())
    assert calls == ["fsync file", "rename", "fsync directory"]


def test_a_full_disk_is_said_and_the_old_file_stands(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    journal.save(Saved(pipelines={"main": GOOD}))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable, match="disk full"):
        journal.save(Saved())
    assert journal.load().pipelines == {"main": GOOD}
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'{"pipelines": 3}', b"\xff", b"[" * 100_000, b'{"schema": "other/9"}'],
)
def test_a_damaged_file_is_set_aside(journal: Journal, tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "journal.json").write_bytes(raw)
    assert journal.load() == Saved()
    assert journal.fault
    assert (tmp_path / "journal.json.damaged").read_bytes() == raw
    journal.save(Saved(orderly=True))
    assert Journal(tmp_path / "journal.json").load().orderly


def test_a_file_without_end_is_not_read(journal: Journal, tmp_path: Path) -> None:
    with (tmp_path / "journal.json").open("wb") as file:
        file.truncate(MAX_JOURNAL_BYTES + 1)
    assert journal.load() == Saved()
    assert "longer than" in journal.fault


def plain(record: Record = GOOD, **change: object) -> dict[str, Any]:
    whole: dict[str, Any] = {**json.loads(record.to_bytes()), **change}
    return whole


def test_an_unknown_state_keeps_the_committed_model() -> None:
    record, fault = read_record(plain(state="teleporting"))
    assert record == Record(committed=GOOD.committed)
    assert "unknown state 'teleporting'" in fault


def test_a_record_that_does_not_fit_keeps_the_committed_model() -> None:
    record, fault = read_record(plain(restarts="many"))
    assert record == Record(committed=GOOD.committed)
    assert "restarts" in fault


def test_a_record_of_before_tries_were_noted_is_read_whole() -> None:
    old = plain()
    del old["tried"]
    assert read_record(old) == (GOOD, "")


def test_a_manifest_that_was_tampered_with_is_dropped() -> None:
    bad = plain()
    bad["candidate"]["manifest"] = bad["candidate"]["manifest"].replace("m", "n", 1)
    record, fault = read_record(bad)
    assert record is not None
    assert (record.state, record.candidate, record.committed) == ("idle", None, GOOD.committed)
    assert "candidate" in fault
    worse = plain(state="?")
    worse["committed"]["manifest"] = "{}"
    assert read_record(worse)[0] is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.dictionaries(st.sampled_from([*Record.model_fields, "x"]), inner, max_size=5),
    )
)
def test_no_json_stops_the_start(data: object) -> None:
    record, fault = read_record(data)
    assert record is not None or fault


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.integers(0, 4000), st.binary(min_size=1, max_size=20))
def test_flipped_bytes_never_stop_the_start(tmp_path: Path, at: int, noise: bytes) -> None:
    raw = bytearray(Saved(pipelines={"main": GOOD}).to_bytes())
    raw[at : at + len(noise)] = noise
    path = tmp_path / "journal.json"
    path.write_bytes(raw)
    assert GOOD.committed is not None
    for record in Journal(path).load().pipelines.values():
        # The model is guarded by its digest; in what stands beside it (the verdict) a byte may be off.
        if record.committed is not None:
            assert record.committed.manifest == GOOD.committed.manifest
            assert record.committed.row.model.sha256 == GOOD.committed.row.model.sha256
