"""Sound from files, pipes and microphones: whole, in order, and with what is missing told."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import missing
from edgeward_runtime import capture, sounds
from edgeward_runtime.backoff import Backoff
from edgeward_runtime.capture import GAPS_QUIET_S, Gaps
from edgeward_runtime.slots import MAX_WAITING_S, Frame, Slots
from edgeward_runtime.sources import kind_of, microphone, open_source, pipe
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from runtime.capturing import Running

RATE = 8000


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    """(n,) int16: every sample differs from its neighbours."""
    return (np.arange(round(seconds * rate)) * 37 % 20_011 - 10_000).astype("<i2")


def wav(values: np.ndarray, rate: int = RATE, size: int | None = None) -> bytes:
    """A WAV file; `size` is what its header says of its data."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    raw = out.getvalue()
    return raw if size is None else raw[:40] + struct.pack("<I", size) + raw[44:]


def wav_file(path: Path, seconds: float = 1.25) -> Path:
    path.write_bytes(wav(tone(seconds)))
    return path


def chunks(source: Source) -> Iterator[np.ndarray]:
    while source.grab():
        yield source.retrieve(None)


# --- files


def test_a_sound_file_gives_all_of_its_sound(tmp_path: Path) -> None:
    path = wav_file(tmp_path / "s.wav")
    source = open_source(SourceOptions("s", str(path)))
    assert (kind_of(SourceOptions("s", str(path))), source.rate, source.fps) == ("sound", RATE, 10)
    parts = list(chunks(source))
    assert [len(part) for part in parts] == [800] * 12 + [400]
    np.testing.assert_array_equal(np.concatenate(parts), sounds.read_wav(path).samples)
    source.rewind()
    np.testing.assert_array_equal(next(chunks(source)), parts[0])
    source.close()


def test_a_sound_file_is_captured_and_ends(tmp_path: Path) -> None:
    path = wav_file(tmp_path / "s.wav")
    with Running(SourceOptions("s", str(path))) as running:
        frames = running.take(13)
        running.await_change(("s", False, "end of file"))
    assert {f.rate for f in frames} == {RATE}
    assert sum(f.lost_s for f in frames) == 0
    np.testing.assert_array_equal(np.concatenate([f.data for f in frames]), sounds.read_wav(path).samples)


def test_a_sound_file_keeps_its_time_and_loops(tmp_path: Path) -> None:
    path = wav_file(tmp_path / "s.wav", seconds=0.2)
    with Running(SourceOptions("s", str(path), realtime=True, loop=True, slot="every", fps=1)) as running:
        frames = running.take(6)
    assert frames[-1].captured_at - frames[0].captured_at >= 0.5 * 0.9, (
        "five chunks of 100 ms; fps is not for sound"
    )
    np.testing.assert_array_equal(frames[0].data, frames[2].data)
    assert sum(f.lost_s for f in frames) == 0


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "holds no sound"),
        (b"RIFF", "holds no sound"),
        (b"ID3 and so on, an MP3", "is not a WAV file"),
        (wav(tone(0.1))[:30], "holds no sound"),
        (wav(tone(0.1))[:20] + b"\x55" + wav(tone(0.1))[21:], "WAV encoding 85"),
    ],
)
def test_what_is_no_sound_is_told(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "s.wav").write_bytes(raw)
    with pytest.raises(Rejected, match=reason):
        open_source(SourceOptions("s", str(tmp_path / "s.wav")))


@given(st.binary(max_size=80))
def test_headers_of_streams_are_read_safely(raw: bytes) -> None:
    for head in (raw, wav(tone(0.01))[:20] + raw, wav(tone(0.01))[:36] + raw):
        try:
            form = sounds.stream_format(head)
        except Rejected:
            continue
        assert form is None or 0 < form.start <= len(head)


@given(st.integers(0, 44))
def test_a_header_that_is_not_whole_asks_for_more(cut: int) -> None:
    form = sounds.stream_format(wav(tone(0.1))[:cut])
    assert (form is not None) == (cut == 44)
    if form is not None:
        assert (form.rate, form.frames, form.start) == (RATE, 800, 44)


def test_what_is_written_is_read_again() -> None:
    values = tone(0.5).astype(np.float32) / 32768
    again = sounds.decode_wav(sounds.encode_wav(sounds.Sound(RATE, values)))
    assert again.rate == RATE
    np.testing.assert_array_equal(again.samples, values)


# --- pipes


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "sound.pipe"
    os.mkfifo(path)
    return path


def write(path: Path, *parts: bytes) -> threading.Thread:
    """Write into a pipe on a thread of its own, which opens it, and closes it at the end."""

    def run() -> None:
        with path.open("wb", buffering=0) as out:
            for part in parts:
                out.write(part)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("size", [None, 0, 0xFFFFFFFF, 0x7FFFF000], ids=["known", "0", "4 GB", "2 GB"])
def test_a_pipe_gives_what_is_written(fifo: Path, size: int | None) -> None:
    raw = wav(tone(0.35), size=size)
    writer = write(fifo, raw[:10], raw[10:50], raw[50:51], raw[51:])
    with Running(SourceOptions("pipe", f"pipe:{fifo}", slot="every")) as running:
        frames = running.take(4)
        running.await_down("has ended")
        writer.join()
        heard = np.concatenate([f.data for f in frames])
        np.testing.assert_array_equal(heard, (tone(0.35).astype(np.float32) / 32768)[: len(heard)])
        assert sum(f.lost_s for f in frames) == 0

        before = len(running.changes)
        writer = write(fifo, raw)
        running.await_up(before)
        assert running.take(1)[0].lost_s > 0, "between the two nobody listened"
        writer.join()
        assert running.changes[-1][1] or "has ended" in running.changes[-1][2]


def test_standard_input_ends_with_the_file() -> None:
    script = (
        "from edgeward_runtime.sources import open_source\n"
        "from edgeward_runtime.sources.options import SourceOptions\n"
        "source, count = open_source(SourceOptions('in', 'pipe:-')), 0\n"
        "while source.grab(): count += len(source.retrieve(None))\n"
        "print(count)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=wav(tone(1.23), size=0), capture_output=True, check=True
    )
    assert int(done.stdout) == round(1.23 * RATE)


def test_what_is_no_pipe_is_told(tmp_path: Path, fifo: Path) -> None:
    with pytest.raises(Unavailable, match="is not there"):
        open_source(SourceOptions("p", f"pipe:{tmp_path}/none"))
    with pytest.raises(Rejected, match="is not a pipe"):
        open_source(SourceOptions("p", f"pipe:{wav_file(tmp_path / 's.wav')}"))
    writer = write(fifo, b"garbage" * 10)
    with pytest.raises(Rejected, match="is not a WAV file"):
        open_source(SourceOptions("p", f"pipe:{fifo}"))
    writer.join()
    writer = write(fifo, wav(tone(0.1))[:20])
    with pytest.raises(Unavailable, match="ended before any sound"):
        open_source(SourceOptions("p", f"pipe:{fifo}"))
    writer.join()


def test_a_recorder_that_leaves_silence_out_is_not_hung_up_on(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has written its header, and will not write another."""
    monkeypatch.setattr(pipe, "READ_S", 0.1)
    monkeypatch.setattr(pipe, "OPEN_S", 0.1)
    raw, head = wav(tone(0.6), size=0), 44
    options = SourceOptions("ears", f"pipe:{fifo}", slot="every")
    with Running(options) as running, fifo.open("wb", buffering=0) as out:
        out.write(raw[: head + 2 * round(0.25 * RATE)])
        heard = running.take(2)
        running.await_down("Nobody writes")
        before = len(running.changes)
        out.write(raw[head + 2 * round(0.25 * RATE) :])
        running.await_up(before)
        heard += running.take(3)
    whole = np.concatenate([frame.data for frame in heard])
    np.testing.assert_array_equal(whole, (tone(0.6).astype(np.float32) / 32768)[: len(whole)])
    assert [frame.lost_s > 0 for frame in heard] == [False, False, True, False, False], "the pause is told"


def test_a_source_that_takes_long_to_fail_is_tried_ever_more_rarely(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it has delivered for a while."""
    monkeypatch.setattr(pipe, "OPEN_S", 0.02)
    monkeypatch.setattr(capture, "_STEADY_S", 0.0)
    with Running(SourceOptions("ears", f"pipe:{fifo}")) as running:
        running.await_down("Nobody writes")
        backoff = running.capture.backoff = Backoff(0.001, 0.1)
        running.find_stale(0, lambda: backoff._next == 0.1)
        writer = write(fifo, wav(tone(0.5)))
        running.find_stale(0, lambda: backoff._next < 0.1)
        writer.join()


def test_a_pipe_that_was_made_anew_is_opened_anew(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "OPEN_S", 0.1)
    with pytest.raises(Unavailable, match="Nobody writes"):
        open_source(SourceOptions("p", f"pipe:{fifo}"))
    fifo.rename(fifo.with_name("old"))
    os.mkfifo(fifo)
    monkeypatch.setattr(pipe, "OPEN_S", 10.0)
    writer = write(fifo, wav(tone(0.1)))
    source = open_source(SourceOptions("p", f"pipe:{fifo}"))
    assert source.grab()
    source.close()
    writer.join()


def test_sound_that_is_none_is_told_as_a_gap(tmp_path: Path) -> None:
    """Of a recording in floats, a tenth of a second that holds a number that is not finite."""
    values = np.linspace(-0.5, 0.5, round(0.4 * RATE), dtype=np.float32)
    values[round(0.15 * RATE)] = np.nan
    path = tmp_path / "floats.wav"
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, RATE, 4 * RATE, 4, 32)
    data = struct.pack("<4sI", b"data", values.nbytes) + values.tobytes()
    path.write_bytes(struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(data), b"WAVE") + form + data)
    with Running(SourceOptions("film", str(path), slot="every")) as running:
        heard = running.take(3)
    assert [round(frame.lost_s, 3) for frame in heard] == [0, 0.1, 0]


def test_a_header_without_end_stays_bounded(fifo: Path) -> None:
    junk = b"RIFF\0\0\0\0WAVE" + b"junk\xf8\x0f\0\0".ljust(8 + 0xFF8, b"\0") * 300

    def flood() -> None:
        with contextlib.suppress(BrokenPipeError), fifo.open("wb", buffering=0) as out:
            while True:
                out.write(junk)

    writer = threading.Thread(target=flood)
    writer.start()
    with pytest.raises(EdgewardError):
        open_source(SourceOptions("p", f"pipe:{fifo}"))
    writer.join()


# --- what waits and what is lost


def chunk(values: np.ndarray, lost_s: float = 0.0) -> Frame:
    return Frame(0, values.astype(np.float32), 1.0, 0, 0, rate=10, lost_s=lost_s)


@given(st.lists(st.tuples(st.integers(1, 15), st.booleans(), st.sampled_from([0.0, 0.0, 0.5])), max_size=40))
def test_sound_waits_in_order_or_its_loss_is_told(steps: list[tuple[int, bool, float]]) -> None:
    """Numbered samples in; out come runs without holes, and each hole is told where it is, and how long."""
    slots, said, number = Slots(["latest"]), 0.0, 0
    taken: list[Frame] = []
    for count, take, lost in steps:
        said += lost
        slots.put(chunk(np.arange(number, number + count), lost))
        number += count
        if take and (frame := slots.take(lambda: False)) is not None:
            assert len(frame.data) <= (MAX_WAITING_S + 1.5) * 10
            taken.append(frame)
    expected = 0.0
    dropped = 0.0
    for frame in taken:
        hole = float(frame.data[0]) - expected
        assert hole >= 0
        assert not hole or frame.lost_s
        dropped += hole / 10
        np.testing.assert_array_equal(np.diff(frame.data), 1)
        expected = float(frame.data[-1]) + 1
    assert sum(f.lost_s for f in taken) <= said + dropped + 1e-6
    if taken and steps[-1][1]:
        assert sum(f.lost_s for f in taken) == pytest.approx(said + dropped)


def test_what_a_slot_drops_is_handed_back() -> None:
    slots = Slots(["latest"])
    assert slots.put(chunk(np.zeros(15))) == 0
    assert slots.put(chunk(np.zeros(10))) == 0, "it waits behind the first"
    assert slots.put(chunk(np.zeros(10))) == 2.5
    assert slots.put(Frame(0, np.zeros(30, np.float32), 1.0, 0, 0, rate=20)) == 1.0, "of another rate"
    frame = slots.take(lambda: False)
    assert isinstance(frame, Frame)
    assert frame.lost_s == 3.5
    assert slots.take_dropped() == [2]


def test_gaps_are_said_once_and_whole() -> None:
    gaps = Gaps()
    assert gaps.due(0.0) is None
    gaps.lost(0.5)
    assert gaps.due(0.0) == "0.5 s of sound were lost"
    gaps.lost(0.25)
    assert gaps.due(1.0) is None
    gaps.lost(0.25)
    assert gaps.due(GAPS_QUIET_S - 1) is None
    assert gaps.due(GAPS_QUIET_S) == "0.5 s of sound were lost", "though nothing is lost now"
    assert gaps.due(GAPS_QUIET_S + 1) is None
    assert gaps.due(2 * GAPS_QUIET_S) == "", "it is over"
    assert gaps.due(9 * GAPS_QUIET_S) is None


def test_sound_that_waited_too_long_for_inference_is_reported(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that is written into while nobody takes what comes out: every loss is told, and then its end."""
    monkeypatch.setattr(capture, "GAPS_QUIET_S", 0.2)
    with Running(SourceOptions("ears", f"pipe:{fifo}")) as running, fifo.open("wb", buffering=0) as out:
        out.write(wav(tone(2 * MAX_WAITING_S + 0.5), size=0))
        running.find_stale(0, lambda: running.changes[1:] and running.changes[-1] == ("ears", True, ""))
        told = [detail for _, _, detail in running.changes if detail]
        assert sum(float(detail.removesuffix(" s of sound were lost")) for detail in told) == 4
        (frame,) = running.take(1)
        assert frame.lost_s == pytest.approx(4)


def test_what_was_lost_is_not_told_of_a_source_that_is_down(fifo: Path) -> None:
    writer = write(fifo, wav(tone(2 * MAX_WAITING_S + 0.5)))
    with Running(SourceOptions("ears", f"pipe:{fifo}")) as running:
        running.await_down("has ended")
        writer.join()
        before = list(running.changes)
        assert [up for _, up, _ in before] == [True, True, False]
        running.capture._tell_gaps(time.monotonic() + 2 * GAPS_QUIET_S)
        assert running.changes == before


# --- microphones


def hear(tmp_path: Path, uri: str, *, later: bool = False) -> dict[str, Any]:
    """PortAudio in a process of its own, with ALSA's `file` in place of a sound card.

    `later`: the one that is called studio is plugged in once it was looked for.
    """
    try:
        microphone.library()
    except Unavailable as error:
        missing(f"what a microphone needs ({error.what})")
    (tmp_path / "in.raw").write_bytes((np.arange(1 << 17, dtype="<f4") / (1 << 18)).tobytes())
    recorder = f'type file slave.pcm {{ type null }} file "/dev/null" infile "{tmp_path}/in.raw" format "raw"'
    one, other = (
        f"pcm.!default {{ {recorder} }}\n",
        f"pcm.studio {{ type plug slave.pcm {{ {recorder} }} }}\n",
    )
    (tmp_path / "asound.conf").write_text(one if later else one + other)
    (tmp_path / "later.conf").write_text(one + other)
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("hear.py")),
            uri,
            *([str(tmp_path / "later.conf")] if later else []),
        ],
        env={
            **os.environ,
            "ALSA_CONFIG_PATH": str(tmp_path / "asound.conf"),
            "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("uri", ["mic:", "mic:default", "mic:STUD", "mic:0"])
def test_a_microphone_is_heard(tmp_path: Path, uri: str) -> None:
    told = hear(tmp_path, uri)
    assert sorted(told["names"]) == ["default", "studio"]
    assert told["lost_s"] == 0
    heard = np.array(told["heard"]) * (1 << 18)
    assert len(heard) == 3 * round(told["rate"] / 10)
    np.testing.assert_allclose(np.diff(heard), 1)


def test_a_microphone_that_is_not_there_is_told(tmp_path: Path) -> None:
    told = hear(tmp_path, "mic:kitchen")
    assert told["error"].startswith("No microphone is called kitchen; there are: ")


def test_a_microphone_that_is_plugged_in_later_is_found(tmp_path: Path) -> None:
    told = hear(tmp_path, "mic:studio", later=True)
    assert told["names"] == ["default"]
    assert len(told["heard"]) == 3 * round(told["rate"] / 10)


class PortAudio:
    """In place of sounddevice: faults that no driver here has."""

    class PortAudioError(Exception):
        pass

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self._initialized = 1
        self.initialised = self.closed = 0
        self.default = SimpleNamespace(device=(0, 0))

    def _at(self, place: str) -> None:
        if self.fails_at == place:
            raise self.PortAudioError("Error\nin the driver [PaErrorCode -9999]")

    def _terminate(self) -> None:
        self._initialized -= 1

    def _initialize(self) -> None:
        self._at("initialise")
        self._initialized += 1
        self.initialised += 1

    def query_devices(self) -> list[dict[str, Any]]:
        self._at("query")
        return [{"index": 0, "name": "desk", "max_input_channels": 1, "default_samplerate": 16_000.0}]

    def RawInputStream(self, **_: object) -> PortAudio:  # noqa: N802  as sounddevice calls it
        self._at("open")
        return self

    def start(self) -> None:
        self._at("start")

    def close(self, *, ignore_errors: bool) -> None:
        self.closed += ignore_errors


@pytest.mark.parametrize("fails_at", ["initialise", "query", "open", "start"])
def test_what_a_driver_fails_with_is_told(fails_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = PortAudio(fails_at)
    monkeypatch.setattr(microphone, "library", lambda: driver)
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"Error in the driver \[PaErrorCode -9999\]\."):
            open_source(SourceOptions("m", "mic:"))
    assert driver.closed == (2 if fails_at == "start" else 0)
    driver.fails_at = ""
    open_source(SourceOptions("m", "mic:")).close()


def test_an_open_microphone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = PortAudio("")
    monkeypatch.setattr(microphone, "library", lambda: driver)
    one = open_source(SourceOptions("m", "mic:"))
    other = open_source(SourceOptions("m", "mic:desk"))
    one.close()
    microphone.microphones()
    assert driver.initialised == 1, "it would end under the stream that is open"
    other.close()
    microphone.microphones()
    assert driver.initialised == 2


def test_without_the_extra_it_is_named() -> None:
    script = (
        "import sys; sys.modules['sounddevice'] = None\n"
        "from edgeward_runtime.sources import open_source\n"
        "from edgeward_runtime.sources.options import SourceOptions\n"
        "from edgeward_wire.errors import Unavailable\n"
        "try: open_source(SourceOptions('m', 'mic:'))\n"
        "except Unavailable as error: print(error.what, error.next_step)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "Microphones need the extra `audio`. Install it: pip install 'edgeward[audio]'\n"
