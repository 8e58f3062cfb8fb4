"""The registry thread: when it asks for a new certificate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward_agent import lookout as module
from edgeward_agent.floors import Floors
from edgeward_agent.http import Http
from edgeward_agent.identity import Identity
from edgeward_agent.lookout import Lookout
from edgeward_agent.trust import Registry
from edgeward_wire.api import Problem
from edgeward_wire.document import parse
from edgeward_wire.enrolment import BrokerAddress, EnrolResponse, RenewRequest
from sim.device import DEVICE
from sim.pki import Authority
from sim.server import Reply, Request, Server


class Cloud:
    """Renews, unless the device is rejected."""

    def __init__(self, server: Server, devices: Authority) -> None:
        self.rejected, self.asked = False, 0
        self._devices = devices
        server.handlers["POST", "/v1/device/certificate"] = self._renew

    def _renew(self, request: Request) -> Reply:
        self.asked += 1
        if self.rejected:
            return Reply(403, Problem(title="rejected", status=403).to_bytes())
        certificate = self._devices.issue_for_csr(parse(RenewRequest, request.body).csr_pem, DEVICE)
        response = EnrolResponse(
            admission="accepted",
            device=DEVICE,
            fleet="lab",
            certificate_pem=certificate,
            broker=BrokerAddress(host="127.0.0.1", port=1),
            server_time=time.time(),
        )
        return Reply(200, response.to_bytes())


@pytest.fixture
def cloud(server: Server, device_authority: Authority) -> Cloud:
    return Cloud(server, device_authority)


@pytest.fixture
def lookout(identity: Identity, tmp_path: Path) -> Iterator[Lookout]:
    http = Http.of(identity)
    registry = Registry(identity, http, tmp_path / "state", Floors(tmp_path / "state/floors.json"), time.time)
    yield Lookout(identity, registry, http, None, 60.0)  # type: ignore[arg-type]  # renewing needs no machine
    http.close()


def test_a_certificate_that_the_broker_refuses_is_renewed(
    lookout: Lookout, cloud: Cloud, identity: Identity
) -> None:
    before = identity.certificate_path.read_bytes()
    lookout._renew()
    assert cloud.asked == 0, "it is young, and nobody refuses it"
    lookout.refused()
    lookout._renew()
    assert identity.certificate_path.read_bytes() != before
    lookout.refused()
    lookout._renew()
    assert cloud.asked == 1, "a broker that is starting must not cost a certificate a minute"


def test_a_rejected_device_asks_again_later_and_complains_once(
    lookout: Lookout, cloud: Cloud, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RENEW_AGAIN_S", 0.0)
    cloud.rejected = True
    for _ in range(3):
        lookout.refused()
        lookout._renew()
    assert cloud.asked == 3
    assert len([m for m in caplog.messages if "could not be renewed" in m]) == 1
    cloud.rejected = False
    lookout.refused()
    lookout._renew()
    assert cloud.asked == 4
