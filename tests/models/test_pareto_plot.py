"""The picture is well-formed, shows every candidate, and keeps them inside of its frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.pareto_plot import Dot, draw

dots = st.lists(
    st.builds(
        Dot,
        st.floats(0.01, 20),
        st.floats(-40, 120),
        st.sampled_from(["chosen", "front", "other", "excluded"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=0x2000), max_size=20),
    ),
    max_size=20,
)
SPACE = "{http://www.w3.org/2000/svg}"


@given(dots, st.text(st.characters(min_codepoint=32, max_codepoint=0x2000), max_size=200))
def test_it_is_well_formed_and_keeps_to_its_frame(found: list[Dot], title: str) -> None:
    picture = ElementTree.fromstring(draw(found, title))
    shown = [circle for circle in picture.iter(f"{SPACE}circle") if circle.find(f"{SPACE}title") is not None]
    assert len(shown) == len(found)
    for circle in shown:
        assert 0 <= float(circle.attrib["cx"]) <= 760
        assert 0 <= float(circle.attrib["cy"]) <= 460


def test_faster_is_further_left_and_better_is_higher() -> None:
    text = draw([Dot(0.5, 20.0, "front", "a"), Dot(0.8, 30.0, "chosen", "b")], "x")
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" fill="[^"]+"><title>(\w)', text)
    (ax, ay), (bx, by) = (
        next((float(x), float(y)) for x, y, name in places if name == one) for one in ("a", "b")
    )
    assert ax < bx
    assert ay > by
    assert "FP32" in text


def test_nothing_measured_is_still_a_picture() -> None:
    assert "<circle cx" in draw([], "nothing")
