"""Frames through models: turns, windows, and the change from one model to the next."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from edgeward_runtime import images
from edgeward_runtime.engine import Engine, Recipe, check_supported
from edgeward_runtime.labels import read_labels
from edgeward_runtime.meter import Meter, Series
from edgeward_runtime.pipeline import (
    Crashed,
    Happening,
    NotServed,
    Pipeline,
    Saw,
    Served,
    SourceChange,
    WindowClosed,
)
from edgeward_runtime.sessions import NotLoaded
from edgeward_runtime.slots import Buffers, Frame
from edgeward_runtime.sources.options import SourceOptions
from edgeward_runtime.tasks.answer import Classified
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import MAX_LABELS
from edgeward_wire.verdict import Plan
from runtime.builders import frame, picture_directory, video_file, wav_file
from runtime.bundles import Bundle, colour_bundle

H = TypeVar("H", bound=Happening)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    images.be_light()
    return colour_bundle(tmp_path_factory.mktemp("pipeline"), float_too=True)


def recipe(bundle: Bundle, variant: str = "int8", **plan: object) -> Recipe:
    manifest = bundle.manifest
    assert manifest.labels is not None
    return Recipe(
        model=bundle.ref,
        contract=manifest.contract,
        file=bundle.blob(manifest.variants[variant].model),
        labels=read_labels(bundle.blob(manifest.labels)),
        plan=Plan.model_validate({"provider": "CPUExecutionProvider", "variant": variant, **plan}),
    )


class Running:
    """A pipeline and all that came out of it."""

    def __init__(self, *sources: SourceOptions, interval_s: float = 0.0) -> None:
        self.happened: list[Happening] = []
        self._queue: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self.pipeline = Pipeline("main", sources, self._queue.put, result_interval_s=interval_s)

    def __enter__(self) -> Running:
        self.pipeline.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.pipeline.stop()
        while not self._queue.empty():
            self.happened.append(self._queue.get())
        assert not self.all(Crashed)

    def all(self, kind: type[H]) -> list[H]:
        return [h for h in self.happened if isinstance(h, kind)]

    def until(self, kind: type[H], count: int = 1) -> list[H]:
        """Read on until so many of a kind have come."""
        while len(found := self.all(kind)) < count:
            self.happened.append(self._queue.get(timeout=20))
            assert not self.all(Crashed)
        return found

    def answers(self) -> list[str]:
        return [saw.look.answer.top[0].label for saw in self.all(Saw)]


def test_every_frame_of_a_file_gets_the_right_answer(bundle: Bundle, tmp_path: Path) -> None:
    video = video_file(tmp_path / "v.avi", ["red", "blue", "green"], frames_each=5)
    with Running(SourceOptions("cam", str(video))) as running:
        running.pipeline.serve(7, recipe(bundle))
        running.until(SourceChange, 2)
        running.until(Saw, 15)
        measures = running.pipeline.close_window(time.monotonic(), time.time())
    assert running.all(Served) == [Served(7, 0.0)]
    assert running.answers() == ["red"] * 5 + ["blue"] * 5 + ["green"] * 5
    (window,) = measures
    assert (window.frames, window.dropped, window.errors) == (15, 0, 0)
    assert window.labels == {"red": 5, "blue": 5, "green": 5}
    assert set(window.stages) == {"capture", "decode", "preprocess", "inference", "postprocess", "end_to_end"}
    assert {h.count for h in window.stages.values()} == {15}
    end, inference = window.stages["end_to_end"], window.stages["inference"]
    assert end.sum > inference.sum
    assert (window.pipeline, window.source, window.variant) == ("main", "cam", "int8")
    assert running.pipeline.totals.frames == 15


def test_frames_wait_for_the_first_model(bundle: Bundle, tmp_path: Path) -> None:
    with Running(SourceOptions("cam", str(picture_directory(tmp_path / "p")))) as running:
        running.until(SourceChange)
        assert running.pipeline.close_window(time.monotonic(), time.time()) == ()
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw, 3)
    assert running.answers() == ["red", "green", "blue"]


def test_sources_take_turns_and_keep_their_own_windows(bundle: Bundle, tmp_path: Path) -> None:
    red = picture_directory(tmp_path / "red", ["red"])
    blue = picture_directory(tmp_path / "blue", ["blue"])
    sources = [SourceOptions("a", str(red), loop=True), SourceOptions("b", str(blue), loop=True)]
    with Running(*sources) as running:
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw, 40)
        a, b = running.pipeline.close_window(time.monotonic(), time.time())
    assert (set(a.labels), set(b.labels)) == ({"red"}, {"blue"})
    assert min(a.frames, b.frames) > 0.2 * max(a.frames, b.frames)
    assert {s.source for s in running.all(Saw)} == {"a", "b"}


def test_a_new_model_takes_over_between_two_frames(bundle: Bundle, tmp_path: Path) -> None:
    """With an `every` slot nothing is lost: the answers of both models together are the whole video."""
    colours = ["red", "green", "blue"] * 20
    video = video_file(tmp_path / "v.avi", colours, frames_each=4)
    with Running(SourceOptions("cam", str(video))) as running:
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw, 20)
        running.pipeline.serve(2, recipe(bundle, "fp32"))
        running.until(Served, 2)
        running.until(Saw, 240)
        last = running.pipeline.close_window(time.monotonic(), time.time())
    assert running.answers() == [c for c in colours for _ in range(4)]
    closed = running.all(WindowClosed)
    assert [m.variant for w in closed for m in w.measures] == ["int8"]
    assert [m.variant for m in last] == ["fp32"]
    assert sum(m.frames for w in closed for m in w.measures) + last[0].frames == 240
    assert running.all(Served)[1].gap_ms < 1000
    variants = [saw.recipe.plan.variant for saw in running.all(Saw)]
    assert variants == sorted(variants, key=["int8", "fp32"].index), "never back to the old one"


def test_a_model_that_cannot_be_prepared_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    looped = SourceOptions("cam", str(picture_directory(tmp_path / "p")), loop=True)
    with Running(looped) as running:
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw)
        running.pipeline.serve(2, recipe(bundle, provider="QnnExecutionProvider"))
        (failed,) = running.until(NotServed)
        seen = len(running.all(Saw))
        running.until(Saw, seen + 5)
    assert failed.id == 2
    assert failed.reason == "Qnn is not in this build of ONNX Runtime."
    assert [s.id for s in running.all(Served)] == [1]


def test_the_newest_order_wins(bundle: Bundle, tmp_path: Path) -> None:
    looped = SourceOptions("cam", str(picture_directory(tmp_path / "p")), loop=True)
    with Running(looped) as running:
        for order in range(1, 6):
            running.pipeline.serve(order, recipe(bundle))
        while not any(s.id == 5 for s in running.all(Served)):
            running.until(Served, len(running.all(Served)) + 1)
        while len(running.all(Served)) + len(running.all(NotServed)) < 5:
            running.until(NotServed, len(running.all(NotServed)) + 1)
        running.until(Saw, len(running.all(Saw)) + 3)
    order = [s.id for s in running.all(Served)]
    assert order == sorted(order)
    assert order[-1] == 5
    assert {n.id for n in running.all(NotServed)} == set(range(1, 6)) - set(order)


def test_a_source_that_is_away_keeps_no_one_from_stopping(bundle: Bundle) -> None:
    with Running(SourceOptions("cam", "/nowhere/v.mp4"), SourceOptions("cam2", "63")) as running:
        running.pipeline.serve(1, recipe(bundle))
        running.until(Served)
        running.until(SourceChange, 2)
    down = {(c.source, c.detail) for c in running.all(SourceChange)}
    assert down == {("cam", "/nowhere/v.mp4 is not there."), ("cam2", "/dev/video63 is not there.")}


def test_a_source_that_the_model_cannot_take_is_told_once(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sound beside pictures, for a model that takes pictures."""
    pictures = SourceOptions("cam", str(picture_directory(tmp_path / "p")), loop=True)
    sound = SourceOptions("mic", str(wav_file(tmp_path / "s.wav", np.zeros(16_000))))
    caplog.set_level("INFO", "edgeward_runtime.pipeline")
    with Running(pictures, sound) as running:
        running.pipeline.serve(0, recipe(bundle))
        while not any(change.source == "mic" and not change.up for change in running.all(SourceChange)):
            running.until(SourceChange, len(running.all(SourceChange)) + 1)
        running.until(Saw, len(running.all(Saw)) + 3)
        assert running.pipeline.totals.errors == 10
    (said,) = [record for record in caplog.records if "inference" in record.message]
    assert said.message.startswith("mic: inference fails: ")


def test_results_are_throttled(bundle: Bundle, tmp_path: Path) -> None:
    looped = SourceOptions("cam", str(picture_directory(tmp_path / "p")), loop=True)
    with Running(looped, interval_s=3600) as running:
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw)
        while running.pipeline.totals.frames < 50:
            time.sleep(0.001)
    assert len(running.all(Saw)) == 1


def test_the_inference_thread_says_how_long_it_is_at_it(bundle: Bundle, tmp_path: Path) -> None:
    with Running(SourceOptions("cam", str(picture_directory(tmp_path / "p")))) as running:
        assert running.pipeline.stalled_s(time.monotonic()) == 0
        running.pipeline.serve(1, recipe(bundle))
        running.until(Saw, 3)
        running.until(SourceChange, 2)
        while running.pipeline.stalled_s(time.monotonic()):
            time.sleep(0.001)
        serving = running.pipeline._serving
        assert serving is not None
        serving.busy_since = 10.0
        assert running.pipeline.stalled_s(13.0) == 3.0


def test_an_engine_answers_and_frees_the_frame_early(bundle: Bundle) -> None:
    engine = Engine(recipe(bundle))
    engine.warm()
    buffers = Buffers()
    picture = Frame(0, frame("green"), 0.0, 0.0, 0.0, buffers=buffers)
    look = next(engine.looks(picture))
    assert buffers.take() is picture.data, "its memory is free before the next one is asked for"
    assert isinstance(look.answer, Classified)
    assert look.answer.top[0].label == "green"
    assert min(look.preprocess_ms, look.inference_ms, look.postprocess_ms) >= 0
    engine.close()


def contract(task: str, *inputs: dict, outputs: tuple[dict, ...] = ()) -> Contract:
    result = {"name": "y", "dtype": "float32", "shape": (1, 3)}
    return Contract.model_validate({"task": task, "inputs": inputs, "outputs": (result, *outputs)})


def test_what_this_release_cannot_run_is_rejected(bundle: Bundle) -> None:
    image = {
        "name": "x",
        "dtype": "float32",
        "shape": (1, 3, 8, 8),
        "bind": "source",
        "image": {"width": 8, "height": 8},
    }
    sound = {"name": "x", "dtype": "float32", "shape": (1, 16), "bind": "source"}
    state = {"dtype": "float32", "shape": (1, 2), "bind": "state:h"}
    stateful = contract("classification", image, {"name": "h", **state}, outputs=({"name": "hn", **state},))
    check_supported(contract("classification", image))
    check_supported(stateful)
    check_supported(contract("tensor", sound))
    for wrong, says in (
        (contract("detection", image), "one output of three dimensions"),
        (contract("vad", image), "3 numbers"),
        (contract("classification", {**image, "dtype": "int64"}), "not a picture of float32"),
    ):
        with pytest.raises(Rejected, match=says):
            check_supported(wrong, labels=())
    with pytest.raises(NotLoaded):
        Engine(recipe(bundle, provider="QnnExecutionProvider"))


@pytest.fixture
def meter() -> Iterator[Meter]:
    ref = ModelRef(path="models/m/1.json", sha256="0" * 64)
    return Meter(Series("main", ("cam",), ref, Plan(provider="CPUExecutionProvider", variant="int8")), 100.0)


def test_windows_add_up(meter: Meter) -> None:
    for k in range(40):
        meter.record(0, {"inference": 5.0, "end_to_end": 9.0}, [f"label {k % 20}" if k else "most"])
        meter.record(0, {"inference": 5.0}, ["most"])
    meter.record_error(0)
    (window,) = meter.close(110.0, 1000.0, [3])
    assert (window.frames, window.dropped, window.errors) == (80, 3, 1)
    assert (window.start, window.duration_s, window.fps) == (990.0, 10.0, 8.0)
    assert window.stages["inference"].count == 80
    assert set(window.stages) == {"inference", "end_to_end"}
    assert len(window.labels) == MAX_LABELS
    assert next(iter(window.labels.items())) == ("most", 41)
    assert meter.close(110.0, 1000.0, [0]) == ()
    (empty,) = meter.close(111.0, 1001.0, [0])
    assert empty.start == window.start + window.duration_s, "it begins where the one before ended"
    assert (empty.frames, empty.errors, empty.stages, empty.labels) == (0, 0, {}, {})
