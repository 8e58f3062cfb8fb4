"""A real cloud as a process for agent-ctl to talk to, made once; without a broker where none is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from stack import Stack

from edgeward_agent.enrol import enrol
from edgeward_agent.identity import Identity
from runtime import builders

AGENT_CTL = Path(sys.executable).parent / "agent-ctl"
FLEET = "edge-01"
EMPTY = "empty"


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Office:
    """Two operators' desks at one cloud."""

    stack: Stack
    media: Path
    identities: dict[str, Identity] = field(default_factory=dict)

    def profile(self, operator: str = "amy") -> Path:
        return self.stack.cloud_dir / "operators" / operator

    def start(
        self, *arguments: str, operator: str = "amy", profile: Path | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(AGENT_CTL), "--profile", str(profile or self.profile(operator)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )

    def ctl(self, *arguments: str, operator: str = "amy", profile: Path | None = None) -> Done:
        """Run agent-ctl to its end. No traceback may ever come out."""
        return finish(self.start(*arguments, operator=operator, profile=profile))

    def model(self, name: str, salt: int) -> Path:
        """A small INT8 model with all that it needs beside it; another salt is another content."""
        home = self.media / name
        home.mkdir(exist_ok=True)
        builders.labels_file(home / "labels.txt")
        builders.sidecar_file(home / f"{name}.toml", samples="pictures")
        builders.picture_directory(home / "pictures")
        return builders.int8_classifier(home / f"{name}.onnx", salt=salt)

    def enrol(self, *devices: str, fleet: str = FLEET) -> dict[str, Identity]:
        """Enrol devices as they do it themselves."""
        token = self.stack.ctl_json("enroll-token", "--fleet", fleet, "--uses", str(len(devices)))
        return {
            device: enrol(
                token["enrolment"],
                device,
                self.stack.device_dir(device),
                wait=lambda _: None,
                say=lambda _: None,
            )
            for device in devices
        }


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a command."""
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err, err
    return Done(process.returncode, out, err)


class AmysStack(Stack):
    """The stack's own commands are amy's."""

    @property
    def profile(self) -> Path:
        return self.cloud_dir / "operators" / "amy"


@pytest.fixture(scope="session")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A cloud whose broker is away: for everything that devices are not part of."""
    directory = tmp_path_factory.mktemp("office")
    with AmysStack(directory) as stack:
        stack.init_cloud(operators=("amy", "bob"))
        settings = stack.cloud_dir / "cloud.toml"
        settings.write_text(settings.read_text().replace("managed = true", "managed = false"))
        stack.start_cloud()
        one = Office(stack, directory)
        for fleet in (FLEET, EMPTY):
            assert one.ctl("fleets", "create", fleet).code == 0
        one.enrol("cam-1", "cam-2")
        yield one


@pytest.fixture
def desk(office: Office, tmp_path: Path) -> Path:
    """A copy of amy's profile, to be spoilt."""
    return Path(shutil.copytree(office.profile(), tmp_path / "profile"))


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The profile of another cloud."""
    directory = tmp_path_factory.mktemp("elsewhere")
    stack = AmysStack(directory)
    stack.init_cloud(operators=("amy",))
    return stack.profile
