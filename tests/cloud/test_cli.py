"""`edgeward-cloud` as it is typed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from cloud.kit import make_cloud
from edgeward_cloud.cli import main
from edgeward_cloud.operators import find_operator, load_operators
from edgeward_cloud.registry import Registry
from edgeward_cloud.settings import Settings


def test_init_explains_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "cloud"
    names = ["--operator", "ann", "--operator", "bob"]
    assert main(["init", "--dir", str(directory), *names, "--port", "9443", "--broker-port", "9883"]) == 0
    said = capsys.readouterr().out
    for word in ("offline/", "root-2.pem", "operators/ann/", "operators/bob/", f"up --dir {directory}"):
        assert word in said
    settings = Settings.load(directory)
    assert (settings.http.port, settings.broker.port) == (9443, 9883)
    assert set(load_operators(settings.operators_file)) == {"ann", "bob"}


def test_errors_are_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_cloud(tmp_path / "cloud")
    for arguments in (
        ["init", "--dir", str(tmp_path / "cloud")],
        ["up", "--dir", str(tmp_path)],
        ["token", "--dir", str(tmp_path), "ann"],
        ["resign", "--dir", str(tmp_path / "cloud"), "--keys", str(tmp_path)],
    ):
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(r"error: .+\nnext: .+\n", captured.err), captured.err


def test_token_prints_a_new_one_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_cloud(tmp_path / "cloud")
    for name, says in (("admin", "old token"), ("zoe", "new operator")):
        assert main(["token", "--dir", str(settings.dir), name]) == 0
        captured = capsys.readouterr()
        assert find_operator(load_operators(settings.operators_file), captured.out.strip()) == name
        assert says in captured.err


def test_resign_renews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_cloud(tmp_path / "cloud")
    assert main(["resign", "--dir", str(settings.dir), "--keys", str(settings.offline_keys)]) == 0
    assert capsys.readouterr().out.count("is signed until") == 3
    assert Registry(settings).root().signed.version == 2


def test_an_unknown_command_is_argparse_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["dance"])
    assert "dance" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["token", "admin"], ["resign", "--keys", "/somewhere"]])
def test_nobody_but_the_owner_writes_there(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What root left there, the cloud could not read: every request was answered with 500."""
    settings = make_cloud(tmp_path / "cloud")
    before = {path: path.stat().st_mtime_ns for path in settings.dir.rglob("*")}
    monkeypatch.setattr(os, "geteuid", lambda: settings.dir.stat().st_uid + 1)
    assert main([command[0], "--dir", str(settings.dir), *command[1:]]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "belongs to" in captured.err
    assert f"-- edgeward-cloud {command[0]} --dir {settings.dir}" in captured.err
    assert before == {path: path.stat().st_mtime_ns for path in settings.dir.rglob("*")}


def test_a_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_cloud(tmp_path / "cloud")
    monkeypatch.delitem(sys.modules, "edgeward_cloud.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["up", "--dir", str(settings.dir)]) == 1
    assert "uvicorn" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "edgeward_cloud.server", raising=False)
    assert main(["up", "--dir", str(settings.dir)]) == 1
    assert "pip install 'edgeward[cloud]'" in capsys.readouterr().err
