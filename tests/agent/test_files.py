from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edgeward_agent.files import is_there, replace_file
from edgeward_wire.errors import Rejected


def test_a_file_is_replaced_whole_and_directories_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    replace_file(path, b"one")
    replace_file(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_leftover_of_a_crash_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".b.new").write_bytes(b"half")
    replace_file(tmp_path / "b", b"whole")
    assert (tmp_path / "b").read_bytes() == b"whole"


def test_when_the_rename_fails_the_old_bytes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b"
    replace_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_whether_a_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "nowhere").symlink_to("b")
    names = ("a", "b", "a/b", "nowhere", ".")
    assert [is_there(tmp_path / name) for name in names] == [True, False, False, False, True]
    with pytest.raises(Rejected, match="cannot be looked at: File name too long"):
        is_there(tmp_path / ("x" * 300))
