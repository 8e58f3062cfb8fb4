"""The page: whole, escaped, without any network; its figures are the report's."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeward_models import report_page
from edgeward_models.optimise import OptimiseReport, OptimiseRequest, optimise
from models.graphs import convolution_block, save

VOID = {"meta", "rect", "i"}


class Wellformed(HTMLParser):
    """Fails where tags do not close in their order; gathers what stands in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID or tag == "i":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def report(tmp_path: Path) -> OptimiseReport:
    model = convolution_block()
    model.graph.node[0].op_type = "Conv"
    path = save(tmp_path / "<b>evil & co.onnx", model)
    return optimise(OptimiseRequest(path, tmp_path / "out.onnx", "extended", seconds=0.05))


def test_the_page_is_whole_and_says_what_the_report_says(report: OptimiseReport) -> None:
    read = Wellformed()
    read.feed(report_page.page(report))
    assert read.open == []
    text = " ".join(read.text)
    for expected in ("optimised at level extended", "Conv + Relu", "com.microsoft::FusedConv", "p99"):
        assert expected in text
    assert str(report.after.nodes) in read.text
    assert report.machine.capability in text


def test_names_are_escaped(report: OptimiseReport) -> None:
    page = report_page.page(report)
    assert "<b>evil" not in page
    assert "&lt;b&gt;evil &amp; co.onnx" in page


def test_it_needs_no_network_and_no_script(report: OptimiseReport) -> None:
    page = report_page.page(report)
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_a_report_without_a_race_has_no_latency(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", convolution_block())
    report = optimise(OptimiseRequest(path, tmp_path / "out.onnx", seconds=0.0))
    assert "Latency" not in report_page.page(report)
    assert "latency" not in {tile.what for tile in report_page.tiles(report)}


@pytest.mark.parametrize(
    ("amount", "told"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (94e6, "94.0 MB"), (2.1e9, "2.10 GB")]
)
def test_sizes(amount: int, told: str) -> None:
    assert report_page.size(amount) == told


@pytest.mark.parametrize(
    ("value", "told"), [(0, "0"), (3.25e-6, "3.2e-06"), (float("inf"), "infinitely much")]
)
def test_numbers(value: float, told: str) -> None:
    assert report_page.number(value) == told
