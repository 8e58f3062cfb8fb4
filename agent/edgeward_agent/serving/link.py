"""The server's end of the way to a runner: what it serves, and channels with shared memory.

Invariants: at most `MAX_CHANNELS` requests are at the runner and at most `queue` wait for one of them; a
channel that a fault of the runner touched is thrown away, and the next request opens a new one, so that a
runner that comes back is found again without anybody's doing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeward_agent import local_socket
from edgeward_agent.serving.faults import Fault
from edgeward_agent.serving.wire import MAX_CHANNELS, MAX_MEMORY, aligned
from edgeward_wire.contract import Contract
from edgeward_wire.errors import EdgewardError

_FRESH_S = 1.0
_PATIENCE_S = 2.0
"""For a runner to say what it serves: one that hangs must not hold up who asks for another's model."""
_WAIT_S = 30.0
_ANSWER_S = 40.0
_KEPT = 32 << 20
"""Of shared memory, by an idle channel."""
_STATUS = {"busy": 429, "changed": 503, "rejected": 400, "failed": 500, "away": 503}

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Model:
    """What a pipeline serves."""

    pipeline: str
    name: str
    version: str
    sha256: str
    contract: Contract


class _Channel:
    """One conversation with a runner. Raises OSError, EdgewardError."""

    def __init__(self, run: Path, pipeline: str) -> None:
        self._open = contextlib.ExitStack()
        self._link: socket.socket = self._open.enter_context(
            local_socket.connect(run, pipeline, {"want": "infer"})
        )
        self._descriptor = -1
        self._memory: mmap.mmap | None = None
        self._new = False
        try:
            self._link.settimeout(_ANSWER_S)
            welcome = self._line()
            if not welcome.get("ok"):
                raise Fault(503, str(welcome.get("error")), 1)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._forget()
        self._open.close()

    def _forget(self) -> None:
        self._memory = None  # views of it may be alive: they end it
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def lay(self, pieces: Sequence[Buffer]) -> list[int]:
        """Put these into the shared memory; where each begins."""
        places, end = [], 0
        for piece in pieces:
            places.append(aligned(end))
            end = places[-1] + len(piece)
        if end > MAX_MEMORY:
            raise Fault(413, f"A request has at most {MAX_MEMORY} bytes of tensors.")
        if self._descriptor < 0:
            self._descriptor = os.memfd_create("edgeward-serve", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            self._new = True
        memory = self.mapped(max(end, mmap.PAGESIZE))
        for place, piece in zip(places, pieces, strict=True):
            memory[place : place + len(piece)] = piece
        return places

    def mapped(self, least: int = 0) -> mmap.mmap:
        """All of the memory, which may have grown."""
        size = os.fstat(self._descriptor).st_size
        if size < least:
            size = -(-least // mmap.PAGESIZE) * mmap.PAGESIZE
            os.ftruncate(self._descriptor, size)
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(self._descriptor, size)
        return self._memory

    def ask(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """One request and its answer."""
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        if self._new:
            self._new = False
            sent = socket.send_fds(self._link, [line], [self._descriptor])
            self._link.sendall(line[sent:])
        else:
            self._link.sendall(line)
        return self._line()

    def relax(self) -> None:
        """Between requests: give much memory back."""
        if self._memory is not None and len(self._memory) > _KEPT:
            self._forget()

    def _line(self) -> dict[str, Any]:
        raw = bytearray()
        while not raw.endswith(b"\n"):
            data = self._link.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the runner has gone")
            raw += data
        answer: dict[str, Any] = json.loads(raw)
        return answer


class Link:
    """One pipeline's runner. For any thread."""

    def __init__(self, run: Path, pipeline: str, queue: int) -> None:
        self.pipeline = pipeline
        self._run = run
        self._queue = queue
        self._lock = threading.Lock()
        self._idle: list[_Channel] = []
        self._turn = threading.Semaphore(MAX_CHANNELS)
        self.waiting = 0
        """Requests that wait for a channel."""
        self.busy = 0
        """Requests that are at the runner."""
        self._model: Model | None = None
        self._known_at = -_FRESH_S
        self._asked: threading.Event | None = None
        """Set once the runner has said what it serves; None: it is not being asked."""
        self.frames: int | None = None
        """Live frames since the runner started, when last asked."""

    def model(self) -> Model | None:
        """What it serves; None: nothing. A second old at most, unless the runner is slow to say."""
        with self._lock:
            fresh = time.monotonic() - self._known_at < _FRESH_S
            if self._model is not None and (fresh or self._asked is not None):
                return self._model
            asked = self._asked
            if asked is None:
                asked = self._asked = threading.Event()
                threading.Thread(target=self._learn, args=(asked,), name="model", daemon=True).start()
        asked.wait(_PATIENCE_S)
        return self._model

    def _learn(self, asked: threading.Event) -> None:
        model = None
        try:
            model = self._ask_model()
        finally:
            with self._lock:
                self._model, self._known_at, self._asked = model, time.monotonic(), None
            asked.set()

    def knows(self, name: str) -> bool:
        """Whether it served this model when last asked."""
        return self._model is not None and self._model.name == name

    def _ask_model(self) -> Model | None:
        try:
            about = local_socket.about(self._run, self.pipeline)
        except (EdgewardError, OSError):
            return None
        known, self.frames = self._model, about.get("frames")
        if "sha256" not in about:
            return None
        if known is not None and known.sha256 == about["sha256"]:
            return known
        contract = Contract.model_validate(about["contract"])
        return Model(self.pipeline, about["model"], about["version"], about["sha256"], contract)

    @contextlib.contextmanager
    def channel(self) -> Iterator[_Channel]:
        """A channel for one request. Raises Fault: too many wait (429), or the runner is away (503)."""
        with self._place():
            channel = None
            try:
                with self._lock:
                    channel = self._idle.pop() if self._idle else None
                channel = channel or _Channel(self._run, self.pipeline)
                yield channel
            except (OSError, EdgewardError, ValueError) as error:
                # What a runner that dies leaves behind. ValueError: half a line.
                if channel is not None:
                    channel.close()
                self._drop()
                raise Fault(503, f"The runner of {self.pipeline} is away: it may come back.", 1) from error
            except BaseException:
                if channel is not None:
                    channel.close()
                raise
            channel.relax()
            with self._lock:
                self._idle.append(channel)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        with self._lock:
            if self.waiting >= self._queue:
                raise Fault(429, f"{self.waiting} requests wait already.", 1)
            self.waiting += 1
        got = self._turn.acquire(timeout=_WAIT_S)
        with self._lock:
            self.waiting -= 1
            self.busy += got
        if not got:
            raise Fault(503, f"The model did not get to it within {_WAIT_S:g} s.", 1)
        try:
            yield
        finally:
            with self._lock:
                self.busy -= 1
            self._turn.release()

    def _drop(self) -> None:
        """The runner is another, or none: what is known of it is void."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._known_at = -_FRESH_S
        for channel in idle:
            channel.close()

    def refused(self, answer: Mapping[str, Any]) -> Fault:
        """What a client is told of an answer that is none."""
        code = str(answer.get("code"))
        if code == "changed":
            with self._lock:
                self._known_at = -_FRESH_S
        status = _STATUS.get(code, 500)
        text = f"{answer.get('error')} {answer.get('next_step') or ''}".strip()
        return Fault(status, text, 1 if status in (429, 503) else None)

    def close(self) -> None:
        """Hang up."""
        self._drop()
