"""The commands that change who belongs: fleets, enrolment, admission, viewers' certificates."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Literal

from edgeward_ctl import checked, screen
from edgeward_ctl.client import Client
from edgeward_ctl.deploying import unknown_fleet
from edgeward_ctl.profile import Profile
from edgeward_wire.api import AdmissionChange, TokenCreate, ViewerCertificate
from edgeward_wire.errors import Rejected, Unavailable


def create_fleet(profile: Profile, name: str, as_json: bool) -> None:
    """Make a fleet."""
    with Client(profile) as client:
        fleet = client.create_fleet(checked.device_name(name, "fleet"))
    if as_json:
        screen.print_json(fleet.model_dump(mode="json"))
    else:
        screen.say(f"Fleet {fleet.name} is there. Next: agent-ctl enroll-token --fleet {fleet.name}")


def enroll_token(
    profile: Profile, fleet: str, *, uses: int, ttl_s: float, pending: bool, as_json: bool
) -> None:
    """Make an enrolment string, and say what to type on the device."""
    request = checked.request(
        TokenCreate,
        fleet=checked.device_name(fleet, "fleet"),
        uses=uses,
        ttl_s=ttl_s,
        preauthorised=not pending,
    )
    with Client(profile) as client:
        names = {known.name for known in client.fleets()}
        if fleet not in names:  # nothing is made in silence
            raise unknown_fleet(fleet, names)
        token = client.create_token(request)
    if as_json:
        screen.print_json(token.model_dump(mode="json"))
        return
    devices = "one device" if token.uses == 1 else f"{token.uses} devices"
    left = screen.duration(token.expires_at - time.time())
    screen.say(f"For {devices} of fleet {token.fleet}, within {left}. It is shown once. On the device:\n")
    screen.out().print(
        f"sudo edgeward-agent enroll {token.enrolment}", markup=False, soft_wrap=True, highlight=False
    )
    screen.say("\nThe device takes its host name as its name; --device NAME says another.")
    if pending:
        screen.say("It stays pending until you say: agent-ctl accept DEVICE")


def admit(profile: Profile, device: str, admission: Literal["accepted", "rejected"], as_json: bool) -> None:
    """Let a device in, or keep it out."""
    with Client(profile) as client:
        changed = client.admit(checked.device_name(device), AdmissionChange(admission=admission))
    if as_json:
        screen.print_json(changed.model_dump(mode="json", by_alias=True))
    else:
        screen.say(f"{changed.id} of fleet {changed.fleet} is {changed.admission}.")
        if changed.certificate_revoked and admission == "accepted":
            screen.say(
                "Its certificate was revoked when it was rejected. A running agent fetches a new one within"
                f" some minutes; else enrol it again: agent-ctl enroll-token --fleet {changed.fleet}"
            )


def viewer_certificate(profile: Profile, name: str, out: Path, as_json: bool) -> None:
    """A client certificate for a read-only dashboard; its private key is made here and stays here."""
    from edgeward_ctl.csr import new_key_and_csr

    checked.device_name(name, "viewer")
    key_pem, csr_pem = new_key_and_csr(f"_viewer-{name}")
    files = {part: out / part for part in ("key.pem", "certificate.pem", "server-ca.pem")}
    there = [str(path) for path in files.values() if path.exists()]
    if there:
        raise Rejected(f"{there[0]} is there already.", "Nothing is overwritten: name another --out.")
    _check_writable(out)  # a certificate that was issued and could not be kept would count all the same
    with Client(profile) as client:
        issued = client.viewer_certificate(checked.request(ViewerCertificate, name=name, csr_pem=csr_pem))
    try:
        _write(files["key.pem"], key_pem, 0o600)
        _write(files["certificate.pem"], issued.certificate_pem, 0o644)
        _write(files["server-ca.pem"], issued.server_ca_pem, 0o644)
    except OSError as error:
        raise Unavailable(f"{error.filename or out} cannot be written: {error.strerror}.") from error
    command = (
        f"mosquitto_sub -V mqttv5 -h {issued.host} -p {issued.port} -i {issued.username}"
        f" --cafile {files['server-ca.pem']} --cert {files['certificate.pem']} --key {files['key.pem']}"
        " -t 'edgeward/v1/+/up/metrics' -v"
    )
    if as_json:
        screen.print_json(
            {
                "username": issued.username,
                "host": issued.host,
                "port": issued.port,
                "expires_at": issued.expires_at,
                **{part.removesuffix(".pem").replace("-", "_"): str(path) for part, path in files.items()},
                "command": command,
            }
        )
        return
    screen.say(f"{issued.username} may read all topics of edgeward/v1. For example:\n")
    screen.out().print(command, markup=False, soft_wrap=True, highlight=False)


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise Rejected(
            f"{out} cannot be written: {error.strerror}.", "Name a directory of yours with --out."
        ) from error


def _write(path: Path, text: str, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as stream:
        stream.write(text)
