"""Children as real processes: what they say, how they end, and that none is left."""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeward_agent import messages
from edgeward_agent.workers import Child, Exit, describe_exit

WAIT_S = 60.0


class Ear:
    """Both callbacks, as a queue."""

    def __init__(self) -> None:
        self.heard: queue.Queue[Any] = queue.Queue()

    def child(self, code: str, **more: Any) -> Child[messages.QualifyMessage]:
        program = f"import os, socket, sys, time\nlink = socket.socket(fileno=int(sys.argv[2]))\n{code}"
        return Child(
            "test",
            (sys.executable, "-c", program),
            messages.FROM_QUALIFY,
            self.heard.put,
            self.heard.put,
            **more,
        )

    def next(self) -> Any:
        return self.heard.get(timeout=WAIT_S)

    def exit(self) -> Exit:
        while not isinstance(heard := self.next(), Exit):
            pass
        return heard


PROGRESS = messages.QualifyProgress(phase="preparing", done=1, total=2, note="ä" * 50)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_messages_come_whole_however_they_are_cut() -> None:
    ear = Ear()
    raw = messages.encode(PROGRESS)
    child = ear.child(f"for b in {raw * 2!r}: link.sendall(bytes([b]))")
    assert ear.next() == PROGRESS
    assert ear.next() == PROGRESS
    assert ear.next() == Exit(0, "ended with exit code 0")
    assert gone(child.pid)


def test_a_child_reads_what_is_sent_and_ends_with_the_conversation() -> None:
    ear = Ear()
    child = ear.child("raw = link.recv(100000)\nlink.sendall(raw)\nwhile link.recv(1): pass\nsys.exit(4)")
    child.send(PROGRESS)
    assert ear.next() == PROGRESS
    child.end(WAIT_S)
    assert ear.next().code == 4


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.abort()", "killed by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?)"),
        (
            "print('no such device', file=sys.stderr)\nsys.exit(7)",
            "exit code 7; it last said: no such device",
        ),
        ('link.sendall(b\'{"kind": "gossip"}\\n\')\ntime.sleep(600)', "It said what we do not understand"),
        ("link.sendall(b'x' * (5 << 20))\ntime.sleep(600)", "It sent a line of more than"),
    ],
)
def test_an_exit_names_its_cause(code: str, expected: str) -> None:
    ear = Ear()
    ear.child(code)
    assert expected in ear.exit().text


def test_a_child_that_ignores_the_end_is_killed() -> None:
    ear = Ear()
    child = ear.child(f"link.sendall({messages.encode(PROGRESS)!r})\ntime.sleep(600)")
    assert ear.next() == PROGRESS
    child.end(0.1)
    assert "did not end within" in ear.exit().text
    assert gone(child.pid)


def test_a_child_that_does_not_read_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeward_agent.workers._SEND_S", 0.2)
    ear = Ear()
    child = ear.child("time.sleep(600)")
    big = messages.QualifyProgress(phase="preparing", done=1, total=2, note="x" * 200)
    for _ in range(5000):
        child.send(big)
        if not ear.heard.empty():
            break
    assert "did not read" in ear.exit().text


def test_grandchildren_go_with_it(tmp_path: Path) -> None:
    ear = Ear()
    marker = tmp_path / "pid"
    child = ear.child(
        "import subprocess\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(marker)!r} + '.new', 'w').write(str(p.pid))\n"
        f"os.rename({str(marker)!r} + '.new', {str(marker)!r})\n"
        "time.sleep(600)"
    )
    until(marker.exists)
    child.kill("enough")
    assert ear.exit().text == "enough"
    grandchild = int(marker.read_text())
    until(lambda: gone(grandchild) or _is_zombie(grandchild))


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_inherits_nothing_but_its_socket(tmp_path: Path) -> None:
    secret = (tmp_path / "secret").open("w")
    os.set_inheritable(secret.fileno(), True)
    ear = Ear()
    ear.child(
        "held = sorted(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3')\n"
        "print([h for h in held if 'secret' in h], os.getsid(0) == os.getpid())\nsys.exit(1)"
    )
    with secret:
        pass
    assert "it last said: [] True" in ear.exit().text


def test_nice_is_set() -> None:
    ear = Ear()
    child = ear.child("link.recv(1)", nice=10)
    assert os.getpriority(os.PRIO_PROCESS, child.pid) == 10
    child.end(WAIT_S)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(OSError, match="nothing-here"):
        Child("x", ("/nothing-here",), messages.FROM_QUALIFY, print, print)


def test_what_a_child_prints_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    ear = Ear()
    with caplog.at_level("INFO", logger="edgeward_agent.workers"):
        ear.child("for n in range(10000): print('line', n)\nsys.stdout.flush()\nsys.exit(2)")
        assert "line 9999" in ear.exit().text
    assert 0 < len(caplog.records) < 300


def test_describe_exit() -> None:
    assert describe_exit(-11) == "killed by SIGSEGV"
    assert describe_exit(0) == "ended with exit code 0"
    assert describe_exit(1, why="Too slow.") == "Too slow."
