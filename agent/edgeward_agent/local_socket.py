"""A pipeline's local socket: what it sees, for programs on the same device.

A Unix socket `<state>/run/<pipeline>.sock` that the runner serves. One connection is one request: a line of
JSON `{"want": ...}`, and the answer. `results` streams every answer as a line, `frame` is a line and then
a JPEG, `about` one line. What cannot be had is `{"ok": false, "error": ..., "next_step": ...}`.

Invariants: only the user of the daemon gets in (directory 0700, socket 0600). Connections, threads, requests
and what waits for a reader are bounded. Nobody who reads slowly, or not at all, holds anybody else up: a
reader's thread is its own, and what does not fit its queue is lost and counted. While the machine has no
descriptor or thread for a connection it is tried again. Standard library only: clients of it stay light.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

log = logging.getLogger("edgeward.local")

RUN = "run"
"""Below the state directory."""
MAX_REQUEST = 64 << 10
MAX_CONNECTIONS = 16
MAX_PATH = 100
MAX_DESCRIPTORS = 4
MAX_WAITING = 256
MAX_WAITING_BYTES = 1 << 20
MAX_ANSWER = 1 << 20
"""Of one line that a client reads."""
MAX_JPEG = 32 << 20
_REQUEST_S = 5.0
_SEND_S = 30.0
_LOOK_S = 1.0
_AGAIN_S = 0.1
_CLIENT_S = 15.0


@dataclass
class Request:
    """One request, and the connection to answer on. `descriptors` came with it, and are closed after it."""

    want: str
    said: Mapping[str, Any]
    link: socket.socket
    descriptors: list[int] = field(default_factory=list)

    def line(self, answer: Mapping[str, Any], more: bytes = b"") -> None:
        """Answer with one line, and the bytes that it announces."""
        self.link.sendall(_line(answer) + more)

    def text(self, key: str, default: str = "") -> str:
        """A text of the request. Raises Rejected."""
        value = self.said.get(key, default)
        if not isinstance(value, str) or len(value) > MAX_PATH:
            raise Rejected(f"{key!r} is a short text.")
        return value

    def number(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number of the request. Raises Rejected."""
        value = self.said.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Rejected(f"{key!r} is a whole number from {low} to {high}.")
        return value


Handler = Callable[[Request], None]
"""Answers a request on a thread of its own. Raises EdgewardError for what the asker is told."""


class _Reader:
    """What waits for one reader of results."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._lines: deque[bytes] = deque()
        self._bytes = self._lost = 0
        self._closed = False
        self._came = threading.Condition()

    def put(self, line: bytes) -> None:
        with self._came:
            self._lines.append(line)
            self._bytes += len(line)
            while len(self._lines) > MAX_WAITING or self._bytes > MAX_WAITING_BYTES:
                self._bytes -= len(self._lines.popleft())
                self._lost += 1
            self._came.notify()

    def lose(self, count: int) -> None:
        with self._came:
            self._lost += count

    def close(self) -> None:
        with self._came:
            self._closed = True
            self._came.notify()

    def take(self, wait_s: float) -> bytes | None:
        """What came, after how many were lost; empty when nothing did, None once closed."""
        with self._came:
            self._came.wait_for(lambda: self._lines or self._closed, wait_s)
            if self._closed:
                return None
            head = _line({"lost": self._lost}) if self._lost and self._lines else b""
            data = head + b"".join(self._lines)
            if head:
                self._lost = 0
            self._lines.clear()
            self._bytes = 0
            return data


class LocalSocket:
    """The server. `handlers` answer everything but `results`; add to them before `start`."""

    def __init__(
        self,
        directory: Path,
        pipeline: str,
        handlers: Mapping[str, Handler],
        listening: Callable[[bool], None],
    ) -> None:
        """`listening` is told, on any thread, whether somebody reads results."""
        self._directory = directory
        self._name = f"{pipeline}.sock"
        self._handlers: dict[str, Handler] = {"results": self._results, **handlers}
        self._listening = listening
        self._lock = threading.Lock()
        self._readers: list[_Reader] = []
        self._links: set[socket.socket] = set()
        self._socket: socket.socket | None = None
        self._inode = 0

    def start(self) -> None:
        """Bind, in the place of whatever was left behind. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                (self._directory / self._name).unlink()
            with _reachable(self._directory, self._name) as address:
                server.bind(address)
            (self._directory / self._name).chmod(0o600)
            server.listen(MAX_CONNECTIONS)
            self._inode = (self._directory / self._name).stat().st_ino
        except OSError:
            server.close()
            raise
        self._socket = server
        threading.Thread(target=self._accept, args=(server,), name="local", daemon=True).start()

    def close(self) -> None:
        """Nobody is served any more, and the socket is gone."""
        server, self._socket = self._socket, None
        if server is None:
            return
        path = self._directory / self._name
        with contextlib.suppress(OSError):
            if path.stat().st_ino == self._inode:  # else it is the next runner's
                path.unlink()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        with self._lock:
            readers, links = list(self._readers), list(self._links)
        for reader in readers:
            reader.close()
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def publish(self, source: str, result: bytes) -> None:
        """Hand a result (JSON on one line) to all who read. Never waits."""
        with self._lock:
            readers = [reader for reader in self._readers if reader.source in ("", source)]
        for reader in readers:
            reader.put(result + b"\n")

    def lose(self, count: int) -> None:
        """Tell the readers that results were lost before they came here."""
        with self._lock:
            for reader in self._readers:
                reader.lose(count)

    # --- connections

    def _accept(self, server: socket.socket) -> None:
        trouble = ""
        while True:
            before, trouble = trouble, self._next(server)
            if self._socket is not server:
                return  # closed
            if trouble and not before:
                log.warning("%s takes nobody in: %s. Trying again.", self._name, trouble)
            elif before and not trouble:
                log.info("%s takes in who asks again.", self._name)
            if trouble:
                time.sleep(_AGAIN_S)

    def _next(self, server: socket.socket) -> str:
        """Wait for one and take it in; else why not, as that too many files are open."""
        try:
            self._admit(server.accept()[0])
        except (OSError, RuntimeError) as error:
            return str(error)
        return ""

    def _admit(self, link: socket.socket) -> None:
        """Converse with it on a thread of its own. Raises RuntimeError when there is none to be had."""
        link.settimeout(_SEND_S)
        with self._lock:
            full = len(self._links) >= MAX_CONNECTIONS
            if not full:
                self._links.add(link)
        if full:
            busy = Unavailable(f"{MAX_CONNECTIONS} are connected already.", "Try again, or end one.")
            with contextlib.suppress(OSError), link:
                link.sendall(_refusal(busy))
            return
        thread = threading.Thread(target=self._converse, args=(link,), name="local-reader", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._links.discard(link)
            link.close()
            raise

    def _converse(self, link: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            with contextlib.suppress(OSError):  # who asked went away
                try:
                    request = _read_request(link, descriptors)
                    handler = self._handlers.get(request.want)
                    if handler is None:
                        known = ", ".join(sorted(self._handlers))
                        raise Rejected(f"{request.want[:64]!r} is not known here.", f"Want one of {known}.")
                    handler(request)
                except EdgewardError as error:
                    link.sendall(_refusal(error))
        finally:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            with self._lock:
                self._links.discard(link)
            link.close()

    def _results(self, request: Request) -> None:
        reader = _Reader(request.text("source"))
        with self._lock:
            self._readers.append(reader)
            self._listening(True)
        try:
            while (data := reader.take(_LOOK_S)) is not None:
                if data:
                    request.link.sendall(data)
                elif _hung_up(request.link):
                    return
        finally:
            with self._lock:
                self._readers.remove(reader)
                self._listening(bool(self._readers))


def _read_request(link: socket.socket, descriptors: list[int]) -> Request:
    """Raises Rejected, OSError. Descriptors that come along are the caller's to close, in any case."""
    link.settimeout(_REQUEST_S)
    raw = bytearray()
    while b"\n" not in raw:
        data, came, _, _ = socket.recv_fds(link, 4096, MAX_DESCRIPTORS)
        descriptors += came
        raw += data
        if len(raw) > MAX_REQUEST or len(descriptors) > MAX_DESCRIPTORS:
            raise Rejected(f"A request is one line of at most {MAX_REQUEST} bytes.")
        if not data:
            break
    link.settimeout(_SEND_S)
    try:
        said = json.loads(raw.partition(b"\n")[0])
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("want"), str):
        raise Rejected("A request is one line of JSON.", 'For example {"want": "results"}.')
    return Request(said["want"], said, link, descriptors)


def _hung_up(link: socket.socket) -> bool:
    """Whether the other side is gone altogether; that it says no more is fine."""
    poll = select.poll()
    poll.register(link, 0)
    return bool(poll.poll(0))


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _refusal(error: EdgewardError) -> bytes:
    return _line({"ok": False, "error": error.what, "next_step": error.next_step})


@contextlib.contextmanager
def _reachable(directory: Path, name: str) -> Iterator[str]:
    """An address that fits: the kernel takes 107 bytes, and a state directory may be deeper than that."""
    path = str(directory / name)
    if len(os.fsencode(path)) <= MAX_PATH:
        yield path
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def forget(run: Path, pipeline: str) -> None:
    """Remove the socket of a runner that is gone."""
    with contextlib.suppress(OSError):
        (run / f"{pipeline}.sock").unlink()


# --- for clients


def pipelines(run: Path) -> list[str]:
    """The pipelines that have a socket in this directory."""
    try:
        found = [path for path in run.iterdir() if path.suffix == ".sock"]
        return sorted(path.stem for path in found if stat.S_ISSOCK(path.stat().st_mode))[:16]
    except OSError:
        return []


@contextlib.contextmanager
def connect(run: Path, pipeline: str, want: Mapping[str, Any]) -> Iterator[socket.socket]:
    """Send one request. Raises Unavailable when nothing serves the pipeline here, Rejected without access."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with link:
        link.settimeout(_CLIENT_S)
        try:
            with _reachable(run, f"{pipeline}.sock") as address:
                link.connect(address)
            link.sendall(_line(want))
        except PermissionError as error:
            raise Rejected(
                f"{run} may not be entered by this user.", "Ask as the agent's user, e.g. with sudo."
            ) from error
        except OSError as error:
            raise Unavailable(
                f"Nothing serves pipeline {pipeline} here.", "See `edgeward-agent status`."
            ) from error
        yield link


def results(run: Path, pipeline: str, source: str = "") -> Iterator[bytes]:
    """Every result as a line of JSON, until the runner ends; empty lines while there is none for a second.

    Raises:
        Unavailable, Rejected: as it says.
    """
    with connect(run, pipeline, {"want": "results", "source": source}) as link:
        link.settimeout(_LOOK_S)
        held = bytearray()
        while True:
            try:
                data = link.recv(1 << 16)
            except TimeoutError:
                yield b""
                continue
            except OSError:
                return
            if not data:
                return
            held += data
            *lines, rest = held.split(b"\n")
            held = rest
            if len(held) > MAX_ANSWER:
                raise Rejected(f"A result has more than {MAX_ANSWER} bytes.")
            for line in lines:
                if line.startswith(b'{"ok":false'):
                    _checked(json.loads(line))
                yield bytes(line)


def about(run: Path, pipeline: str) -> dict[str, Any]:
    """What the pipeline runs. Raises Unavailable, Rejected."""
    with connect(run, pipeline, {"want": "about"}) as link, link.makefile("rb") as stream:
        return _answer(stream)


def frame(run: Path, pipeline: str, source: str, max_side: int = 1280) -> tuple[dict[str, Any], bytes]:
    """The newest frame of a source: what is known of it, and the JPEG (empty for sound).

    Raises:
        Unavailable, Rejected: as it says.
    """
    want = {"want": "frame", "source": source, "max_side": max_side}
    with connect(run, pipeline, want) as link, link.makefile("rb") as stream:
        header = _answer(stream)
        length = header.get("length")
        if not isinstance(length, int) or not 0 <= length <= MAX_JPEG:
            raise Rejected("The runner's answer is not understood.")
        picture = _read(stream, length)
        if len(picture) != length:
            raise Unavailable("The runner went away in the middle of its answer.", "Try again.")
        return header, picture


def _answer(stream: Any) -> dict[str, Any]:
    try:
        line = stream.readline(MAX_ANSWER)
    except OSError as error:
        raise Unavailable("The runner does not answer.", "Try again.") from error
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable("The runner went away before it answered.", "Try again.")
    return _checked(answer)


def _read(stream: Any, length: int) -> bytes:
    try:
        return bytes(stream.read(length))
    except OSError as error:
        raise Unavailable("The runner does not answer.", "Try again.") from error


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("ok") is False:
        raise Unavailable(str(answer.get("error")), str(answer.get("next_step") or ""))
    return answer
