"""The whole way, end to end: real broker, real registry, real agents. See also the demo.

Each test brings a model of its own, and ends with devices that serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from e2e.fleet import DEVICES, FLEET, Fleet
from edgeward_wire.topics import all_up

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_deploy_upgrade_and_rollback(fleet: Fleet) -> None:
    old = fleet.deployed(fleet.model())
    for device in DEVICES:
        fleet.serving(device, old)
        fleet.goes_on_serving(device)

    new = fleet.deployed(fleet.model())
    assert new != old

    back = fleet.stack.ctl("rollback", "--fleet", FLEET, "--json")
    assert back.returncode == 0, back.stderr + back.stdout
    for device in DEVICES:
        fleet.serving(device, old)
        fleet.goes_on_serving(device)

    log = fleet.stack.ctl_json("log", DEVICES[0])
    assert len(log) >= 3
    assert "succeeded" in json.dumps(log)


def test_what_it_sees_is_right(fleet: Fleet) -> None:
    """The camera shows red, green and blue in turn, for as long each."""
    assert fleet.deploy(fleet.model()).returncode == 0

    def labels() -> set[str]:
        rows = fleet.stack.telemetry(device=DEVICES[0])
        return {label for row in rows for label in row["labels"]}

    fleet.wait(lambda: labels() == {"red", "green", "blue"}, "all three colours to be seen")


def test_the_same_bundle_gets_the_same_version(fleet: Fleet) -> None:
    model = fleet.model()
    path = fleet.deployed(model)
    assert fleet.deployed(model) == path


def test_a_tampered_blob_is_refused_and_the_old_model_goes_on(fleet: Fleet) -> None:
    old = fleet.deployed(fleet.model())
    for device in DEVICES:
        fleet.serving(device, old)
        fleet.stack.stop(device)
    model = fleet.model()
    assert fleet.deploy(model, "--detach").returncode == 0
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    blob = fleet.stack.cloud_dir / "blobs" / "sha256" / digest
    raw = bytearray(blob.read_bytes())
    raw[len(raw) // 2] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(raw)
    for device in DEVICES:
        fleet.stack.start_agent(device)

    def refused(device: str) -> bool:
        update = fleet.pipeline(device).get("update") or {}
        return update.get("result") in ("rejected", "failed_no_change") and bool(update["reason"])

    for device in DEVICES:
        fleet.wait(lambda device=device: refused(device), f"{device} to refuse the blob")
        assert digest[:8] in fleet.pipeline(device)["update"]["reason"]
        fleet.serving(device, old)
        fleet.goes_on_serving(device)


def test_a_wrong_signature_is_refused_by_the_device(fleet: Fleet) -> None:
    """Who holds the cloud's disk but not its keys cannot feed a device."""
    old = fleet.deployed(fleet.model())
    timestamp = fleet.stack.cloud_dir / "registry" / "metadata" / "timestamp.json"
    good = timestamp.read_bytes()
    forged = json.loads(good)
    forged["signed"]["version"] += 1
    timestamp.write_bytes(json.dumps(forged).encode())
    try:
        fleet.wait(
            lambda: "sign" in (fleet.device(DEVICES[0])["reported"] or {}).get("registry", ""),
            "the device to report the wrong signature",
        )
        assert fleet.committed(DEVICES[0]) == old
        fleet.goes_on_serving(DEVICES[0])
    finally:
        timestamp.write_bytes(good)
    assert fleet.deploy(fleet.model()).returncode == 0


def test_a_release_key_that_root_does_not_know_is_refused_by_the_cloud(fleet: Fleet, tmp_path: Path) -> None:
    profile = tmp_path / "mallory"
    shutil.copytree(fleet.stack.profile, profile)
    done = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519"], capture_output=True, text=True, check=True
    )
    (profile / "release-key.pem").write_text(done.stdout)
    refused = fleet.stack.ctl("deploy", str(fleet.model()), "--fleet", FLEET, "--detach", profile=profile)
    assert refused.returncode not in (0, 1, 3)
    assert "Traceback" not in refused.stderr
    assert "key" in refused.stderr


def test_a_killed_device_serves_again_without_the_cloud(fleet: Fleet) -> None:
    path = fleet.deployed(fleet.model())
    device = DEVICES[0]
    fleet.serving(device, path)
    fleet.stack.stop("cloud")
    fleet.stack.stop(device, signal.SIGKILL)
    fleet.stack.start_agent(device)

    def serves() -> bool:
        status = fleet.stack.agent_status(device) or {}
        return path in json.dumps(status) and '"committed": true' in json.dumps(status)

    fleet.wait(serves, "the device to serve with the cloud away")
    fleet.stack.start_cloud()
    fleet.wait(lambda: fleet.stack.online() == len(DEVICES), "all devices to be back")
    fleet.goes_on_serving(device)


def broker_pid(fleet: Fleet) -> int | None:
    cloud = fleet.stack.processes["cloud"].pid
    found = subprocess.run(
        ["pgrep", "-P", str(cloud), "mosquitto"], capture_output=True, text=True, check=False
    )
    return int(found.stdout.split()[0]) if found.stdout else None


def test_the_broker_is_killed_and_nothing_is_lost(fleet: Fleet) -> None:
    """Sequence numbers are the proof: every window of each device's stream is stored, with no gap."""
    assert fleet.deploy(fleet.model()).returncode == 0
    old = broker_pid(fleet)
    assert old is not None
    os.kill(old, signal.SIGKILL)
    fleet.wait(lambda: broker_pid(fleet) not in (None, old), "the broker to be back")
    for device in DEVICES:
        fleet.goes_on_serving(device)
    fleet.wait(lambda: fleet.stack.online() == len(DEVICES), "all devices to be back")
    assert fleet.deploy(fleet.model()).returncode == 0
    for device in DEVICES:
        fleet.wait(lambda device=device: fleet.gaps(device) == 0, f"{device} to have no gap")


def test_metrics_are_flat_numbers_for_a_viewer(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.deploy(fleet.model()).returncode == 0
    issued = fleet.stack.ctl_json("mqtt", "cert", "grafana", "--out", str(tmp_path / "viewer"))
    files = {path.name: path for path in (tmp_path / "viewer").iterdir()}
    command = ["mosquitto_sub", "-V", "5", "-h", issued["host"], "-p", str(issued["port"])]
    command += ["--cafile", str(files["server-ca.pem"]), "--cert", str(files["certificate.pem"])]
    command += ["--key", str(files["key.pem"]), "-i", issued["username"]]
    seen = subprocess.run(
        [*command, "-t", all_up("metrics"), "-C", "3", "-W", "60"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert seen.returncode == 0, seen.stderr
    messages = [json.loads(line) for line in seen.stdout.splitlines()]
    assert len(messages) == 3
    for message in messages:
        assert all(isinstance(value, int | float) for key, value in message.items() if key != "schema")
        assert message["main_cam_end_to_end_p99_ms"] >= message["main_cam_end_to_end_p50_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fleet", "nowhere"], "nowhere"),
        (["--fleet", FLEET, "--labels", "/nonexistent.txt"], "nonexistent.txt"),
    ],
)
def test_bad_input_to_deploy_gets_one_clear_error(fleet: Fleet, arguments: list[str], says: str) -> None:
    done = fleet.stack.ctl("deploy", str(fleet.model()), "--detach", *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_onnx(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "cat.onnx"
    path.write_bytes(b"not a model at all" * 10)
    done = fleet.stack.ctl("deploy", str(path), "--fleet", FLEET)
    assert done.returncode == 2
    assert "ONNX" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_used_token_and_a_taken_name_are_refused(fleet: Fleet, tmp_path: Path) -> None:
    token = fleet.stack.ctl_json("enroll-token", "--fleet", FLEET, "--uses", "1")["enrolment"]

    def enroll(device: str, state: str) -> subprocess.CompletedProcess[str]:
        return fleet.stack.run(
            "edgeward-agent", "enroll", token, "--device", device, "--state", str(tmp_path / state)
        )

    taken = enroll(DEVICES[0], "impostor")
    assert taken.returncode != 0
    assert DEVICES[0] in taken.stderr
    assert enroll("e2e-new", "new").returncode == 0
    used = enroll("e2e-newer", "newer")
    assert used.returncode != 0
    assert "token" in used.stderr
    assert "Traceback" not in taken.stderr + used.stderr
    fleet.stack.ctl("reject", "e2e-new")


def test_a_camera_that_is_not_there_is_reported_and_tried_again(fleet: Fleet) -> None:
    stack = fleet.stack
    stack.ctl_json("fleets", "create", "blind")
    token = stack.ctl_json("enroll-token", "--fleet", "blind")["enrolment"]
    camera = stack.directory / "late.avi"
    stack.add_device(
        "e2e-blind", token, {"cam": f'uri = "{camera}"\nslot = "latest"\nrealtime = true\nloop = true'}
    )
    stack.start_agent("e2e-blind")
    try:
        fleet.wait(lambda: fleet.device("e2e-blind")["online"], "the blind device to be online")
        assert fleet.deploy(fleet.model(), "--detach", fleet="blind").returncode == 0

        def source() -> dict[str, object]:
            sources: dict[str, dict[str, object]] = fleet.pipeline("e2e-blind").get("sources") or {}
            return sources.get("cam") or {}

        fleet.wait(lambda: source().get("up") is False and bool(source()["detail"]), "the camera's absence")
        shutil.copy(fleet.media, camera)
        fleet.wait(lambda: source().get("up") is True, "the camera's return")
        fleet.serving("e2e-blind")  # the model has passed on live frames
    finally:
        stack.stop("e2e-blind")


def test_two_operators_publish_at_the_same_moment_and_both_land(fleet: Fleet) -> None:
    profiles = [fleet.stack.cloud_dir / "operators" / name for name in ("demo", "other")]
    models = [fleet.model(), fleet.model()]
    command = [str(Path(sys.executable).parent / "agent-ctl")]
    both = [
        subprocess.Popen(
            [*command, "--profile", str(profile), "deploy", str(model), "--fleet", FLEET, "--detach"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for profile, model in zip(profiles, models, strict=True)
    ]
    outputs = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    digests = {hashlib.sha256(model.read_bytes()).hexdigest() for model in models}
    blobs = fleet.stack.cloud_dir / "blobs" / "sha256"
    assert all((blobs / digest).exists() for digest in digests)
    entries = fleet.stack.ctl_json("models")
    assert len({(entry["path"], entry["sha256"]) for entry in entries}) == len(entries)
    assert len(entries) >= 2
