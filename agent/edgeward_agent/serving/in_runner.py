"""The runner's end of local serving: `{"want": "infer"}` on its local socket opens a channel.

A channel is a conversation of JSON lines; the first line that has work brings a memfd. Tensors, pictures
and answers lie in that memory, which both sides have mapped. Each request is one job between live frames.

    {"op": "tensors", "model": SHA256, "inputs": [{"name", "dtype", "shape", "offset"}], "outputs": [NAME]}
    {"op": "predict", "model": SHA256, "length": N}     {"op": "check", "model": SHA256}
    → {"ok": true, ...} or {"ok": false, "code": "busy" | "changed" | "rejected" | "failed" | "away", ...}

Invariants: the memory is sealed against shrinking (a page that goes away would kill the runner), at most
`MAX_MEMORY`, and every offset is checked; the inference thread reads inputs where they lie and never waits
for a channel; what is written back is written by the channel's thread.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_agent import results
from edgeward_agent.local_socket import MAX_REQUEST, Request
from edgeward_agent.serving.wire import MAX_CHANNELS, MAX_MEMORY, aligned
from edgeward_runtime import golden, images
from edgeward_runtime.engine import SERVED, Engine, Recipe, Vector
from edgeward_runtime.jobs import Busy, Changed, Job
from edgeward_runtime.pipeline import Pipeline, Saw
from edgeward_runtime.sessions import RunFailed
from edgeward_runtime.slots import Frame
from edgeward_runtime.sounds import F32, decode_wav, resample, wav_format
from edgeward_wire.contract import AudioSpec
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from edgeward_wire.telemetry import Stage

MAX_PIXELS = 1 << 25
MAX_WINDOWS = 2000
_WAIT_S = 30.0
_SOURCE = "predict"

Array = npt.NDArray[Any]


class Desk:
    """The handler of `infer` for one pipeline."""

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        self._pipeline, self._name = pipeline, name
        self._lock = threading.Lock()
        self._free = list(range(MAX_CHANNELS))
        self._vectors = _Vectors()

    def __call__(self, request: Request) -> None:
        """Serve one channel until the other side hangs up."""
        with self._lock:
            if not self._free:
                raise Unavailable(f"{MAX_CHANNELS} channels are open already.", "Close one.")
            number = self._free.pop()
        channel = _Channel(request.link, self._pipeline, self._name, SERVED + number, self._vectors)
        try:
            request.line({"ok": True})
            channel.converse()
        finally:
            channel.close()
            with self._lock:
                self._free.append(number)


class _Vectors:
    """The first golden vector of the model that serves, unpacked when somebody first asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._file: Path | None = None
        self._vector: Vector | None = None

    def first(self, recipe: Recipe) -> Vector | None:
        """None for a model that came without. Raises Rejected, Unavailable."""
        with self._lock:
            if recipe.golden != self._file:
                self._vector = golden.first_vector(recipe.golden) if recipe.golden else None
                self._file = recipe.golden
            return self._vector


class _Channel:
    def __init__(
        self, link: socket.socket, pipeline: Pipeline, name: str, source: int, vectors: _Vectors
    ) -> None:
        self._link, self._pipeline, self._name, self._source = link, pipeline, name, source
        self._vectors = vectors
        self._descriptor = -1
        self._memory: mmap.mmap | None = None

    def close(self) -> None:
        self._memory = None  # not closed: a run that was given up may still read it
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def converse(self) -> None:
        while (raw := self._line()) is not None:
            try:
                answer = self._answer(raw)
            except EdgewardError as error:
                answer = {
                    "ok": False,
                    "code": _code(error),
                    "error": error.what,
                    "next_step": getattr(error, "next_step", ""),
                }
            self._link.sendall(json.dumps(answer, separators=(",", ":")).encode() + b"\n")

    def _line(self) -> bytes | None:
        self._link.settimeout(None)  # an idle channel costs nothing
        raw = bytearray()
        while not raw.endswith(b"\n"):
            data, came, _, _ = socket.recv_fds(self._link, 1 << 16, 1)
            for descriptor in came:
                self._take_memory(descriptor)
            raw += data
            if not data or len(raw) > MAX_REQUEST:
                return None
            self._link.settimeout(_WAIT_S)
        return bytes(raw)

    def _take_memory(self, descriptor: int) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._memory = descriptor, None

    def _mapped(self, least: int = 0) -> mmap.mmap:
        """The memory as it is now, grown to `least` bytes. Raises Rejected."""
        if self._descriptor < 0:
            raise Rejected("No shared memory came with the request.")
        try:
            sealed = fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except OSError:
            sealed = 0
        size = os.fstat(self._descriptor).st_size
        if not sealed or max(size, least) > MAX_MEMORY:
            raise Rejected(
                f"Shared memory is a memfd sealed against shrinking, of at most {MAX_MEMORY} bytes."
            )
        if size < least:
            os.ftruncate(self._descriptor, least)
            size = least
        if not size:
            raise Rejected("The shared memory is empty.")
        if self._memory is None or len(self._memory) < size:
            self._memory = mmap.mmap(self._descriptor, size)
        return self._memory

    def _answer(self, raw: bytes) -> dict[str, Any]:
        try:
            said = json.loads(raw)
            op, model = str(said["op"]), str(said["model"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Rejected("A request is a line of JSON with an op and a model.") from None
        recipe = self._pipeline.serving
        if recipe is None:
            raise Unavailable("No model serves yet.", "See `edgeward-agent status`.")
        if recipe.model.sha256 != model:
            raise Changed("Another model serves by now.", "Ask again.")
        if op == "tensors":
            return self._tensors(said, model)
        if op == "predict":
            return self._predict(said, recipe)
        if op == "check":
            return self._check(recipe)
        raise Rejected(f"{op[:32]!r} is no operation.")

    def _run(self, job: Job) -> float:
        """Milliseconds until it was done."""
        began = time.perf_counter()
        self._pipeline.submit(job)
        job.wait(_WAIT_S)
        return (time.perf_counter() - began) * 1e3

    def _check(self, recipe: Recipe) -> dict[str, Any]:
        vector = self._vectors.first(recipe)
        cosine: list[float | None] = []

        def work(engine: Engine) -> Iterator[None]:
            cosine.append(engine.check(vector))
            yield

        took = self._run(Job(recipe.model.sha256, work))
        return {"ok": True, "took_ms": round(took, 3), "cosine": cosine[0]}

    # --- tensors

    def _tensors(self, said: Mapping[str, Any], model: str) -> dict[str, Any]:
        memory = self._mapped()
        try:
            feeds = {str(one["name"]): _view(memory, one) for one in said["inputs"]}
            wanted = [str(name) for name in said["outputs"]]
            end = max((one["offset"] + feeds[one["name"]].nbytes for one in said["inputs"]), default=0)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise Rejected("The request does not describe its tensors.") from None
        made: dict[str, Array] = {}
        ran = [0.0]

        def work(engine: Engine) -> Iterator[None]:
            began = time.perf_counter()
            made.update(engine.infer(feeds))
            ran[0] = (time.perf_counter() - began) * 1e3
            yield

        took = self._run(Job(model, work))
        feeds = {}
        missing = [name for name in wanted if name not in made]
        if missing:
            raise Rejected(f"The model has no output {missing[0]!r}.")
        outputs = self._write(end, {name: made[name] for name in wanted})
        return {"ok": True, "outputs": outputs, "took_ms": round(took, 3), "ran_ms": round(ran[0], 3)}

    def _write(self, start: int, outputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        at, places = aligned(start), []
        for array in outputs.values():
            places.append(at)
            at = aligned(at + array.nbytes)
        memory = self._mapped(at)
        told = []
        for place, (name, array) in zip(places, outputs.items(), strict=True):
            target = np.frombuffer(memory, array.dtype, array.size, place)
            target[:] = array.reshape(-1)
            told.append(
                {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": place}
            )
        return told

    # --- a picture or a sound

    def _predict(self, said: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
        memory, length = self._mapped(), said.get("length")
        if not isinstance(length, int) or not 0 < length <= len(memory):
            raise Rejected("The request does not say how long its picture or sound is.")
        frame = self._frame(memory[:length], recipe)
        answers: list[dict[str, Any]] = []

        def work(engine: Engine) -> Iterator[None]:
            for look in engine.looks(frame):
                stages: dict[Stage, float] = {"end_to_end": (time.monotonic() - frame.captured_at) * 1e3}
                saw = Saw(_SOURCE, recipe, look, stages, time.time(), "every")
                message = results.message(saw, self._name)
                answers.append(message.model_dump(mode="json", by_alias=True, exclude_defaults=False))
                yield

        self._run(Job(recipe.model.sha256, work))
        if frame.rate is None:
            text = json.dumps(answers[0], ensure_ascii=False).encode()
        else:
            text = json.dumps(_heard(recipe, answers), ensure_ascii=False).encode()
        self._mapped(len(text))[: len(text)] = text
        return {"ok": True, "length": len(text)}

    def _frame(self, raw: bytes, recipe: Recipe) -> Frame:
        """What a request's body holds, decoded here and not on the inference thread. Raises Rejected."""
        fed = next((port for port in recipe.contract.inputs if port.bind == "source"), None)
        takes_sound = fed is not None and fed.audio is not None
        if not takes_sound and (fed is None or fed.image is None):
            raise Rejected(
                "The model takes tensors, neither a picture nor a sound.", "Use /v2/models/NAME/infer."
            )
        began, now = time.perf_counter(), time.monotonic()
        if raw[:4] == b"RIFF":
            if not takes_sound:
                raise Rejected("The model takes a picture, and this is a sound.", "Send a JPEG or PNG.")
            assert fed is not None
            assert fed.audio is not None
            rate = fed.audio.rate
            data = _sound(raw, fed.audio)
            return Frame(self._source, data, now, 0.0, _since(began), rate=rate, lost_s=1.0)
        size = images.jpeg_size(raw) or _png_size(raw)
        if size is None:
            raise Rejected("The body is no JPEG, PNG or WAV.", "Send one of these as it is, not in a form.")
        if takes_sound:
            raise Rejected("The model takes sound, and this is a picture.", "Send a WAV file.")
        if not 0 < size[0] * size[1] <= MAX_PIXELS:
            raise Rejected(
                f"The picture has {size[0]} x {size[1]} pixels; {MAX_PIXELS} are read.", "Shrink it."
            )
        return Frame(self._source, images.decode(raw, "The body"), now, 0.0, _since(began), lost_s=1.0)


def _sound(raw: bytes, spec: AudioSpec) -> F32:
    """A WAV file at the model's rate: how long it is, is seen before it is unpacked. Raises Rejected."""
    form = wav_format(raw, "The body")
    if form.frames / form.rate * spec.rate / spec.hop > MAX_WINDOWS:
        raise Rejected(f"The sound has more than {MAX_WINDOWS} windows of the model.", "Cut it.")
    sound = decode_wav(raw, "The body")
    return sound.samples if sound.rate == spec.rate else resample(sound.samples, sound.rate, spec.rate)


def _heard(recipe: Recipe, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The answers to the windows of a sound, each with when its hop begins."""
    spec = next(port.audio for port in recipe.contract.inputs if port.audio is not None)
    if not answers:
        raise Rejected("The sound is shorter than one window of the model.")
    step = spec.hop / spec.rate
    return {"step_s": step, "windows": [{"at_s": round(k * step, 4), **one} for k, one in enumerate(answers)]}


def _view(memory: mmap.mmap, said: Mapping[str, Any]) -> Array:
    """A tensor where it lies. Raises ValueError, KeyError, TypeError for one that does not."""
    dtype = np.dtype(str(said["dtype"]))
    shape = tuple(int(side) for side in said["shape"])
    count, offset = math.prod(shape), int(said["offset"])
    if dtype.kind not in "fiub" or min(shape, default=1) < 0 or offset < 0 or offset % dtype.itemsize:
        raise ValueError("not a tensor")
    if offset + count * dtype.itemsize > len(memory):
        raise ValueError("beyond the memory")
    if not count:
        return np.empty(shape, dtype)
    return np.frombuffer(memory, dtype, count, offset).reshape(shape)


def _png_size(raw: bytes) -> tuple[int, int] | None:
    if raw[:8] != b"\x89PNG\r\n\x1a\n" or raw[12:16] != b"IHDR":
        return None
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def _code(error: EdgewardError) -> str:
    if isinstance(error, Busy):
        return "busy"
    if isinstance(error, Changed):
        return "changed"
    if isinstance(error, RunFailed):
        return "failed"
    return "away" if isinstance(error, Unavailable) else "rejected"
