"""Plots: the same bytes each time, the right kind of file, and the figures as text beside the bars."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import cv2
import pytest

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

from edgeward_models.plots import bench_plot, check_suffix
from edgeward_wire.errors import Rejected, Unavailable
from models.test_bench import FP32, INT8, PUBLISHED, report

GONE = replace(INT8, p50_ms=None, ratio=None, interval=None, reason="nothing passes")


def test_an_svg_is_the_same_each_time_and_has_no_date(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        bench_plot(report(FP32, INT8, published=PUBLISHED), tmp_path / name)
    one = (tmp_path / "one.svg").read_bytes()
    assert one == (tmp_path / "two.svg").read_bytes()
    assert b"<dc:date>" not in one
    assert not re.search(rb'href="https?:', one)


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    bench_plot(report(FP32, INT8), tmp_path / "p.png")
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture is not None
    assert picture.shape[1] > 800
    assert picture.std() > 10


def test_a_wider_one_has_the_published_figures(tmp_path: Path) -> None:
    bench_plot(report(FP32, INT8), tmp_path / "narrow.png")
    bench_plot(report(FP32, INT8, published=PUBLISHED), tmp_path / "wide.png")
    narrow, wide = (cv2.imread(str(tmp_path / name)) for name in ("narrow.png", "wide.png"))
    assert narrow is not None
    assert wide is not None
    assert wide.shape[1] > narrow.shape[1]


def test_rows_without_figures_leave_no_bar_and_no_trouble(tmp_path: Path) -> None:
    bench_plot(report(FP32, GONE, published=PUBLISHED), tmp_path / "p.svg")
    bench_plot(report(GONE), tmp_path / "q.svg")
    assert (tmp_path / "p.svg").stat().st_size > (tmp_path / "q.svg").stat().st_size


@pytest.mark.parametrize("name", ["p.pdf", "p"])
def test_other_kinds_are_refused_before_the_work(name: str) -> None:
    with pytest.raises(Rejected, match=r"\.svg or \.png|neither SVG nor PNG"):
        check_suffix(Path(name))


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be written"):
        bench_plot(report(FP32), tmp_path / "file" / "p.svg")
