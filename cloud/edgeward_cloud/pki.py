"""Certificates: one CA for servers, another for MQTT clients. The only importer of cryptography here.

Invariants: ECDSA P-256 only; a certificate's CN is what the caller says, a CSR's subject is ignored;
the CAs cannot sign other CAs (path length 0); everything is valid from 1970 on, because a device whose
clock has not been set yet must still be able to ask what time it is.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeward_cloud.files import PRIVATE, write_atomic
from edgeward_wire.errors import Rejected

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MAX_CSR = 16_384
CA_DAYS = 30 * 365
SERVER_DAYS = 10 * 365
"""Only a machine of ours verifies it, against our own CA; it is replaced with `init`'s directory."""

MAX_HOST = 253
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")

CLOUD = "_cloud"
VIEWER = "_viewer-"
"""Prefixes of MQTT user names that no device can have: a device's id never starts with `_`."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate for someone else's key."""

    subject: str
    certificate_pem: str
    """Leaf first, then the CA."""
    serial: str
    """Hexadecimal; what `Pki.write_crl` takes."""
    not_after: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of a certificate chain and its key."""

    certificate: Path
    key: Path


class Pki:
    """The two authorities in `<dir>/pki`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server_ca = directory / "server-ca.pem"
        self.device_ca = directory / "device-ca.pem"
        self.crl = directory / "crl.pem"
        self.server = TlsFiles(directory / "server.pem", directory / "server.key")
        self.broker = TlsFiles(directory / "broker.pem", directory / "broker.key")
        self.cloud_client = TlsFiles(directory / "cloud-client.pem", directory / "cloud-client.key")

    @staticmethod
    def create(directory: Path, names: Sequence[str], *, now: float | None = None) -> Pki:
        """Make both CAs, the server's and the broker's certificate (SANs `names`), and `_cloud`'s."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        pki = Pki(directory)
        pki._new_ca("Edgeward server CA", pki.server_ca)
        pki._new_ca("Edgeward device CA", pki.device_ca)
        pki.renew_server_certificates(names, now=now)
        pki.renew_cloud_client(now=now)
        pki.write_crl((), now=now)
        return pki

    def renew_server_certificates(self, names: Sequence[str], *, now: float | None = None) -> None:
        """New keys and certificates for the HTTPS server and for the broker."""
        for files in (self.server, self.broker):
            key = ec.generate_private_key(ec.SECP256R1())
            sans = [_san(name) for name in names]
            leaf = self._sign(self.server_ca, key.public_key(), names[0], SERVER_DAYS, sans=sans, now=now)
            self._save(files, leaf, key, self.server_ca)

    def renew_cloud_client(self, *, now: float | None = None) -> None:
        """A new key and certificate for the cloud's own MQTT client."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(self.device_ca, key.public_key(), CLOUD, SERVER_DAYS, now=now)
        self._save(self.cloud_client, leaf, key, self.device_ca)

    def issue_device_certificate(
        self, csr_pem: str, device: str, days: float, *, now: float | None = None
    ) -> Issued:
        """A client certificate with CN `device`, valid until `days` from now.

        Raises:
            Rejected: the CSR is not one, is not signed by its own key, or its key is not P-256.
        """
        leaf = self._sign(self.device_ca, _public_key(csr_pem), device, days, now=now)
        return Issued(
            subject=device,
            certificate_pem=_pem(leaf).decode() + self.device_ca.read_text(),
            serial=f"{leaf.serial_number:x}",
            not_after=leaf.not_valid_after_utc.timestamp(),
        )

    def issue_viewer_certificate(
        self, csr_pem: str, name: str, days: float, *, now: float | None = None
    ) -> Issued:
        """A client certificate `_viewer-<name>` for a read-only dashboard. Raises as for devices."""
        return self.issue_device_certificate(csr_pem, VIEWER + name, days, now=now)

    def write_crl(self, serials: Iterable[str], *, now: float | None = None) -> None:
        """Write the list of all revoked serials. The broker reads it on `Broker.apply`.

        It never expires before the CA does: a broker refuses every client once its CRL has.
        """
        ca, key = self._load_ca(self.device_ca)
        moment = _moment(now)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(ca.subject)
            .last_update(EPOCH)
            .next_update(ca.not_valid_after_utc)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
            )
            .add_extension(x509.CRLNumber(int(moment.timestamp())), critical=False)
        )
        for serial in sorted(set(serials)):
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(moment)
            builder = builder.add_revoked_certificate(entry.build())
        crl = builder.sign(key, hashes.SHA256())
        write_atomic(self.crl, crl.public_bytes(Encoding.PEM))

    @property
    def server_ca_pem(self) -> str:
        """What GET /v1/ca.pem answers."""
        return self.server_ca.read_text()

    @property
    def server_ca_sha256(self) -> str:
        """The pin in an enrolment string: sha256 of the server CA's DER, in hexadecimal."""
        ca = x509.load_pem_x509_certificate(self.server_ca.read_bytes())
        return hashlib.sha256(ca.public_bytes(Encoding.DER)).hexdigest()

    def _new_ca(self, name: str, path: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        public = key.public_key()
        certificate = (
            _builder(subject, subject, public, datetime.now(timezone.utc) + timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_atomic(path.with_suffix(".key"), _private_pem(key), mode=PRIVATE)
        write_atomic(path, _pem(certificate))

    def _load_ca(self, path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = load_pem_private_key(path.with_suffix(".key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise Rejected(f"{path.with_suffix('.key')} is not an ECDSA key.", "Restore it from a backup.")
        return x509.load_pem_x509_certificate(path.read_bytes()), key

    def _sign(
        self,
        ca_path: Path,
        public: ec.EllipticCurvePublicKey,
        name: str,
        days: float,
        *,
        sans: Sequence[x509.GeneralName] = (),
        now: float | None = None,
    ) -> x509.Certificate:
        """A leaf: for a server where there are SANs, else for a client."""
        ca, ca_key = self._load_ca(ca_path)
        until = min(_moment(now) + timedelta(days=days), ca.not_valid_after_utc)
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if sans else ExtendedKeyUsageOID.CLIENT_AUTH
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        builder = (
            _builder(subject, ca.subject, public, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
            )
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        return builder.sign(ca_key, hashes.SHA256())

    def _save(
        self, files: TlsFiles, leaf: x509.Certificate, key: ec.EllipticCurvePrivateKey, ca: Path
    ) -> None:
        write_atomic(files.key, _private_pem(key), mode=PRIVATE)
        write_atomic(files.certificate, _pem(leaf) + ca.read_bytes())


def csr_public_key_pem(csr_pem: str) -> str:
    """The public key of a CSR (PEM): who asks, whatever the CSR says of itself. Raises Rejected."""
    return _public_key(csr_pem).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def check_names(names: Iterable[str]) -> None:
    """Raise Rejected for what cannot stand in a server certificate."""
    for name in names:
        _san(name)


def new_csr(name: str = "") -> tuple[str, str]:
    """A fresh P-256 key and a CSR for it (both PEM): for tools that enrol on a dashboard's behalf."""
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else []
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    signed = csr.sign(key, hashes.SHA256())
    return _private_pem(key).decode(), signed.public_bytes(Encoding.PEM).decode()


def _public_key(csr_pem: str) -> ec.EllipticCurvePublicKey:
    if len(csr_pem) > MAX_CSR:
        raise Rejected(f"The certificate request is longer than {MAX_CSR} bytes.")
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        if not csr.is_signature_valid:
            raise Rejected("The certificate request is not signed by its own key.")
        public = csr.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise Rejected("This is not a certificate request (PEM).", "Make one with a P-256 key.") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise Rejected("The certificate request's key is not ECDSA P-256.", "Make one with a P-256 key.")
    return public


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(EPOCH)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > MAX_HOST or not _HOST.fullmatch(name):
        raise Rejected(
            f"{name[:80]!r} is neither a host name nor an address.", "Use ASCII: xn--… if need be."
        )
    return x509.DNSName(name)


def _moment(now: float | None) -> datetime:
    seconds = time.time() if now is None else now
    return datetime.fromtimestamp(int(seconds), timezone.utc)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
