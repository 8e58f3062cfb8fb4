from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_agent.floors import Floors
from edgeward_wire.errors import Unavailable


def test_nothing_is_known_at_first(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    assert floors.version("timestamp", ["a"]) == 0
    assert floors.security("toy") == 0
    assert floors.last_authenticated_time == 0
    assert floors.damaged is None


def test_what_was_saved_is_known_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state" / "floors.json"
    floors = Floors(path)
    floors.raise_version("timestamp", ["a", "b"], 7)
    floors.raise_time(1e9, ["a"])
    floors.save()
    again = Floors(path)
    assert again.version("timestamp", ["b", "a"]) == 7
    assert again.last_authenticated_time == 1e9


def test_what_was_not_saved_is_not(tmp_path: Path) -> None:
    Floors(tmp_path / "floors.json").raise_version("timestamp", ["a"], 7)
    assert Floors(tmp_path / "floors.json").version("timestamp", ["a"]) == 0


def test_other_keys_begin_anew(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    floors.raise_version("timestamp", ["a"], 7)
    assert floors.version("timestamp", ["a", "b"]) == 0
    floors.raise_version("timestamp", ["b"], 3)
    assert floors.version("timestamp", ["b"]) == 3
    floors.raise_time(1e9, ["a"])
    floors.raise_time(1e8, ["b"])
    assert floors.last_authenticated_time == 1e8


def test_a_time_lapses_with_its_keys_only(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    floors.raise_time(1e9, ["a"])
    assert not floors.lapse_time(["a"])
    assert floors.lapse_time(["b"])
    assert not floors.lapse_time(["b"])
    assert floors.last_authenticated_time == 0


@given(st.lists(st.integers(0, 1 << 40), min_size=1))
def test_floors_only_rise(versions: list[int]) -> None:
    floors = Floors(Path("/nonexistent/floors.json"))
    for version in versions:
        floors.raise_version("timestamp", ["a"], version)
        floors.raise_time(float(version) / 100, ["a"])
    assert floors.version("timestamp", ["a"]) == max(versions)
    assert floors.last_authenticated_time == max(versions) / 100


def test_a_security_floor_is_on_disk_at_once_and_only_rises(tmp_path: Path) -> None:
    floors = Floors(tmp_path / "floors.json")
    floors.raise_security("toy", 3)
    floors.raise_security("toy", 2)
    assert Floors(tmp_path / "floors.json").security("toy") == 3


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "floors.json"
    floors = Floors(path)
    floors.raise_version("timestamp", ["a"], 7)
    floors.save()
    path.unlink()
    floors.raise_version("timestamp", ["a"], 7)
    floors.raise_version("timestamp", ["a"], 6)
    floors.save()
    assert not path.exists()


def test_a_disk_that_does_not_take_them_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the directory should be")
    floors = Floors(tmp_path / "state" / "floors.json")
    floors._damaged = None  # reading failed as well; what matters here is writing
    with pytest.raises(Unavailable, match=r"floors\.json cannot be written"):
        floors.raise_security("toy", 1)


@given(st.binary(max_size=200))
def test_any_damage_is_told_and_nothing_is_overwritten(rubbish: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "floors.json"
        path.write_bytes(rubbish)
        floors = Floors(path)
        if floors.damaged is None:
            return
        assert "floors.json" in floors.damaged.what
        assert "backup" in floors.damaged.next_step
        floors.raise_security("toy", 1)
        assert path.read_bytes() == rubbish
