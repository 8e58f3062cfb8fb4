"""What sources deliver as the inputs of runs: windows of sound, gaps, rates, and what cannot be fed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.engine import Engine, Recipe, check_supported
from edgeward_runtime.feeds import Pictures, Sounds, Tensors, feedable, feeder, windows_of
from edgeward_runtime.slots import Frame
from edgeward_runtime.tasks.answer import Spoken
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan
from runtime.builders import frame, listener, listener_sidecar, wav_file

RATE = 16_000


def hears(*, rate: int = RATE, window: int = 8, hop: int = 8, context: int = 0) -> Contract:
    audio = {"rate": rate, "window": window, "hop": hop, "context": context}
    source = {"name": "x", "dtype": "float32", "shape": (1, window + context), "bind": "source"}
    output = {"name": "y", "dtype": "float32", "shape": (1, 1)}
    return Contract.model_validate(
        {"task": "vad", "inputs": [{**source, "audio": audio}], "outputs": [output]}
    )


def takes(*inputs: dict[str, object], task: str = "tensor") -> Contract:
    output = {"name": "y", "dtype": "float32", "shape": (1, 1)}
    return Contract.model_validate({"task": task, "inputs": inputs, "outputs": [output]})


def chunk(samples: np.ndarray, *, source: int = 0, rate: int = RATE, lost_s: float = 0.0) -> Frame:
    return Frame(source, samples.astype(np.float32), 0.0, 0.0, 0.0, rate=rate, lost_s=lost_s)


def fed(sounds: Sounds, one: Frame) -> list[list[float]]:
    return [feed["x"][0].tolist() for feed in sounds.feeds(one)]


COUNTED = np.arange(1, 1000, dtype=np.float32)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_windows_do_not_depend_on_how_sound_is_cut(
    sizes: list[int], window: int, hop: int, context: int
) -> None:
    sounds = Sounds(hears(window=window, hop=hop, context=context))
    total = sum(sizes)
    got: list[list[float]] = []
    at = 0
    for size in sizes:
        got += fed(sounds, chunk(COUNTED[at : at + size]))
        at += size
    padded = np.concatenate([np.zeros(context, np.float32), COUNTED[:total]])
    expected = [
        padded[start : start + context + window].tolist()
        for start in range(0, total - window + 1, hop)
        if total >= window
    ]
    assert got == expected


def test_a_gap_begins_the_windows_anew() -> None:
    sounds = Sounds(hears(context=2))
    assert fed(sounds, chunk(COUNTED[:12])) == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 8]]
    after = fed(sounds, chunk(COUNTED[100:110], lost_s=0.1))
    assert after == [[0, 0, *range(101, 109)]], "nothing from before the gap, and nothing invented"
    sounds.forget(0)
    assert fed(sounds, chunk(COUNTED[:8])) == [[0, 0, *range(1, 9)]]


def test_sources_do_not_share_windows() -> None:
    sounds = Sounds(hears())
    assert fed(sounds, chunk(COUNTED[:5])) == []
    assert fed(sounds, chunk(COUNTED[100:108], source=1)) == [[*range(101, 109)]]
    assert fed(sounds, chunk(COUNTED[5:8])) == [[*range(1, 9)]]


@settings(max_examples=20)
@given(
    st.sampled_from([8_000, 22_050, 44_100, 48_000]), st.lists(st.integers(1, 4000), min_size=5, max_size=9)
)
def test_sound_of_another_rate_is_converted(rate: int, sizes: list[int]) -> None:
    """A tone of 440 Hz stays one of 440 Hz, wherever the chunks end."""
    sounds = Sounds(hears(window=64, hop=64))
    total = sum(sizes)
    tone = np.sin(2 * np.pi * 440 * np.arange(total) / rate)
    at, got = 0, []
    for size in sizes:
        got += fed(sounds, chunk(tone[at : at + size], rate=rate))
        at += size
    made = np.array(got).reshape(-1)
    expected = np.sin(2 * np.pi * 440 * np.arange(len(made)) / RATE)
    assert abs(len(made) - total * RATE / rate) < 64 + 50 * max(1.0, RATE / rate) * 4
    inner = slice(200, None)  # before the first sample there was silence
    assert np.abs(made[inner] - expected[inner]).max(initial=0) < 2e-3


def test_another_rate_begins_anew() -> None:
    sounds = Sounds(hears())
    assert fed(sounds, chunk(COUNTED[:5])) == []
    fed(sounds, chunk(np.zeros(4), rate=48_000))
    assert fed(sounds, chunk(COUNTED[5:13])) == [[*range(6, 14)]]


def test_a_source_of_the_wrong_kind_is_named() -> None:
    picture = {"name": "x", "dtype": "float32", "shape": (1, 3, 8, 8), "bind": "source"}
    pictures = Pictures(takes({**picture, "image": {"width": 8, "height": 8}}))
    with pytest.raises(Rejected, match="takes pictures, but the source delivers sound"):
        next(pictures.feeds(chunk(COUNTED[:8])))
    with pytest.raises(Rejected, match="takes sound, but the source delivers pictures"):
        next(Sounds(hears()).feeds(Frame(0, frame("red"), 0.0, 0.0, 0.0)))


def test_what_no_source_can_feed_loads_all_the_same() -> None:
    rows = {"name": "features", "dtype": "float32", "shape": (1, 4), "bind": "source"}
    known = takes(rows, {**rows, "name": "more", "dtype": "int64"})
    check_supported(known, labels=())
    assert not feedable(known)
    tensors = feeder(known)
    assert isinstance(tensors, Tensors)
    assert {name: (a.shape, a.dtype.name) for name, a in tensors.blank().items()} == {
        "features": ((1, 4), "float32"),
        "more": ((1, 4), "int64"),
    }
    with pytest.raises(Rejected, match=r"No source can feed this model: it takes features \(1, 4\), more"):
        next(iter(tensors.feeds(Frame(0, frame("red"), 0.0, 0.0, 0.0))))


def test_windows_of_files(tmp_path: Path) -> None:
    wav_file(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 20))
    wav_file(tmp_path / "b.wav", np.full(24, 0.25))
    contract = hears()
    all_of_them = windows_of(contract, tmp_path, 100)
    assert len(all_of_them) == 2 + 3
    assert all_of_them[0]["x"][0, 0] == pytest.approx(-0.5, abs=1e-4)
    assert all_of_them[4]["x"] == pytest.approx(0.25, abs=1e-4)
    assert len(windows_of(contract, tmp_path / "b.wav", 2)) == 2
    (tmp_path / "none").mkdir()
    with pytest.raises(Rejected, match="holds no sound"):
        windows_of(contract, tmp_path / "none", 1)


# --- through an engine, whose model counts its runs in its state


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    listener_sidecar(tmp_path / "ear.toml")
    path = listener(tmp_path / "ear.onnx")
    known = guess(path).complete()
    assert known.contract.stateful
    engine = Engine(
        Recipe(
            model=ModelRef(path="models/ear/1.json", sha256="0" * 64),
            contract=known.contract,
            file=path,
            labels=(),
            plan=Plan(provider="CPUExecutionProvider", variant="fp32"),
        )
    )
    engine.warm()
    yield engine
    engine.close()


LOUD, QUIET = np.full(160, 0.25), np.zeros(160)


def heard(engine: Engine, one: Frame) -> list[tuple[bool, float]]:
    answers = [look.answer for look in engine.looks(one)]
    return [(a.active, round(a.for_s, 3)) for a in answers if isinstance(a, Spoken)]


def count(engine: Engine, source: int = 0) -> float:
    return float(engine._states[source]["count"].item())


def test_state_is_carried_from_window_to_window(engine: Engine) -> None:
    assert heard(engine, chunk(np.concatenate([LOUD, LOUD, LOUD]))) == [
        (True, 0.01),
        (True, 0.02),
        (True, 0.03),
    ]
    assert heard(engine, chunk(LOUD[:10])) == []
    assert count(engine) == 3
    heard(engine, chunk(LOUD, source=1))
    assert (count(engine), count(engine, 1)) == (3, 1)


def test_a_gap_resets_windows_state_and_hysteresis(engine: Engine) -> None:
    heard(engine, chunk(np.concatenate([LOUD, LOUD])))
    assert heard(engine, chunk(QUIET)) == [(True, 0.03)]
    assert heard(engine, chunk(QUIET[:100], lost_s=0.2)) == []
    assert heard(engine, chunk(QUIET[:60])) == [(False, 0.01)], "the first window after the gap"
    assert count(engine) == 1


def test_what_was_left_in_the_middle_is_a_gap(engine: Engine) -> None:
    """A run that fails takes the rest of its chunk with it: what comes next does not continue it."""
    looks = engine.looks(chunk(np.concatenate([LOUD, LOUD, LOUD[:100]])))
    next(looks)
    looks.close()
    assert heard(engine, chunk(QUIET)) == [(False, 0.01)]
    assert count(engine) == 1


def test_another_rate_is_a_gap(engine: Engine) -> None:
    heard(engine, chunk(LOUD))
    heard(engine, chunk(np.zeros(960), rate=48_000))
    assert count(engine) == 1
