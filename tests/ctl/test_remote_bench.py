"""`model bench --on DEVICE`: watching, what it amounts to, and all of it against a real cloud and broker."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from rich.console import Console

from conftest import missing
from ctl.conftest import FLEET, AmysStack, Office
from ctl.puppet import WAIT_S, Puppet
from edgeward_ctl.client import Client
from edgeward_ctl.deploying import Waiting
from edgeward_ctl.model import remote_bench
from edgeward_ctl.model.remote_bench import Options, exit_code, machine_lines, plain, plans_table, run, watch
from edgeward_ctl.profile import Profile, load_profile
from edgeward_wire import topics
from edgeward_wire.api import CommandStatus
from edgeward_wire.command import Command, CommandResponse, MachineFacts
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict
from runtime import builders

MODEL = ModelRef(path="models/lite0/3.json", sha256="a" * 64)
BOOT = "0" * 32
PLAN = Plan(provider="CPUExecutionProvider", variant="int8")
EXACT = PLAN.model_copy(update={"session": {"session.x64quantprecision": "1"}, "optimisation": "basic"})
OUTCOMES = (
    PlanOutcome(plan=PLAN, outcome="chosen", parity=0.9985, p50_ms=5.8, p99_ms=7.25, ratio=1, memory_mb=31),
    PlanOutcome(plan=EXACT, outcome="wrong_output", parity=0.7, reason="[b]cosine[/b] 0.7"),
)
FACTS = MachineFacts(
    arch="aarch64",
    cores=6,
    memory_mb=7168,
    cpu="Cortex-A78AE",
    board="Jetson Orin Nano",
    isa=("asimddp", "bf16"),
    power_mode="15W",
    temperature_before_c=51.2,
    temperature_after_c=54.9,
    threads=6,
    beside=("main: lite0 2, CUDA fp16 x1",),
    agent="0.1.0",
)


def verdict(*outcomes: PlanOutcome, **more: Any) -> Verdict:
    chosen = next((o.plan for o in outcomes if o.outcome == "chosen"), None)
    runtime = {"onnxruntime": "1.32.0"}
    return Verdict(
        model_sha256=MODEL.sha256, key="0" * 64, chosen=chosen, plans=outcomes, runtime=runtime, **more
    )


def response(state: Any, n: int = 9, **more: Any) -> CommandResponse:
    return CommandResponse(n=n, boot_id=BOOT, state=state, **more)


def status(state: Any = "sent", said: CommandResponse | None = None, **more: Any) -> CommandStatus:
    fields: dict[str, Any] = {"device": "d1", "n": 9, "kind": "bench", "model": MODEL, "online": True}
    return CommandStatus(**{**fields, "issued_at": 1, "expires_at": 2, **more}, state=state, response=said)


DONE = status("done", response("done", verdict=verdict(*OUTCOMES), machine=FACTS, took_s=12.5))


class Board:
    """Remembers what is shown."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float, str]] = []
        self.said: list[str] = []

    def step(self, name: str, done: float, total: float, detail: str = "") -> None:
        self.steps.append((name, done / total, detail))

    def say(self, text: str) -> None:
        self.said.append(text)

    def device(self, target: Any) -> None:
        raise AssertionError("no rollout here")

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> Any:
        return False


def watched(
    answers: list[CommandStatus | Unavailable], timeout_s: float = 100.0
) -> tuple[CommandStatus, Board]:
    board, left, now = Board(), iter(answers), [0.0]

    def fetch() -> CommandStatus:
        one = next(left)
        if isinstance(one, Unavailable):
            raise one
        return one

    def wait(seconds: float) -> None:
        now[0] += seconds

    found = watch(fetch, status(), board, timeout_s=timeout_s, clock=lambda: now[0], wait=wait)
    return found, board


# --- watching


def test_it_watches_to_the_last_word_and_closes_each_step() -> None:
    running = [
        status("running", response("running", phase=phase, progress=0.5, detail=detail))
        for phase, detail in (
            ("verifying", ""),
            ("downloading", "3 MB"),
            ("waiting", ""),
            ("measuring", "CPU"),
        )
    ]
    found, board = watched([status("accepted", response("accepted")), *running, DONE])
    assert found is DONE
    ended = [name for name, share, _ in board.steps if share == 1]
    assert ended == ["ask", "verify", "download", "wait", "measure"]
    assert ("download", 0.5, "3 MB") in board.steps


def test_a_cloud_that_is_away_for_a_while_ends_nothing() -> None:
    away = Unavailable("Nothing answers.")
    found, board = watched([away, away, DONE])
    assert found is DONE
    assert board.said == [
        "Nothing answers. Still trying; the device goes on without us.",
        "The cloud answers again.",
    ]


def test_time_is_up_and_the_device_goes_on() -> None:
    found, board = watched([status(online=False)] * 10, timeout_s=2.0)
    assert found.state == "sent"
    assert any("offline" in detail for _, _, detail in board.steps)


# --- what it amounts to


@pytest.mark.parametrize(
    ("one", "code"),
    [
        (DONE, 0),
        (status("done", response("done", verdict=verdict(OUTCOMES[1]))), 1),
        (status("done"), 1),
        (status("refused"), 1),
        (status("failed"), 1),
        (status("expired"), 3),
        (status("running"), 3),
        (status("sent"), 3),
    ],
)
def test_exit_codes(one: CommandStatus, code: int) -> None:
    assert exit_code(one) == code


def test_the_json_has_every_plan_and_the_machine() -> None:
    found = json.loads(json.dumps(plain(DONE, 0)))
    assert (found["device"], found["command"], found["state"], found["exit"]) == ("d1", 9, "done", 0)
    assert found["model"] == {"name": "lite0", "version": "3", **MODEL.model_dump()}
    assert [(p["outcome"], p.get("p50_ms")) for p in found["plans"]] == [
        ("chosen", 5.8),
        ("wrong_output", None),
    ]
    assert found["chosen"] == PLAN.title
    assert found["machine"]["isa"] == ["asimddp", "bf16"]
    assert plain(status(), 3)["plans"] == []


def test_people_see_every_plan_with_its_numbers_and_the_machine() -> None:
    assert DONE.response
    assert DONE.response.verdict
    text = io.StringIO()
    Console(file=text, width=300).print(plans_table(DONE.response.verdict))
    head, chosen, wrong = text.getvalue().splitlines()
    assert head.split()[:4] == ["provider", "variant", "threads", "options"]
    for value in ("CPU", "int8", "0.9985", "5.80", "7.25", "1.000", "31", "chosen"):
        assert value in chosen.split()
    assert "x64quantprecision=1 opt=basic" in wrong
    assert "[b]cosine[/b] 0.7" in wrong, "what devices say is text"
    lines = "\n".join(machine_lines("d1", FACTS, DONE.response.verdict))
    for part in ("Jetson Orin Nano", "6 cores", "7.0 GB", "bf16", "15W", "51 to 55 °C", "onnxruntime 1.32.0"):
        assert part in lines
    assert "beside main: lite0 2, CUDA fp16 x1" in lines


# --- against a real cloud


class Answering(Puppet):
    """A device that answers commands as a test tells it to."""

    def __init__(self, identity: Any) -> None:
        super().__init__(identity)
        self.came: list[Command] = []
        self.answers: Callable[[Command], list[CommandResponse]] = lambda command: []
        self._listening = threading.Event()
        self.client.on_subscribe = lambda *_: self._listening.set()
        self.client.on_message = self._on_message

    def __enter__(self) -> Answering:
        super().__enter__()
        self.client.subscribe(topics.all_down(self.device), qos=1)
        assert self._listening.wait(WAIT_S)
        return self

    def _on_message(self, _: Any, __: Any, message: paho.MQTTMessage) -> None:
        if topics.parse_topic(message.topic).kind == topics.COMMAND:
            command = Command.model_validate_json(message.payload)
            self.came.append(command)
            for answer in self.answers(command):
                self.say(command, answer)

    def say(self, command: Command, answer: CommandResponse) -> None:
        right = answer.model_copy(update={"n": command.n, "boot_id": command.boot_id})
        self.client.publish(topics.response(self.device, command.n), right.to_bytes(), qos=1)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    os.environ["PATH"] += ":/usr/sbin"
    if shutil.which("mosquitto") is None:
        missing("mosquitto")
    directory = tmp_path_factory.mktemp("bench")
    with AmysStack(directory) as stack:
        stack.init_cloud(operators=("amy",))
        stack.start_cloud()
        one = Office(stack, directory)
        assert one.ctl("fleets", "create", FLEET).code == 0
        one.identities = one.enrol("d1", "off")
        yield one


@pytest.fixture
def profile(office: Office) -> Profile:
    return load_profile(office.profile())


@pytest.fixture
def client(profile: Profile) -> Iterator[Client]:
    with Client(profile) as client:
        yield client


@pytest.fixture
def device(office: Office, client: Client) -> Iterator[Answering]:
    with Answering(office.identities["d1"]) as puppet:
        office.stack.wait_for(lambda: client.device("d1").online, "d1 to be online")
        yield puppet
    office.stack.wait_for(lambda: not client.device("d1").online, "d1 to be offline")


def as_json() -> Waiting:
    return Waiting(as_json=True, timeout_s=60)


def test_a_file_is_released_measured_and_assigned_to_nobody(
    office: Office, profile: Profile, client: Client, device: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    device.answers = lambda _: [
        response("accepted"),
        response("running", phase="downloading", progress=0.3),
        response("done", verdict=verdict(*OUTCOMES), machine=FACTS, took_s=3),
    ]
    file = office.model("colours", salt=1)
    assert run(profile, str(file), "d1", as_json(), Options(threads=2, seconds=30)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["exit"], len(found["plans"])) == ("done", 0, 2)
    [command] = device.came
    assert (command.what.threads, command.what.seconds) == (2, 30)
    [entry] = client.models()
    assert command.what.model == ModelRef(path=entry.path, sha256=entry.sha256)
    assert client.rollouts() == []

    for target in ("colours", f"colours@{entry.version}", str(file)):
        assert run(profile, target, "d1", as_json()) == 0
    assert all(c.what.model == command.what.model for c in device.came), "and the file is not released twice"

    capsys.readouterr()
    assert run(profile, "colours", "d1", Waiting(timeout_s=60)) == 0
    shown = capsys.readouterr()
    assert "0.9985" in shown.out
    assert "Jetson Orin Nano" in shown.out


def test_a_float_file_is_measured_with_what_is_said_about_it(
    office: Office, client: Client, device: Answering, tmp_path: Path
) -> None:
    device.answers = lambda _: [response("done", verdict=verdict(*OUTCOMES), machine=FACTS, took_s=3)]
    file = builders.classifier(tmp_path / "float.onnx")
    labels = builders.labels_file(tmp_path / "labels.txt")
    side = builders.sidecar_file(tmp_path / "said.toml", labels=str(labels))
    said = ("--sidecar", str(side), "--set", "name=floaty", "--seconds", "30")
    refused = office.ctl("model", "bench", str(file), "--on", "d1", *said)
    assert refused.code == 2
    assert "is not INT8" in refused.err
    done = office.ctl("model", "bench", str(file), "--on", "d1", *said, "--allow-float", "to compare")
    assert done.code == 0, done.err
    assert [entry.name for entry in client.models() if entry.name == "floaty"] == ["floaty"]
    [command] = device.came
    assert command.what.model.name == "floaty"
    again = office.ctl("model", "bench", "floaty", "--on", "d1", "--allow-float", "to compare")
    assert again.code == 2
    assert "names a release" in again.err


def test_what_the_device_refuses_is_exit_1_with_its_reason(
    profile: Profile, device: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    device.answers = lambda _: [
        response("refused", reason="An update comes first: pipeline main is probation.")
    ]
    assert run(profile, "colours", "d1", as_json()) == 1
    shown = capsys.readouterr()
    assert "An update comes first" in json.loads(shown.out)["reason"]
    assert "refused. An update comes first" in shown.err


def test_what_is_not_there_is_said(profile: Profile, device: Answering) -> None:
    for target, device_name, why in (
        ("nobody", "d1", "neither a file nor a released model"),
        ("colours@77", "d1", "has no version '77'"),
        ("colours", "d9", "no device d9"),
        ("colours", "D/..", "cannot be the name of a device"),
        ("nothing.onnx", "d1", "nothing.onnx"),
    ):
        with pytest.raises(Rejected, match=why):
            run(profile, target, device_name, as_json())
    for options in (Options(seconds=1), Options(seconds=1e6), Options(threads=0)):
        with pytest.raises(Rejected, match="That cannot be asked for"):
            run(profile, "nothing.onnx", "d1", as_json(), options)
    assert device.came == []


def test_an_offline_device_is_exit_3_before_any_work(
    profile: Profile, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(profile, "does-not-matter", "off", as_json()) == 3
    shown = capsys.readouterr()
    assert json.loads(shown.out)["state"] == "offline"
    assert "agent-ctl devices" in shown.err


def test_time_is_up_ctrl_c_leaves_it_and_the_same_command_watches_on(
    office: Office,
    profile: Profile,
    client: Client,
    device: Answering,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device.answers = lambda _: [response("running", phase="measuring", progress=0.1)]
    assert run(profile, "colours", "d1", Waiting(timeout_s=0.1)) == 3
    assert "goes on measuring" in capsys.readouterr().err

    def pressed(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote_bench, "_show", pressed)
        assert run(profile, "colours", "d1", Waiting()) == 130
    said = capsys.readouterr().err
    assert "d1 goes on measuring" in said
    assert "same command again" in said
    # Else its end could overtake what it answered first, or be told of no command.
    office.stack.wait_for(lambda: client.commands("d1", 1)[0].state == "running", "its first answer")
    [command] = device.came

    device.say(command, response("done", verdict=verdict(*OUTCOMES)))
    # It may be at its end before we ask: then the same command would be a new one, which ends as well.
    device.answers = lambda _: [response("done", verdict=verdict(*OUTCOMES))]
    assert run(profile, "colours", "d1", as_json()) == 0
