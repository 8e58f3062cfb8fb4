from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509

from edgeward_agent.enrol import enrol, renew
from edgeward_agent.http import Http
from edgeward_agent.identity import Identity
from edgeward_wire.api import Problem
from edgeward_wire.document import parse
from edgeward_wire.enrolment import (
    Admission,
    BrokerAddress,
    EnrolmentString,
    EnrolRequest,
    EnrolResponse,
    RenewRequest,
)
from edgeward_wire.errors import Rejected, Unavailable
from sim.device import DEVICE
from sim.pki import Authority
from sim.repository import Repository
from sim.server import Fault, Reply, Request, Server


@dataclass
class Cloud:
    """The public side of a cloud, as far as enrolment goes."""

    server: Server
    devices: Authority
    root: bytes
    pin: str
    admissions: list[Admission] = field(default_factory=lambda: ["accepted"])
    """The last one stays."""
    problem: Problem | None = None
    changes: dict[str, object] = field(default_factory=dict)
    now: float = field(default_factory=time.time)

    def string(self, **changes: str) -> str:
        told = EnrolmentString(
            url=self.server.url,
            ca_sha256=self.pin,
            root_sha256=hashlib.sha256(self.root).hexdigest(),
            token="secret",
        )
        return told.model_copy(update=changes).encode()

    def enroll(self, request: Request) -> Reply:
        asked = parse(EnrolRequest, request.body)
        assert asked.token == "secret"
        if self.problem:
            return Reply(self.problem.status, self.problem.to_bytes())
        admission = self.admissions.pop(0) if len(self.admissions) > 1 else self.admissions[0]
        return self.answer(asked.device, asked.csr_pem, admission)

    def renew(self, request: Request) -> Reply:
        assert request.headers["Authorization"].startswith("Bearer ey")
        return self.answer(DEVICE, parse(RenewRequest, request.body).csr_pem, self.admissions[0])

    def answer(self, device: str, csr: str, admission: Admission) -> Reply:
        response = EnrolResponse(admission=admission, device=device, retry_after_s=3, server_time=self.now)
        if admission == "accepted":
            response = response.model_copy(
                update={
                    "fleet": "lab",
                    "certificate_pem": self.devices.issue_for_csr(csr, device),
                    "broker": BrokerAddress(host="127.0.0.1", port=8883),
                    **self.changes,
                }
            )
        return Reply(202 if admission == "pending" else 200, response.to_bytes())


@pytest.fixture
def cloud(
    server: Server, repository: Repository, server_authority: Authority, device_authority: Authority
) -> Cloud:
    pin = hashlib.sha256(server_authority.der).hexdigest()
    cloud = Cloud(server, device_authority, repository.root_bytes, pin)
    server.files["/v1/ca.pem"] = server_authority.pem.encode()
    server.handlers["POST", "/v1/enroll"] = cloud.enroll
    server.handlers["POST", "/v1/device/certificate"] = cloud.renew
    return cloud


Enrol = Callable[..., Identity]


@dataclass
class Person:
    """Who runs `enroll`: hears what is said, and waits."""

    said: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)


@pytest.fixture
def person() -> Person:
    return Person()


@pytest.fixture
def do(cloud: Cloud, person: Person, tmp_path: Path) -> Enrol:
    def do(string: str | None = None, device: str = DEVICE) -> Identity:
        told = cloud.string() if string is None else string
        return enrol(told, device, tmp_path / "state", wait=person.waited.append, say=person.said.append)

    return do


def test_a_device_enrols(do: Enrol, cloud: Cloud, tmp_path: Path) -> None:
    identity = do()

    assert identity == Identity.load(tmp_path / "state")
    assert (identity.device, identity.fleet, identity.url) == (DEVICE, "lab", cloud.server.url)
    assert identity.broker == BrokerAddress(host="127.0.0.1", port=8883)
    assert identity.root == cloud.root
    assert identity.issued_at == cloud.now
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE}"
    assert stat.S_IMODE(identity.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(identity.directory.stat().st_mode) == 0o700
    identity.client_context()


def test_what_enroll_token_prints_is_enough(cloud: Cloud) -> None:
    """`sudo edgeward-agent enroll STRING`, on a machine where systemd runs the agent as another user."""
    someone = 65534 if os.geteuid() == 0 else os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "state").mkdir(mode=0o700)
        os.chown(home / "state", someone, -1)
        if not _can_run_python(someone):
            pytest.skip("this environment is for one user alone")
        places = ["--state", str(home / "state"), "--config", str(home / "agent.toml")]
        command = [sys.executable, "-m", "edgeward_agent.cli", "enroll", cloud.string(), *places]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        identity = Identity.load(home / "state")
        assert identity.device == re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower())
        owners = {path.stat().st_uid for path in (home / "state").rglob("*")}
        assert owners == {someone}


def test_a_state_directory_of_somebody_else_is_named_and_no_traceback(cloud: Cloud) -> None:
    """The documented install, and `enroll` without sudo."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    nobody = 65534
    if not _can_run_python(nobody):
        pytest.skip("this environment is for one user alone")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "state").mkdir(mode=0o700)
        command = [sys.executable, "-m", "edgeward_agent.cli", "enroll", cloud.string(), "--device", DEVICE]
        command += ["--state", str(home / "state")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, user=nobody)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.endswith("enrolment.json cannot be looked at: Permission denied.")
    assert second == "next: Run it as the agent's user, e.g. with sudo."


def _can_run_python(user: int) -> bool:
    who = {"user": user} if os.geteuid() == 0 else {}
    code = "import edgeward_agent, cryptography"
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, **who)
    except PermissionError:
        return False
    return done.returncode == 0


def test_doing_it_again_keeps_the_key(do: Enrol) -> None:
    first = do().key_path.read_bytes()
    assert do().key_path.read_bytes() == first


def test_a_wrong_pin_is_refused_before_anything_is_stored(do: Enrol, cloud: Cloud, tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="is not the cloud that the string names") as caught:
        do(cloud.string(ca_sha256="0" * 64))
    assert "Someone may be in between" in caught.value.next_step
    assert not (tmp_path / "state").exists()
    assert [r.path for r in cloud.server.requests] == ["/v1/ca.pem"], "the token was not shown to it"


def test_someone_in_between_with_the_right_ca_file_is_not_trusted(
    do: Enrol, cloud: Cloud, tmp_path: Path
) -> None:
    """The file passes the pin, but the server's own certificate is another CA's."""
    theirs = Authority.make("Someone in between")
    directory = tmp_path / "theirs"
    directory.mkdir()
    proxy = Server(theirs, directory)
    proxy.files.update(cloud.server.files)
    with pytest.raises(Unavailable, match="does not trust"):
        do(cloud.string(url=proxy.url))
    assert all(r.method == "GET" for r in proxy.requests)
    proxy.close()


def test_a_wrong_root_is_refused(do: Enrol, cloud: Cloud) -> None:
    with pytest.raises(Rejected, match="root 1 is not the one"):
        do(cloud.string(root_sha256="0" * 64))
    assert not any(r.method == "POST" for r in cloud.server.requests)


NO_CERTIFICATE = b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----"


@pytest.mark.parametrize("rubbish", [b"", b"<html>", NO_CERTIFICATE])
def test_a_ca_that_is_none_is_refused(do: Enrol, cloud: Cloud, rubbish: bytes) -> None:
    cloud.server.files["/v1/ca.pem"] = rubbish
    with pytest.raises(Rejected):
        do()


@pytest.mark.parametrize("path", ["/v1/ca.pem", "/tuf/metadata/1.root.json"])
def test_an_address_without_a_cloud_is_named(do: Enrol, cloud: Cloud, path: str) -> None:
    cloud.server.faults[path] = Fault(status=404)
    with pytest.raises(Unavailable, match="404"):
        do()


@pytest.mark.parametrize(
    ("status", "text"),
    [(403, "The token has expired."), (403, "The token is used up."), (409, "edge-01a is taken.")],
)
def test_a_refusal_comes_in_the_clouds_words(do: Enrol, cloud: Cloud, status: int, text: str) -> None:
    cloud.problem = Problem(title="No", status=status, detail=text, next_step="Make another.")
    with pytest.raises(Rejected, match=text) as caught:
        do()
    assert caught.value.next_step == "Make another."


def test_after_a_refusal_a_new_string_goes_on_with_the_same_key(
    do: Enrol, cloud: Cloud, tmp_path: Path
) -> None:
    cloud.problem = Problem(title="No", status=403, detail="used")
    with pytest.raises(Rejected):
        do()
    key = (tmp_path / "state/identity/key.pem").read_bytes()
    cloud.problem = None
    assert do().key_path.read_bytes() == key


def test_a_pending_device_waits_and_says_so(do: Enrol, cloud: Cloud, person: Person) -> None:
    cloud.admissions = ["pending", "pending", "accepted"]
    assert do().device == DEVICE
    assert person.waited == [3, 3]
    assert [s for s in person.said if "Waiting for an operator" in s]


def test_a_cloud_that_goes_away_while_one_waits_is_waited_for(
    do: Enrol, cloud: Cloud, person: Person
) -> None:
    cloud.admissions = ["pending", "accepted"]
    person.waited = Waits(lambda: cloud.server.faults.update({"/v1/enroll": Fault(status=503, times=1)}))
    assert do().device == DEVICE
    assert [s for s in person.said if "Still waiting" in s]


class Waits(list[float]):
    """Something happens at the first wait."""

    def __init__(self, then: Callable[[], None]) -> None:
        super().__init__()
        self._then = then

    def append(self, seconds: float) -> None:
        if not self:
            self._then()
        super().append(seconds)


def test_an_operator_may_reject(do: Enrol, cloud: Cloud) -> None:
    cloud.admissions = ["pending", "rejected"]
    with pytest.raises(Rejected, match="rejected this device"):
        do()


@pytest.mark.parametrize(
    "changes",
    [{"certificate_pem": None}, {"broker": None}, {"fleet": None}, {"device": "other"}],
)
def test_an_answer_that_lacks_something_is_refused(
    do: Enrol, cloud: Cloud, tmp_path: Path, changes: dict[str, object]
) -> None:
    cloud.changes = changes
    with pytest.raises(Rejected):
        do()
    with pytest.raises(Rejected, match="not enrolled"):
        Identity.load(tmp_path / "state")


def test_a_certificate_for_someone_else_is_refused(
    do: Enrol, cloud: Cloud, device_authority: Authority, server_authority: Authority
) -> None:
    cloud.changes = {"certificate_pem": server_authority.pem}
    with pytest.raises(Rejected, match="not for edge-01a"):
        do()


def test_a_state_directory_belongs_to_one_device(do: Enrol) -> None:
    do()
    with pytest.raises(Rejected, match="already belongs to the device edge-01a") as caught:
        do(device="edge-02")
    assert "another state directory" in caught.value.next_step


@pytest.mark.parametrize("device", ["", "Edge", "-a", "a" * 64, "a/b", "a\n", "ä"])
def test_a_bad_device_id_is_refused(do: Enrol, device: str) -> None:
    with pytest.raises(Rejected, match="not a device id"):
        do(device=device)


@pytest.mark.parametrize("string", ["", "edgeward1.", "edgeward1.!!!", "edgeward1.e30", "nonsense"])
def test_a_damaged_string_is_refused(do: Enrol, string: str) -> None:
    with pytest.raises(Rejected):
        do(string)


def test_a_state_directory_that_cannot_be_made(cloud: Cloud, person: Person, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be made"):
        enrol(cloud.string(), DEVICE, tmp_path / "file", wait=person.waited.append, say=person.said.append)


def test_a_certificate_is_renewed_for_the_same_key(do: Enrol, cloud: Cloud, http: Http) -> None:
    identity = do()
    key = identity.key_path.read_bytes()
    cloud.now += 1000
    newer = renew(identity, http)
    assert newer.issued_at == cloud.now
    assert newer.key_path.read_bytes() == key
    assert json.loads((identity.directory / "enrolment.json").read_bytes())["issued_at"] == cloud.now


@pytest.mark.parametrize("admission", ["rejected", "pending"])
def test_a_device_that_is_no_longer_admitted_is_not_renewed(
    do: Enrol, cloud: Cloud, http: Http, admission: Admission
) -> None:
    identity = do()
    before = identity.certificate_path.read_bytes()
    cloud.admissions = [admission]
    with pytest.raises(Rejected, match=admission):
        renew(identity, http)
    assert identity.certificate_path.read_bytes() == before
