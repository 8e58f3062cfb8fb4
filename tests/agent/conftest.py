"""A cloud made of simulators for the device's link, and a device that is enrolled in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward_agent.http import Http, anchored
from edgeward_agent.identity import Identity
from sim.device import HASTY, PATIENT, Device, write_identity
from sim.pki import Authority
from sim.repository import Repository
from sim.server import Server


@pytest.fixture(scope="session")
def server_authority() -> Authority:
    """The CA of servers."""
    return Authority.make("Edgeward servers")


@pytest.fixture(scope="session")
def device_authority() -> Authority:
    """The CA of devices."""
    return Authority.make("Edgeward devices")


@pytest.fixture
def server(server_authority: Authority, tmp_path: Path) -> Iterator[Server]:
    """An HTTPS server that serves nothing yet."""
    directory = tmp_path / "server"
    directory.mkdir()
    server = Server(server_authority, directory)
    yield server
    server.close()


@pytest.fixture
def repository(server: Server) -> Repository:
    """An empty registry on that server."""
    return Repository(server.files)


@pytest.fixture
def identity(
    server: Server,
    repository: Repository,
    server_authority: Authority,
    device_authority: Authority,
    tmp_path: Path,
) -> Identity:
    """A device enrolled in that registry."""
    return write_identity(
        tmp_path / "state",
        server_authority,
        device_authority,
        url=server.url,
        root=repository.root_bytes,
    )


@pytest.fixture
def http(server: Server, server_authority: Authority) -> Iterator[Http]:
    """A client of that server."""
    http = Http(server.url, anchored(server_authority.pem), patience=PATIENT)
    yield http
    http.close()


@pytest.fixture
def hasty(server: Server, server_authority: Authority) -> Iterator[Http]:
    """One that leaves it soon when too little comes."""
    http = Http(server.url, anchored(server_authority.pem), patience=HASTY)
    yield http
    http.close()


@pytest.fixture
def device(identity: Identity, http: Http, repository: Repository, tmp_path: Path) -> Device:
    """A device whose clock is the registry's."""
    return Device(identity, http, tmp_path / "state", repository.now + 60)
