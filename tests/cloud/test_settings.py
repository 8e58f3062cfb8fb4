"""cloud.toml: what it takes, and what it says about what it does not take."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_cloud.operators import find_operator, load_operators, new_token
from edgeward_cloud.settings import BrokerSettings, HttpSettings, Settings, authority, is_wildcard, reachable
from edgeward_wire.errors import Rejected


def write(directory: Path, text: str) -> Path:
    (directory / "cloud.toml").write_text(text)
    return directory


def test_no_cloud_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="There is no cloud") as caught:
        Settings.load(tmp_path / "nowhere")
    assert f"edgeward-cloud init --dir {tmp_path / 'nowhere'}" in caught.value.next_step


def test_an_empty_file_is_loopback(tmp_path: Path) -> None:
    settings = Settings.load(write(tmp_path, ""))
    assert (settings.http.host, settings.broker.bind) == ("127.0.0.1", "127.0.0.1")
    assert settings.url == "https://127.0.0.1:8443"
    assert settings.database_url == f"sqlite+aiosqlite:///{tmp_path}/edgeward.db"
    assert settings.broker_address.port == settings.broker_connect.port == 8883


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 1", "colour"),
        ("[http]\nprot = 1", r"http\.prot"),
        ("[http]\nport = 0", r"http\.port"),
        ('[http]\nport = "x"', r"http\.port"),
        ('url = "http://x"', "must be an https address"),
        ('url = "https://"', "must be an https address"),
        ('dir = "/elsewhere"', "dir cannot be set"),
        ("= 1", "is not TOML"),
        ("\x00", "is not TOML"),
        ("# " + "x" * 70_000, "longer than"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        Settings.load(write(tmp_path, text))


def test_an_external_broker_is_reached_where_devices_reach_it(tmp_path: Path) -> None:
    text = '[broker]\nmanaged = false\nhost = "mqtt.example"\nport = 8884\n'
    settings = Settings.load(write(tmp_path, text))
    assert settings.broker_connect == settings.broker_address
    assert settings.broker_connect.host == "mqtt.example"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    settings = Settings(
        dir=tmp_path,
        url="https://cloud.example/base",
        http=HttpSettings(host="0.0.0.0", port=1),
        broker=BrokerSettings(bind="::", host="cloud.example", port=2),
    )
    settings.save()
    assert Settings.load(tmp_path) == settings
    assert stat.S_IMODE((tmp_path / "cloud.toml").stat().st_mode) == 0o600
    assert settings.broker_connect.host == "::1"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_survives_the_file(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    directory = tmp_path_factory.mktemp("cloud")
    settings = Settings(dir=directory, broker=BrokerSettings(host=text))
    settings.save()
    assert Settings.load(directory) == settings


@pytest.mark.parametrize(
    ("host", "wildcard", "reach"),
    [
        ("0.0.0.0", True, "127.0.0.1"),
        ("::", True, "::1"),
        ("127.0.0.1", False, "127.0.0.1"),
        ("cloud.example", False, "cloud.example"),
    ],
)
def test_addresses(host: str, wildcard: bool, reach: str) -> None:
    assert is_wildcard(host) is wildcard
    assert reachable(host) == reach
    assert authority("::1", 5) == "[::1]:5"
    assert authority("a", 5) == "a:5"


# --- operators' tokens


def test_a_token_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    assert load_operators(path) == {}
    ann, bob = new_token(path, "ann", now=5), new_token(path, "bob")
    records = load_operators(path)
    assert find_operator(records, ann) == "ann"
    assert find_operator(records, bob) == "bob"
    assert find_operator(records, "") is None
    assert find_operator(records, "x" * 100_000) is None
    assert records["ann"].created == 5
    assert ann not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(json.loads(path.read_text())["ann"]) == {"token_sha256", "created"}


def test_a_new_token_ends_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    old, new = new_token(path, "ann"), new_token(path, "ann")
    assert find_operator(load_operators(path), old) is None
    assert find_operator(load_operators(path), new) == "ann"


@pytest.mark.parametrize("name", ["", "Ann", "a b", "-a", "a" * 64, "ann\n"])
def test_a_name_that_is_none_gets_no_token(tmp_path: Path, name: str) -> None:
    with pytest.raises(Rejected, match="cannot be an operator's name"):
        new_token(tmp_path / "operators.json", name)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "operators.json"
    path.write_text('{"ann": {"token_sha256": "x"}}')
    with pytest.raises(Rejected, match=r"operators\.json.*ann"):
        load_operators(path)
