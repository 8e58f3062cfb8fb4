"""Sound: WAV files of every kind, tones through the converter, and windows that do not care about chunks."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_runtime import sounds
from edgeward_runtime.sounds import (
    Resampler,
    Windows,
    decode_wav,
    read_wav,
    resample,
    resampled_length,
    wav_format,
    window_at,
    window_count,
)
from edgeward_wire.contract import AudioSpec
from edgeward_wire.errors import Rejected, Unavailable

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
TAIL = bytes.fromhex("000000001000800000aa00389b71")


def tone(frequency: float, rate: int, seconds: float = 0.5) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate).astype(np.float32)


def wav(
    values: np.ndarray,
    rate: int = 16_000,
    *,
    bits: int = 16,
    encoding: int = PCM,
    extensible: bool = False,
    declared: int | None = None,
    before: bytes = b"",
) -> bytes:
    """`values` (n,) or (n, channels) in -1..1 as the bytes of a WAV file."""
    values = values.reshape(len(values), -1) if values.size else values.reshape(0, 1)
    channels = values.shape[1]
    if encoding == FLOAT:
        data = values.astype("<f4").tobytes()
    elif bits == 8:
        data = np.round(values * 127 + 128).astype(np.uint8).tobytes()
    else:
        whole = np.round(values.astype(np.float64) * (2 ** (bits - 1) - 1)).astype("<i4")
        data = whole.reshape(-1, 1).view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes()
    align = channels * bits // 8
    kind = EXTENSIBLE if extensible else encoding
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * align, align, bits)
    if extensible:
        form += struct.pack("<HHIH", 22, bits, 0, encoding) + TAIL
    length = len(data) if declared is None else declared
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + before
    chunks += b"data" + struct.pack("<I", length) + data
    return b"RIFF" + struct.pack("<I", (len(chunks) + 4) & 0xFFFFFFFF) + b"WAVE" + chunks


# --- WAV files


@pytest.mark.parametrize(
    ("bits", "encoding", "step"),
    [(8, PCM, 1 / 64), (16, PCM, 1e-4), (24, PCM, 1e-6), (32, PCM, 1e-7), (32, FLOAT, 1e-7)],
)
@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_kind_is_read(bits: int, encoding: int, step: float, extensible: bool, channels: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (1001, channels))  # an odd number of frames, and of bytes for 8 and 24 bits
    sound = decode_wav(wav(values, 22_050, bits=bits, encoding=encoding, extensible=extensible))
    assert sound.rate == 22_050
    assert sound.samples.dtype == np.float32
    np.testing.assert_allclose(sound.samples, values.mean(axis=1), atol=step)


def test_full_scale_is_one() -> None:
    raw = bytearray(wav(np.zeros(2), bits=16))
    raw[-4:] = struct.pack("<hh", -32768, 32767)
    assert decode_wav(bytes(raw)).samples.tolist() == [-1.0, 32767 / 32768]


def test_other_chunks_are_passed_over_and_open_lengths_are_taken() -> None:
    values = tone(440, 16_000)
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    for raw in (wav(values, before=odd), wav(values, declared=0), wav(values, declared=0xFFFFFFFF)):
        assert len(decode_wav(raw).samples) == len(values)


def test_floats_are_clipped_and_must_be_finite() -> None:
    values = np.array([0.5, 3.0, -2.0], np.float32)
    assert decode_wav(wav(values, bits=32, encoding=FLOAT)).samples.tolist() == [0.5, 1.0, -1.0]
    values[1] = np.nan
    with pytest.raises(Rejected, match="not finite"):
        decode_wav(wav(values, bits=32, encoding=FLOAT))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a WAV file"),
        (b"fLaC" + b"\0" * 40, "not a WAV file"),
        (wav(np.zeros(9))[:30], "cut off"),
        (wav(np.zeros(99))[:-10], "188 of 198 bytes"),
        (wav(np.zeros(0)), "empty"),
        (wav(np.zeros(9))[:36], "no data"),
        (wav(np.zeros(9), encoding=7, bits=8), "encoding 7 with 8 bits"),
        (wav(np.zeros(9), rate=12), "12 Hz"),
        (b"RIFF\0\0\0\0WAVEdata\0\0\0\0", "before their format"),
    ],
)
def test_what_is_no_sound_says_why(raw: bytes, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        decode_wav(raw)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_bytes_are_sound_or_rejected(noise: bytes, cut: int) -> None:
    good = wav(np.zeros(20))
    for raw in (noise, good[:cut] + noise, good[:cut] + noise + good[cut + len(noise) :]):
        with contextlib.suppress(Rejected):
            form = wav_format(raw)
            assert len(decode_wav(raw).samples) == form.frames


def test_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(tone(440, 8000), 8000))
    assert read_wav(path).rate == 8000
    monkeypatch.setattr(sounds, "MAX_WAV_BYTES", 100)
    with pytest.raises(Rejected, match=r"a\.wav is longer"):
        read_wav(path)
    with pytest.raises(Unavailable, match="cannot be read"):
        read_wav(tmp_path / "gone.wav")


# --- rates


def level_db(samples: np.ndarray) -> float:
    return 10 * np.log10(max(float(np.mean(np.square(samples, dtype=np.float64))), 1e-30) * 2)


PAIRS = [
    (44_100, 16_000),
    (48_000, 16_000),
    (8_000, 16_000),
    (16_000, 44_100),
    (22_050, 16_000),
    (16_000, 8_000),
]


@pytest.mark.parametrize(("rate", "to"), PAIRS)
def test_a_tone_stays_what_it_is(rate: int, to: int) -> None:
    nyquist = min(rate, to) / 2
    for share in (0.01, 0.3, 0.6, 0.85):
        out = resample(tone(share * nyquist, rate), rate, to)
        assert len(out) == resampled_length(round(rate * 0.5), rate, to)
        expected = tone(share * nyquist, to)[: len(out)]
        middle = slice(len(out) // 4, -len(out) // 4)  # no silence before the beginning within reach
        assert level_db(out[middle] - expected[middle]) < -95


@pytest.mark.parametrize(("rate", "to"), [(44_100, 16_000), (48_000, 16_000), (16_000, 8_000)])
def test_what_the_lower_rate_cannot_hold_is_gone(rate: int, to: int) -> None:
    for share in (1.01, 1.3, 1.9):
        out = resample(tone(share * to / 2, rate), rate, to)
        assert level_db(out[len(out) // 4 : -len(out) // 4]) < -90


def test_the_same_rate_changes_nothing() -> None:
    values = tone(440, 16_000)
    out = resample(values, 16_000, 16_000)
    np.testing.assert_array_equal(out, values)
    assert not np.shares_memory(out, values)


def test_a_constant_stays_constant() -> None:
    out = resample(np.full(4410, 0.25, np.float32), 44_100, 16_000)
    np.testing.assert_allclose(out[100:-100], 0.25, atol=1e-6)


def test_rates_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(Rejected, match="too little in common"):
        Resampler(44_101, 383_999)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*PAIRS, (16_000, 16_000), (11_025, 12_000)]),
    st.lists(st.integers(0, 700), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_chunks_do_not_matter(pair: tuple[int, int], lengths: list[int], seed: int) -> None:
    whole = np.random.default_rng(seed).uniform(-1, 1, sum(lengths)).astype(np.float32)
    one = Resampler(*pair)
    for _ in range(2):  # after its end a stream begins anew
        parts = [one.push(chunk) for chunk in np.split(whole, np.cumsum(lengths)[:-1])]
        got = np.concatenate([*parts, one.flush()])
        np.testing.assert_array_equal(got, resample(whole, *pair))
        assert len(got) == resampled_length(len(whole), *pair)


# --- windows


def test_windows_overlap_and_carry_their_context() -> None:
    spec = AudioSpec(rate=16_000, window=4, hop=2, context=3)
    cut = [w.copy() for w in Windows(spec).push(np.arange(1, 9, dtype=np.float32))]
    assert [w.tolist() for w in cut] == [
        [0, 0, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6],
        [2, 3, 4, 5, 6, 7, 8],
    ]


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        AudioSpec,
        rate=st.just(16_000),
        window=st.integers(1, 12),
        hop=st.integers(1, 30),
        context=st.integers(0, 12),
    ),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_windows_are_the_same_however_the_stream_is_cut(spec: AudioSpec, lengths: list[int]) -> None:
    whole = np.arange(1, sum(lengths) + 1, dtype=np.float32)
    chunks = np.split(whole, np.cumsum(lengths)[:-1]) if lengths else []
    windows = Windows(spec)
    for _ in range(2):
        got = [window.copy() for chunk in chunks for window in windows.push(chunk)]
        assert len(got) == window_count(len(whole), spec)
        for k, window in enumerate(got):
            np.testing.assert_array_equal(window, window_at(whole, k * spec.hop, spec))
        windows.reset()


def test_a_window_is_the_same_buffer_each_time() -> None:
    windows = Windows(AudioSpec(rate=16_000, window=8, hop=8))
    first, second = (next(windows.push(np.full(8, k, np.float32))) for k in (1, 2))
    assert first is second
