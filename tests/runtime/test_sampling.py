"""Samples: what is chosen, how the directory stays bounded, and that calibration takes what is there."""

from __future__ import annotations

import queue
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.samples import open_samples
from edgeward_runtime import images
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.engine import Recipe
from edgeward_runtime.pipeline import Happening, Pipeline, Saw
from edgeward_runtime.sampling import SOUND_S, Choosing, Drift, SampleOptions, Sampler, Store, sureness
from edgeward_runtime.slots import Buffers, Frame
from edgeward_runtime.sounds import read_wav
from edgeward_runtime.sources.options import SourceOptions
from edgeward_runtime.tasks.answer import Answer, Classified, Detected, Found, Raw, Scored, Spoken
from edgeward_wire.errors import Unavailable
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan
from runtime.builders import frame, int8_classifier, label_names, labels_file, picture_directory, sidecar_file


def classified(label: str, score: float = 0.9) -> Classified:
    return Classified((Scored(0, label, score), Scored(1, "other", 1 - score)), score)


def detected(*scores: float) -> Detected:
    return Detected(tuple(Found(0, "car", score, (0, 0, 1, 1)) for score in scores), (10, 10))


@pytest.mark.parametrize(
    ("answer", "sure"),
    [
        (classified("a", 0.4), 0.4),
        (Classified((), 0.3), 0.3),
        (Classified((), 0.95), 0.95),
        (detected(0.9, 0.3, 0.6), 0.3),
        (detected(), None),
        (Spoken(False, 0.1, 1.0), 0.9),
        (Spoken(True, 0.6, 1.0), 0.6),
        (Raw(()), None),
    ],
)
def test_how_sure_an_answer_is(answer: Answer, sure: float | None) -> None:
    assert sureness(answer) == (sure if sure is None else pytest.approx(sure))


def chosen(options: SampleOptions, answers: list[Answer], step_s: float = 1.0) -> list[str | None]:
    choosing = Choosing(options)
    return [choosing.why(answer, step_s * k) for k, answer in enumerate(answers)]


HERE = Path()


def test_what_is_unsure_is_kept_but_not_all_night() -> None:
    options = SampleOptions(HERE, below=0.5, apart_s=3.0)
    answers: list[Answer] = [classified("a", score) for score in (0.9, 0.4, 0.4, 0.4, 0.4, 0.6)]
    assert chosen(options, answers) == [None, "unsure", None, None, "unsure", None]


def test_every_nth_is_kept_and_one_that_came_too_early_is_made_up_for() -> None:
    answers: list[Answer] = [classified("a")] * 12
    assert [k for k, why in enumerate(chosen(SampleOptions(HERE, every=3, apart_s=0), answers)) if why] == [
        2,
        5,
        8,
        11,
    ]
    late = chosen(SampleOptions(HERE, every=3, apart_s=4.5), answers)
    assert [k for k, why in enumerate(late) if why] == [2, 7]
    assert not any(chosen(SampleOptions(HERE, every=3, below=None, apart_s=1e9), answers)[3:])


def test_what_comes_otherwise_than_usual_is_drift() -> None:
    rng = random.Random(0)
    usual: list[Answer] = [classified(rng.choices("abc", (6, 3, 1))[0]) for _ in range(3000)]
    unusual: list[Answer] = [classified(rng.choices("abc", (1, 3, 6))[0]) for _ in range(500)]
    options = SampleOptions(HERE, drift=0.3, apart_s=0)
    found = chosen(options, [*usual, *unusual])
    assert not any(found[:3000])
    assert found[3000:].index("drift") <= 3 * Drift.BLOCK
    assert set(found[3200:]) == {"drift"}


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=3), max_size=900))
def test_a_distance_is_between_0_and_1(answers: list[list[str]]) -> None:
    drift = Drift()
    for labels in answers:
        drift.see(labels)
        assert 0 <= drift.distance <= 1


def test_labels_without_end_are_bounded() -> None:
    drift = Drift()
    for k in range(20_000):
        drift.see([f"label {k}"])
    assert len(drift._usual) <= 256
    assert len(drift._recent) <= 256


# --- the directory


def test_the_oldest_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "s", most_files=3, most_bytes=1000)
    for k in range(5):
        assert store.add(bytes(10), "cam", "every", ".jpg") is not None, k
    assert [name[:8] for name in store.names] == ["00000002", "00000003", "00000004"]
    assert store.add(bytes(985), "cam", "unsure", ".jpg") is not None
    assert [path.name for path in sorted((tmp_path / "s").iterdir())] == [
        "00000004-cam-every.jpg",
        "00000005-cam-unsure.jpg",
    ]
    assert store.bytes == 995


def test_another_process_goes_on_and_touches_nothing_of_others(tmp_path: Path) -> None:
    first = Store(tmp_path, most_files=10, most_bytes=100)
    for _ in range(3):
        first.add(bytes(10), "cam", "every", ".jpg")
    (tmp_path / "notes.txt").write_bytes(bytes(500))
    (tmp_path / ".00000003-cam.part").write_bytes(b"half")
    second = Store(tmp_path, most_files=2, most_bytes=100)
    assert second.bytes == 30, "nobody else's file is counted"
    assert not (tmp_path / ".00000003-cam.part").exists()
    path = second.add(bytes(10), "cam", "drift", ".wav")
    assert path is not None
    assert path.name == "00000003-cam-drift.wav"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "00000002-cam-every.jpg",
        "00000003-cam-drift.wav",
        "notes.txt",
    ]
    assert path.stat().st_mode & 0o077 == 0, "pictures of people: for its owner only"


@given(st.lists(st.integers(0, 120), max_size=40))
def test_its_bounds_hold_whatever_comes(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    directory = tmp_path_factory.mktemp("s")
    store = Store(directory, most_files=5, most_bytes=100)
    for size in sizes:
        kept = store.add(bytes(size), "cam", "every", ".jpg")
        assert (kept is None) == (size > 100)
        there = [path.stat().st_size for path in directory.iterdir()]
        assert len(there) == len(store.names) <= 5
        assert sum(there) == store.bytes <= 100


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match=r"Samples cannot be kept in .*file/s: "):
        Store(tmp_path / "file/s", 1, 1)


# --- on their way


def picture(colour: str = "red") -> Frame:
    return Frame(0, frame(colour), 0.0, 0.0, 0.0)


def sampler(directory: Path, **more: object) -> Sampler:
    crashed: list[BaseException] = []
    return Sampler(SampleOptions(directory, every=1, **more), ("cam", "mic"), crashed.append)  # type: ignore[arg-type]


def test_a_picture_is_kept_as_it_was_when_it_was_chosen(tmp_path: Path) -> None:
    one = sampler(tmp_path)
    held = picture("green")
    one.keep(held, "every")
    held.data[:] = 0  # the next picture is read into the same memory
    one.start()
    one.stop()
    (path,) = tmp_path.iterdir()
    mean = images.decode(path.read_bytes()).astype(int) - frame("green")
    assert abs(mean).mean() < 3
    assert (one.kept, one.dropped) == (1, 0)


def test_inference_never_waits_for_the_disk(tmp_path: Path) -> None:
    """The writer has not even begun: two are taken, the rest is dropped and counted."""
    one = sampler(tmp_path)
    for _ in range(5):
        one.keep(picture(), "every")
    assert one.dropped == 3
    one.start()
    one.stop()
    assert (one.kept, one.dropped) == (2, 3)


def test_what_cannot_be_written_is_counted_and_nothing_ends(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    one = sampler(tmp_path / "file")
    one.keep(picture(), "every")
    one.start()
    one.stop()
    assert (one.kept, one.dropped) == (0, 1)


def test_a_directory_that_went_away_comes_back(tmp_path: Path) -> None:
    one = sampler(tmp_path / "stick")
    one.start()
    for count in (1, 2, 3):
        one.keep(picture(), "every")
        while one.kept + one.dropped < count:
            time.sleep(0.001)
        if count == 1:
            shutil.rmtree(tmp_path / "stick")
    one.stop()
    assert (one.kept, one.dropped) == (2, 1)
    assert len(list((tmp_path / "stick").iterdir())) == 1


def test_sound_is_kept_with_what_was_heard_before(tmp_path: Path) -> None:
    one = sampler(tmp_path)
    rate = 8000
    sound = (np.sin(np.arange(6 * rate) / 20) * 0.5).astype(np.float32)
    for at in range(0, len(sound), 400):
        chunk = Frame(1, sound[at : at + 400], 0.0, 0.0, 0.0, rate=rate)
        one.hear(chunk)
    one.keep(chunk, "unsure")
    gap = Frame(1, sound[:400], 0.0, 0.0, 0.0, rate=rate, lost_s=0.5)
    one.hear(gap)
    one.keep(gap, "every")
    one.start()
    one.stop()
    long, short = (read_wav(path) for path in sorted(tmp_path.iterdir()))
    assert (long.rate, len(long.samples)) == (rate, SOUND_S * rate)
    assert np.abs(long.samples - sound[-len(long.samples) :]).max() < 1e-4
    assert len(short.samples) == 400, "nothing from before the gap"


def test_a_held_picture_is_given_back_at_the_end() -> None:
    buffers = Buffers()
    one = Frame(0, frame("red"), 0.0, 0.0, 0.0, buffers=buffers, held=True)
    one.release()
    assert buffers._free.empty()
    one.let_go()
    assert buffers.take() is one.data


def test_a_pipeline_keeps_what_calibration_takes(tmp_path: Path) -> None:
    """From a device's pictures to `--samples`, with nothing in between."""
    labels_file(tmp_path / "labels.txt")
    sidecar_file(tmp_path / "m.toml")
    model = int8_classifier(tmp_path / "m.onnx")
    contract = guess(model).complete().contract
    recipe = Recipe(
        model=ModelRef(path="models/m/1.json", sha256="0" * 64),
        contract=contract,
        file=model,
        labels=tuple(label_names()),
        plan=Plan(provider="CPUExecutionProvider", variant="int8"),
    )
    happened: queue.SimpleQueue[Happening] = queue.SimpleQueue()
    pictures = picture_directory(tmp_path / "p", ["red", "green", "blue"] * 2)
    kept = tmp_path / "kept"
    pipeline = Pipeline(
        "main",
        [SourceOptions("cam", str(pictures))],
        happened.put,
        result_interval_s=0.0,
        samples=SampleOptions(kept, every=3, apart_s=0),
    )
    pipeline.listening = True
    pipeline.start()
    pipeline.serve(1, recipe)
    seen = 0
    while seen < 6:
        seen += isinstance(happened.get(timeout=30), Saw)
    pipeline.stop()
    files = sorted(kept.iterdir())
    assert [path.name for path in files] == ["00000000-cam-every.jpg", "00000001-cam-every.jpg"]
    for path in files:  # every third picture is blue
        blue, green, red = images.decode(path.read_bytes()).reshape(-1, 3).mean(axis=0)
        assert blue > 150 > max(red, green)
    samples = open_samples(contract, kept)
    assert samples.evidence == "strong"
    assert samples.take("fit", 4)[0]["image"].shape == (1, 3, 32, 32)
