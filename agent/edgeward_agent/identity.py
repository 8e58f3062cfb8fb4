"""Who this device is: its key, its certificate, and whom it trusts. Only importer of cryptography and jwt.

Invariants: the private key is made on the device, is never sent, and its file is 0600. `enrolment.json`
is written last, so its presence means that the identity is whole. Issued certificates are backdated to
1970, so their age counts from `issued_at`, the server's time of issue.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeward_wire.enrolment import BrokerAddress


@dataclass(frozen=True, slots=True)
class Identity:
    """An enrolled device. All files are below `directory`, which is `<state>/identity`."""

    directory: Path
    device: str
    fleet: str
    url: str
    """Base address of the cloud, without a trailing slash."""
    broker: BrokerAddress
    issued_at: float
    """Unix seconds, the server's clock."""
    expires_at: float
    """Unix seconds, when the client certificate ends."""

    @classmethod
    def load(cls, state: Path) -> Identity:
        """Read `<state>/identity`.

        Raises:
            Rejected: it is absent or damaged; the next step is to enrol.
        """
        raise NotImplementedError

    @property
    def key_path(self) -> Path:
        """Private key, PEM, 0600."""
        return self.directory / "key.pem"

    @property
    def certificate_path(self) -> Path:
        """Client certificate, PEM: leaf first, then the device CA."""
        return self.directory / "certificate.pem"

    @property
    def server_ca_path(self) -> Path:
        """The only anchor for servers, PEM."""
        return self.directory / "server-ca.pem"

    @property
    def root(self) -> bytes:
        """The pinned TUF root 1."""
        return (self.directory / "root.json").read_bytes()

    def token(self, now: float) -> str:
        """A JWT for one request; `now` in Unix seconds becomes `iat`."""
        raise NotImplementedError

    def csr_pem(self) -> str:
        """A certificate request by this device's key."""
        raise NotImplementedError

    def renewal_due(self, now: float) -> bool:
        """Whether half of the certificate's life is over at `now` (Unix seconds)."""
        return now >= self.issued_at + (self.expires_at - self.issued_at) / 2
