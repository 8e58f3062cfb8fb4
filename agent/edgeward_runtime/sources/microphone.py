"""A microphone, through PortAudio (`sounddevice`): `mic:` is the default one, `mic:NAME` one of several.

An overflow, sound that came while nobody read, is measured by the stream's own clock and told as `lost_s`.
PortAudio lists the devices when it is initialised and never again: while no stream is open, it is
initialised anew for each look, so that what was plugged in since is found. The only importer of sounddevice.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeward_runtime.images import U8
from edgeward_runtime.sounds import F32
from edgeward_runtime.sources.base import SoundBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Rejected, Unavailable

_BUFFER_S = 1.0
"""What PortAudio and the driver keep while this process is busy elsewhere."""
_MAX_CHANNELS = 8
_TURN_S = 10.0
"""How long one may wait for another one that opens or closes a microphone."""


@dataclass(frozen=True)
class Microphone:
    """One device that records."""

    number: int
    name: str
    channels: int
    rate: int


def library() -> Any:
    """sounddevice. Raises Unavailable with what to install."""
    try:
        import sounddevice  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise Unavailable(
            "Microphones need the extra `audio`.", "Install it: pip install 'edgeward[audio]'"
        ) from None
    except OSError:
        raise Unavailable(
            "The PortAudio library is missing.", "Install it: apt install libportaudio2"
        ) from None
    except Exception as error:
        # It is initialised by its import, and the class of its errors goes down with that.
        if type(error).__name__ != "PortAudioError":
            raise
        raise _fails(error) from None
    return sounddevice


class _PortAudio:
    """The library's state, which is the process's: it must not be initialised anew under an open stream."""

    def __init__(self) -> None:
        self.streams = 0
        """Those that are open. Only to be touched in `turn`."""
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Any]:
        """The library, for one thread at a time, its list of devices as new as can be. Raises Unavailable."""
        loaded = library()
        if not self._lock.acquire(timeout=_TURN_S):
            raise Unavailable("Another microphone takes long to open.", "Check its driver.")
        try:
            if not self.streams:
                _initialise(loaded)
            yield loaded
        except loaded.PortAudioError as error:
            raise _fails(error) from None
        finally:
            self._lock.release()

    def close(self, stream: Any) -> None:
        """Never raises, and does not wait for ever: a stream that hangs while it is closed stays counted."""
        mine = self._lock.acquire(timeout=_TURN_S)
        try:
            stream.close(ignore_errors=True)
            if mine:
                self.streams -= 1
        finally:
            if mine:
                self._lock.release()


_PORTAUDIO = _PortAudio()


def _initialise(loaded: Any) -> None:
    while loaded._initialized:
        loaded._terminate()
    loaded._initialize()


def _fails(error: Exception) -> Unavailable:
    return Unavailable(
        f"PortAudio fails: {_line(error)}.", "Is the sound system up? `arecord -l` lists microphones."
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:150]


def microphones() -> list[Microphone]:
    """All devices that record, as PortAudio sees them. Raises Unavailable."""
    with _PORTAUDIO.turn() as loaded:
        return _listed(loaded)


def _listed(loaded: Any) -> list[Microphone]:
    return [
        Microphone(
            int(d["index"]), str(d["name"]), int(d["max_input_channels"]), int(d["default_samplerate"])
        )
        for d in loaded.query_devices()
        if d["max_input_channels"] > 0
    ]


class MicrophoneSource(SoundBase):
    """Chunks as they come, all channels mixed to one."""

    def __init__(self, options: SourceOptions) -> None:
        with _PORTAUDIO.turn() as loaded:
            self._faults = loaded.PortAudioError
            device = _chosen(_listed(loaded), loaded.default.device[0], options.uri.removeprefix("mic:"))
            self._what = f"The microphone {device.name}"
            self._rate = device.rate
            self._stream = self._opened(loaded, device)
            _PORTAUDIO.streams += 1
        self._until = 0.0
        """The stream's time at the end of what was read."""
        self._chunk: F32 = np.zeros(0, np.float32)

    def _opened(self, loaded: Any, device: Microphone) -> Any:
        fault = ""
        for channels in dict.fromkeys((1, min(2, device.channels), min(_MAX_CHANNELS, device.channels))):
            stream, fault = _tried(loaded, device, channels)
            if stream is not None:
                return stream
        raise Unavailable(
            f"{self._what} cannot be opened: {fault}.", "Is it in use? `arecord -l` lists them."
        )

    def grab(self) -> bool:
        """Reads the next chunk."""
        try:
            raw, overflowed = self._stream.read(self.chunk)
            behind = self._stream.read_available / self._rate
            until = float(self._stream.time) - behind
        except self._faults as error:
            raise Unavailable(
                f"{self._what} stopped delivering: {_line(error)}.",
                "Check that it is plugged in.",
            ) from None
        values = np.frombuffer(raw, np.float32).reshape(-1, self._stream.channels)
        heard = np.nan_to_num(values, posinf=1, neginf=-1).mean(axis=1, dtype=np.float32)
        self._chunk = np.clip(heard, -1, 1)
        passed = until - self._until - len(values) / self._rate
        self.lost_s = max(passed, 1 / self._rate) if overflowed and self._until else 0.0
        self._until = until
        return True

    def retrieve(self, buffer: U8 | None) -> F32:
        del buffer
        return self._chunk

    def rewind(self) -> None:
        """A microphone has no first chunk: `grab` never says that it ended."""

    def close(self) -> None:
        _PORTAUDIO.close(self._stream)


def _tried(loaded: Any, device: Microphone, channels: int) -> tuple[Any, str]:
    """A stream that runs; None and why not."""
    try:
        stream = loaded.RawInputStream(
            device=device.number,
            samplerate=device.rate,
            channels=channels,
            dtype="float32",
            latency=_BUFFER_S,
        )
    except (loaded.PortAudioError, ValueError) as error:
        return None, _line(error)
    try:
        stream.start()
    except loaded.PortAudioError as error:
        stream.close(ignore_errors=True)
        return None, _line(error)
    return stream, ""


def _chosen(there: list[Microphone], default: int, wanted: str) -> Microphone:
    if not there:
        raise Unavailable("No microphone is there.", "Plug one in; `arecord -l` lists them.")
    if not wanted:
        return next((m for m in there if m.number == default), there[0])
    found = [m for m in there if str(m.number) == wanted or m.name == wanted]
    found = found or [m for m in there if wanted.lower() in m.name.lower()]
    if not found:
        names = ", ".join(m.name for m in there[:8])
        raise Unavailable(
            f"No microphone is called {wanted}; there are: {names}.", "`edgeward-agent sources`"
        )
    if len(found) > 1:
        raise Rejected(
            f"Several microphones are called {wanted}: {', '.join(m.name for m in found[:8])}.",
            "Name one wholly, or by its number.",
        )
    return found[0]
