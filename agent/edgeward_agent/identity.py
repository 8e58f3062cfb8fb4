"""Who this device is: its key, its certificate, and whom it trusts. Only importer of cryptography and jwt.

Invariants: the private key is made on the device, is never sent, and its file is 0600. `enrolment.json`
is written last, so its presence means that the identity is whole. Issued certificates are backdated to
1970, so their age counts from `issued_at`, the server's time of issue.
"""

from __future__ import annotations

import secrets
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeward_agent.files import replace_file
from edgeward_wire.document import Open, parse
from edgeward_wire.enrolment import BrokerAddress
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import DeviceId, FleetName, ShortText, UnixTime

if TYPE_CHECKING:  # cryptography and jwt cost 9 MB: imported where they are first needed
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

TOKEN_LIFE_S = 240
"""A JWT's life in seconds; the cloud accepts at most 300."""

_AUDIENCE = "edgeward"
_ENROL_STEP = "Run `edgeward-agent enroll` with a string from `agent-ctl enroll-token`."


class Enrolment(Open):
    """`enrolment.json`."""

    url: ShortText
    device: DeviceId
    fleet: FleetName
    broker: BrokerAddress
    issued_at: UnixTime


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
    server_ca: str
    """PEM of the only anchor for servers."""

    @classmethod
    def load(cls, state: Path) -> Identity:
        """Read `<state>/identity`.

        Raises:
            Rejected: it is absent or damaged; the next step is to enrol.
        """
        directory = state / "identity"
        try:
            known = parse(Enrolment, (directory / "enrolment.json").read_bytes(), name="enrolment.json")
            certificate = (directory / "certificate.pem").read_bytes()
            server_ca = (directory / "server-ca.pem").read_text()
            missing = [n for n in ("key.pem", "root.json") if not (directory / n).is_file()]
        except FileNotFoundError as error:
            raise Rejected("This device is not enrolled.", _ENROL_STEP) from error
        except OSError as error:
            raise Rejected(
                f"{directory} cannot be read: {error.strerror}.", "Run it as its owner."
            ) from error
        if missing:
            raise Rejected(f"{directory} lacks {', '.join(missing)}.", _ENROL_STEP)
        return cls(
            directory=directory,
            device=known.device,
            fleet=known.fleet,
            url=known.url,
            broker=known.broker,
            issued_at=known.issued_at,
            expires_at=_expiry(certificate),
            server_ca=server_ca,
        )

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
        import jwt

        claims = {
            "iss": self.device,
            "aud": _AUDIENCE,
            "iat": int(now),
            "exp": int(now) + TOKEN_LIFE_S,
            "jti": secrets.token_hex(16),
        }
        return jwt.encode(claims, _load_key(self.key_path), algorithm="ES256", headers={"kid": self.device})

    def csr_pem(self) -> str:
        """A certificate request by this device's key."""
        return request_certificate(self.key_path, self.device)

    def renewal_due(self, now: float) -> bool:
        """Whether half of the certificate's life is over at `now` (Unix seconds)."""
        return now >= self.issued_at + (self.expires_at - self.issued_at) / 2

    def client_context(self) -> ssl.SSLContext:
        """TLS with this device's certificate, read afresh, so that a renewed one is used.

        Raises:
            Rejected: the files on disk cannot be used.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self.server_ca)
        try:
            context.load_cert_chain(self.certificate_path, self.key_path)
        except OSError as error:  # ssl.SSLError is one
            raise Rejected(
                f"The certificate in {self.directory} cannot be used: {error}.", _ENROL_STEP
            ) from error
        return context


def ensure_key(path: Path) -> None:
    """Make an ECDSA P-256 key at `path` (0600) unless one is there.

    Raises:
        Rejected: what is there is not such a key.
        Unavailable: the disk does not take it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if path.exists():
        _load_key(path)
        return
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        replace_file(path, pem, mode=0o600)
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}.") from error


def request_certificate(key_path: Path, device: str) -> str:
    """A CSR as PEM. The server sets the subject itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name)
    return (
        request.sign(_load_key(key_path), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
    )


def check_certificate(pem: str, key_path: Path, device: str) -> None:
    """Raises Rejected unless this is a certificate for `device` over the key at `key_path`."""
    from cryptography import x509

    try:
        leaf = x509.load_pem_x509_certificate(pem.encode())
        names = [a.value for a in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        same_key = leaf.public_key() == _load_key(key_path).public_key()
    except (ValueError, TypeError) as error:
        raise Rejected(f"The cloud's answer holds no certificate that can be read: {error}.") from error
    if names != [device] or not same_key:
        raise Rejected(
            f"The cloud's certificate is for {names}, and not for {device} with this device's key."
        )


def _expiry(pem: bytes) -> float:
    from cryptography import x509

    try:
        leaf = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise Rejected(f"certificate.pem is damaged: {error}.", _ENROL_STEP) from error
    return leaf.not_valid_after_utc.timestamp()


def _load_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise Rejected(f"{path} is not a private key that can be read: {error}.", _ENROL_STEP) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Rejected(f"{path} is not an ECDSA P-256 key.", _ENROL_STEP)
    return key
