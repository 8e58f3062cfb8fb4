"""One whole Edgeward for the end-to-end tests: real cloud, real broker, real agents, as processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from stack import Stack

from conftest import missing
from e2e.fleet import DEVICES, FLEET, Fleet
from runtime import builders


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two devices of one fleet, each with a camera, online, with nothing deployed."""
    os.environ["PATH"] += ":/usr/sbin"
    for part in ("mosquitto", "mosquitto_sub"):
        if shutil.which(part) is None:
            missing(part)
    directory = tmp_path_factory.mktemp("e2e")
    media = builders.video_file(directory / "camera.avi", fps=5, frames_each=15)
    with Stack(directory, window_s=1.0, poll_interval_s=2) as stack:
        one = Fleet(stack, media)
        stack.init_cloud(operators=("demo", "other"))
        stack.start_cloud()
        stack.ctl_json("fleets", "create", FLEET)
        token = stack.ctl_json("enroll-token", "--fleet", FLEET, "--uses", str(len(DEVICES)))
        for device in DEVICES:
            stack.add_device(device, token["enrolment"], {"cam": one.camera()})
            stack.start_agent(device)
        one.wait(lambda: stack.online() == len(DEVICES), "both devices to be online")
        yield one
