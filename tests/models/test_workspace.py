"""Work is done once, also when a run is killed in the middle of it or its files are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.workspace import Workspace, digest_of, file_digest
from edgeward_wire.errors import Rejected, Unavailable


class Maker:
    """Counts how often it had to work."""

    def __init__(self, content: bytes = b"made") -> None:
        self.content, self.calls = content, 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.write_bytes(self.content)


def test_a_file_is_made_once_for_a_key(tmp_path: Path) -> None:
    maker = Maker()
    first = Workspace(tmp_path).file("model.onnx", {"a": 1}, maker)
    again = Workspace(tmp_path).file("model.onnx", {"a": 1}, maker)
    assert first == again
    assert first.read_bytes() == b"made"
    assert first.suffix == ".onnx"
    assert maker.calls == 1


def test_another_key_or_name_is_another_file(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    files = {space.file(n, k, Maker()) for n in ("a.onnx", "b.onnx") for k in ({"x": 1}, {"x": 2})}
    assert len(files) == 4


def test_a_file_that_was_cut_off_or_changed_is_made_again(tmp_path: Path) -> None:
    space, maker = Workspace(tmp_path), Maker()
    path = space.file("a", {}, maker)
    for damaged in (b"", b"mad", b"mede"):
        path.write_bytes(damaged)
        assert space.file("a", {}, maker).read_bytes() == b"made"
    assert maker.calls == 4


def test_a_file_whose_seal_was_not_written_is_made_again(tmp_path: Path) -> None:
    space, maker = Workspace(tmp_path), Maker()
    path = space.file("a", {}, maker)
    path.with_name(path.name + ".sha256").unlink()
    space.file("a", {}, maker)
    assert maker.calls == 2


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    space = Workspace(tmp_path)

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise Rejected("No.")

    with pytest.raises(Rejected):
        space.file("a", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_the_leftovers_of_a_killed_run_are_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".making-abc").mkdir()
    (tmp_path / ".making-abc" / "half").write_bytes(b"half")
    space = Workspace(tmp_path)
    with space.alone(), pytest.raises(Rejected, match="at work"), Workspace(tmp_path).alone():
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_another_run_is_making_stays(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        with pytest.raises(Rejected, match=f"Another quantise is at work in {tmp_path}"), other.alone():
            pass
        path.write_bytes(b"whole")

    space, other = Workspace(tmp_path / "work"), Workspace(tmp_path / "work")
    with space.alone():
        assert space.file("a", {}, make).read_bytes() == b"whole"
    with other.alone():  # it ends with who held it
        pass


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    calls = []

    def make() -> object:
        calls.append(1)
        return {"b": [1, 2.5, None], "a": "é"}

    for _ in range(2):
        assert Workspace(tmp_path).json("ranges", {"m": "minmax"}, make) == {"b": [1, 2.5, None], "a": "é"}
    assert len(calls) == 1


def test_work_that_goes_on_is_kept_as_far_as_it_got(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert space.so_far("layers", {"a": 1}) is None
    space.keep("layers", {"a": 1}, {"b": 1.0})
    space.keep("layers", {"a": 1}, {"b": 1.0, "c": 2.0})
    assert space.so_far("layers", {"a": 1}) == {"b": 1.0, "c": 2.0}
    assert space.so_far("layers", {"a": 2}) is None


def test_a_directory_that_cannot_be_made_is_the_worlds_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable):
        Workspace(tmp_path / "file")


def test_a_name_is_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain"):
        Workspace(tmp_path).file("../a", {}, Maker())
    with pytest.raises(ValueError, match="JSON"):
        Workspace(tmp_path).file("a", {"x": object()}, Maker())


def test_a_file_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"")
    assert file_digest(path) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(Rejected):
        file_digest(tmp_path / "none")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_the_order_of_a_key_does_not_matter(key: dict[str, object]) -> None:
    assert digest_of(key) == digest_of(dict(reversed(key.items())))
