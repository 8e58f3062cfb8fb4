"""Commands: judged purely, then obeyed by the machine with real children beside a runner that serves."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models import manifest, row
from agent.test_machine import ONE, THREE, TWO, WAIT_S, Device, put
from edgeward_agent.commands import REMEMBERED, Circumstances, judge
from edgeward_agent.lifetime import Pulse
from edgeward_agent.lookout import Lookout
from edgeward_agent.supply import Ticket
from edgeward_wire.command import MAX_COMMAND_BYTES, Bench, Command, CommandResponse
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Manifest, ModelRef, TargetHints
from sim import device as sim_device
from sim.repository import Repository, small_manifest

BOOT = f"{1:032x}"
NOW = 1000.0


def command(
    model: Manifest, n: int = 1, *, boot_id: str = BOOT, now: float | None = None, **more: Any
) -> Command:
    issued = time.time() if now is None else now
    what = Bench(model=row(model).model, **more)
    return Command(n=n, boot_id=boot_id, issued_at=issued, expires_at=issued + 60, what=what)


# --- judged


def here(**changes: Any) -> Circumstances:
    return Circumstances(**{"boot_id": BOOT, "now": NOW, "newest": 0, "cores": 4, **changes})


def test_a_command_in_order_is_obeyed() -> None:
    asked = command(ONE, now=NOW, threads=4)
    assert judge(1, asked.to_bytes(), here()) == asked


@pytest.mark.parametrize(
    ("number", "circumstances", "state", "why"),
    [
        (2, {}, "refused", "says that it is number 1"),
        (1, {"boot_id": "f" * 32}, "refused", "another run"),
        (1, {"newest": 1}, "refused", "not newer than command 1"),
        (1, {"newest": 9}, "refused", "not newer than command 9"),
        (1, {"now": NOW + 61}, "expired", "1 s too late"),
        (1, {"at_work": 3}, "refused", "Command 3 is under way"),
        (1, {"update": "pipeline main is probation"}, "refused", "An update comes first"),
        (1, {"cores": 2}, "refused", "3 threads; this device has 2 cores"),
        (1, {"fault": "No runtime."}, "refused", "No runtime"),
    ],
)
def test_a_command_that_is_not_obeyed_is_told_why(
    number: int, circumstances: dict[str, Any], state: str, why: str
) -> None:
    answer = judge(number, command(ONE, now=NOW, threads=3).to_bytes(), here(**circumstances))
    assert isinstance(answer, tuple)
    assert answer[0] == state
    assert why in answer[1]


@given(st.binary(max_size=200) | st.integers(0, 9).map(lambda n: b" " * (MAX_COMMAND_BYTES + n)))
def test_what_is_no_command_is_refused_and_nothing_else(raw: bytes) -> None:
    answer = judge(1, raw, here())
    assert isinstance(answer, tuple)
    assert answer[0] == "refused"


@given(st.integers(1, 20), st.integers(0, 20), st.sampled_from([BOOT, "e" * 32]), st.floats(0, 2 * NOW))
def test_only_a_new_command_of_this_run_in_time_is_obeyed(
    n: int, newest: int, boot_id: str, now: float
) -> None:
    asked = command(ONE, n, boot_id=boot_id, now=NOW)
    obeyed = judge(n, asked.to_bytes(), here(newest=newest, now=now)) == asked
    assert obeyed == (n > newest and boot_id == BOOT and now <= asked.expires_at)


# --- obeyed


class Outlet:
    """A broker's end: keeps the answers."""

    connected = True
    trouble = ""

    def __init__(self) -> None:
        self.answers: list[CommandResponse] = []

    def publish(self, kind: str, payload: bytes) -> bool:
        return True

    def respond(self, answer: CommandResponse) -> bool:
        assert parse(CommandResponse, answer.to_bytes()) == answer
        self.answers.append(answer)
        return True

    def wake(self) -> None:
        pass


class Asked(Device):
    """A device whose registry has released some models, and which is sent commands."""

    def start(self) -> None:
        self.released: dict[str, Manifest] = getattr(self, "released", {})
        self.outlet = Outlet()
        super().start()
        self.reporter.attach(self.outlet)
        self.machine.attach(self._ask)

    def _ask(self, ref: ModelRef, answer: Callable[[Manifest | Rejected | Unavailable], None]) -> None:
        answer(self.released.get(ref.sha256) or Rejected(f"{ref.path}: no release key has signed it."))

    def release(self, model: Manifest) -> Manifest:
        self._let_the_blob_thread_finish()
        put(self.state, model)
        self.released[row(model).model.sha256] = model
        return model

    def send(self, asked: Command) -> None:
        self.machine.command(asked.n, asked.to_bytes())

    def of(self, n: int) -> list[CommandResponse]:
        return [answer for answer in self.outlet.answers if answer.n == n]

    def hears(self, n: int, holds: Callable[[CommandResponse], object]) -> CommandResponse:
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline and not self.failure:
            for answer in self.of(n):
                if holds(answer):
                    return answer
            time.sleep(0.01)
        if self.failure:
            raise self.failure[0]
        raise AssertionError(f"never; heard {self.of(n)}")

    def answered(self, n: int) -> CommandResponse:
        return self.hears(n, lambda answer: answer.final)

    def bench(self, model: Manifest, n: int = 1, **more: Any) -> CommandResponse:
        self.send(command(model, n, boot_id=f"{self.starts:032x}", **more))
        return self.answered(n)

    def has_blobs(self, model: Manifest) -> bool:
        self._let_the_blob_thread_finish()
        return (self.state / "blobs" / model.variants["int8"].model.sha256).exists()

    def barrier(self) -> None:
        """All that was posted to the machine before is done."""
        done = threading.Event()
        self.machine.poke(done.set)
        assert done.wait(WAIT_S)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Asked]:
    device = Asked(tmp_path / "state")
    yield device
    if any(thread.is_alive() for thread in device.threads):
        device.stop()


def test_a_bench_measures_and_changes_nothing(device: Asked) -> None:
    device.deploy(ONE)
    pid, journal = device.runner(), device.journal()
    device.release(TWO)
    done = device.bench(TWO)
    assert (done.state, done.reason) == ("done", "")
    assert done.verdict
    assert done.verdict.model_sha256 == row(TWO).model.sha256
    assert [(o.outcome, o.p50_ms) for o in done.verdict.plans] == [("chosen", 5.0)]
    assert done.machine
    assert done.machine.cores > 0
    assert done.machine.beside[0].startswith("main: m 1, CPU int8 x")
    states = [(a.state, a.phase) for a in device.of(1)]
    assert states[0] == ("accepted", None)
    assert ("running", "measuring") in states
    assert [state for state, _ in states].count("done") == 1
    device.serves(ONE)
    assert device.runner() == pid
    assert device.journal() == journal
    assert not device.has_blobs(TWO), "pruned by the usual rule"
    assert device.has_blobs(ONE)
    assert device.deploy(TWO).result == "succeeded"
    assert device.qualified() == ["1", "2", "2"], "a bench's verdict decides nothing"


class Heedful(Outlet):
    """Looks for a blob once the blob thread has done what it was asked before the last answer."""

    def __init__(self, device: Asked, blob: Path) -> None:
        super().__init__()
        self._device, self._blob = device, blob
        self.there: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def respond(self, answer: CommandResponse) -> bool:
        if answer.final:
            look = Ticket(refs=(), done=lambda _fault: self.there.put(self._blob.exists()))
            self._device.supply.submit(look)
        return super().respond(answer)


@pytest.mark.parametrize("superseded", [False, True])
def test_nothing_is_forgotten_after_the_answer(device: Asked, superseded: bool) -> None:
    """Whoever has the answer may fetch the same blobs again."""
    device.deploy(ONE)
    measured = hang(device) if superseded else device.release(TWO)
    blob = device.state / "blobs" / measured.variants["int8"].model.sha256
    assert blob.exists()
    device.outlet = outlet = Heedful(device, blob)
    device.reporter.attach(outlet)
    if superseded:
        device.assign(THREE)
    else:
        device.bench(TWO)
    assert not outlet.there.get(timeout=WAIT_S)


def test_a_bench_of_what_serves_keeps_its_blobs(device: Asked) -> None:
    device.deploy(ONE)
    device.release(ONE)
    done = device.bench(ONE, threads=1)
    assert done.state == "done"
    assert done.machine
    assert done.machine.threads == 1
    assert device.has_blobs(ONE)


def test_a_device_with_nothing_deployed_can_be_asked(device: Asked) -> None:
    done = device.bench(device.release(ONE))
    assert done.state == "done"
    assert done.machine
    assert done.machine.beside == ()


def test_a_model_that_nobody_released_is_refused(device: Asked) -> None:
    refused = device.bench(ONE)
    assert (refused.state, refused.verdict) == ("refused", None)
    assert "no release key has signed it" in refused.reason
    assert device.qualified() == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"targets": TargetHints(arch=("riscv128",))}, "No variant of it is meant for this device"),
        ({"requires": ("telepathy",)}, "lacks what the model requires: telepathy"),
        ({"security_epoch": 1}, "below this device's floor 2"),
    ],
)
def test_what_an_update_would_refuse_a_bench_refuses(
    device: Asked, changes: dict[str, Any], why: str
) -> None:
    device.floors.raise_security("m", 2)
    refused = device.bench(device.release(manifest("1", **{"security_epoch": 2, **changes})))
    assert refused.state == "refused"
    assert why in refused.reason


@pytest.mark.parametrize(
    ("behaviour", "state", "why"),
    [
        ("crash", "failed", "SIGSEGV"),
        ("exit", "failed", "no such thing"),
        ("later", "failed", "could not work"),
        ("none", "done", "wrong output (0.71)"),
    ],
)
def test_a_bad_model_is_an_answer(device: Asked, behaviour: str, state: str, why: str) -> None:
    bad = device.release(manifest("1", annotations={"qualify": behaviour}))
    answer = device.bench(bad)
    assert answer.state == state
    assert why in answer.reason
    assert device.bench(device.release(TWO), 2).state == "done", "and the next finds its way"


def hang(device: Asked, n: int = 1) -> Manifest:
    """A bench that is measuring, for ever."""
    stuck = device.release(manifest("9", annotations={"qualify": "hang"}))
    device.send(command(stuck, n, boot_id=f"{device.starts:032x}"))
    device.hears(n, lambda a: a.phase == "measuring" and a.detail)
    return stuck


def test_it_has_an_end(device: Asked) -> None:
    hang(device)
    device.machine.poke(lambda: device.machine._commands.turn(time.monotonic() + 10_000))
    answer = device.answered(1)
    assert answer.state == "failed"
    assert "not done within 900 s" in answer.reason
    assert "measuring" in answer.reason


def test_one_at_a_time(device: Asked) -> None:
    hang(device)
    second = device.bench(device.release(TWO), 2)
    assert second.state == "refused"
    assert "Command 1 is under way" in second.reason
    assert not any(answer.final for answer in device.of(1))


def test_an_assignment_supersedes_it(device: Asked) -> None:
    device.deploy(ONE)
    stuck = hang(device)
    assert device.deploy(THREE).result == "succeeded"
    answer = device.answered(1)
    assert answer.state == "failed"
    assert answer.reason.startswith("superseded")
    assert not device.has_blobs(stuck)


def test_an_update_under_way_is_not_disturbed(device: Asked) -> None:
    device.assign(ONE, probation_s=3600)
    device.serves(ONE, committed=False)
    refused = device.bench(device.release(TWO))
    assert refused.state == "refused"
    assert "pipeline main is probation" in refused.reason
    assert device.qualified() == ["1"]


def test_pruning_meanwhile_spares_what_is_measured(device: Asked) -> None:
    device.deploy(ONE)
    stuck = hang(device)
    device.machine.poke(device.machine._prune)
    device.barrier()
    assert device.has_blobs(stuck)


def test_a_copy_does_nothing_and_is_answered_the_same(device: Asked) -> None:
    asked = command(device.release(ONE))
    device.send(asked)
    done = device.answered(1)
    device.send(asked)
    device.barrier()
    assert device.of(1)[-1] == done
    assert device.of(1).count(done) == 2
    assert device.qualified() == ["1"]


def test_numbers_only_grow(device: Asked) -> None:
    device.release(ONE)
    assert device.bench(ONE, 5).state == "done"
    device.release(ONE)
    refused = device.bench(ONE, 4)
    assert refused.state == "refused"
    assert "command 5" in refused.reason
    assert device.bench(ONE, 6).state == "done"


def test_answers_are_given_again_when_the_broker_is_back_and_not_for_ever(device: Asked) -> None:
    for n in range(1, REMEMBERED + 4):
        device.bench(TWO, n)  # refused: not released
    device.outlet.answers.clear()
    device.machine.connected()
    device.barrier()
    device.barrier()
    assert [answer.n for answer in device.outlet.answers] == list(range(4, REMEMBERED + 4))


SHELL = command(ONE, 99).to_bytes().replace(b'"bench"', b'"shell"')


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"{", "not valid"),
        (b" " * (MAX_COMMAND_BYTES + 1), "at most"),
        (SHELL, "what.kind"),
    ],
)
def test_what_is_no_command_is_answered_and_blocks_nothing(
    device: Asked, payload: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    device.machine.command(99, payload)
    refused = device.answered(99)
    assert refused.state == "refused"
    assert why in refused.reason
    assert "Command 99: refused" in caplog.text
    assert device.bench(device.release(ONE), 1).state == "done", "its number counts for nothing"


@pytest.mark.parametrize("orderly", [True, False])
def test_a_restart_ends_it_and_a_copy_starts_nothing(device: Asked, orderly: bool) -> None:
    device.deploy(ONE)
    stuck = hang(device)
    asked, before = command(stuck), device.outlet
    device.restart(orderly=orderly)
    [last] = [answer for answer in before.answers if answer.final]
    assert (last.state, last.reason) == ("failed", "The agent was stopped.")
    device.serves(ONE)
    device.send(asked)
    assert "another run" in device.answered(1).reason
    assert device.qualified() == ["1", "9"]
    assert "9.json" not in json.dumps(device.journal())


# --- the registry's word


def test_the_registry_thread_answers_what_it_is_asked(
    device: Asked, identity: Any, http: Any, repository: Repository, tmp_path: Path
) -> None:
    """The real registry: verified like an assignment's; a forged digest and an unsigned name are refused."""
    released = repository.release(small_manifest())
    state = sim_device.Device(identity, http, tmp_path / "state", repository.now + 60)
    lookout = Lookout(identity, state.registry, http, device.machine, 3600.0)
    answers: queue.Queue[Any] = queue.Queue()
    thread = threading.Thread(target=lookout.run, args=(Pulse("registry", 60.0),))
    thread.start()
    try:
        for ref in (
            released,
            released.model_copy(update={"sha256": "0" * 64}),
            ModelRef(path="models/toy/2.json", sha256=released.sha256),
            ModelRef(path="models/other/1.json", sha256="1" * 64),
        ):
            lookout.ask(ref, answers.put)
        found = [answers.get(timeout=WAIT_S) for _ in range(4)]
    finally:
        lookout.stop()
        thread.join(WAIT_S)
    assert not thread.is_alive()
    assert found[0] == small_manifest()
    assert "another sha256 than the release key has signed" in found[1].what
    assert "says that it is models/toy/1.json" in found[2].what
    assert "no release key has signed it" in found[3].what
    assert all(isinstance(fault, Rejected) for fault in found[1:])
