"""Threads, signals and the watchdog, in real processes and on a real datagram socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest

from edgeward_agent import daemon
from edgeward_agent.config import load_config
from edgeward_agent.lifetime import Lifetime, Pulse
from edgeward_agent.mqtt import Link
from edgeward_agent.notify import Notifier
from sim.device import write_identity
from sim.pki import Authority

WAIT_S = 60.0


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(WAIT_S)

    def next(self) -> str:
        return self.socket.recv(4096).decode()

    def until(self, text: str) -> list[str]:
        seen: list[str] = []
        while not seen or text not in seen[-1]:
            seen.append(self.next())
        return seen


@contextmanager
def manager(address: str) -> Iterator[Manager]:
    found = Manager(address)
    with found.socket:
        yield found


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = f"{tmp_path}/notify" if request.param == "path" else f"@edgeward-test-{os.getpid()}"
    with manager(address) as found:
        yield found


def test_notifications(systemd: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "2000000"}, os.getpid())
    assert notifier.watchdog_s == 2.0
    notifier.ready("serving\nthings")
    assert systemd.next() == "READY=1\nSTATUS=serving things"
    notifier.watchdog()
    assert systemd.next() == "WATCHDOG=1"
    notifier.status("x" * 1000)
    assert len(systemd.next()) < 250
    notifier.stopping()
    assert systemd.next() == "STOPPING=1"


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    Notifier({}, 1).ready()
    Notifier({"NOTIFY_SOCKET": f"{tmp_path}/gone"}, 1).ready()
    assert Notifier({"WATCHDOG_USEC": "soon"}, 1).watchdog_s is None
    assert Notifier({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "2"}, 1).watchdog_s is None


PROGRAM = """
import logging, os, sys, threading, time
from edgeward_agent.lifetime import Lifetime, Pulse
from edgeward_agent.notify import Notifier
from edgeward_wire.errors import Unavailable

logging.basicConfig(level="INFO", format="%(message)s")
lifetime = Lifetime(Notifier(os.environ, os.getpid()))
stop = threading.Event()
mode = sys.argv[1]

def work(pulse):
    while not stop.wait(0.02):
        if mode == "bug":
            raise ZeroDivisionError("by a person")
        if mode == "unavailable":
            raise Unavailable("The disk is gone.")
        if mode != "stuck":
            pulse.beat()

def hang(pulse):
    while True:
        pulse.beat()
        time.sleep(0.05)

if mode == "stuck service":
    lifetime.service("link", lambda: None, lambda orderly: None, Pulse("link", 0.3))
lifetime.closing("last", lambda orderly: print("closed last", orderly, flush=True))
def say(orderly):
    print("stop hang", flush=True)

if mode == "hang":
    lifetime.thread("hang", hang, lambda orderly: None, limit_s=5, join_s=0.3)
if mode == "hang for ever":
    lifetime.thread("hang", hang, say, limit_s=5, join_s=1e9)
def end(orderly):
    print("stop work", orderly, flush=True)
    stop.set()

lifetime.thread("work", work, end, limit_s=0.3 if mode == "stuck" else 60)
sys.exit(lifetime.run())
"""


def start(mode: str, systemd: Manager) -> subprocess.Popen[str]:
    environment = {**os.environ, "NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "400000"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_an_orderly_stop(systemd: Manager, number: signal.Signals) -> None:
    process = start("well", systemd)
    systemd.until("READY=1")
    systemd.until("WATCHDOG=1")
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert out == "stop work True\nclosed last True\n"
    systemd.until("STOPPING=1")


@pytest.mark.parametrize(
    ("mode", "said"), [("bug", "ZeroDivisionError"), ("unavailable", "The disk is gone.")]
)
def test_the_first_exception_stops_all_and_fails(systemd: Manager, mode: str, said: str) -> None:
    process = start(mode, systemd)
    out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert said in err
    assert ("Traceback" in err) == (mode == "bug")
    assert out == "stop work False\nclosed last False\n"


@pytest.mark.parametrize(("mode", "who"), [("stuck", "work"), ("stuck service", "link")])
def test_a_thread_without_progress_starves_the_watchdog(systemd: Manager, mode: str, who: str) -> None:
    process = start(mode, systemd)
    try:
        systemd.until("READY=1")
        assert process.stderr
        for line in process.stderr:
            if f"Thread {who} makes no progress" in line:
                break
        systemd.socket.settimeout(1.0)  # more than twice the watchdog's time
        with pytest.raises(TimeoutError):
            systemd.until("never comes: after what was sent before it was noticed, there is silence")
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)
    assert process.returncode == 0


def test_a_thread_that_does_not_end_is_named_and_left(systemd: Manager) -> None:
    process = start("hang", systemd)
    systemd.until("READY=1")
    process.terminate()
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "Thread hang did not end within" in err


def test_a_second_signal_does_not_wait_any_longer(systemd: Manager) -> None:
    process = start("hang for ever", systemd)
    systemd.until("READY=1")
    process.terminate()
    assert process.stdout
    assert [process.stdout.readline() for _ in range(2)] == ["stop work True\n", "stop hang\n"]
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=WAIT_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "Thread hang did not end before a second signal came." in err
    assert out == "closed last True\n", "the rest is closed in order"


def test_systemd_waits_for_longer_than_a_stop_may_take(tmp_path: Path) -> None:
    unit = Path(__file__).parents[2] / "systemd/edgeward-agent.service"
    waits = int(unit.read_text().partition("TimeoutStopSec=")[2].partition("\n")[0])
    (tmp_path / "agent.toml").write_text("[page]\nport = 8088\n[serve]\nport = 8089\n")
    identity = write_identity(tmp_path, Authority.make("Servers"), Authority.make("Devices"))
    lifetime = daemon._compose(load_config(tmp_path / "agent.toml"), identity, tmp_path)
    link_s = signature(Link.stop).parameters["timeout_s"].default
    assert sum(part.join_s for part in lifetime._parts if part.thread) + link_s < waits
    for part in lifetime._parts:  # what was made and never started
        part.stop(False)


def test_handlers_are_given_back() -> None:
    lifetime = Lifetime(Notifier({}, os.getpid()))
    before = signal.getsignal(signal.SIGTERM)
    done = threading.Event()

    def run(_pulse: Pulse) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        done.wait(WAIT_S)

    lifetime.thread("one", run, lambda _orderly: done.set(), limit_s=WAIT_S)
    assert lifetime.run() == 0
    assert signal.getsignal(signal.SIGTERM) is before
