"""The device's trust against the cloud's own registry: the same questions that the simulator is asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward_agent.http import Http, anchored
from edgeward_agent.trust import BUILD_TIME
from edgeward_cloud.ceremony import Wishes, create_cloud
from edgeward_cloud.registry import Registry
from edgeward_cloud.settings import Settings
from edgeward_wire.assignment import Assignment
from edgeward_wire.errors import Rejected, Unavailable
from sim.device import DEVICE, PATIENT, Device, write_identity
from sim.pki import Authority
from sim.server import Server

DAY = 86_400


class World:
    """A registry on disk, served as it is at each moment, and a device that looks at it."""

    def __init__(self, tmp_path: Path, server: Server, servers: Authority) -> None:
        self.now = BUILD_TIME + DAY
        self.server = server
        self.settings: Settings = create_cloud(Wishes(dir=tmp_path / "cloud"), now=self.now)
        self.cloud = Registry(self.settings, clock=lambda: self.now)
        self.serve()
        root = self.server.files["/tuf/metadata/1.root.json"]
        identity = write_identity(
            tmp_path / "state", servers, Authority.make("Devices"), url=server.url, root=root
        )
        http = Http(server.url, anchored(servers.pem), patience=PATIENT)
        self.device = Device(identity, http, tmp_path / "state", self.now)

    def serve(self) -> None:
        self.server.files.clear()
        for name, directory in (("metadata", self.settings.metadata), ("targets", self.settings.targets)):
            for path in directory.rglob("*"):
                if path.is_file():
                    key = f"/tuf/{name}/{path.relative_to(directory).as_posix()}"
                    self.server.files[key] = path.read_bytes()

    def look(self) -> Assignment | None:
        self.serve()
        self.device.now = self.now
        desired = self.device.registry.check()
        return desired.assignment if desired else None


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    servers = Authority.make("Servers")
    (tmp_path / "server").mkdir()
    server = Server(servers, tmp_path / "server")
    world = World(tmp_path, server, servers)
    yield world
    world.device.http.close()
    server.close()


def assignment(text: str = "first") -> Assignment:
    return Assignment(device=DEVICE, fleet="lab", revision=0, labels={"text": text})


def test_a_new_cloud_has_nothing_for_the_device(world: World) -> None:
    assert world.look() is None


def test_an_assignment_arrives_as_it_was_signed(world: World) -> None:
    [signed] = world.cloud.assign([assignment()])
    assert world.look() == signed
    world.now += 60
    [newer] = world.cloud.assign([assignment("second")])
    assert world.look() == newer
    assert newer.revision > signed.revision


def test_a_cloud_that_signs_again_in_time_never_expires(world: World) -> None:
    world.cloud.assign([assignment()])
    for _ in range(12):
        world.now += 3 * DAY
        world.cloud.resign_due(world.now)
        assert world.look() is not None
    world.now += 8 * DAY
    with pytest.raises(Unavailable, match=r"timestamp\.json expired .* the cloud must re-sign it"):
        world.look()
    world.cloud.resign_due(world.now)
    assert world.look() is not None


def test_time_is_learnt_from_the_cloud(world: World) -> None:
    world.cloud.assign([assignment()])
    world.look()
    assert world.device.floors.last_authenticated_time == int(world.now)


def test_an_older_state_of_the_cloud_is_refused_until_it_signs_anew(world: World, tmp_path: Path) -> None:
    world.cloud.assign([assignment()])
    world.look()
    registry = world.settings.metadata.parent
    shutil.copytree(registry, tmp_path / "backup")
    world.now += 600
    world.cloud.assign([assignment("second")])
    world.look()

    shutil.rmtree(registry)
    shutil.copytree(tmp_path / "backup", registry)
    shutil.rmtree(world.device.state / "tuf")
    with pytest.raises(Rejected, match="an older state was put back"):
        world.look()
    world.now += 600
    world.cloud = Registry(world.settings, clock=lambda: world.now)
    world.cloud.assign([assignment("third")])
    assert world.look() is not None
