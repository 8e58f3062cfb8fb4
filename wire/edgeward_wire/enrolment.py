"""Enrolment: the one string that `enroll-token` prints, and what follows from it.

Order: pin -> server CA -> root 1 -> CSR -> admission -> certificate. The string carries everything
that a device must know to trust the cloud; the network is trusted for nothing.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open, Signed, parse
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import DeviceId, FleetName, Sha256, ShortText, UnixTime

PREFIX = "edgeward1."
MAX_STRING = 4096
Admission = Literal["pending", "accepted", "rejected"]


class EnrolmentString(Signed):
    """URL of the cloud, pin of its CA (sha256 of the DER), sha256 of root 1, and the token."""

    url: ShortText = Field(pattern=r"^https://[^\s]+$")
    ca_sha256: Sha256
    root_sha256: Sha256
    token: ShortText

    def encode(self) -> str:
        """One word that survives copy and paste."""
        return PREFIX + base64.urlsafe_b64encode(self.to_bytes()).decode().rstrip("=")

    @staticmethod
    def decode(text: str) -> EnrolmentString:
        """Raises Rejected when it is not such a string, or was cut."""
        text = text.strip()
        hint = "Copy the whole line that `agent-ctl enroll-token` printed."
        if not text.startswith(PREFIX) or len(text) > MAX_STRING:
            raise Rejected(f"Not an enrolment string: it must start with {PREFIX!r}.", hint)
        body = text.removeprefix(PREFIX)
        try:
            raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        except (binascii.Error, ValueError) as error:
            raise Rejected("The enrolment string is damaged.", hint) from error
        try:
            return parse(EnrolmentString, raw, name="The enrolment string")
        except Rejected as error:
            raise Rejected("The enrolment string is damaged.", hint) from error


class EnrolRequest(Open):
    """POST /v1/enroll. The server sets the certificate's CN; the CSR's subject is ignored."""

    device: DeviceId
    token: ShortText
    csr_pem: str = Field(max_length=16_384)


class BrokerAddress(Open):
    """Where MQTT is. Its server certificate is checked against `ca_pem` of the answer."""

    host: ShortText
    port: int = Field(ge=1, le=65535)


class EnrolResponse(Open):
    """`pending`: ask again with the same request after `retry_after_s`."""

    admission: Admission
    device: DeviceId
    fleet: FleetName | None = None
    retry_after_s: float = Field(default=10, ge=1, le=3600)
    certificate_pem: str | None = Field(default=None, max_length=65_536)
    """Leaf first, then the device CA."""
    broker: BrokerAddress | None = None
    server_time: UnixTime = 0


class RenewRequest(Open):
    """POST /v1/device/certificate with the device's JWT: a new certificate for the same id."""

    csr_pem: str = Field(max_length=16_384)
