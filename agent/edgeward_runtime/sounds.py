"""Sound as models take it: WAV files read, rates converted, and windows cut as a contract's AudioSpec says.

Everything here is mono float32 in -1..1. Invariants: pure, and the same samples in give the same samples
out, however they were cut into chunks on the way; what is read is bounded before it is unpacked; buffers
are made once, so that a device runs this for months without allocating (arrays that `Windows` hands out
are overwritten by the next one).

The converter is a polyphase filter: a sinc under a Kaiser window, 48 of its zeros on each side. Measured
with tones (tests/runtime/test_sounds.py): a tone up to 85 % of the lower Nyquist frequency comes out
95 dB above its error, one beyond it is 90 dB down, and there is no delay.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeward_wire.contract import AudioSpec
from edgeward_wire.errors import Rejected, Unavailable

F32 = npt.NDArray[np.float32]

MAX_WAV_BYTES = 256 << 20
MAX_WAV_HEAD = 1 << 20
MAX_CHANNELS = 64
ENDLESS = 1 << 62
"""Frames of a stream whose length nobody knows."""
_NEARLY_ENDLESS = 0x7FFF0000
_ONE_FRAME = MAX_CHANNELS * 4
RATES = range(1000, 384_001)
SOUND_SUFFIXES = frozenset({".wav", ".wave"})
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_SUBFORMAT_TAIL = bytes.fromhex("000000001000800000aa00389b71")
_FORMATS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32)}
_WAV_STEP = "Convert it, e.g. `sox IN -e signed -b 16 OUT.wav`."

_ZEROS = 48
_BETA = 10.0
_ROLL_OFF = 0.93
_MAX_FILTER = 1 << 23
_BLOCK = 2048


@dataclass(frozen=True)
class Format:
    """How the frames of a WAV file are written, and where they are."""

    encoding: int
    """1: whole numbers, 3: IEEE floats."""
    bits: int
    channels: int
    rate: int
    start: int
    """Position of the first frame, in bytes."""
    frames: int

    @property
    def frame_bytes(self) -> int:
        """Of all channels."""
        return self.channels * self.bits // 8


@dataclass(frozen=True)
class Sound:
    """One channel at `rate` Hz; `samples` is (n,) in -1..1."""

    rate: int
    samples: F32


# --- WAV files


def read_wav(path: Path) -> Sound:
    """A WAV file, its channels mixed to one.

    Raises:
        Rejected: it is no WAV file that we read. Unavailable: it cannot be read.
    """
    return decode_wav(read_wav_bytes(path), path.name)


def read_wav_bytes(path: Path) -> bytes:
    """The file's bytes, at most `MAX_WAV_BYTES`. Raises Rejected, Unavailable."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_WAV_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > MAX_WAV_BYTES:
        raise Rejected(f"{path.name} is longer than {MAX_WAV_BYTES >> 20} MB.", "Cut it into parts.")
    return raw


def wav_format(raw: bytes, name: str = "sound") -> Format:
    """The format of a WAV file's bytes: PCM of 8, 16, 24 or 32 bits, or floats of 32. Raises Rejected."""
    if raw[:4] != b"RIFF" or raw[8:12] != b"WAVE":
        raise Rejected(f"{name} is not a WAV file.", _WAV_STEP)
    described: tuple[int, int, int, int] | None = None
    at = 12
    while at + 8 <= len(raw):
        kind, size = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "little")
        at += 8
        if kind == b"fmt ":
            described = _described(raw[at : at + min(size, 40)], name)
        elif kind == b"data":
            return _with_data(described, len(raw) - at, size, at, name)
        at += size + size % 2
    raise Rejected(f"{name} holds no sound: it has no data.", "Copy it again.")


def _described(chunk: bytes, name: str) -> tuple[int, int, int, int]:
    """(encoding, bits, channels, rate) of a `fmt ` chunk."""
    if len(chunk) < 16:
        raise Rejected(f"{name} is damaged: its format is cut off.", "Copy it again.")
    encoding, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", chunk)
    if encoding == _EXTENSIBLE and len(chunk) >= 40 and chunk[26:40] == _SUBFORMAT_TAIL:
        encoding = int.from_bytes(chunk[24:26], "little")
    if (encoding, bits) not in _FORMATS:
        raise Rejected(
            f"{name} has WAV encoding {encoding} with {bits} bits; read are PCM of 8, 16, 24 and 32 bits and"
            " floats of 32.",
            _WAV_STEP,
        )
    if not 1 <= channels <= MAX_CHANNELS or align != channels * bits // 8 or rate not in RATES:
        raise Rejected(
            f"{name} has {channels} channels of {rate} Hz in frames of {align} bytes: it is damaged."
        )
    return encoding, bits, channels, rate


def _with_data(
    described: tuple[int, int, int, int] | None, there: int, declared: int, start: int, name: str
) -> Format:
    if described is None:
        raise Rejected(f"{name} is damaged: its data come before their format.", "Copy it again.")
    # Programs that write into a pipe do not know the length: they say 0 or the largest number.
    unknown = declared == 0 or declared >= 0xFFFFFF00
    if declared > there and not unknown:
        raise Rejected(
            f"{name} is cut off: {there} of {declared} bytes of sound are there.", "Copy it again."
        )
    encoding, bits, channels, rate = described
    frames = (there if unknown else declared) // (channels * bits // 8)
    if not frames:
        raise Rejected(f"{name} holds no sound: it is empty.")
    return Format(encoding, bits, channels, rate, start, frames)


def decode_wav(raw: bytes, name: str = "sound") -> Sound:
    """A WAV file's bytes as one channel: the mean of its channels, clipped to -1..1. Raises Rejected."""
    form = wav_format(raw, name)
    data = np.frombuffer(raw, np.uint8, form.frames * form.frame_bytes, form.start)
    return Sound(form.rate, to_mono(data, form, name))


def stream_format(head: bytes, name: str = "sound") -> Format | None:
    """The format of a WAV stream of which `head` is the beginning; None: more of it is needed.

    `frames` is what the header says, or `ENDLESS` where whoever writes it does not know. Raises Rejected.
    """
    if not b"RIFF".startswith(head[:4]) or not b"WAVE".startswith(head[8:12]):
        raise Rejected(f"{name} is not a WAV file.", _WAV_STEP)
    described: tuple[int, int, int, int] | None = None
    at = 12
    while at + 8 <= len(head):
        kind, size = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8
        if kind == b"data":
            form = _with_data(described, _ONE_FRAME, 0, at, name)
            # Recorders that never mean to end say 0, or a number near 2 or 4 GB.
            frames = size // form.frame_bytes if 0 < size < _NEARLY_ENDLESS else ENDLESS
            return replace(form, frames=frames)
        if kind == b"fmt ":
            if len(head) < at + min(size, 40):
                return None
            described = _described(head[at : at + min(size, 40)], name)
        at += size + size % 2
    if at > MAX_WAV_HEAD:
        raise Rejected(f"{name} has no sound in its first {MAX_WAV_HEAD >> 10} KB.", _WAV_STEP)
    return None


def to_mono(data: npt.NDArray[np.uint8], form: Format, name: str = "sound") -> F32:
    """Whole frames, (n * frame_bytes,) -> (n,): the mean of the channels, in -1..1. Raises Rejected."""
    values = _to_float(data, form).reshape(-1, form.channels)
    mono = values[:, 0] if form.channels == 1 else values.mean(axis=1, dtype=np.float32)
    if form.encoding == _FLOAT:
        if not np.isfinite(mono).all():
            raise Rejected(f"{name} holds values that are not finite.", _WAV_STEP)
        mono = np.clip(mono, -1, 1)
    return np.ascontiguousarray(mono, np.float32)


def encode_wav(sound: Sound) -> bytes:
    """One channel as a WAV file of 16 bits."""
    values = np.clip(np.rint(sound.samples * 32768), -32768, 32767).astype("<i2").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, _PCM, 1, sound.rate, sound.rate * 2, 2, 16)
    data = struct.pack("<4sI", b"data", len(values))
    return (
        struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(data) + len(values), b"WAVE")
        + form
        + data
        + values
    )


def _to_float(data: npt.NDArray[np.uint8], form: Format) -> F32:
    if form.encoding == _FLOAT:
        return np.asarray(data.view("<f4"), np.float32)
    if form.bits == 8:
        return np.asarray((data.astype(np.float32) - 128) / 128, np.float32)
    if form.bits == 24:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = data.reshape(-1, 3)
        whole = wide.reshape(-1).view("<i4")  # the upper three bytes: 256 times the value
    else:
        whole = data.view(f"<i{form.bits // 8}")
    full = np.float32(1 << (15 if form.bits == 16 else 31))
    return np.asarray(whole.astype(np.float32) / full, np.float32)


# --- rates


class Resampler:
    """Converts a stream from one rate to another, chunk by chunk. Not for several threads."""

    def __init__(self, rate: int, to: int) -> None:
        """Raises Rejected where the two rates would need an unreasonably large filter."""
        common = math.gcd(rate, to)
        self._up, self._down = to // common, rate // common
        stretch = max(1.0, rate / to)
        self._reach = math.ceil(_ZEROS * stretch)
        if self._up != self._down and 2 * self._reach * self._up > _MAX_FILTER:
            raise Rejected(
                f"Sound of {rate} Hz cannot be converted to {to} Hz here: the two have too little in common.",
                "Record or convert it with a usual rate, such as 16000, 44100 or 48000.",
            )
        self._bank = _filters(self._up, self._reach, stretch) if self._up != self._down else None
        self._pending = np.zeros(self._reach - 1, np.float32)
        self._first = 1 - self._reach
        """Number of the first pending sample in the stream."""
        self._next = 0
        """Number of the next sample that goes out."""
        self._came = 0

    def push(self, chunk: F32) -> F32:
        """(n,) samples in -> those that are certain by now, in an array of one's own."""
        if self._bank is None:
            return np.array(chunk, np.float32)
        self._came += len(chunk)
        self._pending = np.concatenate([self._pending, chunk])
        # Sample k needs what came up to `reach` samples past its place, k * down / up.
        certain = -(-(self._came - self._reach) * self._up // self._down)
        return self._make(max(self._next, certain))

    def flush(self) -> F32:
        """The rest, at the end of the stream: silence follows. Then it can begin anew."""
        if self._bank is None:
            return np.zeros(0, np.float32)
        self._pending = np.concatenate([self._pending, np.zeros(self._reach + 1, np.float32)])
        rest = self._make(resampled_length(self._came, self._down, self._up))
        self._pending = np.zeros(self._reach - 1, np.float32)
        self._first, self._next, self._came = 1 - self._reach, 0, 0
        return rest

    def _make(self, end: int) -> F32:
        """The samples from `_next` up to `end`."""
        assert self._bank is not None
        out = np.empty(end - self._next, np.float32)
        if len(out):
            taps = np.lib.stride_tricks.sliding_window_view(self._pending, 2 * self._reach)
            for begin in range(self._next, end, _BLOCK):
                numbers = np.arange(begin, min(begin + _BLOCK, end), dtype=np.int64) * self._down
                rows = numbers // self._up - self._reach + 1 - self._first
                part = out[begin - self._next : begin - self._next + len(rows)]
                np.einsum("nt,nt->n", taps[rows], self._bank[numbers % self._up], out=part)
            self._next = end
        begin = self._next * self._down // self._up - self._reach + 1 - self._first
        self._pending, self._first = self._pending[begin:].copy(), self._first + begin
        return out


def resample(samples: F32, rate: int, to: int) -> F32:
    """(n,) at `rate` Hz -> (ceil(n * to / rate),) at `to` Hz. Raises Rejected for odd rates."""
    one = Resampler(rate, to)
    return np.concatenate([one.push(samples), one.flush()])


def resampled_length(count: int, rate: int, to: int) -> int:
    """How many samples `resample` makes of `count`."""
    return -(-count * to // rate)


def _filters(up: int, reach: int, stretch: float) -> F32:
    """(up, 2 * reach): one filter for each place between two samples; each has the sum 1."""
    taps = np.arange(-reach + 1, reach + 1)[None, :] - np.arange(up)[:, None] / up
    cutoff = _ROLL_OFF / stretch
    shape = np.i0(_BETA * np.sqrt(np.maximum(0, 1 - (taps / reach) ** 2))) / np.i0(_BETA)
    bank = np.sinc(taps * cutoff) * shape
    return np.asarray(bank / bank.sum(axis=1, keepdims=True), np.float32)


# --- windows


class Windows:
    """Cuts a stream into windows. Not for several threads.

    Window k holds the samples from k * hop to k * hop + window, after the `context` samples before them
    (silence before the beginning), so `length` = context + window in all.
    """

    def __init__(self, spec: AudioSpec) -> None:
        self.length = spec.context + spec.window
        self._hop = spec.hop
        self._context = spec.context
        self._buffer = np.zeros(self.length, np.float32)
        self._filled = spec.context
        self._skip = 0

    def push(self, chunk: F32) -> Iterator[F32]:
        """(n,) samples in -> each window (length,) that they complete, valid until the next one.

        What is not taken from the iterator is lost.
        """
        at = 0
        while at < len(chunk) or self._filled == self.length:
            if self._filled == self.length:
                self._advance()
            skipped = min(self._skip, len(chunk) - at)
            self._skip -= skipped
            at += skipped
            taken = min(self.length - self._filled, len(chunk) - at)
            self._buffer[self._filled : self._filled + taken] = chunk[at : at + taken]
            self._filled += taken
            at += taken
            if self._filled == self.length:
                yield self._buffer

    def _advance(self) -> None:
        kept = max(0, self.length - self._hop)
        if kept:
            self._buffer[:kept] = self._buffer[self._hop :]
        self._filled = kept
        self._skip = max(0, self._hop - self.length)

    def reset(self) -> None:
        """Begin anew, with silence before the first sample."""
        self._buffer[:] = 0
        self._filled, self._skip = self._context, 0


def window_count(count: int, spec: AudioSpec) -> int:
    """How many whole windows `count` samples make."""
    return 0 if count < spec.window else 1 + (count - spec.window) // spec.hop


def window_at(samples: F32, start: int, spec: AudioSpec) -> F32:
    """The window that begins at `start`, with its context, in one's own array; silence beyond both ends."""
    out = np.zeros(spec.context + spec.window, np.float32)
    first, last = max(0, start - spec.context), min(len(samples), start + spec.window)
    if first < last:
        begin = first - (start - spec.context)
        out[begin : begin + last - first] = samples[first:last]
    return out
