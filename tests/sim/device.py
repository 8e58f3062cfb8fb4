"""A device as its disk and its clock have it, for tests of the link to the cloud."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from edgeward_agent.floors import Floors
from edgeward_agent.http import Http, Patience
from edgeward_agent.identity import Enrolment, Identity
from edgeward_agent.trust import Registry
from edgeward_wire.enrolment import BrokerAddress
from sim.pki import Authority, key_pem, new_key

DEVICE = "edge-01a"

PATIENT = Patience(connect_s=60, read_s=60, window_s=60.0, rate=64)
"""Bears a machine that is busy with other things."""

HASTY = Patience(connect_s=60, read_s=60, window_s=1.0, rate=64)
"""Leaves a server that drips after a second: for tests of just that, which need not wait."""


def write_identity(
    state: Path,
    servers: Authority,
    devices: Authority,
    *,
    url: str = "https://127.0.0.1:1",
    root: bytes = b"{}",
    device: str = DEVICE,
    broker_port: int = 8883,
) -> Identity:
    """An enrolled device's files, without the enrolment."""
    directory = state / "identity"
    directory.mkdir(parents=True)
    key = new_key()
    (directory / "key.pem").write_bytes(key_pem(key))
    (directory / "key.pem").chmod(0o600)
    certificate = devices.issue(device, key.public_key(), server=False) + devices.pem
    (directory / "certificate.pem").write_text(certificate)
    (directory / "server-ca.pem").write_text(servers.pem)
    (directory / "root.json").write_bytes(root)
    known = Enrolment(
        url=url,
        device=device,
        fleet="lab",
        broker=BrokerAddress(host="127.0.0.1", port=broker_port),
        issued_at=time.time(),
    )
    (directory / "enrolment.json").write_bytes(known.to_bytes())
    return Identity.load(state)


@dataclass
class Device:
    """A device's view of the registry, with a clock that tests turn."""

    identity: Identity
    http: Http
    state: Path
    now: float
    floors: Floors = field(init=False)
    registry: Registry = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Only what is on disk survives."""
        self.floors = Floors(self.state / "floors.json")
        self.registry = Registry(self.identity, self.http, self.state, self.floors, lambda: self.now)
