"""deploy and rollback followed to their end, over the real broker: exit codes, tables, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import missing
from ctl.conftest import AGENT_CTL, FLEET, AmysStack, Done, Office, finish
from ctl.puppet import WAIT_S, Puppet
from edgeward_ctl.client import Client
from edgeward_ctl.profile import load_profile
from edgeward_wire.api import Rollout
from edgeward_wire.event import Finished

DEVICES = ("a", "b")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A cloud with its broker, and two enrolled devices."""
    os.environ["PATH"] += ":/usr/sbin"
    if shutil.which("mosquitto") is None:
        missing("mosquitto")
    directory = tmp_path_factory.mktemp("busy")
    with AmysStack(directory) as stack:
        stack.init_cloud(operators=("amy",))
        stack.start_cloud()
        office = Office(stack, directory)
        assert office.ctl("fleets", "create", FLEET).code == 0
        office.identities = office.enrol(*DEVICES)
        yield office


class Play:
    """Puppets of this cloud, and the rollout that a command makes."""

    def __init__(self, office: Office, client: Client) -> None:
        self.office, self.client = office, client
        self._stack = contextlib.ExitStack()

    def online(self, *devices: str) -> list[Puppet]:
        """Bring these online, and wait until the cloud has seen it."""
        puppets = [self._stack.enter_context(Puppet(self.office.identities[d])) for d in devices]
        self.wait(lambda: {d.id for d in self.client.devices() if d.online} == set(devices))
        return puppets

    def started(self, before: set[str]) -> Rollout:
        """The rollout that is new."""
        found: list[Rollout] = []

        def look() -> bool:
            found[:] = [r for r in self.client.rollouts() if r.id not in before]
            return bool(found)

        self.wait(look)
        return found[0]

    def logged(self, rollout: Rollout) -> None:
        """Wait until each device's log tells its end; a report may end it before that is stored."""

        def told(device: str) -> bool:
            said = [entry.event.what for entry in self.client.log(device, 100)]
            return any(isinstance(what, Finished) and what.update.rollout == rollout.id for what in said)

        self.wait(lambda: all(told(target.device) for target in rollout.targets))

    def known(self) -> set[str]:
        return {r.id for r in self.client.rollouts()}

    @staticmethod
    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)

    def close(self) -> None:
        self._stack.close()
        self.wait(lambda: not any(d.online for d in self.client.devices()))


@pytest.fixture
def play(busy: Office) -> Iterator[Play]:
    """Everybody is offline before and after."""
    with Client(load_profile(busy.profile())) as client:
        one = Play(busy, client)
        try:
            yield one
        finally:
            one.close()


def deploy(
    play: Play,
    name: str,
    salt: int,
    *more: str,
    act: Callable[[Rollout], None],
    target: str = "",
    held: bool = False,
) -> Done:
    """Start a deploy, act when its rollout is there (`held`: while it stands still), and see how it ends."""
    before = play.known()
    whom = ("--device", target) if target else ("--fleet", FLEET)
    running = play.office.start("deploy", str(play.office.model(name, salt)), *whom, *more)
    rollout = play.started(before)
    if held:
        running.send_signal(signal.SIGSTOP)
    try:
        act(rollout)
    finally:
        running.send_signal(signal.SIGCONT)
    return finish(running)


def test_all_online_devices_succeed_and_the_offline_one_is_pending(play: Play) -> None:
    (a,) = play.online("a")
    done = deploy(play, "one", 0, act=a.succeed)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()[1:]
    assert re.match(r"a +succeeded +int8 +CPU +10\.0 +20\.0 +\d+\.\d s", first)
    assert second.split()[:3] == ["b", "offline,", "pending"]
    assert "a: probation" in done.err or "a: succeeded" in done.err
    assert "b: pending (offline)" in done.err
    assert "Offline, pending: b" in done.err
    events = play.office.ctl("log", "a", "-n", "2", "--json").json
    assert len(events) == 2, "as many as were asked for"
    whole = play.office.ctl("log", "a", "--json").json
    assert events == whole[:2]
    assert len(whole) > 2


def test_one_that_rolls_back_makes_it_1_with_the_reason(play: Play) -> None:
    a, b = play.online("a", "b")

    def act(rollout: Rollout) -> None:
        a.succeed(rollout)
        b.fail(rollout, "failed_rolled_back", "p99 rose from 10 to 30 ms")

    done = deploy(play, "two", 0, "--json", act=act)
    assert done.code == 1, done.err
    assert (done.json["succeeded"], done.json["failed"]) == (["a"], ["b"])
    row = done.json["devices"][1]
    assert row["reason"] == "p99 rose from 10 to 30 ms"
    assert row["serving_after_s"] is None or row["serving_after_s"] > 0
    assert "agent-ctl log b -v" in done.err


def test_time_that_is_up_makes_it_3_and_names_those_that_are_not_done(play: Play) -> None:
    a, _ = play.online("a", "b")

    def act(rollout: Rollout) -> None:
        a.succeed(rollout)
        play.wait(lambda: play.client.rollout(rollout.id).targets[0].result == "succeeded")

    # However long that takes: it asks once more before it looks at the clock.
    done = deploy(play, "three", 0, "--timeout", "5s", act=act, held=True)
    assert done.code == 3, done.err
    assert "Time is up, and these are not done: b." in done.err
    assert "agent-ctl watch --fleet edge-01" in done.err


def test_one_device_alone(play: Play) -> None:
    a, _ = play.online("a", "b")
    done = deploy(play, "four", 0, "--json", act=a.succeed, target="a")
    assert done.code == 0, done.err
    assert [row["device"] for row in done.json["devices"]] == ["a"]


def test_ctrl_c_while_waiting_says_that_the_rollout_goes_on(play: Play) -> None:
    (a,) = play.online("a")
    before = play.known()
    running = play.office.start("deploy", str(play.office.model("five", 0)), "--fleet", FLEET)
    rollout = play.started(before)
    a.play(rollout, "preparing")
    assert running.stderr is not None
    heard = ""
    while "a: preparing" not in heard:
        line = running.stderr.readline()
        assert line, heard
        heard += line
    running.send_signal(signal.SIGINT)
    done = finish(running)
    assert done.code == 130
    assert "the rollout goes on" in done.err
    assert "agent-ctl watch" in done.err
    a.succeed(rollout)
    play.wait(lambda: play.client.rollout(rollout.id).targets[0].result == "succeeded")


def test_a_newer_deploy_takes_the_place_of_one_that_is_watched(play: Play) -> None:
    (a,) = play.online("a")
    newer: list[Done] = []

    def act(rollout: Rollout) -> None:
        a.play(rollout, "preparing")
        path = str(play.office.model("six", 30))
        newer.append(play.office.ctl("deploy", path, "--fleet", FLEET, "--detach"))

    done = deploy(play, "six", 0, act=act)
    assert newer[0].code == 0, newer[0].err
    assert done.code == 1
    assert "superseded" in done.err + done.out


def test_rollback_goes_to_what_was_finished_with_before(play: Play) -> None:
    (a,) = play.online("a")
    for salt in (0, 60):
        assert deploy(play, "seven", salt, act=a.succeed, target="a").code == 0
    before = play.known()
    running = play.office.start("rollback", "--device", "a")
    a.succeed(play.started(before))
    done = finish(running)
    assert done.code == 0, done.err
    assert "Back to seven 1." in done.err


def test_status_log_and_devices_tell_the_story(play: Play) -> None:
    a, b = play.online("a", "b")

    def act(rollout: Rollout) -> None:
        a.succeed(rollout)
        b.fail(rollout, "failed_rolled_back", "too slow")

    before = play.known()
    assert deploy(play, "eight", 0, act=act).code == 1
    play.logged(play.started(before))
    rows = {row["device"]: row for row in play.office.ctl("status", "--json").json}
    assert rows["a"]["model"] == "eight 1"
    assert "too slow" in rows["b"]["state"]
    log = play.office.ctl("log", "b")
    assert "main: eight 1" in log.out
    assert "failed, rolled back" in log.out
    assert "too slow" in log.out
    full = play.office.ctl("log", "a", "-v", "-n", "1").out
    assert "CPU int8 x1" in full
    assert "cosine 0.7" in full
    assert "live_end_to_end_p99_ms = 20" in full


class Terminal:
    """agent-ctl on a terminal of its own."""

    def __init__(self, office: Office, *arguments: str) -> None:
        self._mine, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [str(AGENT_CTL), "--profile", str(office.profile()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "150", "TERM": "xterm"},
        )
        os.close(theirs)
        self.shown = ""

    def read_until(self, part: str) -> None:
        while part not in self.shown:
            piece = os.read(self._mine, 65536)
            assert piece, self.shown
            self.shown += piece.decode(errors="replace")

    def finish(self) -> int:
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(self._mine, 65536):
                self.shown += piece.decode(errors="replace")
        os.close(self._mine)
        assert "Traceback" not in self.shown
        return self.process.wait(60)


def test_on_a_terminal_there_are_bars(play: Play) -> None:
    (a,) = play.online("a")
    before = play.known()
    terminal = Terminal(play.office, "deploy", str(play.office.model("nine", 0)), "--device", "a")
    a.succeed(play.started(before))
    assert terminal.finish() == 0
    for part in ("bundle", "upload", "sign", "━", "succeeded"):
        assert part in terminal.shown


def test_watch_is_live_and_survives_a_change(play: Play) -> None:
    (a,) = play.online("a")
    terminal = Terminal(play.office, "watch", "--fleet", FLEET)
    terminal.read_until("Ctrl-C ends")
    assert deploy(play, "ten", 0, act=a.succeed, target="a").code == 0
    terminal.read_until("ten 1")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 0


def test_the_profile_of_the_readme_is_found_by_the_environment(busy: Office, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(AGENT_CTL), "fleets", "--json"],
        env={**os.environ, "EDGEWARD_PROFILE": str(busy.profile())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
