"""Samples kept on the device, if its owner asks for them: what the calibration of the next model can use.

    [pipelines.main.samples]
    below = 0.5        # answers less sure than this
    every = 10000      # every so many answers, whatever they say
    drift = 0.3        # while labels come otherwise than they used to

Pictures are kept as JPEG, as the model got them (turned and cropped), sound as WAV of its last seconds: the
directory is what `--samples` takes. Invariants: the directory never holds more files or bytes than allowed,
the oldest go first, and a file of another name than ours is never touched; a file is there whole or not at
all; inference copies what is chosen and waits for nothing: what the writer cannot take is dropped, and
counted. What is kept stays on the device, and only its owner's account reads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeward_runtime import images
from edgeward_runtime.slots import Frame
from edgeward_runtime.sounds import Sound, encode_wav
from edgeward_runtime.tasks.answer import Answer, Classified, Detected, Spoken
from edgeward_wire.errors import EdgewardError, Unavailable

log = logging.getLogger(__name__)

Kept = Literal["unsure", "drift", "every"]

MAX_QUEUED = 2
"""Samples on their way to the disk; a picture of 1080p has 6 MB."""
SOUND_S = 4.0
"""How much sound is kept with a moment of it: most windows are shorter."""
_JPEG_QUALITY = 95
_NAME = re.compile(r"^(\d{8,12})-[a-z0-9._-]{1,64}-(?:unsure|drift|every)\.(?:jpg|wav)$")
_PART = re.compile(r"^\.\d{8,12}-[a-z0-9._-]{1,80}\.part$")
_JOIN_S = 5.0


@dataclass(frozen=True)
class SampleOptions:
    """What is kept, and where. None: not for this reason."""

    directory: Path
    below: float | None = None
    every: int | None = None
    drift: float | None = None
    apart_s: float = 10.0
    """Least time between two samples of a source: a camera that is unsure all night is one scene."""
    most_files: int = 500
    most_bytes: int = 256 << 20


# --- what is worth keeping: pure


def sureness(answer: Answer) -> float | None:
    """How sure the model is, 0..1; None where its answer does not tell. A detector: of its faintest box."""
    if isinstance(answer, Classified):
        return answer.best  # also where the rules leave nothing: of what they do not ask for it may be sure
    if isinstance(answer, Detected):
        return min((box.score for box in answer.boxes), default=None)
    if isinstance(answer, Spoken):
        return max(answer.score, 1 - answer.score)
    return None


class Drift:
    """How far the labels of late are from the usual ones: 0 the same, 1 nothing in common.

    Total variation between the last hundred or two answers and a long mean, looked at once in `BLOCK`
    answers. An answer without a label counts as one of its own; 0 until `KNOWN` blocks are known.
    """

    BLOCK = 50
    KNOWN = 10
    _RECENT = 0.5
    _USUAL = 0.01
    _MAX_LABELS = 256
    _OTHER = "\0other"

    def __init__(self) -> None:
        self.distance = 0.0
        self._counts: dict[str, float] = {}
        self._answers = self._blocks = 0
        self._recent: dict[str, float] = {}
        self._usual: dict[str, float] = {}

    def see(self, labels: Sequence[str]) -> None:
        """One answer's labels; each has its part of it."""
        for label in labels or ("",):
            known = label in self._counts or len(self._counts) < self._MAX_LABELS
            key = label if known else self._OTHER
            self._counts[key] = self._counts.get(key, 0.0) + 1 / max(1, len(labels))
        self._answers += 1
        if self._answers == self.BLOCK:
            self._close()

    def _close(self) -> None:
        block = {label: count / self.BLOCK for label, count in self._counts.items()}
        self._counts, self._answers = {}, 0
        self._blocks += 1
        self._recent = _mixed(self._recent, block, self._RECENT if self._blocks > 1 else 1.0)
        if self._blocks > self.KNOWN:
            self.distance = _variation(self._recent, self._usual)
        self._usual = _mixed(self._usual, block, max(self._USUAL, 1 / self._blocks))


def _mixed(old: Mapping[str, float], new: Mapping[str, float], share: float) -> dict[str, float]:
    mixed = {k: (1 - share) * old.get(k, 0.0) + share * new.get(k, 0.0) for k in {*old, *new}}
    heaviest = sorted(mixed, key=lambda label: (-mixed[label], label))[: Drift._MAX_LABELS]
    return {label: mixed[label] for label in heaviest if mixed[label] > 1e-6}


def _variation(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return min(1.0, 0.5 * sum(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in {*one, *other}))


class Choosing:
    """Which of one source's answers from one model are kept."""

    def __init__(self, options: SampleOptions) -> None:
        self._options = options
        self._drift = Drift() if options.drift is not None else None
        self._since = 0
        self._again_at = float("-inf")

    def why(self, answer: Answer, now: float) -> Kept | None:
        """Why this answer's frame is kept; None: it is not. `now` is monotonic, in seconds."""
        self._since += 1
        if self._drift is not None:
            self._drift.see(answer.labels())
        why = self._reason(answer) if now >= self._again_at else None
        if why is not None:
            self._again_at = now + self._options.apart_s
            self._since = 0
        return why

    def _reason(self, answer: Answer) -> Kept | None:
        options = self._options
        if options.below is not None:
            sure = sureness(answer)
            if sure is not None and sure < options.below:
                return "unsure"
        if self._drift is not None and options.drift is not None and self._drift.distance > options.drift:
            return "drift"
        return "every" if options.every is not None and self._since >= options.every else None


# --- the directory


class Store:
    """A directory with a bound on its files and on their bytes. One thread's."""

    def __init__(self, directory: Path, most_files: int, most_bytes: int) -> None:
        """Takes over what an earlier process left. Raises Unavailable."""
        self._directory, self._most_files, self._most_bytes = directory, most_files, most_bytes
        self._sizes: dict[str, int] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.scandir(directory) as entries:
                for entry in entries:
                    if _PART.match(entry.name):
                        os.unlink(entry.path)
                    elif _NAME.match(entry.name) and entry.is_file(follow_symlinks=False):
                        self._sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
        except OSError as error:
            raise _unavailable(directory, error) from error
        # By number and not by time: a clock that was wrong for a day must not decide what is old.
        self._sizes = dict(sorted(self._sizes.items(), key=lambda item: _number(item[0])))
        self._next = max(map(_number, self._sizes), default=-1) + 1
        self.bytes = sum(self._sizes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(self._sizes)

    def add(self, raw: bytes, source: str, why: Kept, suffix: str) -> Path | None:
        """Keep one, and let the oldest go for it; None: it is larger than all that may be kept.

        Raises:
            Unavailable: the disk is full or gone.
        """
        if len(raw) > self._most_bytes:
            return None
        name = f"{self._next:08d}-{source}-{why}{suffix}"
        part = self._directory / f".{self._next:08d}-{source}.part"
        try:
            while self._sizes and (
                len(self._sizes) >= self._most_files or self.bytes + len(raw) > self._most_bytes
            ):
                self._drop(next(iter(self._sizes)))
            _write(part, raw)
            os.replace(part, self._directory / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise _unavailable(self._directory, error) from error
        self._next += 1
        self._sizes[name] = len(raw)
        self.bytes += len(raw)
        return self._directory / name

    def _drop(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)  # somebody may have taken it away
        self.bytes -= self._sizes.pop(name)


def _write(path: Path, raw: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _number(name: str) -> int:
    return int(name.split("-", 1)[0])


def _unavailable(directory: Path, error: OSError) -> Unavailable:
    return Unavailable(
        f"Samples cannot be kept in {directory}: {error.strerror or error}.",
        "Correct [pipelines.NAME.samples] in agent.toml, or make room.",
    )


# --- frames on their way there


class Tail:
    """The last `SOUND_S` seconds of one source, as chunks of one's own."""

    def __init__(self) -> None:
        self.rate = 0
        self._chunks: deque[npt.NDArray[Any]] = deque()
        self._length = 0

    def push(self, frame: Frame) -> None:
        """Sound that follows, or, after a gap, a beginning."""
        assert frame.rate is not None
        if frame.lost_s or frame.rate != self.rate:
            self._chunks.clear()
            self.rate, self._length = frame.rate, 0
        self._chunks.append(frame.data.copy())
        self._length += len(frame.data)
        while len(self._chunks) > 1 and self._length - len(self._chunks[0]) >= SOUND_S * self.rate:
            self._length -= len(self._chunks.popleft())

    def samples(self) -> npt.NDArray[np.float32]:
        """(n,), a copy."""
        return np.concatenate(list(self._chunks))[-int(SOUND_S * self.rate) :].astype(np.float32)


@dataclass(frozen=True)
class _Sample:
    source: str
    why: Kept
    data: npt.NDArray[Any]
    rate: int | None


class Sampler:
    """Takes chosen frames on the inference thread, and writes them on one of its own."""

    def __init__(
        self, options: SampleOptions, names: Sequence[str], on_crash: Callable[[BaseException], None]
    ) -> None:
        self.options = options
        self.kept = self._refused = self._unwritten = 0
        self._names = tuple(names)
        self._tails = [Tail() for _ in names]
        self._queue: queue.Queue[_Sample | None] = queue.Queue(MAX_QUEUED)
        self._on_crash = on_crash
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    @property
    def dropped(self) -> int:
        """Samples that were chosen and are not there."""
        return self._refused + self._unwritten

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def hear(self, frame: Frame) -> None:
        """Every frame comes by here, before it is looked at: sound is remembered for some seconds."""
        if frame.rate is not None:
            self._tails[frame.source].push(frame)

    def keep(self, frame: Frame, why: Kept) -> None:
        """Copy a frame whose memory is still held, and hand it on if the writer can take it."""
        if self._queue.full():  # only this thread puts: it cannot become full before the put
            self._refused += 1
            return
        sound = frame.rate is not None
        data = self._tails[frame.source].samples() if sound else frame.data.copy()
        self._queue.put_nowait(_Sample(self._names[frame.source], why, data, frame.rate))

    def stop(self) -> None:
        """Write what was taken, then end; a disk that hangs is left behind."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=_JOIN_S)
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            store: Store | None = None
            failing = ""
            while (sample := self._queue.get()) is not None:
                try:
                    store = store or Store(
                        self.options.directory, self.options.most_files, self.options.most_bytes
                    )
                    written = store.add(*_encoded(sample))
                except EdgewardError as error:
                    store = None  # it makes its directory again, and counts what is there now
                    self._unwritten += 1
                    if error.what != failing:
                        failing = error.what
                        log.error("%s", failing)
                    continue
                self.kept, self._unwritten = self.kept + bool(written), self._unwritten + (not written)
                if failing:
                    failing = ""
                    log.info("samples are kept again")
        except BaseException as error:  # noqa: BLE001  the thread's last act: its owner stops the process
            self._on_crash(error)


def _encoded(sample: _Sample) -> tuple[bytes, str, Kept, str]:
    if sample.rate is not None:
        return encode_wav(Sound(sample.rate, sample.data)), sample.source, sample.why, ".wav"
    return images.encode_jpeg(sample.data, _JPEG_QUALITY), sample.source, sample.why, ".jpg"
