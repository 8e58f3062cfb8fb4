"""Other tasks than classification, the whole way: deployed, seen on a device, heard over MQTT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ports import free_port
from stack import Stack

from conftest import missing, need
from edgeward_agent.config import load_config
from edgeward_wire.topics import up
from runtime import builders

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]

EYE, EAR, ROWS = "e2e-eye", "e2e-ear", "e2e-rows"
ZONES = "zones = { left = [[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]] }\n"
SAMPLES = "[pipelines.main.samples]\nevery = 5\napart_s = 0.0\nmost_files = 3\n"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Three devices, each alone in its fleet: one sees, with a zone, and keeps samples; one hears; one is
    asked."""
    os.environ["PATH"] += ":/usr/sbin"
    for part in ("mosquitto", "mosquitto_sub"):
        if shutil.which(part) is None:
            missing(part)
    directory = tmp_path_factory.mktemp("tasks")
    video = builders.video_file(directory / "camera.avi", ["green"], fps=10, frames_each=20)
    voice = np.concatenate([np.zeros(8_000), np.full(8_000, 0.2)])
    sound = builders.wav_file(directory / "microphone.wav", voice)
    paced = "realtime = true\nloop = true\n"
    with Stack(directory, window_s=1.0, poll_interval_s=2) as stack:
        stack.init_cloud()
        stack.start_cloud()

        def add(device: str, sources: dict[str, str], extra: str = "") -> None:
            stack.ctl_json("fleets", "create", device)
            token = stack.ctl_json("enroll-token", "--fleet", device)
            stack.add_device(device, token["enrolment"], sources, extra)
            stack.start_agent(device)

        add(EYE, {"cam": f'uri = "{video}"\n{paced}{ZONES}'}, SAMPLES)
        add(EAR, {"cam": f'uri = "{sound}"\n{paced}results = "change"\n'})
        add(ROWS, {}, f"[serve]\nport = {free_port()}\n")
        stack.wait_for(lambda: stack.online() == 3, "all devices to be online", seconds=60)
        yield stack


@pytest.fixture(scope="module")
def listen(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """The next messages on a topic, as a dashboard gets them."""
    directory = tmp_path_factory.mktemp("viewer")
    issued = stack.ctl_json("mqtt", "cert", "viewer", "--out", str(directory / "viewer"))
    files = directory / "viewer"
    command = ["mosquitto_sub", "-V", "5", "-h", issued["host"], "-p", str(issued["port"])]
    command += ["--cafile", str(files / "server-ca.pem"), "--cert", str(files / "certificate.pem")]
    command += ["--key", str(files / "key.pem"), "-i", issued["username"], "-W", "60"]

    def messages(topic: str, count: int) -> list[Any]:
        seen = subprocess.run(
            [*command, "-t", topic, "-C", str(count)], capture_output=True, text=True, check=False
        )
        assert seen.returncode == 0, seen.stderr
        return [json.loads(line) for line in seen.stdout.splitlines()]

    return messages


def deploy(stack: Stack, model: Path, fleet: str) -> None:
    done = stack.ctl("deploy", str(model), "--fleet", fleet, "--probation", "1", "--timeout", "120", "--json")
    assert done.returncode == 0, done.stderr + done.stdout


def test_boxes_with_zones(stack: Stack, listen: Callable[[str, int], list[Any]], tmp_path: Path) -> None:
    builders.labels_file(tmp_path / "labels.txt")
    builders.detector_sidecar(tmp_path / "boxes.toml")
    deploy(stack, builders.detector(tmp_path / "boxes.onnx"), EYE)
    for result in listen(up(EYE, "result"), 2):
        assert (result["task"], result["model"]) == ("detection", "boxes")
        assert {box["label"] for box in result["boxes"]} == {"green"}
        for box in result["boxes"]:
            standing = (box["x1"] + box["x2"]) / 2
            assert box["zones"] == (["left"] if standing <= 0.5 else [])
    (metrics,) = listen(up(EYE, "metrics"), 1)
    assert metrics["main_cam_end_to_end_p99_ms"] > 0
    assert metrics["main_cam_fps"] > 0
    kept = stack.device_dir(EYE) / "state/samples/main"
    stack.wait_for(lambda: len(list(kept.glob("*.jpg"))) == 3, "samples to be kept")


def test_voice_activity(stack: Stack, listen: Callable[[str, int], list[Any]], tmp_path: Path) -> None:
    builders.listener_sidecar(tmp_path / "ear.toml")
    deploy(stack, builders.listener(tmp_path / "ear.onnx"), EAR)
    results = listen(up(EAR, "result"), 6)
    assert {result["speech"]["active"] for result in results} == {True, False}
    assert {result["why"] for result in results} >= {"change"}


def test_rows_of_numbers_are_asked_for_over_http(stack: Stack, tmp_path: Path) -> None:
    """A forest of scikit-learn's: no source delivers rows, so its pipeline has none and serves who asks."""
    need("sklearn")
    built = stack.ctl("model", "zoo", "build", "digits-forest", "--out", str(tmp_path), "--json")
    assert built.returncode == 0, built.stderr
    (model,) = tmp_path.glob("*.onnx")
    deploy(stack, model, ROWS)
    port = load_config(stack.device_dir(ROWS) / "agent.toml").serve.port
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:

        def ready() -> bool:
            try:
                return http.get("/v2/health/ready").status_code == 200
            except httpx.TransportError:  # nobody listens yet
                return False

        stack.wait_for(ready, "the model")
        held_out = np.load(tmp_path / "digits.npz")
        (taken,) = http.get("/v2/models/digits-forest").json()["inputs"]
        given = {"name": taken["name"], "datatype": taken["datatype"]}
        right = 0
        for row, digit in zip(held_out["features"][:32], held_out["labels"][:32], strict=True):
            asked = {"inputs": [{**given, "shape": [1, 64], "data": row.tolist()}]}
            answer = http.post("/v2/models/digits-forest/infer", json=asked).raise_for_status().json()
            right += int(np.argmax(answer["outputs"][0]["data"])) == digit
        assert right >= 26  # of its own test data it knows 0.90 to 0.94
        assert http.get("/health").json()["pipelines"]["main"]["ok"]
