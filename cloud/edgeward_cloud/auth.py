"""Who asks: operators by token, devices by a JWT under their own key.

Invariants: a token's hash is compared in constant time; a device's JWT lives for five minutes at most and
serves once; what is remembered against replay is bounded for each device, so that none can push out
another's. No secret is ever logged or answered.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jwt

from edgeward_cloud.operators import OperatorRecord, find_operator, load_operators
from edgeward_cloud.problem import Refused
from edgeward_wire.identifiers import DEVICE_PATTERN

AUDIENCE = "edgeward"
MAX_LIFE_S = 300.0
LEEWAY_S = 30.0
MAX_TOKEN = 4096
MAX_JTI = 128
MAX_REMEMBERED = 1000
"""JWTs of one device within their life."""

_DEVICE = re.compile(DEVICE_PATTERN)
_CLAIMS = ["iss", "aud", "iat", "exp", "jti"]
_log = logging.getLogger(__name__)


class Operators:
    """The operators' tokens, read again whenever the file has changed: `token` may run beside the cloud.

    While the file cannot be read, those that were known go on counting; a damaged one admits nobody.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._records: dict[str, OperatorRecord] = {}
        self._fault = ""

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None: nobody's."""
        with self._lock:
            try:
                self._read_what_changed()
            except OSError as error:
                self._say(str(error))
            else:
                self._say("")
            return find_operator(self._records, token)

    def _read_what_changed(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._records, self._seen = {}, None
            return
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            self._records = load_operators(self._path)
            self._seen = seen

    def _say(self, fault: str) -> None:
        if fault and not self._fault:
            _log.error("The operators' tokens cannot be read, the old ones count: %s", fault)
        if self._fault and not fault:
            _log.info("The operators' tokens can be read again.")
        self._fault = fault


def unauthorised(what: str, next_step: str) -> Refused:
    """401. Every answer carries `Date`, by which a device that has no clock finds the time."""
    return Refused(401, what, next_step, {"WWW-Authenticate": 'Bearer realm="edgeward"'})


class DeviceTokens:
    """Checks the devices' JWTs, and remembers them until they end."""

    def __init__(self) -> None:
        self._used: dict[str, OrderedDict[str, float]] = {}

    def claimed_device(self, token: str) -> str:
        """Who the token says that it is from (its `kid`): nothing is proven yet.

        Raises:
            Refused: 401, it is not such a token.
        """
        try:
            if len(token) > MAX_TOKEN:
                raise jwt.DecodeError("too long")
            device = jwt.get_unverified_header(token).get("kid")
        except jwt.PyJWTError as error:
            raise _bad(str(error)) from error
        if not isinstance(device, str) or not _DEVICE.fullmatch(device):
            raise _bad("its kid is not a device")
        return device

    def check(self, token: str, device: str, public_key_pem: str, now: float) -> None:
        """Verify a device's token and use it up.

        Raises:
            Refused: 401, wrong, too old, or used before; 429, too many.
        """
        try:
            # Time is checked below, against the cloud's one clock.
            claims: dict[str, Any] = jwt.decode(
                token,
                public_key_pem,
                algorithms=["ES256"],
                audience=AUDIENCE,
                issuer=device,
                options={"require": _CLAIMS, "verify_exp": False, "verify_iat": False, "verify_nbf": False},
            )
        except (jwt.PyJWTError, ValueError) as error:
            raise _bad(str(error)) from error
        self._use(device, claims["jti"], _expiry(claims, now), now)

    def _use(self, device: str, jti: object, expires: float, now: float) -> None:
        if not isinstance(jti, str) or not 8 <= len(jti) <= MAX_JTI:
            raise _bad("its jti must be 8 to 128 characters long")
        used = self._used.setdefault(device, OrderedDict())
        while used and next(iter(used.values())) < now:
            used.popitem(last=False)
        if jti in used:
            raise _bad("it was used before")
        if len(used) >= MAX_REMEMBERED:
            raise Refused(
                429, "Too many requests of one device.", "Wait.", {"Retry-After": str(int(MAX_LIFE_S))}
            )
        # Kept for the longest possible life, so that the order of arrival is the order of the end.
        used[jti] = max(expires, now + MAX_LIFE_S) + 2 * LEEWAY_S


def _expiry(claims: dict[str, Any], now: float) -> float:
    issued, expires = claims["iat"], claims["exp"]
    if not all(isinstance(t, int | float) and abs(t) < 1e12 for t in (issued, expires)):
        raise _bad("its times are not numbers")
    if expires - issued > MAX_LIFE_S:
        raise _bad(f"it may live for {MAX_LIFE_S:.0f} s at most")
    if issued > now + LEEWAY_S:
        raise _bad("it is from the future")
    if expires < now - LEEWAY_S:
        raise _bad("it has expired")
    return float(expires)


def _bad(why: str) -> Refused:
    return unauthorised(
        f"The device's token is not valid: {why}.",
        "Sign a new one; the Date of this answer is the cloud's time.",
    )
