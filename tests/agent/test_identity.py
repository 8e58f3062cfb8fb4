from __future__ import annotations

import stat
import time
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from edgeward_agent.identity import TOKEN_LIFE_S, Identity, check_certificate, ensure_key
from edgeward_wire.errors import Rejected, Unavailable
from sim.device import DEVICE, write_identity
from sim.pki import Authority, new_key


@pytest.fixture
def made(tmp_path: Path, server_authority: Authority, device_authority: Authority) -> Identity:
    return write_identity(tmp_path, server_authority, device_authority)


def public_key(identity: Identity) -> ec.EllipticCurvePublicKey:
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def test_a_token_says_who_and_for_how_long(made: Identity) -> None:
    now = int(time.time())
    token = made.token(now)
    claims = jwt.decode(token, public_key(made), algorithms=["ES256"], audience="edgeward")
    assert jwt.get_unverified_header(token)["kid"] == DEVICE
    assert claims["iss"] == DEVICE
    assert (claims["iat"], claims["exp"]) == (now, now + TOKEN_LIFE_S)
    assert TOKEN_LIFE_S <= 300
    assert made.token(now) != token, "each has its own jti"


def test_a_csr_is_for_the_same_key(made: Identity) -> None:
    csr = x509.load_pem_x509_csr(made.csr_pem().encode())
    assert csr.is_signature_valid
    assert csr.public_key() == public_key(made)


def test_renewal_is_due_at_half_of_life_counted_from_issue_not_from_1970(made: Identity) -> None:
    half = made.issued_at + (made.expires_at - made.issued_at) / 2
    assert not made.renewal_due(time.time())
    assert not made.renewal_due(half - 1)
    assert made.renewal_due(half)


@pytest.mark.parametrize(
    "name", ["key.pem", "certificate.pem", "server-ca.pem", "root.json", "enrolment.json"]
)
def test_an_identity_that_is_not_whole_is_told_to_enrol(made: Identity, tmp_path: Path, name: str) -> None:
    (made.directory / name).unlink()
    with pytest.raises(Rejected) as caught:
        Identity.load(tmp_path)
    assert "edgeward-agent enroll" in caught.value.next_step


@pytest.mark.parametrize("name", ["certificate.pem", "enrolment.json"])
def test_a_damaged_identity_is_refused(made: Identity, tmp_path: Path, name: str) -> None:
    (made.directory / name).write_bytes(b"rubbish")
    with pytest.raises(Rejected):
        Identity.load(tmp_path)


def test_a_key_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "identity" / "key.pem"
    ensure_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_bytes()
    ensure_key(path)
    assert path.read_bytes() == first


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(b"rubbish")
    with pytest.raises(Rejected, match="not a private key"):
        ensure_key(path)


def test_a_key_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        ensure_key(tmp_path / "file" / "key.pem")


def test_a_certificate_must_be_ours(made: Identity, device_authority: Authority) -> None:
    check_certificate(made.certificate_path.read_text(), made.key_path, DEVICE)
    for pem in (
        device_authority.issue("other", public_key(made), server=False),
        device_authority.issue(DEVICE, new_key().public_key(), server=False),
        "rubbish",
    ):
        with pytest.raises(Rejected):
            check_certificate(pem, made.key_path, DEVICE)


def test_a_client_context_needs_usable_files(made: Identity) -> None:
    made.client_context()
    made.certificate_path.write_text("rubbish")
    with pytest.raises(Rejected, match="cannot be used"):
        made.client_context()
