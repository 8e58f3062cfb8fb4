"""Trying sources: whether each delivers, what, and how fast; and what one sees or hears now.

Every source is tried on a thread of its own, because a driver may hang; nobody waits longer than asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from edgeward_runtime import images, sounds
from edgeward_runtime.images import U8
from edgeward_runtime.sounds import Sound
from edgeward_runtime.sources import kind_of, open_source
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.framing import Framing
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

PATIENCE_S = 25.0
"""Longer than any source may take to open and say why it cannot."""
WARM_S = 0.7
"""Cameras find their exposure meanwhile."""
MAX_SOUND_S = 60.0
MAX_DEVICES = 16
_BAD_PICTURES = 50

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What a source gave."""

    kind: str
    up: bool
    width: int | None = None
    height: int | None = None
    """As the model sees it: turned and cut."""
    rate: int | None = None
    """Of sound, in samples a second."""
    fps: float | None = None
    """Measured of what delivers at its own pace, claimed by a file; None for sound."""
    lost_s: float = 0.0
    reason: str = ""
    next_step: str = ""


@dataclass(frozen=True)
class Device:
    """Something on this machine that could be a source."""

    uri: str
    name: str


def cameras(root: Path = Path("/sys")) -> list[Device]:
    """The V4L2 devices that capture: the first of each camera's nodes, the others carry metadata."""
    found: list[tuple[int, Device]] = []
    for node in root.glob("class/video4linux/video*"):
        number = node.name.removeprefix("video")
        if number.isdecimal() and _line(node / "index") in ("0", ""):
            found.append((int(number), Device(f"/dev/{node.name}", _line(node / "name"))))
    return [device for _, device in sorted(found, key=lambda item: item[0])][:MAX_DEVICES]


def _line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(200).decode(errors="replace").strip()
    except OSError:
        return ""


class _Call(threading.Thread, Generic[T]):
    """One call on a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="try-source", daemon=True)
        self._call = call
        self.value: T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._call()
        except BaseException as error:  # noqa: BLE001  raised again where it is asked for
            self.error = error

    def result(self, deadline: float) -> T | None:
        """None: it is not done yet. Raises what the call raised."""
        self.join(max(0.0, deadline - time.monotonic()))
        if self.error is not None:
            raise self.error
        return self.value


def bounded(call: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Call it. Raises Unavailable when it does not return in time: its thread is left behind."""
    one = _Call(call)
    one.start()
    value = one.result(time.monotonic() + patience_s)
    if value is None:
        raise Unavailable(f"It did not answer within {patience_s:.0f} s.", "Check the device or its driver.")
    return value


def try_all(
    sources: Sequence[SourceOptions], seconds: float, patience_s: float = PATIENCE_S
) -> list[Findings]:
    """Try all of them at the same time, each for so many seconds once it is open."""
    calls = [_Call(partial(try_source, options, seconds)) for options in sources]
    for call in calls:
        call.start()
    deadline = time.monotonic() + seconds + patience_s
    late = f"It did not answer within {seconds + patience_s:.0f} s."
    return [
        call.result(deadline) or Findings(_kind(options), False, reason=late)
        for call, options in zip(calls, sources, strict=True)
    ]


def try_source(options: SourceOptions, seconds: float) -> Findings:
    """Open it and read for a while. What is wrong with it is among the findings, and not raised."""
    try:
        source = open_source(options)
        try:
            return _measure(options, source, seconds)
        finally:
            source.close()
    except EdgewardError as error:
        return Findings(_kind(options), False, reason=error.what, next_step=error.next_step)


def _kind(options: SourceOptions) -> str:
    try:
        return kind_of(options)
    except EdgewardError:
        return "unknown"


def _measure(options: SourceOptions, source: Source, seconds: float) -> Findings:
    kind, frames, lost = kind_of(options), 0, 0.0
    first = _frame(source, options)
    since, live = time.monotonic(), options.live and not source.recorded
    while live and time.monotonic() - since < seconds:
        _frame(source, options)
        frames += 1
        lost += source.lost_s
    if source.rate is not None:
        return Findings(kind, True, rate=source.rate, lost_s=lost)
    fps = frames / max(time.monotonic() - since, 1e-9) if frames else source.fps
    return Findings(kind, True, first.shape[1], first.shape[0], fps=fps)


def _frame(source: Source, options: SourceOptions) -> npt.NDArray[Any]:
    """The next one that is readable. Raises Unavailable, Rejected."""
    for bad in range(_BAD_PICTURES):
        if not source.grab():
            break
        try:
            data = source.retrieve(None)
        except Rejected:
            if bad == _BAD_PICTURES - 1:
                raise
            continue
        if source.rate is not None:
            return data
        framing = Framing(options.rotate, options.crop)
        return framing.turn(framing.cut(data), None)
    raise Unavailable("It holds nothing readable.", "Check the file.")


def look(options: SourceOptions, sound_s: float) -> U8 | Sound:
    """One picture, or so many seconds of sound (fewer at the end of a file). Raises Unavailable, Rejected."""
    source = open_source(options)
    try:
        data, since = _frame(source, options), time.monotonic()
        if source.rate is None:
            while options.live and not source.recorded and time.monotonic() - since < WARM_S:
                data = _frame(source, options)
            return np.ascontiguousarray(data)
        wanted = round(min(sound_s, MAX_SOUND_S) * source.rate)
        parts, count = [data], len(data)
        while count < wanted and source.grab():
            if source.lost_s:
                raise Unavailable(f"{source.lost_s:.3g} s of sound were lost meanwhile.", "Try again.")
            parts.append(source.retrieve(None))
            count += len(parts[-1])
        return Sound(source.rate, np.concatenate(parts)[:wanted])
    finally:
        source.close()


def encoded(seen: U8 | Sound, suffix: str) -> bytes:
    """As a file of that suffix. Raises Rejected when it is not one for this."""
    if isinstance(seen, Sound):
        if suffix not in sounds.SOUND_SUFFIXES:
            raise Rejected("This source gives sound.", "Name a file that ends in .wav.")
        return sounds.encode_wav(seen)
    if suffix in (".jpg", ".jpeg"):
        return images.encode_jpeg(seen)
    if suffix == ".png":
        return images.encode_png(seen)
    raise Rejected("This source gives pictures.", "Name a file that ends in .jpg or .png.")
