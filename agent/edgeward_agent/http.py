"""HTTPS to the cloud. Only importer of httpx and of httpcore beneath it.

Invariants: every request has a bound in bytes and in time. A minimum rate holds for headers and bodies
alike, so that a server that drips cannot hold a thread. Errors become Rejected or Unavailable. The server
is trusted through one CA file, never the system's. Redirects are not followed.
"""

from __future__ import annotations

import ssl
import sys
import threading
import time
import typing
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from edgeward_wire import __version__
from edgeward_wire.document import Document, parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.problem import Problem

if TYPE_CHECKING:
    from edgeward_agent.identity import Identity


@contextmanager
def _without(*modules: str) -> Iterator[None]:
    """Make optional imports of httpx fail: its command line (rich, pygments) and asyncio cost 8 MB."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None means: not importable
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("httpx._main", "httpcore._backends.anyio", "httpcore._backends.trio"):
    import httpcore
    import httpx

Token = Callable[[float], str]
"""Unix seconds -> bearer token (`Identity.token`)."""

_SLICE_S = 0.5
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, slots=True)
class Patience:
    """Bounds in time. `rate` is the fewest bytes per second over `window_s` seconds of waiting."""

    connect_s: float = 10.0
    read_s: float = 30.0
    window_s: float = 30.0
    rate: float = 256.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, of any status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Body:
    """An answer whose body is still to come."""

    status: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]


def anchored(ca_pem: str) -> ssl.SSLContext:
    """A context that trusts this one CA and nothing else.

    Raises:
        Rejected: it is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise Rejected(
            "The certificate of the server's CA is damaged.",
            "Run `edgeward-agent enroll` with a string from `agent-ctl enroll-token`.",
        ) from error
    return context


def unanchored() -> ssl.SSLContext:
    """A context that trusts everyone: only for the CA certificate, which its pin then proves."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Http:
    """One connection pool to one cloud. For one thread at a time: give each thread its own.

    `stop` ends a request that is under way within a second.
    """

    def __init__(
        self,
        url: str,
        context: ssl.SSLContext,
        *,
        stop: threading.Event | None = None,
        patience: Patience = Patience(),
    ) -> None:
        self._url = url.rstrip("/")
        self._host = urlsplit(url).netloc
        self._line = _Line(patience, stop or threading.Event())
        self._clock_offset = 0.0
        """Server's clock minus ours, once a 401 has told it."""
        self._client = httpx.Client(
            transport=_Transport(context, self._line, _proxy(url)),
            timeout=httpx.Timeout(patience.read_s, connect=patience.connect_s),
            # `identity`: bytes are counted and hashed as they come, and nothing inflates.
            headers={"User-Agent": f"edgeward-agent/{__version__}", "Accept-Encoding": "identity"},
            trust_env=False,
        )

    @classmethod
    def of(cls, identity: Identity, *, stop: threading.Event | None = None) -> Http:
        """The cloud of this identity, trusted through its server CA only."""
        return cls(identity.url, anchored(identity.server_ca), stop=stop)

    def get(self, path: str, *, limit: int, token: Token | None = None) -> Answer:
        """GET at most `limit` bytes, whatever the status.

        Raises:
            Unavailable: no whole answer came.
            Rejected: the answer is longer than `limit`.
        """
        with self._send("GET", path, {}, None, token) as body:
            return _whole(body, limit, self._url + path)

    def post(self, path: str, document: Document, *, limit: int, token: Token | None = None) -> Answer:
        """POST a document as JSON. Raises like `get`."""
        headers = {"Content-Type": "application/json"}
        with self._send("POST", path, headers, document.to_bytes(), token) as body:
            return _whole(body, limit, self._url + path)

    @contextmanager
    def stream(
        self, path: str, *, offset: int = 0, token: Token | None = None, stop: threading.Event | None = None
    ) -> Iterator[Body]:
        """GET whose body is read in chunks as they come, from byte `offset` on (by Range when above 0).

        `stop` ends it within a second. Raises like `get`, also while chunks are read.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        self._line.also = stop
        try:
            with self._send("GET", path, headers, None, token) as body:
                yield body
        finally:
            self._line.also = None

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @contextmanager
    def _send(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None, token: Token | None
    ) -> Iterator[Body]:
        """One request; with a token, a 401 tells the server's time and gets one more try by that clock."""
        url = self._url + path
        for last in (token is None, True):
            if token is not None:
                headers = {**headers, "Authorization": f"Bearer {token(time.time() + self._clock_offset)}"}
            with self._blame():
                request = self._client.build_request(method, url, headers=headers, content=content)
                response = self._client.send(request, stream=True)
            try:
                if last or response.status_code != 401 or not self._learn_time(response.headers):
                    yield Body(response.status_code, response.headers, self._chunks(response))
                    return
            finally:
                response.close()

    def _learn_time(self, headers: Mapping[str, str]) -> bool:
        try:
            server = parsedate_to_datetime(headers.get("date", "")).timestamp()
        except ValueError:
            return False
        self._clock_offset = server - time.time()
        return True

    def _chunks(self, response: httpx.Response) -> Iterator[bytes]:
        with self._blame():
            yield from response.iter_raw()

    @contextmanager
    def _blame(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            if self._line.stopped:
                raise Unavailable("The request was stopped.") from error
            raise _unavailable(self._host, error) from error


def refusal(answer: Answer, doing: str) -> Rejected | Unavailable:
    """What an answer that is not the hoped-for one means; `doing` names the request for people."""
    try:
        problem = parse(Problem, answer.body, name="The answer")
        text, next_step = problem.detail or problem.title, problem.next_step
    except Rejected:
        text, next_step = f"the server answered with status {answer.status}", ""
    what = f"{doing}: {text}"
    passing = answer.status in (408, 425, 429) or not 400 <= answer.status < 500
    return Unavailable(what, next_step) if passing else Rejected(what, next_step)


def _whole(body: Body, limit: int, url: str) -> Answer:
    kept = bytearray()
    for chunk in body.chunks:
        kept += chunk
        if len(kept) > limit:
            raise Rejected(f"{url} is longer than {limit} bytes.", "Is this address an Edgeward cloud?")
    return Answer(body.status, body.headers, bytes(kept))


def _unavailable(host: str, error: httpx.TransportError) -> Unavailable:
    text = str(error) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        return Unavailable(
            f"{host} shows a certificate that this device does not trust ({text}).",
            f"Check that this is the cloud of the enrolment, and this machine's clock ({now} UTC).",
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Unavailable(
            f"{host} cannot be reached: {text}.", "Check the network and that the cloud is running."
        )
    return Unavailable(f"The connection to {host} broke: {text}.")


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for this address; never one for loopback."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in _LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


class _Line:
    """What all connections of one `Http` share: patience, and the events that end a request."""

    def __init__(self, patience: Patience, stop: threading.Event) -> None:
        self.patience = patience
        self.also: threading.Event | None = None
        self._stop = stop

    @property
    def stopped(self) -> bool:
        return self._stop.is_set() or (self.also is not None and self.also.is_set())


class _Transport(httpx.HTTPTransport):
    """httpx's own transport over streams that lose their patience."""

    def __init__(self, context: ssl.SSLContext, line: _Line, proxy: str | None) -> None:
        limits = httpx.Limits(max_connections=2, max_keepalive_connections=1, keepalive_expiry=30)
        super().__init__(verify=context, limits=limits, proxy=proxy, trust_env=False)
        # httpx has no argument for httpcore's public `network_backend`; a test sees that this holds.
        self._pool._network_backend = _Backend(line)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, line: _Line) -> None:
        self._line = line
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: typing.Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return _Stream(stream, self._line)


class _Stream(httpcore.NetworkStream):
    """A stream whose reads can be stopped, and fail when too little comes for too long."""

    def __init__(self, inner: httpcore.NetworkStream, line: _Line) -> None:
        self._inner = inner
        self._line = line
        self._waited = 0.0
        self._got = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        began = time.monotonic()
        limit = self._line.patience.read_s if timeout is None else timeout
        while True:
            if self._line.stopped:
                raise httpcore.ReadError("stopped")
            left = began + limit - time.monotonic()
            if left <= 0:
                raise httpcore.ReadTimeout(f"nothing came for {limit:g} s")
            try:
                data = self._inner.read(max_bytes, timeout=min(_SLICE_S, left))
                break
            except httpcore.ReadTimeout:
                continue
        self._pace(len(data), time.monotonic() - began)
        return data

    def _pace(self, got: int, waited: float) -> None:
        patience = self._line.patience
        self._got += got
        self._waited += waited
        if self._waited < patience.window_s:
            return
        if self._got < patience.rate * self._waited:
            raise httpcore.ReadTimeout(f"fewer than {patience.rate:g} bytes a second came")
        self._got, self._waited = 0, 0.0

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._got, self._waited = 0, 0.0
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout), self._line)

    def get_extra_info(self, info: str) -> typing.Any:
        return self._inner.get_extra_info(info)
