"""A profile is read whole or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeward_ctl.profile import find_directory, load_profile
from edgeward_wire.errors import Rejected


def write(directory: Path, text: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "profile.toml").write_text(text)
    for name in ("server-ca.pem", "root.json", "release-key.pem", "release-key.pub.json"):
        (directory / name).write_text("{}")
    return directory


GOOD = 'url = "https://cloud.example:8443/"\noperator = "amy"\ntoken = "t"\n'


def test_a_profile_is_read(tmp_path: Path) -> None:
    profile = load_profile(write(tmp_path, GOOD))
    assert profile.url == "https://cloud.example:8443"
    assert (profile.operator, profile.token) == ("amy", "t")
    assert profile.release_key == f"file2:{tmp_path / 'release-key.pem'}"


@pytest.mark.parametrize(
    ("line", "uri"),
    [
        ('release_key = "file2:release-key.pem"', "file2:{dir}/release-key.pem"),
        ('release_key = "hsm:2?label=x"', "hsm:2?label=x"),
        ('release_key = "awskms:alias/x"', "awskms:alias/x"),
        ('release_key = "gone.pem"', None),
    ],
)
def test_keys_are_files_or_uris(tmp_path: Path, line: str, uri: str | None) -> None:
    profile = load_profile(write(tmp_path, GOOD + line))
    assert profile.release_key == (uri.format(dir=tmp_path) if uri else None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("https", "http"), "https://"),
        (GOOD.replace('token = "t"\n', ""), "lacks 'token'"),
        (GOOD + 'colour = "red"', "unknown key 'colour'"),
        (GOOD + "root = 3", "root must be a text"),
        ("url = ", "not valid TOML"),
        (GOOD + 'root = "gone.json"', "gone.json"),
    ],
)
def test_a_faulty_profile_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        load_profile(write(tmp_path, text))


def test_no_profile_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no profile") as caught:
        load_profile(tmp_path / "nowhere")
    assert "edgeward-cloud init" in caught.value.next_step


def test_option_before_environment_before_home(tmp_path: Path) -> None:
    environment = {"EDGEWARD_PROFILE": "/env", "XDG_CONFIG_HOME": "/xdg"}
    assert find_directory(tmp_path, environment) == tmp_path
    assert find_directory(None, environment) == Path("/env")
    assert find_directory(None, {"XDG_CONFIG_HOME": "/xdg"}) == Path("/xdg/edgeward")
    assert find_directory(None, {}) == Path("~/.config/edgeward").expanduser()
