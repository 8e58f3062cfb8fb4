"""Operators' tokens, and devices' JWTs under real keys."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.apikit import DeviceKit
from edgeward_cloud import auth
from edgeward_cloud.auth import DeviceTokens, Operators
from edgeward_cloud.operators import new_token
from edgeward_cloud.pki import csr_public_key_pem
from edgeward_cloud.problem import Refused
from edgeward_wire.errors import Rejected

NOW = 1_800_000_000.0
DEVICE = DeviceKit("d1")
PUBLIC = csr_public_key_pem(DEVICE.csr_pem)


def check(tokens: DeviceTokens, token: str, now: float = NOW) -> None:
    device = tokens.claimed_device(token)
    tokens.check(token, device, PUBLIC, now)


def refused(token: str, now: float = NOW) -> str:
    with pytest.raises(Refused) as caught:
        check(DeviceTokens(), token, now)
    assert caught.value.status == 401
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    return caught.value.what


def test_a_devices_token_counts_once() -> None:
    tokens, token = DeviceTokens(), DEVICE.token(NOW)
    check(tokens, token)
    with pytest.raises(Refused, match="used before"):
        check(tokens, token)
    with pytest.raises(Refused, match="used before"):
        check(tokens, token, NOW + 329)
    check(tokens, DEVICE.token(NOW))


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"exp": int(NOW) + 301}, "300 s at most"),
        ({"iat": int(NOW) - 400, "exp": int(NOW) - 100}, "expired"),
        ({"iat": int(NOW) + 100, "exp": int(NOW) + 200}, "from the future"),
        ({"aud": "other"}, "udience"),
        ({"iss": "d2"}, "ssuer"),
        ({"jti": None}, "jti"),
        ({"exp": None}, "exp"),
        ({"jti": "short"}, "jti"),
        ({"jti": "x" * 129}, "jti"),
        ({"iat": 1e300, "exp": 1e300}, "times"),
    ],
)
def test_what_a_token_claims_must_hold(claims: dict[str, Any], says: str) -> None:
    assert says in refused(DEVICE.token(NOW, **claims))


def test_clocks_may_differ_by_half_a_minute() -> None:
    check(DeviceTokens(), DEVICE.token(NOW + 29))
    check(DeviceTokens(), DEVICE.token(NOW - 329))


def test_only_the_devices_own_key_counts() -> None:
    other = DeviceKit("d1")
    assert "ignature" in refused(other.token(NOW))


def test_no_other_algorithm_counts() -> None:
    claims = {"iss": "d1", "aud": "edgeward", "iat": int(NOW), "exp": int(NOW) + 60, "jti": "12345678"}
    symmetric = jwt.encode(claims, "a secret of thirty-two bytes, no less", "HS256", headers={"kid": "d1"})
    assert "alg" in refused(symmetric)
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "none", "kid": "d1", "typ": "JWT"}, claims)
    )
    refused(f"{head}.{body}.")


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.hex()))
def test_rubbish_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="not valid"):
        DeviceTokens().claimed_device(text)


@pytest.mark.parametrize("kid", ["../d1", "", "D1", "a" * 64, "_cloud", "d1\n"])
def test_a_kid_that_is_no_device_is_refused(kid: str) -> None:
    token = jwt.encode({}, DEVICE.key_pem, algorithm="ES256", headers={"kid": kid})
    assert "kid" in refused(token)


def test_a_token_that_is_too_long_is_refused() -> None:
    assert "too long" in refused(DEVICE.token(NOW, extra="x" * auth.MAX_TOKEN))


def test_one_device_cannot_fill_the_memory_nor_push_out_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_REMEMBERED", 3)
    tokens = DeviceTokens()
    for _ in range(3):
        check(tokens, DEVICE.token(NOW))
    with pytest.raises(Refused) as caught:
        check(tokens, DEVICE.token(NOW))
    assert caught.value.status == 429
    other = DeviceKit("d2")
    tokens.check(other.token(NOW), "d2", csr_public_key_pem(other.csr_pem), NOW)
    later = NOW + 400
    check(tokens, DEVICE.token(later), later)


def test_operators_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    operators = Operators(path)
    assert operators.name_of("anything") is None
    ann, bob = new_token(path, "ann"), new_token(path, "bob")
    assert (operators.name_of(ann), operators.name_of(bob)) == ("ann", "bob")
    assert operators.name_of(ann[:-1]) is None
    assert operators.name_of("") is None
    fresh = new_token(path, "ann")
    assert (operators.name_of(ann), operators.name_of(fresh)) == (None, "ann")
    path.unlink()
    assert operators.name_of(fresh) is None


def test_a_damaged_operators_file_admits_nobody(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    operators = Operators(path)
    token = new_token(path, "ann")
    assert operators.name_of(token) == "ann"
    path.write_text("{")
    os.utime(path, (1, 1))
    with pytest.raises(Rejected, match=r"operators\.json"):
        operators.name_of(token)


def test_while_the_file_cannot_be_read_the_old_tokens_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "operators.json"
    operators = Operators(path)
    token = new_token(path, "ann")
    assert operators.name_of(token) == "ann"
    path.rename(tmp_path / "aside")
    path.mkdir()  # what root may not read either
    with caplog.at_level("INFO"):
        assert [operators.name_of(token) for _ in range(3)] == ["ann"] * 3
        assert len(caplog.records) == 1, "said once"
        path.rmdir()
        (tmp_path / "aside").rename(path)
        other = new_token(path, "bob")
        assert (operators.name_of(token), operators.name_of(other)) == ("ann", "bob")
    assert "can be read again" in caplog.messages[-1]
