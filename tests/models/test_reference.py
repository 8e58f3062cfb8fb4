"""The reference models' table, put together from tiny files: names, what is missing, published figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeward_models import zoo
from edgeward_models.reference import (
    PUBLISHED,
    TITLES,
    Made,
    ReferenceRequest,
    beside_published,
    default_work,
)
from runtime import builders


def test_every_reference_model_is_in_the_zoo_and_has_published_figures() -> None:
    assert TITLES.keys() == PUBLISHED.keys()
    assert TITLES.keys() <= zoo.RECIPES.keys()
    for figures in PUBLISHED.values():
        assert all(1.9 < one.speed_up < 2.8 for one in figures)


def test_files_get_the_models_names_and_what_is_missing_is_a_row(tmp_path: Path) -> None:
    made = {
        "resnet50": Made(builders.classifier(tmp_path / "a.onnx", salt=1), None, "nothing passes the gate"),
        "yolov8s": Made(
            builders.classifier(tmp_path / "b.onnx", classes=4),
            builders.int8_classifier(tmp_path / "c.onnx", classes=4),
        ),
    }
    report = beside_published(made, ReferenceRequest(tmp_path, runs=2))
    assert [(row.model, row.name) for row in report.rows] == [
        ("resnet50", "FP32"),
        ("resnet50", "INT8"),
        ("yolov8s", "FP32"),
        ("yolov8s", "INT8"),
    ]
    assert report.rows[1].reason == "nothing passes the gate"
    assert report.rows[1].p50_ms is None
    assert not report.right
    assert set(report.inputs) == {"resnet50", "yolov8s"}
    assert report.published["yolov8s"] == PUBLISHED["yolov8s"]
    assert any("random" in note for note in report.notes)


def test_files_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_work() == tmp_path / "edgeward" / "reference"
