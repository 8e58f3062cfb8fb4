"""What the demo shows must be right: the shipped model on the demo's own video, through the device's code."""

from __future__ import annotations

import sys
from pathlib import Path

import camera
import cv2
import pytest

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.engine import Engine, Recipe
from edgeward_runtime.labels import read_labels
from edgeward_runtime.slots import Frame
from edgeward_runtime.tasks.answer import Classified
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ZOO = Path(__file__).resolve().parents[1] / "models/zoo"
MODEL = ZOO / "efficientnet-lite0.onnx"
REF = ModelRef(path="models/efficientnet-lite0/1.json", sha256="0" * 64)
EXPECTED = tomllib.loads((ZOO / "pictures/expected.toml").read_text())
SHOWN = ("camera.jpg", "coffee.jpg", "chelsea.jpg", "rocket.jpg")


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", SHOWN)
def test_every_frame_of_the_pan_gets_a_right_label(tmp_path: Path, name: str, *, backwards: bool) -> None:
    video = tmp_path / "camera.avi"
    camera.make_video(video, [ZOO / "pictures" / name], fps=10, seconds_each=4, backwards=backwards)
    found = guess(MODEL)
    plan = Plan(provider="CPUExecutionProvider", variant="int8")
    labels = read_labels(ZOO / "imagenet-labels.txt")
    engine = Engine(Recipe(model=REF, contract=found.contract, file=MODEL, labels=labels, plan=plan))
    reader = cv2.VideoCapture(str(video))
    seen = []
    while True:
        ok, frame = reader.read()
        if not ok:
            break
        look = next(engine.looks(Frame(0, frame, 0.0, 0.0, 0.0)))
        assert isinstance(look.answer, Classified)
        seen.append(look.answer.top[0].class_index)
    reader.release()
    engine.close()
    assert len(seen) == 40
    assert set(seen) <= set(EXPECTED[name]["classes"])
