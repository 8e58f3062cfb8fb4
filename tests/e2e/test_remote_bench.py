"""A model measured on a device that serves: real cloud, broker and agent, the shipped EfficientNet-Lite0."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.fleet import Fleet
from edgeward_ctl import deploying, screen
from edgeward_ctl.deploying import Wish
from edgeward_wire import topics
from edgeward_wire.api import CommandCreate, CommandStatus, RolloutCreate
from edgeward_wire.command import FINAL, Bench, Command
from edgeward_wire.manifest import ModelRef

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]

DEVICE, MEASURED = "edge-01a", "measured"
LITE0 = Path(__file__).resolve().parents[2] / "models/zoo/efficientnet-lite0.onnx"


@pytest.fixture(scope="module")
def one(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet's cloud with one more device, which serves EfficientNet-Lite0."""
    stack = fleet.stack
    stack.ctl_json("fleets", "create", MEASURED)
    token = stack.ctl_json("enroll-token", "--fleet", MEASURED)
    stack.add_device(DEVICE, token["enrolment"], {"cam": fleet.camera()})
    stack.start_agent(DEVICE)
    try:
        fleet.wait(lambda: fleet.device(DEVICE)["online"], f"{DEVICE} to be online")
        fleet.deployed(LITE0, fleet=MEASURED)
        yield fleet
    finally:
        stack.stop(DEVICE)
        fleet.wait(lambda: not fleet.device(DEVICE)["online"], f"{DEVICE} to be offline")


def serving(fleet: Fleet) -> ModelRef:
    found = fleet.pipeline(DEVICE)["serving"]
    assert found["committed"]
    return ModelRef.model_validate(found["model"])


def log(fleet: Fleet) -> str:
    return fleet.stack.processes[DEVICE].log.read_text()


def reaches(fleet: Fleet, n: int, holds: Callable[[CommandStatus], object]) -> CommandStatus:
    fleet.wait(lambda: holds(fleet.stack.api.command(DEVICE, n)), f"command {n} to get so far")
    return fleet.stack.api.command(DEVICE, n)


def test_a_file_is_measured_while_the_pipeline_goes_on_serving(one: Fleet) -> None:
    before, frames = serving(one), one.frames(DEVICE)
    done = one.stack.ctl("model", "bench", str(LITE0), "--on", DEVICE, "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert (found["state"], found["exit"]) == ("done", 0)
    assert ModelRef(path=found["model"]["path"], sha256=found["model"]["sha256"]) == before, "released before"
    passed = [plan for plan in found["plans"] if plan["outcome"] in ("chosen", "passed")]
    assert found["chosen"] in [plan["title"] for plan in passed]
    for plan in passed:
        assert plan["parity"] >= 0.99
        assert 0 < plan["p50_ms"] <= plan["p99_ms"]
    assert found["machine"]["cores"] > 0
    assert found["machine"]["beside"][0].startswith(f"main: {before.name} {before.version}, CPU int8")
    assert found["runtime"]["onnxruntime"]
    one.wait(lambda: one.frames(DEVICE) > frames, "frames meanwhile")
    one.goes_on_serving(DEVICE)
    assert serving(one) == before
    assert not one.pipeline(DEVICE)["fault"]
    one.wait(lambda: one.gaps(DEVICE) == 0, "all windows to be stored")


def steal_the_cloud(fleet: Fleet, command: Command) -> None:
    """Publish with the cloud's own certificate what its API would never send."""
    stack = fleet.stack
    pki = stack.cloud_dir / "pki"
    arguments = ["mosquitto_pub", "-V", "5", "-h", "127.0.0.1", "-p", str(stack.broker_port), "-q", "1"]
    arguments += ["--cafile", str(pki / "server-ca.pem"), "--cert", str(pki / "cloud-client.pem")]
    arguments += ["--key", str(pki / "cloud-client.key"), "-t", topics.command(DEVICE, command.n)]
    cloud = stack.processes["cloud"].pid
    os.kill(cloud, signal.SIGSTOP)  # else it takes its name at the broker back before we are done
    try:
        done = subprocess.run([*arguments, "-s"], input=command.to_bytes(), capture_output=True, check=False)
    finally:
        os.kill(cloud, signal.SIGCONT)
    assert done.returncode == 0, done.stderr


def test_a_stolen_cloud_cannot_have_measured_what_nobody_signed(one: Fleet) -> None:
    boot_id = one.device(DEVICE)["birth"]["boot_id"]
    real, now = serving(one), time.time()
    last = max((command.n for command in one.stack.api.commands(DEVICE)), default=1)
    forged = real.model_copy(update={"sha256": "f" * 64})
    unsigned = ModelRef(path="models/evil/1.json", sha256="e" * 64)
    asked: list[tuple[dict[str, Any], ModelRef, str]] = [
        ({}, forged, "refused: .* another sha256 than the release key has signed"),
        ({}, unsigned, "refused: models/evil/1.json .* no release key has signed it"),
        ({"issued_at": now - 500, "expires_at": now - 400}, real, "expired: It came"),
        ({"boot_id": "0" * 32}, real, "refused: It was meant for another run"),
    ]
    for n, (changes, model, says) in enumerate(asked, last + 1):
        fields = {"boot_id": boot_id, "issued_at": now, "expires_at": now + 120, **changes}
        steal_the_cloud(one, Command(n=n, what=Bench(model=model), **fields))
        one.wait(lambda n=n, says=says: re.search(f"Command {n}: {says}", log(one)), f"{n} to be {says}")
    assert serving(one) == real
    # Its theft cut the cloud's own session off.
    one.wait(lambda: one.device(DEVICE)["online"], f"{DEVICE} to be seen online again")
    one.goes_on_serving(DEVICE)


def hold_qualify(fleet: Fleet) -> None:
    """Let it stand still as soon as it is there."""
    agent, found = str(fleet.stack.processes[DEVICE].pid), ""

    def there() -> bool:
        nonlocal found
        command = ["pgrep", "-P", agent, "-f", "edgeward_agent.qualify"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return bool(found)

    fleet.wait(there, "qualify")
    os.kill(int(found), signal.SIGSTOP)


def test_an_assignment_during_a_bench_wins(one: Fleet) -> None:
    api = one.stack.api
    with screen.board(began=time.monotonic()) as board:
        newer = deploying.release(api, Wish(model=one.model(), target={}), board)
    bench = api.send_command(DEVICE, CommandCreate(model=serving(one)))
    hold_qualify(one)  # however long the assignment takes
    reaches(one, bench.n, lambda status: status.response is not None and status.response.phase == "measuring")
    rollout = api.create_rollout(RolloutCreate(device=DEVICE, model=newer, probation_s=1))
    ended = reaches(one, bench.n, lambda status: status.state in FINAL)
    assert ended.state == "failed"
    assert ended.reason.startswith("superseded")
    one.wait(lambda: api.rollout(rollout.id).state != "running", "the rollout's end")
    assert [target.result for target in api.rollout(rollout.id).targets] == ["succeeded"]
    one.serving(DEVICE, newer.path)
    one.goes_on_serving(DEVICE)
