"""Enrolment: pin -> root -> CSR -> admission -> certificate. The network is trusted for nothing.

Invariants: nothing from the server is stored before its pin or its hash has proved it. `enrolment.json` is
written last. Interrupted anywhere, doing it again with the same string goes on with the same key.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from collections.abc import Callable
from pathlib import Path

from edgeward_agent.files import is_there, replace_file
from edgeward_agent.http import Answer, Http, anchored, refusal, unanchored
from edgeward_agent.identity import (
    Enrolment,
    Identity,
    check_certificate,
    ensure_key,
    request_certificate,
)
from edgeward_wire.document import Document, parse
from edgeward_wire.enrolment import EnrolmentString, EnrolRequest, EnrolResponse, RenewRequest
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import DEVICE_PATTERN

_MAX_CA_BYTES = 64 << 10
_MAX_ROOT_BYTES = 512_000
_MAX_ANSWER_BYTES = 256 << 10
_NEW_STRING = "Get a new string with `agent-ctl enroll-token`, over a way that you trust."
_MISSING_STEP = "Check the address, and that the cloud is running there."


def enrol(
    enrolment: str, device: str, state: Path, *, wait: Callable[[float], None], say: Callable[[str], None]
) -> Identity:
    """Make this state directory the device `device` of the cloud that the string names.

    `wait` sleeps for seconds (and may raise to give up), `say` shows one line to a person. Doing it again
    with the same string is harmless: the key stays and the server gives the certificate again.

    Raises:
        Rejected: wrong string, pin, root, token or id; an operator has rejected the device; or this user may
            not look into `state`.
        Unavailable: the cloud cannot be reached, or the disk does not take the files.
    """
    told = EnrolmentString.decode(enrolment)
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise Rejected(
            f"{device!r} is not a device id.",
            "Use a-z, 0-9 and dashes, at most 63, not starting with a dash: `--device edge-01`.",
        )
    url = told.url.rstrip("/")
    directory = state / "identity"
    _refuse_other(state, device, url)

    server_ca = _pinned_ca(url, told.ca_sha256)
    say(f"The cloud at {url} is the one that the string names.")
    http = Http(url, anchored(server_ca))
    try:
        root = _pinned_root(http, told.root_sha256)
        _private_directory(directory)
        ensure_key(directory / "key.pem")
        csr = request_certificate(directory / "key.pem", device)
        request = EnrolRequest(device=device, token=told.token, csr_pem=csr)
        answer = _await_admission(http, request, wait, say)
    finally:
        http.close()
    _store(directory, {"server-ca.pem": server_ca.encode(), "root.json": root})
    return _accept(state, url, device, answer)


def renew(identity: Identity, http: Http) -> Identity:
    """Fetch and store a new certificate for the same key and id. Raises like `enrol`."""
    request = RenewRequest(csr_pem=identity.csr_pem())
    answer = http.post("/v1/device/certificate", request, limit=_MAX_ANSWER_BYTES, token=identity.token)
    doing = "The certificate cannot be renewed"
    response = _response(answer, doing)
    if response.admission != "accepted":
        raise Rejected(
            f"{doing}: this device's admission is {response.admission}.", "Ask the cloud's operator."
        )
    return _accept(identity.directory.parent, identity.url, identity.device, response)


def _refuse_other(state: Path, device: str, url: str) -> None:
    """An enrolled state directory stays what it is."""
    if not is_there(state / "identity" / "enrolment.json"):
        return
    known = Identity.load(state)
    if (known.device, known.url) != (device, url):
        raise Rejected(
            f"{state} already belongs to the device {known.device} of {known.url}.",
            f"Use another state directory, or remove {state / 'identity'} to give that identity up.",
        )


def _pinned_ca(url: str, pin: str) -> str:
    """The server's CA, fetched without trust and proved by its pin; PEM of those very bytes."""
    http = Http(url, unanchored())
    try:
        answer = http.get("/v1/ca.pem", limit=_MAX_CA_BYTES)
    finally:
        http.close()
    if answer.status != 200:
        raise Unavailable(f"{url} does not give its CA certificate (status {answer.status}).", _MISSING_STEP)
    try:
        der = ssl.PEM_cert_to_DER_cert(answer.body.decode("ascii").strip())
    except ValueError as error:
        raise Rejected(f"{url} gives something that is not a certificate.", _MISSING_STEP) from error
    found = hashlib.sha256(der).hexdigest()
    if found != pin:
        raise Rejected(
            f"{url} is not the cloud that the string names: its CA is {found[:16]}…, expected {pin[:16]}….",
            f"Someone may be in between. {_NEW_STRING}",
        )
    return ssl.DER_cert_to_PEM_cert(der)


def _pinned_root(http: Http, expected: str) -> bytes:
    answer = http.get("/tuf/metadata/1.root.json", limit=_MAX_ROOT_BYTES)
    if answer.status != 200:
        raise Unavailable(f"The cloud does not give root 1 (status {answer.status}).", _MISSING_STEP)
    found = hashlib.sha256(answer.body).hexdigest()
    if found != expected:
        raise Rejected(
            f"The cloud's root 1 is not the one that the string names: {found[:16]}…, not {expected[:16]}….",
            _NEW_STRING,
        )
    return answer.body


def _await_admission(
    http: Http, request: Document, wait: Callable[[float], None], say: Callable[[str], None]
) -> EnrolResponse:
    """Ask until an operator has decided. A cloud that goes away in between is waited for, too."""
    doing = "Enrolment is refused"
    response = _response(http.post("/v1/enroll", request, limit=_MAX_ANSWER_BYTES), doing)
    if response.admission == "pending":
        say("Waiting for an operator to accept this device.")
    while response.admission == "pending":
        wait(response.retry_after_s)
        try:
            response = _response(http.post("/v1/enroll", request, limit=_MAX_ANSWER_BYTES), doing)
        except Unavailable as error:
            say(f"Still waiting: {error.what}")
    if response.admission == "rejected":
        raise Rejected("An operator has rejected this device.", "Ask the cloud's operator.")
    return response


def _response(answer: Answer, doing: str) -> EnrolResponse:
    if answer.status not in (200, 202):
        raise refusal(answer, doing)
    return parse(EnrolResponse, answer.body, name="The cloud's answer")


def _accept(state: Path, url: str, device: str, response: EnrolResponse) -> Identity:
    """Check the accepted answer against what this device asked for, and store it."""
    directory = state / "identity"
    if response.device != device or not response.certificate_pem or not response.broker or not response.fleet:
        raise Rejected(
            "The cloud's answer lacks the certificate, the broker or the fleet.", "Update the cloud."
        )
    check_certificate(response.certificate_pem, directory / "key.pem", device)
    known = Enrolment(
        url=url,
        device=device,
        fleet=response.fleet,
        broker=response.broker,
        issued_at=response.server_time,
    )
    _store(
        directory, {"certificate.pem": response.certificate_pem.encode(), "enrolment.json": known.to_bytes()}
    )
    return Identity.load(state)


def _private_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        raise Unavailable(
            f"{directory} cannot be made: {error.strerror}.",
            "Run it as the agent's user, or use `--state DIR`.",
        ) from error


def _store(directory: Path, files: dict[str, bytes]) -> None:
    try:
        for name, data in files.items():
            replace_file(directory / name, data)
    except OSError as error:
        raise Unavailable(f"{directory} cannot be written: {error.strerror}.") from error
