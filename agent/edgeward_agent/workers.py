"""Children: processes that do what may crash, and the thread that listens to each.

Invariants: a child gets one socket and inherits nothing else; it stands in a session of its own, so that a
Ctrl-C meant for the daemon is not for it, and so that a kill takes whatever it started too. End of file on
its socket ends it; who does not go is killed. `on_exit` comes exactly once, last, and names the exit code
or the signal. What a child prints is logged under its name, bounded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from edgeward_agent.messages import MAX_LINE, encode
from edgeward_wire.document import Document, faults

log = logging.getLogger(__name__)

M = TypeVar("M")

_SEND_S = 15.0
"""A slow device takes seconds to start Python, and a long message waits for it."""
_CLOSING_S = 10.0
_CHUNK = 64 << 10
_LOGGED_LINES = 200
"""Of a child's own output, per minute."""
_LINE = 500


@dataclass(frozen=True, slots=True)
class Programs:
    """Command lines of the children; `--fd N` is appended."""

    runner: tuple[str, ...] = (sys.executable, "-m", "edgeward_agent.runner")
    qualify: tuple[str, ...] = (sys.executable, "-m", "edgeward_agent.qualify")


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. `code` is negative for a signal, `text` one sentence for people."""

    code: int
    text: str


class Child(Generic[M]):
    """One child process and its reader thread. Both callbacks run on that thread."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        messages: TypeAdapter[M],
        on_message: Callable[[M], None],
        on_exit: Callable[[Exit], None],
        *,
        nice: int = 0,
    ) -> None:
        """Start it.

        Raises:
            OSError: the program cannot be started.
        """
        self.name = name
        self._messages = messages
        self._on_message = on_message
        self._on_exit = on_exit
        self._why = ""
        self._printed = _Printed(name)
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        if nice:
            with contextlib.suppress(OSError):  # it may be gone already
                os.setpriority(os.PRIO_PROCESS, self._process.pid, nice)
        ours.settimeout(_SEND_S)
        self._socket = ours
        self._sending = threading.Lock()
        self._reaping = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name=f"reader-{name}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: Document) -> None:
        """Write one message; a child that does not read within some seconds is killed."""
        data = encode(message)
        with self._sending:
            try:
                self._socket.sendall(data)
            except TimeoutError:
                self.kill("It did not read its messages.")
            except OSError as error:
                log.debug("%s: %s", self.name, error)  # it is gone: `on_exit` says so

    def kill(self, why: str) -> None:
        """SIGKILL to its whole session; `why` becomes the reason of its exit."""
        with self._reaping:
            if self._process.returncode is None:  # else its id may be another's by now
                self._why = self._why or why
                self._kill_session()

    def _kill_session(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def hang_up(self) -> None:
        """Close our side of the conversation: it should say its last words and go."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def end(self, grace_s: float) -> None:
        """Hang up, wait for it to go, kill it if it does not; waits for `on_exit`."""
        self.hang_up()
        self._thread.join(grace_s)
        if self._thread.is_alive():
            self.kill(f"It did not end within {grace_s:g} s.")
            self._thread.join(5.0)

    def _listen(self) -> None:
        out = self._process.stdout
        assert out is not None
        buffer = bytearray()
        with selectors.DefaultSelector() as selector, self._socket, out:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(out, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    data = self._read(key.fd)
                    if data is None:
                        continue
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is out:
                        self._printed.feed(data)
                    elif not self._take(buffer, data):
                        selector.unregister(self._socket)
                if self._socket not in [k.fileobj for k in selector.get_map().values()]:
                    break  # the conversation is over, whoever still holds the output
            self._printed.drain(out.fileno())
        self._on_exit(self._wait())

    @staticmethod
    def _read(descriptor: int) -> bytes | None:
        try:
            return os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return None
        except OSError:  # reset: it died with unread messages
            return b""

    def _take(self, buffer: bytearray, data: bytes) -> bool:
        """Cut lines out of the buffer and hand them on; False ends the conversation."""
        buffer += data
        *lines, rest = buffer.split(b"\n")
        buffer[:] = rest
        for line in lines:
            try:
                message = self._messages.validate_json(bytes(line))
            except ValidationError as error:
                self.kill(f"It said what we do not understand: {faults(error)[:300]}.")
                return False
            self._on_message(message)
        if len(buffer) > MAX_LINE:
            self.kill(f"It sent a line of more than {MAX_LINE} bytes.")
            return False
        return True

    def _wait(self) -> Exit:
        deadline = time.monotonic() + _CLOSING_S
        while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                self.kill("It closed its socket and did not end.")
            time.sleep(0.02)
        with self._reaping:
            self._kill_session()  # what it left behind; its own id is still taken, as it is not reaped yet
            code = self._process.wait()
        return Exit(code, describe_exit(code, self._why, self._printed.last))


def describe_exit(code: int, why: str = "", last_words: str = "") -> str:
    """How a process ended, in one sentence."""
    if why:
        return why
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"killed by {name}"
        if -code == signal.SIGKILL:
            how += " (out of memory?)"
    else:
        how = f"ended with exit code {code}"
    said = f"; it last said: {last_words[:300]}" if last_words and code else ""
    return f"{how}{said}"


class _Printed:
    """What a child prints: logged line by line, at most so many a minute."""

    def __init__(self, name: str) -> None:
        self._log = logging.getLogger(f"{__name__}.{name}")
        self._rest = b""
        self._since = time.monotonic()
        self._lines = 0
        self.last = ""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE:]
        for line in lines:
            self._line(line)

    def drain(self, descriptor: int) -> None:
        """What is left in the pipe, without waiting for whoever else holds it open."""
        os.set_blocking(descriptor, False)
        with contextlib.suppress(OSError):
            while data := os.read(descriptor, _CHUNK):
                self.feed(data)
        if self._rest:
            self._line(self._rest)

    def _line(self, raw: bytes) -> None:
        text = "".join(c if c.isprintable() else " " for c in raw[:_LINE].decode(errors="replace")).strip()
        if not text:
            return
        self.last = text
        now = time.monotonic()
        if now - self._since > 60:
            self._since, self._lines = now, 0
        self._lines += 1
        if self._lines <= _LOGGED_LINES:
            self._log.info("%s", text)
        elif self._lines == _LOGGED_LINES + 1:
            self._log.warning("prints too much; the rest of this minute is not shown")
