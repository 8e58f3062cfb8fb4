"""Nothing is signed that was not verified: another root, another key, an older registry are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ctl.conftest import Office
from edgeward_ctl.client import Client
from edgeward_ctl.profile import load_profile
from edgeward_ctl.signing import Models, ReleaseKey
from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Manifest


@pytest.fixture
def manifest(office: Office, tmp_path: Path) -> Manifest:
    """A bundle whose blobs are in the registry."""
    bundle = make_bundle(BundleRequest(office.model("signed", 0)), tmp_path / "bundle")
    with Client(load_profile(office.profile())) as client:
        for ref in bundle.manifest.blobs():
            client.put_blob(ref, bundle.blobs[ref.sha256], lambda _: None)
    return bundle.manifest


def test_what_is_published_is_verified_and_found_again(
    office: Office, desk: Path, manifest: Manifest
) -> None:
    profile = load_profile(desk)
    with Client(profile) as client:
        models = Models(client)
        done = models.publish(manifest, ReleaseKey(profile))
        release = models.releases()[done.ref.path]
        assert release.ref == done.ref
        assert release.content == manifest.content_digest()
        assert models.publish(manifest, ReleaseKey(profile)).reused


def test_every_entry_is_kept(office: Office, desk: Path, manifest: Manifest) -> None:
    profile = load_profile(desk)
    with Client(profile) as client:
        models = Models(client)
        before = models.releases()
        models.publish(manifest, ReleaseKey(profile), wanted="kept-1")
        after = models.releases()
    assert before.items() <= after.items()
    assert "models/signed/kept-1.json" in after


def test_another_root_is_refused(office: Office, desk: Path, elsewhere: Path) -> None:
    shutil.copy(elsewhere / "root.json", desk / "root.json")
    with Client(load_profile(desk)) as client, pytest.raises(Rejected, match=r"not signed|does not verify"):
        Models(client).releases()


def test_a_key_that_may_not_sign_is_refused_before_it_signs(
    office: Office, desk: Path, elsewhere: Path, manifest: Manifest
) -> None:
    for name in ("release-key.pem", "release-key.pub.json"):
        shutil.copy(elsewhere / name, desk / name)
    profile = load_profile(desk)
    with Client(profile) as client, pytest.raises(Rejected, match="not one that may sign"):
        Models(client).publish(manifest, ReleaseKey(profile), wanted="stranger")


def test_a_key_and_its_public_half_must_be_a_pair(desk: Path, elsewhere: Path) -> None:
    shutil.copy(elsewhere / "release-key.pem", desk / "release-key.pem")
    with pytest.raises(Rejected, match="cannot be used"):
        ReleaseKey(load_profile(desk))


def test_a_missing_key_is_named(desk: Path) -> None:
    (desk / "release-key.pem").unlink()
    with pytest.raises(Rejected, match="no release key"):
        ReleaseKey(load_profile(desk))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"keyid": "x", "keytype": "none", "scheme": "y"})]
)
def test_a_damaged_public_key_is_refused(desk: Path, text: str) -> None:
    (desk / "release-key.pub.json").write_text(text)
    with pytest.raises(Rejected, match=r"release-key\.pub\.json"):
        ReleaseKey(load_profile(desk))


def test_a_registry_that_was_turned_back_is_refused(
    office: Office, desk: Path, tmp_path: Path, manifest: Manifest
) -> None:
    metadata = office.stack.cloud_dir / "registry" / "metadata"
    older = Path(shutil.copytree(metadata, tmp_path / "older"))
    profile = load_profile(desk)
    with Client(profile) as client:
        models = Models(client)
        models.publish(manifest, ReleaseKey(profile), wanted="newest")
        models.releases()
        newer = Path(shutil.copytree(metadata, tmp_path / "newer"))
        try:
            shutil.copytree(older, metadata, dirs_exist_ok=True)
            with pytest.raises(Rejected, match=r"does not verify|turning it back"):
                models.releases()
        finally:
            shutil.copytree(newer, metadata, dirs_exist_ok=True)
        assert "models/signed/newest.json" in models.releases()


@pytest.mark.parametrize("change", [b"", b"longer than it was"])
def test_a_file_that_changes_while_it_is_sent_is_named(office: Office, tmp_path: Path, change: bytes) -> None:
    bundle = make_bundle(BundleRequest(office.model("hasty", 0)), tmp_path / "bundle")
    assert bundle.manifest.labels
    labels = bundle.manifest.labels.model_copy(update={"sha256": "e" * 64})
    path = bundle.blobs[bundle.manifest.labels.sha256]
    path.write_bytes(path.read_bytes() + change if change else b"")
    with (
        Client(load_profile(office.profile())) as client,
        pytest.raises(Rejected, match="changed while it was sent"),
    ):
        client.put_blob(labels, path, lambda _: None)
