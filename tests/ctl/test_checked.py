"""What operators type is checked before it goes anywhere."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_ctl import checked
from edgeward_wire.api import TokenCreate
from edgeward_wire.errors import Rejected


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("90s", 90), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("0.5h", 1800)],
)
def test_lengths_of_time(text: str, value: float) -> None:
    assert checked.seconds(text) == value


@pytest.mark.parametrize("text", ["", "h", "-3s", "3 parsecs", "1e9", "nan"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(Rejected):
        checked.seconds(text)


def test_a_moment_is_absolute_or_ago() -> None:
    assert checked.moment("1700000000.5") == 1700000000.5
    assert abs(checked.moment("10m") - (time.time() - 600)) < 60


def test_settings_are_toml_or_plain_words() -> None:
    assert checked.settings(
        [
            "inputs.image.width=320",
            "inputs.image.colour=bgr",
            "inputs.image.scale=[1.0, 2.0, 3.0]",
            'inputs."input.1".layout=nhwc',
            "task=a = b",
        ]
    ) == {
        "inputs": {
            "image": {"width": 320, "colour": "bgr", "scale": [1.0, 2.0, 3.0]},
            "input.1": {"layout": "nhwc"},
        },
        "task": "a = b",
    }


@pytest.mark.parametrize("text", ["width", "=3", "a b=3", "a..b=3", "a=1\nb=2"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(Rejected, match="--set"):
        checked.settings([text])


def test_contradictions_are_named() -> None:
    with pytest.raises(Rejected, match="contradicts"):
        checked.settings(["a=1", "a.b=2"])


@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_text_is_a_setting_or_refused(texts: list[str]) -> None:
    try:
        assert isinstance(checked.settings(texts), dict)
    except Rejected as error:
        assert error.what  # noqa: PT017


def test_exactly_one_target() -> None:
    assert checked.one_target("f", None) == {"fleet": "f"}
    assert checked.one_target(None, "d") == {"device": "d"}
    for fleet, device in ((None, None), ("f", "d")):
        with pytest.raises(Rejected, match="--fleet"):
            checked.one_target(fleet, device)


def test_names_are_held_to_their_pattern() -> None:
    with pytest.raises(Rejected, match="fleet"):
        checked.device_name("../x", "fleet")
    with pytest.raises(Rejected):
        checked.version_name("a/b")
    with pytest.raises(Rejected):
        checked.model_name("A")
    assert checked.version_name(None) is None


def test_a_request_out_of_bounds_names_the_field() -> None:
    with pytest.raises(Rejected, match="ttl_s"):
        checked.request(TokenCreate, fleet="f", ttl_s=1e12)
