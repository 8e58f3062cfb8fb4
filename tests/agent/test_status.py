"""`edgeward-agent status` and its files, for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.models import manifest, plan, row
from edgeward_agent.status import (
    Figures,
    StatusFile,
    daemon_lives,
    only_daemon,
    read_status,
    show_status,
    write_status,
)
from edgeward_wire.errors import Rejected
from edgeward_wire.reported import PipelineReport, Reported, Serving, SourceReport, Update

ONE, TWO = row(manifest("1")), row(manifest("2"))
MAIN = PipelineReport(
    serving=Serving(
        model=ONE.model,
        variant="int8",
        provider="CPU",
        plan=plan(),
        committed=True,
        below_floor=True,
        stale=True,
    ),
    update=Update(
        rollout="r",
        model=TWO.model,
        attempt=1,
        state="idle",
        result="failed_rolled_back",
        reason="p99 was 80 ms",
    ),
    sources={"cam": SourceReport(up=True), "door": SourceReport(up=False, detail="not there")},
)


def status(**pipelines: PipelineReport) -> StatusFile:
    return StatusFile(
        agent="0.1.0",
        pid=1,
        device="edge-01a",
        fleet="edge-01",
        started_at=0,
        broker=True,
        reported=Reported(device="edge-01a", boot_id="b" * 32, time=0, revision=7, pipelines=pipelines),
        figures={"main": {"cam": Figures(fps=14.2, p50_ms=12, p99_ms=30, seen="tabby cat")}},
    )


def write(state: Path, found: StatusFile) -> None:
    write_status(state / "status.json", found)


def test_the_table_says_everything_that_matters(tmp_path: Path) -> None:
    write(tmp_path, status(main=MAIN))
    with only_daemon(tmp_path):
        text, code = show_status(tmp_path, as_json=False)
    assert code == 0
    for words in (
        "device edge-01a of fleet edge-01: running",
        "revision 7",
        "m 1, CPU int8 x1 (below the security floor, its verdict is stale)",
        "update to m 2: failed_rolled_back: p99 was 80 ms",
        "tabby cat",
        "not there",
    ):
        assert words in text
    assert [line for line in text.splitlines() if line != line.rstrip()] == []


def test_a_daemon_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, status(main=MAIN))
    text, code = show_status(tmp_path, as_json=False)
    assert code == 1
    assert "not running; this is what it wrote last" in text
    assert json.loads(show_status(tmp_path, as_json=True)[0])["running"] is False


def test_a_fault_is_an_exit_code(tmp_path: Path) -> None:
    write(tmp_path, status(main=PipelineReport(fault="The runner died: killed by SIGSEGV")))
    with only_daemon(tmp_path):
        text, code = show_status(tmp_path, as_json=False)
    assert code == 1
    assert "SIGSEGV" in text
    assert "serves nothing" in text


def test_why_there_is_no_broker_is_said_and_is_no_fault(tmp_path: Path) -> None:
    found = status(main=PipelineReport())
    trouble = "edge:8883: the broker ended the connection before it accepted this device"
    write(tmp_path, found.model_copy(update={"broker": False, "broker_trouble": trouble}))
    with only_daemon(tmp_path):
        text, code = show_status(tmp_path, as_json=False)
    assert f"broker not connected ({trouble}), registry fine" in text
    assert code == 0, "it polls, and goes on serving"


def test_no_pipelines_say_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, status())
    assert "agent.toml" in show_status(tmp_path, as_json=False)[0]


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    assert not daemon_lives(tmp_path)
    with only_daemon(tmp_path):
        assert daemon_lives(tmp_path)
        other = (
            "import pathlib, sys, edgeward_agent.status as s\n"
            "with s.only_daemon(pathlib.Path(sys.argv[1])): pass"
        )
        command = [sys.executable, "-c", other, str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Another edgeward-agent runs on" in found.stderr
    assert not daemon_lives(tmp_path)


def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Rejected, match="cannot be used"), only_daemon(tmp_path / "file" / "state"):
        pass


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff", b"[]", b"x" * (5 << 20)])
def test_a_damaged_file_is_one_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "status.json").write_bytes(raw)
    with pytest.raises(Rejected, match=r"status\.json"):
        read_status(tmp_path)
