"""A microphone, through PortAudio (`sounddevice`): `mic:` is the default one, `mic:NAME` one of several.

An overflow, sound that came while nobody read, is measured by the stream's own clock and told as `lost_s`.
The only importer of sounddevice.
"""

from __future__ import annotations

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
    return sounddevice


def microphones() -> list[Microphone]:
    """All devices that record, as PortAudio sees them. Raises Unavailable."""
    return [
        Microphone(
            int(d["index"]), str(d["name"]), int(d["max_input_channels"]), int(d["default_samplerate"])
        )
        for d in library().query_devices()
        if d["max_input_channels"] > 0
    ]


class MicrophoneSource(SoundBase):
    """Chunks as they come, all channels mixed to one."""

    def __init__(self, options: SourceOptions) -> None:
        self._library = library()
        wanted = options.uri.removeprefix("mic:")
        device = _chosen(self._library, wanted)
        self._what = f"The microphone {device.name}"
        self._rate = device.rate
        self._stream = self._opened(device)
        self._stream.start()
        self._until = 0.0
        """The stream's time at the end of what was read."""
        self._chunk: F32 = np.zeros(0, np.float32)

    def _opened(self, device: Microphone) -> Any:
        fault = ""
        for channels in dict.fromkeys((1, min(2, device.channels), min(_MAX_CHANNELS, device.channels))):
            stream, fault = self._tried(device, channels)
            if stream is not None:
                return stream
        raise Unavailable(
            f"{self._what} cannot be opened: {fault}.", "Is it in use? `arecord -l` lists them."
        )

    def _tried(self, device: Microphone, channels: int) -> tuple[Any, str]:
        try:
            stream = self._library.RawInputStream(
                device=device.number,
                samplerate=self._rate,
                channels=channels,
                dtype="float32",
                latency=_BUFFER_S,
            )
        except (self._library.PortAudioError, ValueError) as error:
            return None, " ".join(str(error).split())[:150]
        return stream, ""

    def grab(self) -> bool:
        """Reads the next chunk."""
        try:
            raw, overflowed = self._stream.read(self.chunk)
            behind = self._stream.read_available / self._rate
            until = float(self._stream.time) - behind
        except self._library.PortAudioError as error:
            raise Unavailable(
                f"{self._what} stopped delivering: {' '.join(str(error).split())[:150]}.",
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
        self._stream.close(ignore_errors=True)


def _chosen(library: Any, wanted: str) -> Microphone:
    there = microphones()
    if not there:
        raise Unavailable("No microphone is there.", "Plug one in; `arecord -l` lists them.")
    if not wanted:
        default = library.default.device[0]
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
