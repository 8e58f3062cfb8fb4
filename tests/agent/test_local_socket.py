"""A runner's local socket: results, frames, what it runs; and readers that are slow, dead or rude."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.test_runner import Child, configure, serve
from edgeward_agent import local_socket
from edgeward_agent.local_socket import MAX_CONNECTIONS, MAX_WAITING, LocalSocket, Request, _Reader
from edgeward_agent.messages import Configure, Heartbeat, ResultSeen, ServingNow
from edgeward_runtime import images
from edgeward_runtime.shots import Shot, Shots
from edgeward_runtime.slots import Frame
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.result import ResultMessage
from runtime.builders import picture_directory
from runtime.bundles import Bundle, colour_bundle
from sim.broker import eventually


class Served:
    """A local socket with a handler that says what came, and no runner behind it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.somebody = threading.Event()
        self.server = LocalSocket(run, "main", {"echo": self._echo}, self._listening)
        self.server.start()

    def _listening(self, somebody: bool) -> None:
        (self.somebody.set if somebody else self.somebody.clear)()

    def _echo(self, request: Request) -> None:
        files = [os.fstat(d).st_size for d in request.descriptors]
        request.line({"ok": True, "number": request.number("n", 1, 0, 9), "files": files})

    def raw(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(60)
        link.connect(os.path.relpath(self.run / "main.sock"))
        return link

    def ask(self, raw: bytes) -> dict[str, Any]:
        with self.raw() as link, link.makefile("rb") as stream:
            link.sendall(raw)
            answer: dict[str, Any] = json.loads(stream.readline())
            return answer


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    one = Served(tmp_path / "run")
    yield one
    one.server.close()


def test_nobody_else_gets_in(served: Served) -> None:
    assert stat.S_IMODE(served.run.stat().st_mode) == 0o700
    assert stat.S_IMODE((served.run / "main.sock").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\n", "one line of JSON"),
        (b"[" * 5000 + b"\n", "one line of JSON"),
        (b'{"want": 3}\n', "one line of JSON"),
        (b'{"want": "infer"}\n', "'infer' is not known here"),
        (b'{"want": "echo", "n": 10}\n', "a whole number from 0 to 9"),
        (b'{"want": "results", "source": 7}\n', "a short text"),
        (b"x" * (local_socket.MAX_REQUEST + 1), "at most 65536 bytes"),
    ],
)
def test_a_wrong_request_is_answered(served: Served, raw: bytes, why: str) -> None:
    answer = served.ask(raw)
    assert answer["ok"] is False
    assert why in answer["error"]


def test_descriptors_come_along_and_are_closed(served: Served, tmp_path: Path) -> None:
    file = tmp_path / "five"
    file.write_bytes(b"12345")
    with served.raw() as link, file.open("rb") as five, link.makefile("rb") as stream:
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(link, [b'{"want": "echo"}\n'], [five.fileno()])
        assert json.loads(stream.readline())["files"] == [5]
        assert stream.read() == b""  # the server has closed its end, and what came with it
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_reader_hears_its_source_only(served: Served) -> None:
    heard = local_socket.results(served.run, "main", "cam")
    assert next(heard) == b""  # nothing is there yet
    assert served.somebody.wait(60)
    served.server.publish("door", b'{"source":"door"}')
    served.server.publish("cam", b'{"source":"cam"}')
    assert next(line for line in heard if line) == b'{"source":"cam"}'


def test_who_does_not_read_loses_and_is_told(served: Served) -> None:
    with served.raw() as link, link.makefile("rb") as stream:
        link.sendall(b'{"want": "results"}\n')
        assert served.somebody.wait(60)
        line = json.dumps({"n": "x" * 4000}).encode()
        count = 2000
        for _ in range(count):  # far more than the kernel and the queue hold: none of it may block
            served.server.publish("cam", line)
        got = lost = 0
        while got + lost < count:
            said = json.loads(stream.readline())
            lost += said.get("lost", 0)
            got += "n" in said
        assert lost > 0
        assert got >= 100


def test_a_queue_counts_what_it_loses() -> None:
    reader = _Reader("")
    for n in range(MAX_WAITING + 5):
        reader.put(b"%d\n" % n)
    lines = (reader.take(0) or b"").splitlines()
    assert json.loads(lines[0]) == {"lost": 5}
    assert lines[1] == b"5"
    reader.put(b"x" * (local_socket.MAX_WAITING_BYTES + 1))
    assert reader.take(0) == b""  # what can never fit is lost as well
    reader.put(b"end\n")
    assert (reader.take(0) or b"").splitlines() == [b'{"lost":1}', b"end"]


def test_a_reader_that_goes_is_noticed(served: Served) -> None:
    gone = threading.Event()
    served.server._listening = lambda somebody: None if somebody else gone.set()
    link = served.raw()
    link.sendall(b'{"want": "results"}\n')
    link.close()
    assert gone.wait(60)


def test_connections_are_bounded(served: Served) -> None:
    links = [served.raw() for _ in range(MAX_CONNECTIONS)]
    answer = served.ask(b"")
    assert "16 are connected already" in answer["error"]
    for link in links:
        link.close()


def test_a_process_with_too_many_files_open_serves_again_later(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "edgeward.local")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as late, late.makefile("rb") as stream:
        late.settimeout(60)
        place = os.path.relpath(served.run / "main.sock")
        free = os.dup(late.fileno())
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))  # all below it are taken
        try:
            late.connect(place)
            eventually(lambda: "main.sock takes nobody in" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        late.sendall(b'{"want": "echo"}\n')
        assert json.loads(stream.readline())["ok"]
    # Linux takes a descriptor before it waits for somebody: that one may have got it, and this one has not.
    assert served.ask(b'{"want": "echo"}\n')["ok"]
    eventually(lambda: "main.sock takes in who asks again" in caplog.text)
    assert caplog.text.count("takes nobody in") == 1


def test_a_process_without_a_thread_to_spare_serves_again_later(served: Served) -> None:
    assert served.ask(b'{"want": "echo"}\n')["ok"]
    before = threading.stack_size(1 << 47)  # more than there are addresses: no thread can be started
    try:
        with served.raw() as turned_away:
            assert turned_away.recv(1) == b""
    finally:
        threading.stack_size(before)
    assert served.ask(b'{"want": "echo"}\n')["ok"]


def test_what_an_earlier_runner_left_is_replaced_and_its_end_takes_nothing(tmp_path: Path) -> None:
    first, second = Served(tmp_path), Served(tmp_path)
    first.server.close()
    assert second.ask(b'{"want": "echo"}\n')["ok"]
    assert local_socket.pipelines(tmp_path) == ["main"]
    second.server.close()
    assert local_socket.pipelines(tmp_path) == []
    with pytest.raises(Unavailable, match="Nothing serves pipeline main here"):
        local_socket.about(tmp_path, "main")


def test_a_state_directory_may_be_deep(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    server = LocalSocket(deep, "main", {"about": lambda r: r.line({"ok": True})}, lambda _: None)
    server.start()
    assert local_socket.about(deep, "main") == {"ok": True}
    server.close()


# --- with a runner


@pytest.fixture
def runner() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("bundle"))


def watched(run: Path, uri: Path, **more: object) -> Configure:
    return configure(uri, window_s=60, **more).model_copy(update={"run": str(run), "result_interval_s": 3600})


def test_every_answer_reaches_a_local_reader(
    runner: Child,
    bundle: Bundle,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    runner.send(watched(run, picture_directory(tmp_path / "p")))
    runner.send(serve(bundle))
    runner.until(ServingNow)
    heard = (line for line in local_socket.results(run, "main") if line)
    seen = [ResultMessage.model_validate_json(line) for line, _ in zip(heard, range(20), strict=False)]
    assert {one.top[0].label for one in seen} == {"red", "green", "blue"}
    assert any(one.why == "every" for one in seen), "some that nobody but this reader wants"
    assert len(runner.all(ResultSeen)) < len(seen), "the daemon is told at its own pace"


def test_a_frame_with_what_was_seen_in_it(
    runner: Child,
    bundle: Bundle,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    runner.send(watched(run, picture_directory(tmp_path / "p", ["blue"])))
    runner.send(serve(bundle))
    runner.until(ServingNow)
    header, jpeg = local_socket.frame(run, "main", "cam", max_side=32)
    picture = images.decode(jpeg)
    assert picture.shape[:2] == (header["height"], header["width"])
    assert max(picture.shape) == 32
    blue, green, red = picture.reshape(-1, 3).mean(0)
    assert blue > 200 > max(green, red)
    assert header["result"]["top"][0]["label"] == "blue"
    known = local_socket.about(run, "main")
    assert (known["model"], known["version"], known["variant"]) == ("colours", "1", "int8")
    assert known["state"] == "serving"
    assert known["sources"] == {"cam": {"up": True, "detail": ""}}
    assert known["contract"]["task"] == "classification"
    with pytest.raises(Unavailable, match="no source 'door'"):
        local_socket.frame(run, "main", "door")
    runner.hang_up()
    assert runner.process.wait(60) == 0
    assert local_socket.pipelines(run) == []


def test_before_a_model_there_is_no_frame(runner: Child, tmp_path: Path) -> None:
    run = tmp_path / "run"
    runner.send(watched(run, tmp_path / "later"))
    while not local_socket.pipelines(run):  # the runner says nothing when it is configured
        runner.until(Heartbeat)
    assert local_socket.about(run, "main")["state"] == "preparing"
    with pytest.raises(Unavailable, match="No model serves yet"):
        local_socket.frame(run, "main", "cam")


def test_results_on_the_command_line(runner: Child, bundle: Bundle, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "edgeward-agent"), "results", "--state", str(tmp_path)]

    def results(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], check=False, capture_output=True, text=True, timeout=60)

    done = results()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Nothing serves pipeline main here.\nnext: ")
    runner.send(watched(tmp_path / "run", picture_directory(tmp_path / "p", ["blue"])))
    runner.send(serve(bundle))
    runner.until(ServingNow)
    done = results()
    assert done.returncode == 0
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d\d  cam +[\d.]+ ms  blue \d\.\d\d\n", done.stdout)
    done = results("--source", "door")
    assert (done.returncode, done.stderr) == (
        1,
        "error: Pipeline main has no source 'door'.\nnext: It has cam.\n",
    )
    sink = subprocess.Popen([*command, "--follow", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert sink.stdout is not None
    lines = [ResultMessage.model_validate_json(sink.stdout.readline()) for _ in range(3)]
    assert [one.top[0].label for one in lines] == ["blue"] * 3
    runner.hang_up()
    assert sink.stderr is not None
    assert b"waiting for the next" in sink.stderr.readline()  # it outlives a runner
    sink.send_signal(signal.SIGINT)
    sink.communicate(timeout=60)
    assert sink.returncode == 130


def test_of_sound_there_is_a_result_and_no_picture() -> None:
    shots: Shots[str] = Shots(["mic"])
    asked: list[Shot[str]] = []
    asker = threading.Thread(target=lambda: asked.append(shots.ask("mic", 60)))
    asker.start()
    while not shots.wanted(0):
        threading.Event().wait(0.001)
    sound = np.zeros(160, np.float32)
    shots.give(Frame(0, sound, captured_at=0, capture_ms=0, decode_ms=0, rate=16_000), "speech")
    asker.join(60)
    assert asked[0].result == "speech"
    assert asked[0].jpeg(100) == (b"", 0, 0)
    assert shots.ask("mic", 0) is asked[0]  # nothing newer came
    with pytest.raises(Rejected, match="no source 'cam'"):
        shots.ask("cam", 0)
    with pytest.raises(Unavailable, match="No frame of cam came"):
        Shots[str](["cam"]).ask("cam", 0)


def test_a_client_is_refused_what_it_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="Nothing serves"):
        next(local_socket.results(tmp_path, "main"))
    if os.geteuid() == 0:
        return
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    with pytest.raises(Rejected, match="may not be entered"):
        local_socket.about(closed, "main")
