"""The same content keeps its version; a version never changes its content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_ctl.releases import Release, choose_version
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import model_path
from edgeward_wire.manifest import ModelRef

CONTENT = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])


def releases(*entries: tuple[str, str, str | None]) -> dict[str, Release]:
    """(name, version, content) each."""
    found = {}
    for name, version, content in entries:
        path = model_path(name, version)
        found[path] = Release(ModelRef(path=path, sha256="0" * 64), 10, content)
    return found


def test_the_first_is_1_and_numbers_count_on() -> None:
    assert choose_version({}, "m", "x").version == "1"
    known = releases(("m", "9", "a"), ("m", "10", "b"), ("m", "v2-final", "c"), ("other", "70", "d"))
    assert choose_version(known, "m", "x").version == "11"


def test_the_same_content_is_not_released_again() -> None:
    known = releases(("m", "1", "a"), ("m", "2", "b"))
    choice = choose_version(known, "m", "a")
    assert choice.version == "1"
    assert choice.existing == known[model_path("m", "1")]


def test_another_model_of_the_same_content_is_another_model() -> None:
    assert choose_version(releases(("other", "1", "a")), "m", "a").existing is None


def test_a_wanted_version_is_free_or_the_same_or_refused() -> None:
    known = releases(("m", "1", "a"))
    assert choose_version(known, "m", "a", "1.0").existing is None
    assert choose_version(known, "m", "a", "1").existing is not None
    with pytest.raises(Rejected, match="Version 1 of m is taken"):
        choose_version(known, "m", "b", "1")


def test_an_entry_that_does_not_say_its_content_is_nobodys() -> None:
    assert choose_version(releases(("m", "1", None)), "m", "a").version == "2"


@given(st.lists(CONTENT, max_size=20))
def test_a_history_of_deploys_keeps_one_version_a_content(deploys: list[str]) -> None:
    known: dict[str, Release] = {}
    for content in deploys:
        choice = choose_version(known, "m", content)
        if choice.existing is None:
            known.update(releases(("m", choice.version, content)))
        assert choose_version(known, "m", content).existing == known[model_path("m", choice.version)]
    assert len(known) == len(set(deploys))
