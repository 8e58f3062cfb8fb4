"""Each task as a device runs it: qualified, served by a runner, its results as they go to MQTT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.test_runner import Child, serve
from edgeward_agent.messages import (
    Configure,
    Heartbeat,
    Qualify,
    ResultSeen,
    ServeFailed,
    SourceSpec,
    WindowClosed,
)
from edgeward_agent.qualify import qualify
from edgeward_runtime import images
from edgeward_runtime.tasks.vad import HOLD_S
from edgeward_wire.manifest import FEATURES
from edgeward_wire.result import ResultMessage, Speech
from runtime.builders import (
    detector,
    detector_sidecar,
    labels_file,
    listener,
    listener_sidecar,
    picture_directory,
    segmenter,
    spoken,
    wav_file,
)
from runtime.bundles import Bundle, bundle_of

SILERO = Path(__file__).resolve().parents[2] / "models/zoo/silero-vad.onnx"
SILERO_SIDECAR = """\
task = "vad"
float = "a tiny recurrent network"
[inputs.input]
rate = 16000
window = 512
hop = 512
context = 64
[inputs.state]
bind = "state:h"
[inputs.sr]
const = [16000]
[outputs.stateN]
bind = "state:h"
"""


@pytest.fixture
def runner() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def configure(uri: Path, **more: object) -> Configure:
    source = SourceSpec.model_validate({"name": "cam", "uri": str(uri), "loop": True, **more})
    return Configure(pipeline="main", sources=(source,), window_s=0.2, result_interval_s=0.05)


def qualified(bundle: Bundle, directory: Path) -> None:
    """Qualify admits it, on golden vectors that carry state where the model does."""
    assert set(bundle.manifest.requires) <= FEATURES
    order = Qualify(
        model=bundle.ref,
        manifest=bundle.manifest,
        blobs=str(bundle.blobs),
        threads=1,
        key="0" * 64,
        lock=str(directory / "lock"),
        scratch=str(directory),
        budget_s=30,
    )
    verdict = qualify(order, lambda _message: None)
    assert verdict.chosen is not None, verdict.reason


def first_result(runner: Child, bundle: Bundle, configured: Configure) -> ResultMessage:
    runner.send(configured)
    runner.send(serve(bundle, variant="fp32"))
    result = runner.until(ResultSeen).result
    assert result.task == bundle.manifest.contract.task
    return result


def test_detection(runner: Child, tmp_path: Path) -> None:
    labels_file(tmp_path / "labels.txt")
    detector_sidecar(tmp_path / "m.toml")
    bundle = bundle_of(tmp_path, detector(tmp_path / "m.onnx"))
    qualified(bundle, tmp_path)
    left = [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)]
    pictures = picture_directory(tmp_path / "p", ["green"])
    result = first_result(runner, bundle, configure(pictures, zones={"left": left}, classes=("green",)))
    assert {box.label for box in result.boxes} == {"green"}
    zones = {box.zones for box in result.boxes}
    assert zones == {("left",), ()}
    assert all((box.zones == ("left",)) == ((box.x1 + box.x2) / 2 <= 0.5) for box in result.boxes)
    window = runner.until(WindowClosed, lambda w: w.measures[0].frames > 0)
    assert set(window.measures[0].labels) == {"green"}


def test_an_object_that_enters_a_zone_is_a_change(runner: Child, tmp_path: Path) -> None:
    labels_file(tmp_path / "labels.txt")
    detector_sidecar(tmp_path / "m.toml")
    bundle = bundle_of(tmp_path, detector(tmp_path / "m.onnx"))
    (tmp_path / "p").mkdir()
    for number, x in enumerate((0, 48)):
        picture = np.full((64, 64, 3), 114, np.uint8)
        picture[16:32, x : x + 16] = (0, 255, 0)
        (tmp_path / "p" / f"{number}.png").write_bytes(images.encode_png(picture))
    door = [(0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)]
    configured = configure(tmp_path / "p", zones={"door": door}, results="change")
    runner.send(configured.model_copy(update={"result_interval_s": 3600.0}))
    runner.send(serve(bundle, variant="fp32"))
    runner.until(Heartbeat, lambda beat: beat.frames >= 200)
    told = [seen.result for seen in runner.all(ResultSeen)]
    assert {result.boxes[0].zones for result in told} == {("door",), ()}
    assert {result.why for result in told[1:]} == {"change"}


def test_segmentation(runner: Child, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\ndark\n")
    (tmp_path / "m.toml").write_text('task = "segmentation"\nlabels = "labels.txt"\n')
    bundle = bundle_of(tmp_path, segmenter(tmp_path / "m.onnx"))
    qualified(bundle, tmp_path)
    result = first_result(runner, bundle, configure(picture_directory(tmp_path / "p", ["blue"])))
    assert [(area.label, area.share) for area in result.areas] == [("blue", 1.0)]


def test_tensor(runner: Child, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text('task = "tensor"\n')
    bundle = bundle_of(tmp_path, segmenter(tmp_path / "m.onnx"))
    qualified(bundle, tmp_path)
    result = first_result(runner, bundle, configure(picture_directory(tmp_path / "p", ["blue"])))
    assert [(value.name, value.shape) for value in result.values] == [("scores", (1, 4, 8, 8))]
    assert len(result.values[0].first) == 16


def test_audio_classification(runner: Child, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("loud\n")
    listener_sidecar(tmp_path / "m.toml", task="audio-classification")
    text = (tmp_path / "m.toml").read_text()
    (tmp_path / "m.toml").write_text(f'labels = "labels.txt"\n{text}[outputs.score]\nactivation = "none"\n')
    bundle = bundle_of(tmp_path, listener(tmp_path / "m.onnx"))
    assert bundle.manifest.requires == ("audio-classification", "audio", "state")
    qualified(bundle, tmp_path)
    sound = wav_file(tmp_path / "s.wav", np.full(8000, 0.125))
    result = first_result(runner, bundle, configure(sound))
    assert [(seen.label, round(seen.score, 2)) for seen in result.top] == [("loud", 0.5)]


def test_voice_activity(runner: Child, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(SILERO_SIDECAR)
    (tmp_path / "m.onnx").write_bytes(SILERO.read_bytes())
    bundle = bundle_of(tmp_path, tmp_path / "m.onnx")
    assert bundle.manifest.requires == ("vad", "audio", "state")
    qualified(bundle, tmp_path)
    sound = wav_file(tmp_path / "s.wav", np.concatenate([np.zeros(16_000), spoken(2.0)]))
    first_result(runner, bundle, configure(sound, results="change"))
    spoke, began_s = heard(runner, active=True)
    assert spoke.score > 0.5
    # In the sound's own time, of which a machine that is quick hears a lot before it tells again.
    stretch_s = 512 / 16_000
    assert stretch_s - 1e-3 <= began_s <= 2 + HOLD_S + stretch_s
    silent, ended_s = heard(runner, active=False)
    assert silent.score < 0.5
    assert HOLD_S <= ended_s <= 1 + HOLD_S + stretch_s, "silence counts from where the score fell"


def heard(runner: Child, *, active: bool) -> tuple[Speech, float]:
    """The next result that says so, and for how many seconds of the sound it had been so."""

    def says_so(message: ResultSeen) -> bool:
        return message.result.speech is not None and message.result.speech.active is active

    result = runner.until(ResultSeen, says_so).result
    assert result.speech is not None
    return result.speech, result.time - result.speech.since


def test_a_model_that_no_source_can_feed_qualifies_and_serves_nobody(runner: Child, tmp_path: Path) -> None:
    """Rows of numbers: it loads, and each frame of a camera is an error that says so."""
    listener_sidecar(tmp_path / "m.toml")
    (tmp_path / "m.toml").write_text('task = "tensor"\nfloat = "for tests"\n')
    bundle = bundle_of(tmp_path, listener(tmp_path / "m.onnx"))
    assert bundle.manifest.requires[:1] == ("tensor",)
    assert "tensors" in bundle.manifest.requires
    runner.send(configure(picture_directory(tmp_path / "p", ["blue"])))
    runner.send(serve(bundle, variant="fp32"))
    window = runner.until(WindowClosed, lambda w: w.measures[0].errors > 0)
    assert window.measures[0].frames == 0
    assert not runner.all(ServeFailed)
    runner.hang_up()
    assert "No source can feed this model" in runner.errors()
