"""Our certificates under real TLS, with Python's strictest verification."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from edgeward_cloud.pki import Pki, TlsFiles, csr_public_key_pem, new_csr
from edgeward_wire.errors import Rejected

NAMES = ["127.0.0.1", "localhost", "cloud.example"]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.create(tmp_path_factory.mktemp("pki"), NAMES)


def leaf(pem: str | bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(pem.encode() if isinstance(pem, str) else pem)[0]


def common_name(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def client_files(pki: Pki, directory: Path, device: str = "edge-01") -> TlsFiles:
    key, csr = new_csr("whatever")
    files = TlsFiles(directory / f"{device}.pem", directory / f"{device}.key")
    files.certificate.write_text(pki.issue_device_certificate(csr, device, 365).certificate_pem)
    files.key.write_text(key)
    return files


def shake_hands(
    pki: Pki, client: TlsFiles | None, name: str = "localhost", anchor: Path | None = None
) -> str:
    """A mutual TLS handshake as the broker and a device do it; returns whom the server saw."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(pki.device_ca))
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_STRICT
    server.load_cert_chain(pki.broker.certificate, pki.broker.key)
    context = ssl.create_default_context(cafile=str(anchor or pki.server_ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    ours, theirs = socket.socketpair()
    seen: list[str] = []

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as stream:
                subject = stream.getpeercert()["subject"]
                seen.append(subject[0][0][1])
                stream.send(b"x")
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with context.wrap_socket(ours, server_hostname=name) as stream:
            if stream.recv(1) != b"x":
                raise ssl.SSLError("closed")
    finally:
        ours.close()
        thread.join(60)
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_device_and_broker_prove_themselves_to_each_other(pki: Pki, tmp_path: Path, name: str) -> None:
    assert shake_hands(pki, client_files(pki, tmp_path), name) == "edge-01"
    assert shake_hands(pki, pki.cloud_client, name) == "_cloud"


def test_nobody_gets_in_without_a_certificate_of_the_device_ca(pki: Pki, tmp_path: Path) -> None:
    other = Pki.create(tmp_path / "other", NAMES)
    for wrong in (None, client_files(other, tmp_path), pki.server):
        with pytest.raises((ssl.SSLError, OSError)):
            shake_hands(pki, wrong)


def test_a_client_certificate_makes_no_server(pki: Pki, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError):
        shake_hands(pki, pki.cloud_client, anchor=pki.device_ca)
    with pytest.raises(ssl.SSLError):
        shake_hands(pki, pki.cloud_client, name="other.example")


def test_the_cn_is_ours_and_the_csr_is_only_a_key(pki: Pki) -> None:
    _, csr = new_csr("_cloud")
    issued = pki.issue_device_certificate(csr, "edge-01", 365)
    certificate = leaf(issued.certificate_pem)
    assert common_name(certificate) == "edge-01" == issued.subject
    assert f"{certificate.serial_number:x}" == issued.serial
    assert issued.not_after == certificate.not_valid_after_utc.timestamp()
    assert len(x509.load_pem_x509_certificates(issued.certificate_pem.encode())) == 2
    public = certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert csr_public_key_pem(csr).encode() == public
    viewer = leaf(pki.issue_viewer_certificate(csr, "grafana", 30).certificate_pem)
    assert common_name(viewer) == "_viewer-grafana"


def test_lives(pki: Pki) -> None:
    now = time.time()
    _, csr = new_csr()
    certificate = leaf(pki.issue_device_certificate(csr, "edge-01", 365, now=now).certificate_pem)
    assert certificate.not_valid_before_utc == datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert certificate.not_valid_after_utc.timestamp() == int(now) + 365 * 86_400
    for path in (pki.server_ca, pki.device_ca, pki.server.certificate, pki.broker.certificate):
        certificate = leaf(path.read_bytes())
        assert certificate.not_valid_before_utc.timestamp() == 0
        assert certificate.not_valid_after_utc > datetime.now(timezone.utc) + timedelta(days=3600)
    late = leaf(pki.issue_device_certificate(csr, "edge-01", 365_000, now=now).certificate_pem)
    assert late.not_valid_after_utc == leaf(pki.device_ca.read_bytes()).not_valid_after_utc


def test_the_authorities_are_two_and_sign_no_others(pki: Pki) -> None:
    assert pki.server_ca.read_bytes() != pki.device_ca.read_bytes()
    for path in (pki.server_ca, pki.device_ca):
        extensions = leaf(path.read_bytes()).extensions
        basic = extensions.get_extension_for_class(x509.BasicConstraints)
        assert basic.critical
        assert basic.value == x509.BasicConstraints(ca=True, path_length=0)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
        assert path.with_suffix(".key").stat().st_mode & 0o777 == 0o600


def test_the_pin_is_the_digest_of_the_der(pki: Pki) -> None:
    assert pki.server_ca_sha256 == leaf(pki.server_ca_pem).fingerprint(hashes.SHA256()).hex()


def test_the_crl_lists_the_revoked_and_does_not_expire_first(pki: Pki) -> None:
    _, csr = new_csr()
    serial = pki.issue_device_certificate(csr, "edge-01", 1).serial
    pki.write_crl([serial, serial])
    crl = x509.load_pem_x509_crl(pki.crl.read_bytes())
    assert [f"{entry.serial_number:x}" for entry in crl] == [serial]
    ca = leaf(pki.device_ca.read_bytes())
    assert crl.next_update_utc == ca.not_valid_after_utc
    assert crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
    pki.write_crl([])
    assert len(x509.load_pem_x509_crl(pki.crl.read_bytes())) == 0


def _csr_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def _forged() -> str:
    _, pem = new_csr("x")
    der = bytearray(x509.load_pem_x509_csr(pem.encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("csr", "says"),
    [
        ("", "not a certificate request"),
        (
            "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
            "not a certificate",
        ),
        ("é", "not a certificate request"),
        ("x" * 20_000, "longer than"),
        (_csr_of(rsa.generate_private_key(65537, 2048)), "not ECDSA P-256"),
        (_csr_of(ec.generate_private_key(ec.SECP384R1())), "not ECDSA P-256"),
        (_forged(), "not signed by its own key"),
    ],
)
def test_what_is_no_request_of_ours_is_refused(pki: Pki, csr: str, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        pki.issue_device_certificate(csr, "edge-01", 1)


def test_a_name_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="neither a host name nor an address"):
        Pki.create(tmp_path, ["bücher.example"])
