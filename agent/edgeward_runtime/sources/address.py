"""Addresses of streams: taken apart, shown without what is secret in them, and reached in bounded time.

Invariants: a user name or password leaves this module only towards the server that it is for; every read
has a deadline and a bound, so that a server that drips or never ends costs neither time nor memory.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from edgeward_wire.errors import Rejected, Unavailable

CONNECT_S = 5.0
_PORTS = {"http": 80, "https": 443, "rtsp": 554, "rtsps": 322}
_MAX_HEAD = 16 << 10
_CHUNK = 64 << 10
# Up to the last @: a password with a slash that nobody encoded is one still. Of a pipeline that is written
# without spaces more is hidden than need be: a password may hold the ! that joins elements.
_USER = re.compile(r"(?<=://)\S*@")
_SECRET = re.compile(r"(?i)\b([\w-]*(?:user|pass|pw|token|key|auth|secret)[\w-]*=)(\"[^\"]*\"|[^\s&]+)")
# Of a WWW-Authenticate: a parameter of the scheme before it, or a scheme.
_WORD = re.compile(r'([\w-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,]*))|([\w-]+)')
HASHES = {"SHA-256": "sha256", "MD5": "md5"}
"""Of Digest, the better one first."""


def shown(uri: str) -> str:
    """The address as a person or a log may see it: no user name, no password, no token."""
    return _SECRET.sub(r"\1***", _USER.sub("", uri))


@dataclass(frozen=True)
class Address:
    """An address of a stream, taken apart."""

    scheme: str
    host: str
    port: int
    target: str
    """Path and query."""
    user: str | None
    password: str

    @property
    def where(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def bare(self) -> str:
        """The address without user name and password; its query may hold secrets still."""
        return f"{self.scheme}://{self.where}{self.target}"

    @property
    def shown(self) -> str:
        """The address as a person or a log may see it."""
        return shown(self.bare)


def parse(uri: str) -> Address:
    """Take it apart. Raises Rejected when it is no address."""
    not_one = Rejected(
        f"{shown(uri)} is not an address.",
        "Write it like rtsp://camera.local:554/stream1, secrets %-encoded.",
    )
    try:
        parts = urlsplit(uri)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise not_one from None
    user = None if parts.username is None else unquote(parts.username)
    password = unquote(parts.password or "")
    odd = any(not c.isprintable() or c == '"' for c in (user or "") + password)
    if not host or parts.scheme not in _PORTS or odd or any(c < "!" or c > "~" for c in uri):
        raise not_one
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, host, _PORTS[parts.scheme] if port is None else port, target, user, password)


@dataclass(frozen=True)
class Reply:
    """The head of an answer; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]

    @property
    def length(self) -> int:
        """Bytes of the body that follows, as far as it says; bounded."""
        said = self.headers.get("content-length", "")
        return min(int(said), _CHUNK) if said.isdecimal() and len(said) < 10 else 0


class Line:
    """A connection, read with bounds."""

    def __init__(self, address: Address) -> None:
        """Connect. Raises Unavailable with the reason; Rejected when no host can have that name."""
        self._what = address.where
        self._read = bytearray()
        try:
            self._socket = socket.create_connection((address.host, address.port), timeout=CONNECT_S)
        except UnicodeError:  # from how Python writes names for DNS: no label, or one over 63 letters
            raise Rejected(
                f"{address.host[:80]} is no host's name.",
                "Correct the address: a part of it is empty or too long.",
            ) from None
        except socket.gaierror:
            raise Unavailable(
                f"The host {address.host} is not known.", "Check the name and the device's DNS."
            ) from None
        except TimeoutError:
            raise Unavailable(
                f"{self._what} does not answer.", "Is the camera on, and on this network?"
            ) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unavailable(
                f"{self._what} cannot be reached: {reason}.", "Is the camera on, and the port right?"
            ) from None
        if address.scheme in ("https", "rtsps"):
            self._secure(address.host)

    def _secure(self, host: str) -> None:
        try:
            self._socket = ssl.create_default_context().wrap_socket(self._socket, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise Unavailable(
                f"The certificate of {self._what} is not trusted: {error.verify_message}.",
                "Add its authority to the system's, or use an address without TLS.",
            ) from None
        except OSError as error:
            self.close()
            raise Unavailable(f"{self._what} does not speak TLS: {error}.", "Check the port.") from None

    def send(self, raw: bytes) -> None:
        """Raises Unavailable."""
        try:
            self._socket.sendall(raw)
        except OSError as error:
            raise Unavailable(f"{self._what} cut the connection: {error.strerror or error}.") from None

    def until(self, mark: bytes, most: int, deadline: float) -> bytes:
        """What comes before `mark`, which is taken too.

        Raises:
            Unavailable: the connection ended, or the deadline passed. Rejected: it is longer than `most`.
        """
        begin = 0
        while (at := self._read.find(mark, begin)) < 0:
            begin = max(0, len(self._read) - len(mark) + 1)
            if begin > most:
                raise Rejected(f"{self._what} sends something without end that is no stream of pictures.")
            self._more(deadline)
        if at > most:
            raise Rejected(f"{self._what} sends more than {most} bytes where a mark should be.")
        found = bytes(self._read[:at])
        del self._read[: at + len(mark)]
        return found

    def exactly(self, count: int, deadline: float) -> bytes:
        """So many bytes. Raises Unavailable."""
        while len(self._read) < count:
            self._more(deadline)
        found = bytes(self._read[:count])
        del self._read[:count]
        return found

    def _more(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            raw = self._socket.recv(_CHUNK)
        except TimeoutError:
            raise Unavailable(f"{self._what} sends nothing.", "Check the camera and the network.") from None
        except OSError as error:
            raise Unavailable(f"{self._what} cut the connection: {error.strerror or error}.") from None
        if not raw:
            raise Unavailable(f"{self._what} closed the connection.", "Check the camera.")
        self._read += raw

    def head(self, protocol: str, deadline: float) -> Reply:
        """The head of an answer. Raises Unavailable; Rejected when it is none of `protocol`."""
        not_one = Rejected(
            f"{self._what} does not answer as {protocol} does.",
            "Check the port and the beginning of the address.",
        )
        begin = self.exactly(len(protocol), deadline)
        if begin != protocol.encode():
            raise not_one
        first, *lines = self.until(b"\r\n\r\n", _MAX_HEAD, deadline).decode("latin-1").split("\r\n")
        words = first.split()
        if len(words) < 2 or not re.fullmatch(r"[1-5]\d\d", words[1]):
            raise not_one
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            key = name.strip().lower()
            # A server may offer several ways to prove who one is, one a line.
            joined = key == "www-authenticate" and key in headers
            headers[key] = f"{headers[key]}, {value.strip()}" if joined else value.strip()
        return Reply(int(words[1]), headers)

    def close(self) -> None:
        """Never raises."""
        self._socket.close()


def _challenges(said: str) -> list[tuple[str, dict[str, str]]]:
    """(scheme, its parameters) for each way that a `WWW-Authenticate` offers; names in lower case."""
    found: list[tuple[str, dict[str, str]]] = []
    for word in _WORD.finditer(said):
        if word[4]:
            found.append((word[4].lower(), {}))
        elif found:
            found[-1][1][word[1].lower()] = word[2] or word[3] or ""
    return found


def credentials(
    address: Address, method: str, target: str, challenge: str, hashes: Mapping[str, str] = HASHES
) -> str | None:
    """The Authorization header that answers a `WWW-Authenticate`; None: it asks for a kind we do not have."""
    if address.user is None:
        return None
    offered = _challenges(challenge)
    for algorithm, hashed in hashes.items():
        for scheme, asked in offered:
            if scheme == "digest" and asked.get("algorithm", "MD5").upper() == algorithm:
                return _digest(address, method, target, asked, hashed)
    if any(scheme == "basic" for scheme, _ in offered):
        raw = f"{address.user}:{address.password}".encode()
        return f"Basic {base64.b64encode(raw).decode()}"
    return None


def _digest(address: Address, method: str, target: str, asked: dict[str, str], hashed: str) -> str:
    def hash_of(text: str) -> str:
        # RFC 7616 lets cameras ask for MD5 still; it protects nothing of ours.
        return hashlib.new(hashed, text.encode(), usedforsecurity=False).hexdigest()

    realm, nonce = asked.get("realm", ""), asked.get("nonce", "")
    known, wanted = hash_of(f"{address.user}:{realm}:{address.password}"), hash_of(f"{method}:{target}")
    said = f'Digest username="{address.user}", realm="{realm}", nonce="{nonce}", uri="{target}"'
    if "algorithm" in asked:
        said += f", algorithm={asked['algorithm']}"
    if "opaque" in asked:
        said += f', opaque="{asked["opaque"]}"'
    if "auth" not in [kind.strip() for kind in asked.get("qop", "").lower().split(",")]:
        return f'{said}, response="{hash_of(f"{known}:{nonce}:{wanted}")}"'
    once = secrets.token_hex(8)
    response = hash_of(f"{known}:{nonce}:00000001:{once}:auth:{wanted}")
    return f'{said}, qop=auth, nc=00000001, cnonce="{once}", response="{response}"'


def refusal(reply: Reply, address: Address, proved: bool) -> Unavailable:
    """Why a server that answers so gives no stream. `proved`: to a request with an Authorization."""
    status = reply.status
    where = address.shown
    if status == 401:
        if address.user is None:
            return Unavailable(
                f"{where} asks for a user name and password.",
                "Put them into the address: //USER:PASSWORD@HOST.",
            )
        if not proved:
            return _no_such_proof(reply, where)
        return Unavailable(f"{where} refuses the user name or password.", "Correct them in agent.toml.")
    if status == 403:
        return Unavailable(f"{where} forbids this user the stream.", "Allow it in the camera's settings.")
    if status == 404:
        return Unavailable(f"{where} is not there (404).", "Check the path; it differs from maker to maker.")
    if status in (301, 302, 303, 307, 308):
        return Unavailable(f"{where} has moved ({status}).", "Put its new address into agent.toml.")
    return Unavailable(f"{where} answers {status}.", "See the camera's own log.")


def _no_such_proof(reply: Reply, where: str) -> Unavailable:
    offered = _challenges(reply.headers.get("www-authenticate", ""))
    names = ", ".join(f"{scheme} {asked.get('algorithm', '')}".strip() for scheme, asked in offered[:8])
    said = names[:80] if names and names.isprintable() else "something that is no scheme"
    return Unavailable(
        f"{where} takes a user name and password only as {said}.",
        "Allow Basic, or Digest with MD5, in the camera's settings.",
    )
