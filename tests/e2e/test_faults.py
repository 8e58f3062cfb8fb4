"""What goes wrong in the field, end to end: killed parts, models that lie, disks that fail or are full.

One device of its own on the fleet's cloud. Each test ends with a device that serves a committed model.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import missing
from e2e.fleet import Fleet
from edgeward_ctl.profile import load_profile
from edgeward_ctl.signing import Models, ReleaseKey
from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_wire.api import RolloutCreate
from edgeward_wire.manifest import BlobRef, ModelRef

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]

DEVICE, FAULTY = "e2e-f", "faulty"


@pytest.fixture(scope="module")
def one(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet's cloud with one more device, which serves a committed model."""
    enrol(fleet, DEVICE, FAULTY)
    try:
        fleet.deployed(fleet.model(), fleet=FAULTY)
        yield fleet
    finally:
        fleet.stack.stop(DEVICE)
        fleet.wait(lambda: not fleet.device(DEVICE)["online"], f"{DEVICE} to be offline")


def enrol(fleet: Fleet, device: str, name: str) -> None:
    fleet.stack.ctl_json("fleets", "create", name)
    token = fleet.stack.ctl_json("enroll-token", "--fleet", name)
    fleet.stack.add_device(device, token["enrolment"], {"cam": fleet.camera()})
    fleet.stack.start_agent(device)
    fleet.wait(lambda: fleet.device(device)["online"], f"{device} to be online")


def start(fleet: Fleet, probation: float, model: Path | None = None) -> str:
    """Begin a deployment and return the rollout's id."""
    arguments = ["--fleet", FAULTY, "--probation", str(probation), "--detach"]
    started = fleet.stack.ctl_json("deploy", str(model or fleet.model()), *arguments)
    return str(started["rollout"]["id"])


def update(fleet: Fleet, rollout: str) -> dict[str, Any]:
    """What the device last reported of this rollout; empty when that was another."""
    found: dict[str, Any] = fleet.pipeline(DEVICE).get("update") or {}
    return found if found.get("rollout") == rollout else {}


def reaches(fleet: Fleet, rollout: str, state: str) -> None:
    fleet.wait(lambda: update(fleet, rollout).get("state") == state, f"{DEVICE} to be {state}")


def ended(fleet: Fleet, rollout: str) -> dict[str, Any]:
    """The update's end, which the cloud's rollout must know as well."""
    fleet.wait(lambda: update(fleet, rollout).get("result"), f"{DEVICE} to end its update")
    fleet.wait(lambda: fleet.stack.api.rollout(rollout).state != "running", "the cloud to know of it")
    [target] = fleet.stack.api.rollout(rollout).targets
    end = update(fleet, rollout)
    assert (target.result, target.reason) == (end["result"], end["reason"])
    return end


def child(fleet: Fleet, program: str) -> int | None:
    """The process id of the device's runner or qualify."""
    agent = str(fleet.stack.processes[DEVICE].pid)
    found = subprocess.run(
        ["pgrep", "-P", agent, "-f", f"edgeward_agent.{program}"], capture_output=True, text=True, check=False
    )
    return int(found.stdout.split()[0]) if found.stdout else None


def restart(fleet: Fleet) -> None:
    """Start the stopped device and wait for its first report."""
    before = (fleet.device(DEVICE)["reported"] or {}).get("boot_id")
    fleet.stack.start_agent(DEVICE)
    fleet.wait(
        lambda: fleet.device(DEVICE)["online"] and fleet.device(DEVICE)["reported"]["boot_id"] != before,
        f"{DEVICE} to be back",
    )


def serves(fleet: Fleet, path: str) -> None:
    """This committed model, in frames that are stored, with none of the device's telemetry lost."""
    fleet.serving(DEVICE, path)
    fleet.goes_on_serving(DEVICE)


def test_a_runner_killed_in_probation_rolls_back_with_the_reason(one: Fleet) -> None:
    old = one.serving(DEVICE)
    rollout = start(one, probation=60)
    reaches(one, rollout, "probation")
    pid = child(one, "runner")
    assert pid
    os.kill(pid, signal.SIGKILL)
    end = ended(one, rollout)
    assert end["result"] == "failed_rolled_back"
    assert "SIGKILL" in end["reason"]
    serves(one, old)
    one.wait(lambda: one.gaps(DEVICE) == 0, "all windows to be stored")


@pytest.mark.parametrize("state", ["preparing", "probation"])
def test_an_agent_killed_in_the_midst_of_an_update_reports_how_it_ended(one: Fleet, state: str) -> None:
    old = one.serving(DEVICE)
    # A probation outlasts whatever is slow here; after a kill before it, it has an end.
    rollout = start(one, probation=60 if state == "probation" else 1)
    if state == "preparing":  # it takes an instant: seen soonest as the process
        one.wait(lambda: child(one, "qualify") or update(one, rollout), "qualify")
    else:
        reaches(one, rollout, state)
    one.stack.stop(DEVICE, signal.SIGKILL)
    restart(one)
    end = ended(one, rollout)
    if end["result"] == "succeeded":
        assert state == "preparing"
        serves(one, end["model"]["path"])
    else:
        assert end["result"] == "failed_rolled_back"
        assert "restarted unexpectedly" in end["reason"]
        serves(one, old)


def release_of_a_liar(fleet: Fleet, scratch: Path) -> ModelRef:
    """A release, signed as it should be, whose golden outputs are not what its file gives."""
    bundle = make_bundle(BundleRequest(fleet.model()), scratch)
    [(name, variant)] = bundle.manifest.variants.items()
    with np.load(bundle.blobs[variant.golden.sha256]) as arrays:
        lies = {k: -v if k.startswith("out.") else v for k, v in arrays.items()}
    raw = io.BytesIO()
    np.savez(raw, **lies)
    path = scratch / "lies.npz"
    path.write_bytes(raw.getvalue())
    golden = BlobRef(sha256=hashlib.sha256(raw.getvalue()).hexdigest(), length=path.stat().st_size)
    variants = {name: variant.model_copy(update={"golden": golden})}
    manifest = bundle.manifest.model_copy(update={"variants": variants})
    for ref in manifest.blobs():
        if not fleet.stack.api.has_blob(ref):
            fleet.stack.api.put_blob(ref, bundle.blobs.get(ref.sha256, path), lambda _: None)
    return Models(fleet.stack.api).publish(manifest, ReleaseKey(load_profile(fleet.stack.profile))).ref


def test_a_model_that_is_not_what_it_promises_fails_each_time_it_is_asked_for(
    one: Fleet, tmp_path: Path
) -> None:
    old = one.serving(DEVICE)
    liar = release_of_a_liar(one, tmp_path)
    for attempt in (1, 2):
        rollout = one.stack.api.create_rollout(RolloutCreate(fleet=FAULTY, pipeline="main", model=liar))
        end = ended(one, rollout.id)
        assert (end["result"], end["attempt"]) == ("failed_no_change", attempt)
        assert "cosine" in end["reason"]
        serves(one, old)


def test_a_deploy_supersedes_the_one_that_is_under_way(one: Fleet) -> None:
    first = start(one, probation=60)
    reaches(one, first, "probation")
    one.deployed(one.model(), fleet=FAULTY)
    found = one.stack.api.rollout(first)
    assert found.state == "superseded"
    assert [target.result for target in found.targets] == ["superseded"]
    one.goes_on_serving(DEVICE)


def test_an_offline_device_is_pending_and_catches_up(one: Fleet) -> None:
    one.stack.stop(DEVICE)
    one.wait(lambda: not one.device(DEVICE)["online"], f"{DEVICE} to be offline")
    done = one.deploy(one.model(), fleet=FAULTY)
    assert done.returncode == 3, done.stderr
    assert "No device of this rollout is online" in done.stderr
    rollout = one.stack.api.rollouts(fleet=FAULTY, limit=1)[0]
    assert [(t.state, t.result, t.online) for t in rollout.targets] == [("pending", None, False)]
    restart(one)
    end = ended(one, rollout.id)
    assert end["result"] == "succeeded"
    serves(one, end["model"]["path"])


def test_blobs_that_the_disk_has_hurt_are_fetched_again(one: Fleet) -> None:
    old = one.serving(DEVICE)
    one.stack.stop(DEVICE)
    for path in (one.stack.device_dir(DEVICE) / "state" / "blobs").iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    restart(one)
    serves(one, old)


def test_a_lost_journal_costs_an_update_and_not_the_device(one: Fleet) -> None:
    old = one.deployed(one.model(), fleet=FAULTY)  # what it is to run is what it then follows
    one.stack.stop(DEVICE)
    journal = one.stack.device_dir(DEVICE) / "state" / "journal.json"
    journal.write_text('{"half')
    restart(one)
    serves(one, old)
    assert journal.with_name("journal.json.damaged").read_text() == '{"half'
    one.wait(lambda: "set aside" in one.stack.ctl("log", DEVICE, "-v").stdout, "the log to tell of it")


def test_with_the_cloud_away_it_restarts_and_loses_no_window(one: Fleet) -> None:
    old = one.serving(DEVICE)
    one.stack.stop("cloud")

    def frames_flow() -> bool:
        status = one.stack.agent_status(DEVICE) or {}
        return not status.get("broker") and bool((status.get("figures") or {}).get("main"))

    one.wait(frames_flow, f"{DEVICE} to serve alone")
    one.stack.stop(DEVICE)  # what it could not send is on disk now
    one.stack.start_agent(DEVICE)
    one.wait(frames_flow, f"{DEVICE} to serve alone after a restart")
    one.stack.start_cloud()
    serves(one, old)
    one.wait(lambda: one.gaps(DEVICE) == 0, "all windows to be stored")


@pytest.fixture
def small_disk(one: Fleet) -> Iterator[Path]:
    """The device's state on a disk of its own, of 100 MB; the device runs on it."""
    state = one.stack.device_dir(DEVICE) / "state"
    kept = state.with_name("kept")
    one.stack.stop(DEVICE)
    shutil.copytree(state, kept)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(state)], capture_output=True, check=False
    )
    try:
        if mounted.returncode:
            missing("the right to mount a tmpfs")
        shutil.copytree(kept, state, dirs_exist_ok=True)
        restart(one)
        one.serving(DEVICE)
        yield state
        one.stack.stop(DEVICE)
        shutil.rmtree(kept)
        shutil.copytree(state, kept)
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(state)], check=True)
        shutil.copytree(kept, state, dirs_exist_ok=True)
        restart(one)
        one.serving(DEVICE)


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


def test_on_a_full_disk_the_old_model_goes_on_and_the_update_waits(one: Fleet, small_disk: Path) -> None:
    old = one.serving(DEVICE)
    serves(one, old)
    ballast = small_disk / "ballast"
    fill(ballast)
    rollout = start(one, probation=1)

    def waits_with_reason() -> bool:
        [target] = one.stack.api.rollout(rollout).targets
        return target.state == "pending" and "cannot be written" in target.reason

    one.wait(waits_with_reason, "the rollout to say why it waits")
    serves(one, old)
    status = one.stack.run("edgeward-agent", "status", *one.stack.agent_paths(DEVICE))
    assert status.returncode == 1
    assert "full" in status.stdout.splitlines()[0]
    ballast.unlink()
    end = ended(one, rollout)
    assert end["result"] == "succeeded"
    serves(one, end["model"]["path"])
