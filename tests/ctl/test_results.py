"""agent-ctl results, and a subscriber of ten lines: over a real cloud and its real broker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import missing
from ctl.conftest import FLEET, AmysStack, Office
from ctl.puppet import Puppet
from edgeward_ctl.results import Told, fresh, told
from edgeward_wire.api import Device
from edgeward_wire.result import Area, Box, ResultMessage, Seen, Speech, Values, headline

SUBSCRIBER = Path(__file__).parents[2] / "docs/examples/subscribe.py"


def result(label: str = "cat", at: float = 100.0, source: str = "cam", **more: Any) -> ResultMessage:
    said = {"top": (Seen(label=label, index=1, score=0.9),), **more}
    return ResultMessage(
        pipeline="main", source=source, time=at, model="lite0", version="1", latency_ms=12.5, **said
    )


# --- pure


def box(label: str) -> Box:
    return Box(label=label, index=0, score=0.5, x1=0, y1=0, x2=1, y2=1)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "cat 0.90"),
        ({"top": ()}, "nothing"),
        ({"top": (), "boxes": (box("car"), box("bus"), box("car"))}, "2 car, 1 bus"),
        ({"top": (), "areas": (Area(label="sky", index=1, share=0.523),)}, "sky 52 %"),
        ({"top": (), "speech": Speech(active=True, score=0.75, since=98.5)}, "speech 0.75 for 1.5 s"),
        ({"top": (), "values": (Values(name="y", shape=(1, 3), first=(0.5,)),)}, "y (1, 3)"),
    ],
)
def test_every_kind_of_result_has_a_headline(parts: dict[str, Any], words: str) -> None:
    assert headline(result(**parts)) == words


def test_only_what_is_new_is_told_oldest_first() -> None:
    before: dict[tuple[str, str, str], float] = {}

    def now(*results: ResultMessage) -> list[str]:
        device = Device(id="a", fleet="f", admission="accepted", results=results)
        return [one.result.source for one in fresh(told([device]), before)]

    assert now(result(at=5, source="b"), result(at=9, source="a")) == ["b", "a"]
    assert now(result(at=5, source="b"), result(at=9, source="a")) == []
    assert now(result(at=5, source="b"), result(at=10, source="a")) == ["a"]
    assert now(result(at=4, source="b")) == ["b"]  # a clock that was set back
    assert fresh([Told("other", True, result(at=5, source="b"))], before) != []


# --- with a cloud


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    os.environ["PATH"] += ":/usr/sbin"
    if shutil.which("mosquitto") is None:
        missing("mosquitto")
    directory = tmp_path_factory.mktemp("seen")
    with AmysStack(directory) as stack:
        stack.init_cloud(operators=("amy",))
        stack.start_cloud()
        office = Office(stack, directory)
        assert office.ctl("fleets", "create", FLEET).code == 0
        office.identities = office.enrol("cam-1")
        yield office


@pytest.fixture
def device(desk: Office) -> Iterator[Puppet]:
    with Puppet(desk.identities["cam-1"]) as puppet:
        yield puppet


def until(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_what_is_seen_now(desk: Office, device: Puppet) -> None:
    at = time.time()
    device._publish("result", result("[b]tabby[/b]\n\x1b[31m", at))
    boxes = tuple(box(f"thing {n}") for n in range(300))
    device._publish("result", result(at=at, source="yard", top=(), boxes=boxes))
    seen = until(lambda: len(lines := desk.ctl("results", "--json").out.splitlines()) == 2 and lines)
    first, second = map(json.loads, seen)
    assert (first["device"], first["source"], first["time"]) == ("cam-1", "cam", at)
    assert len(second["boxes"]) == 300
    table = desk.ctl("results", "--device", "cam-1").out
    assert "[b]tabby[/b]  [31m 0.90" in table
    assert "\x1b" not in table
    assert "1 thing 0, 1 thing 1" in table


def test_following_tells_what_is_new_and_ctrl_c_ends_it(desk: Office, device: Puppet) -> None:
    process = desk.start("results", "--fleet", FLEET, "--follow", "--json")
    assert process.stdout is not None
    at = time.time()
    for n, label in enumerate(("one", "two", "three")):
        device._publish("result", result(label, at + n, source="door"))
        for line in process.stdout:
            said = json.loads(line)
            if said["source"] == "door":
                assert said["top"][0]["label"] == label
                break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--fleet", "nope"), "There is no fleet 'nope'"),
        (("--device", "nope"), "nope"),
        (("--fleet", FLEET, "--device", "cam-1"), "one of the two"),
        (("--device", "No!"), "cannot be the name of a device"),
    ],
)
def test_a_wrong_question_is_answered(desk: Office, arguments: tuple[str, ...], why: str) -> None:
    done = desk.ctl("results", *arguments)
    assert done.code == 2
    assert why in done.err


def test_nothing_seen_is_said(desk: Office) -> None:
    assert desk.ctl("fleets", "create", "quiet").code == 0
    done = desk.ctl("results", "--fleet", "quiet")
    assert (done.code, done.out) == (0, "")
    assert "No results yet" in done.err


def test_the_subscriber_of_the_documentation_runs(desk: Office, device: Puppet, tmp_path: Path) -> None:
    code = [line for line in SUBSCRIBER.read_text().splitlines() if line and not line.startswith('"""')]
    assert len(code) <= 10
    certificate = desk.ctl("mqtt", "cert", "docs", "--out", str(tmp_path / "viewer"), "--json").json
    where = (certificate["host"], str(certificate["port"]), certificate["username"], str(tmp_path / "viewer"))
    process = subprocess.Popen([sys.executable, str(SUBSCRIBER), *where], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    told: list[str] = []

    def heard() -> bool:
        device._publish("result", result("heard", time.time()))  # QoS 0: who is not there yet gets none
        assert process.poll() is None
        told.extend(process.stdout.readlines() if process.stdout else [])
        return bool(told)

    until(heard)
    topic, _, payload = told[0].partition(" ")
    assert topic == "edgeward/v1/cam-1/up/result"
    assert json.loads(payload)["top"][0]["label"] == "heard"
    process.terminate()
    process.wait(60)
    process.stdout.close()
