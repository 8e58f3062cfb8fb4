"""`init`: what it makes, who may read it, and what it refuses."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from edgeward_cloud.ceremony import Wishes, create_cloud
from edgeward_cloud.keys import load_public, load_signer, new_key
from edgeward_cloud.operators import find_operator, load_operators
from edgeward_cloud.settings import Settings
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_a_cloud_is_whole(tmp_path: Path) -> None:
    settings = create_cloud(Wishes(dir=tmp_path / "cloud", operators=("ann", "bob")))
    assert Settings.load(tmp_path / "cloud") == settings
    offline = sorted(path.name for path in settings.offline_keys.glob("*.pem"))
    assert offline == ["agent.pem", "root-1.pem", "root-2.pem", "targets.pem"]
    online = sorted(path.name for path in settings.online_keys.glob("*.pem"))
    assert online == ["director.pem", "snapshot.pem", "timestamp.pem"]
    assert "recovery" in (settings.offline_keys / "README.txt").read_text()


def test_only_the_owner_reads_what_is_secret(tmp_path: Path) -> None:
    settings = create_cloud(Wishes(dir=tmp_path / "cloud"))
    assert stat.S_IMODE(settings.dir.stat().st_mode) == 0o700
    for path in settings.dir.rglob("*"):
        text = path.read_text() if path.is_file() else ""
        if "PRIVATE KEY" in text or path.name in ("profile.toml", "cloud.toml", "operators.json"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_profile_is_all_that_an_operator_needs(tmp_path: Path) -> None:
    settings = create_cloud(Wishes(dir=tmp_path / "cloud", operators=("ann", "bob")))
    home = settings.operators / "ann"
    profile = tomllib.loads((home / "profile.toml").read_text())
    assert profile["url"] == settings.url
    assert profile["operator"] == "ann"
    assert find_operator(load_operators(settings.operators_file), profile["token"]) == "ann"
    assert (home / profile["root"]).read_bytes() == (settings.metadata / "1.root.json").read_bytes()
    assert (home / profile["server_ca"]).read_bytes() == (settings.pki / "server-ca.pem").read_bytes()
    public = home / profile["release_public_key"]
    signer = load_signer(profile["release_key"], public, base=home)
    assert signer.public_key == load_public(public)
    with pytest.raises(Rejected, match="Cannot use the key"):
        load_signer(profile["release_key"], settings.operators / "bob" / public.name, base=home)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    wishes = Wishes(dir=tmp_path / "cloud")
    create_cloud(wishes)
    before = {path: path.read_bytes() for path in wishes.dir.rglob("*") if path.is_file()}
    with pytest.raises(Rejected, match=r"There is a cloud in .* already"):
        create_cloud(wishes)
    assert {path: path.read_bytes() for path in wishes.dir.rglob("*") if path.is_file()} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(Rejected, match="There is something in"):
        create_cloud(Wishes(dir=tmp_path / "full"))
    with pytest.raises(Rejected, match="is not a directory"):
        create_cloud(Wishes(dir=tmp_path / "full" / "thesis.tex"))


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    create_cloud(Wishes(dir=tmp_path))
    assert Settings.load(tmp_path).dir == tmp_path


@pytest.mark.parametrize(
    ("host", "sans", "url", "broker"),
    [
        ("127.0.0.1", (), "https://127.0.0.1:1", "127.0.0.1"),
        ("127.0.0.1", ("a.example",), "https://127.0.0.1:1", "127.0.0.1"),
        ("::1", (), "https://[::1]:1", "::1"),
        ("192.0.2.7", (), "https://192.0.2.7:1", "192.0.2.7"),
        ("0.0.0.0", ("cloud.example", "192.0.2.7"), "https://cloud.example:1", "cloud.example"),
    ],
)
def test_devices_are_told_a_name_that_they_can_reach(
    tmp_path: Path, host: str, sans: tuple[str, ...], url: str, broker: str
) -> None:
    settings = create_cloud(Wishes(dir=tmp_path, host=host, sans=sans, port=1, broker_port=2))
    assert settings.url == url
    assert settings.broker_address.host == broker
    assert (settings.http.host, settings.broker.bind) == (host, host)


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"host": "0.0.0.0"}, "need a name"),
        ({"port": 5, "broker_port": 5}, "cannot share"),
        ({"port": 0}, "0 is not a port"),
        ({"broker_port": 70_000}, "70000 is not a port"),
        ({"operators": ()}, "needs an operator"),
        ({"operators": ("../x",)}, "cannot be an operator's name"),
        ({"operators": ("a", "a")}, "named twice"),
        ({"sans": ("bücher",)}, "neither a host name nor an address"),
        ({"host": "not a host"}, "neither a host name nor an address"),
    ],
)
def test_a_wish_that_cannot_be_granted_makes_no_cloud(
    tmp_path: Path, wishes: dict[str, object], says: str
) -> None:
    with pytest.raises(Rejected, match=says):
        create_cloud(Wishes(dir=tmp_path / "cloud", **wishes))  # type: ignore[arg-type]
    assert not (tmp_path / "cloud").exists()


def test_a_ceremony_that_fails_half_way_leaves_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Settings) -> None:
        raise Unavailable("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(Settings, "save", full)
        with pytest.raises(Unavailable, match="full"):
            create_cloud(Wishes(dir=tmp_path / "cloud"))
    assert list((tmp_path / "cloud").iterdir()) == []
    create_cloud(Wishes(dir=tmp_path / "cloud"))


def test_a_parent_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgewardError, match="Cannot make"):
        create_cloud(Wishes(dir=tmp_path / "file" / "cloud"))


@pytest.mark.parametrize("uri", ["hsm:", "awskms:arn", "gcpkms:x", "nonsense:x", "nothing", "file2:gone.pem"])
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, uri: str) -> None:
    new_key(tmp_path / "key.pem")
    with pytest.raises(Rejected, match=uri.split(".", maxsplit=1)[0].partition(":")[0]):
        load_signer(uri, tmp_path / "key.pub.json", base=tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"keyid": 1}', '{"keyid": "a", "keytype": "x"}'])
def test_a_damaged_public_key_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "key.pub.json").write_text(text)
    with pytest.raises(Rejected, match=r"key\.pub\.json is not a public key"):
        load_public(tmp_path / "key.pub.json")


def test_a_key_is_never_made_over_another(tmp_path: Path) -> None:
    new_key(tmp_path / "key.pem")
    with pytest.raises(Rejected, match="exists already"):
        new_key(tmp_path / "key.pem")
