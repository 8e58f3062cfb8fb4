"""Voice activity: when speech begins and ends, for each source by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.engine import Engine, Recipe
from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.slots import Frame
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks import reader
from edgeward_runtime.tasks.answer import Spoken
from edgeward_runtime.tasks.vad import BAND, HOLD_S, Hearing
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan
from runtime.builders import spoken

STEP_S = 0.032
SILERO = Path(__file__).resolve().parents[2] / "models/zoo/silero-vad.onnx"
RATE = 16_000

SOUND = {"name": "x", "dtype": "float32", "shape": (1, 512), "bind": "source"}
VAD = Contract.model_validate(
    {
        "task": "vad",
        "inputs": [{**SOUND, "audio": {"rate": RATE, "window": 512, "hop": 512}}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": (1, 1)}],
    }
)


def hear(scores: Sequence[float], *, step_s: float = STEP_S, threshold: float = 0.5) -> list[bool]:
    hearing, heard = Hearing(), []
    for score in scores:
        hearing.hear(score, step_s, threshold)
        heard.append(hearing.active)
    return heard


def test_speech_begins_at_the_threshold() -> None:
    assert hear([0.1, 0.49, 0.5, 0.9]) == [False, False, True, True]
    assert hear([0.5, 0.7], threshold=0.7) == [False, True]


def test_speech_ends_when_it_has_been_low_for_long_enough() -> None:
    assert hear([0.9, *[0.1] * 4]) == [True, True, True, True, False]
    assert hear([0.9, 0.1], step_s=0.1) == [True, False]


def test_a_short_breath_is_no_end() -> None:
    assert all(hear([0.9, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.9]))


def test_between_the_thresholds_nothing_changes() -> None:
    assert all(hear([0.9, *[0.4] * 50]))
    assert not any(hear([0.4] * 50))
    assert hear([0.9, 0.1, *[0.4] * 20, 0.1])[-2:] == [True, False], "the time since it fell counts"


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.2, 0.9), st.floats(0.01, 0.5))
def test_what_can_be_said_of_any_sound(scores: list[float], threshold: float, step_s: float) -> None:
    hearing, before, total = Hearing(), False, 0.0
    for score in scores:
        hearing.hear(score, step_s, threshold)
        total += step_s
        if score >= threshold:
            assert hearing.active
        if hearing.active and not before:
            assert score >= threshold
            assert hearing.for_s == step_s
        if before and not hearing.active:
            assert score < threshold - BAND
            assert hearing.for_s >= HOLD_S - 1e-6, "silence counts from where the score fell"
        assert 0 < hearing.for_s <= total + 1e-6
        before = hearing.active


def test_each_source_is_heard_by_itself_and_a_gap_forgets_it() -> None:
    task = reader(VAD, (Port("y", "float32", (1, 1)),), ())
    loud, quiet = [np.array([[0.9]], np.float32)], [np.array([[0.4]], np.float32)]

    def answer(source: int, outputs: list[np.ndarray], *, fresh: bool = False) -> Spoken:
        spoken = task(outputs, View(source, Rules(), step_s=STEP_S, fresh=fresh))
        assert isinstance(spoken, Spoken)
        return spoken

    assert answer(0, loud).active
    assert not answer(1, quiet).active
    second = answer(0, quiet)
    assert (second.active, second.for_s) == (True, pytest.approx(2 * STEP_S))
    assert second.labels() == ("speech",)
    after = answer(0, quiet, fresh=True)
    assert (after.active, after.for_s, after.labels()) == (False, STEP_S, ("silence",))


def test_the_threshold_is_the_sources() -> None:
    task = reader(VAD, (Port("y", "float32", (1, 1)),), ())
    output = [np.array([[0.6]], np.float32)]
    for rules, active in ((Rules(), True), (Rules({"speech": 0.7}), False), (Rules({"*": 0.55}), True)):
        assert task(output, View(active, rules, fresh=True)).labels() == (("silence", "speech")[active],)


def test_of_two_classes_the_second_is_speech() -> None:
    two = VAD.model_copy(
        update={"outputs": (VAD.outputs[0].model_copy(update={"shape": (1, 2), "activation": "softmax"}),)}
    )
    task = reader(two, (Port("y", "float32", (1, 2)),), ())
    answer = task([np.array([[-2, 2]], np.float32)], View(0, Rules()))
    assert isinstance(answer, Spoken)
    assert answer.score > 0.9


def test_what_is_no_score_is_rejected_or_fails() -> None:
    with pytest.raises(Rejected, match="has 3 numbers"):
        reader(VAD, (Port("y", "float32", (1, 3)),), ())
    task = reader(VAD, (Port("y", "float32", (1, None)),), ())
    with pytest.raises(RunFailed, match="5 numbers"):
        task([np.zeros((1, 5), np.float32)], View(0, Rules()))
    with pytest.raises(RunFailed, match="not finite"):
        task([np.array([[np.nan]], np.float32)], View(0, Rules()))


# --- Silero VAD, on something like a voice


def silero() -> Engine:
    state = {"dtype": "float32", "shape": (2, 1, 128), "bind": "state:h"}
    contract = Contract.model_validate(
        {
            "task": "vad",
            "inputs": [
                {
                    "name": "input",
                    "dtype": "float32",
                    "shape": (1, 576),
                    "bind": "source",
                    "audio": {"rate": RATE, "window": 512, "hop": 512, "context": 64},
                },
                {"name": "state", **state},
                {"name": "sr", "dtype": "int64", "shape": (), "bind": "const", "const": (RATE,)},
            ],
            "outputs": [{"name": "output", "dtype": "float32", "shape": (1, 1)}, {"name": "stateN", **state}],
        }
    )
    engine = Engine(
        Recipe(
            model=ModelRef(path="models/silero-vad/1.json", sha256="0" * 64),
            contract=contract,
            file=SILERO,
            labels=(),
            plan=Plan(provider="CPUExecutionProvider", variant="fp32"),
        )
    )
    engine.warm()
    return engine


def chunks(sound: np.ndarray, rate: int, *, source: int = 0, lost_s: float = 0.0) -> list[Frame]:
    """Sound as a microphone delivers it: 30 ms at a time."""
    size = int(0.03 * rate)
    return [
        Frame(source, sound[at : at + size], 0.0, 0.0, 0.0, rate=rate, lost_s=lost_s if not at else 0.0)
        for at in range(0, len(sound), size)
    ]


def answers(engine: Engine, frames: list[Frame]) -> list[Spoken]:
    found = [look.answer for frame in frames for look in engine.looks(frame)]
    assert all(isinstance(answer, Spoken) for answer in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_silero_hears_where_a_voice_is(rate: int) -> None:
    """Half a second of hiss, two seconds of voice, a second of hiss; a window is 32 ms."""
    rng = np.random.default_rng(0)
    hiss = rng.normal(0, 0.005, rate).astype(np.float32)
    sound = np.concatenate([hiss[: rate // 2], spoken(2.0, rate), hiss])
    engine = silero()
    heard = answers(engine, chunks(sound, rate))
    active = np.flatnonzero([answer.active for answer in heard])
    assert len(heard) == pytest.approx(3.5 / STEP_S, abs=2)
    assert (np.diff(active) == 1).all(), "one stretch"
    assert active[0] * STEP_S == pytest.approx(0.5, abs=0.15)
    assert active[-1] * STEP_S == pytest.approx(2.5, abs=0.4)
    assert heard[active[-1]].for_s == pytest.approx(2.0, abs=0.4)
    engine.close()


def test_silero_keeps_two_microphones_apart() -> None:
    """Interleaved with a silent one it hears exactly what it hears alone."""
    voice, silence = spoken(0.6), np.zeros(int(0.6 * RATE), np.float32)
    engine = silero()
    alone = answers(engine, chunks(voice, RATE))
    engine.close()
    engine = silero()
    both: dict[int, list[Spoken]] = {0: [], 1: []}
    for pair in zip(chunks(voice, RATE), chunks(silence, RATE, source=1), strict=True):
        for frame in pair:
            both[frame.source] += answers(engine, [frame])
    engine.close()
    assert [a.score for a in both[0]] == [a.score for a in alone]
    assert not any(a.active for a in both[1])


def test_silero_begins_anew_after_a_gap() -> None:
    voice = spoken(0.6)
    engine = silero()
    first = answers(engine, chunks(voice, RATE))
    again = answers(engine, chunks(voice, RATE, lost_s=0.5))
    assert [a.score for a in again] == [a.score for a in first]
    on = answers(engine, chunks(voice, RATE))
    assert [a.score for a in on] != [a.score for a in first], "without a gap it goes on"
    engine.close()
