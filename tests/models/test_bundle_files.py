"""Bundle directories: what is read is what was written, and what is not is named."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_models.bundle import Bundle, BundleRequest, find_model, make_bundle
from edgeward_models.bundle_files import is_bundle, read_bundle, write_bundle
from edgeward_wire.errors import Rejected, Unavailable
from runtime import builders


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 classifier with all that it needs beside it."""
    home = tmp_path_factory.mktemp("model")
    builders.labels_file(home / "labels.txt")
    builders.sidecar_file(home / "colours.toml", samples="pictures")
    builders.picture_directory(home / "pictures")
    return builders.int8_classifier(home / "colours.onnx")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(BundleRequest(source), tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def there(made: Bundle, tmp_path: Path) -> Path:
    return write_bundle(made, tmp_path / "colours.bundle")


def test_what_is_written_is_read(made: Bundle, there: Path) -> None:
    back = read_bundle(there)
    assert back.manifest == made.manifest
    assert back.content == made.content
    assert back.card == made.card
    assert {k: p.read_bytes() for k, p in back.blobs.items()} == {
        k: p.read_bytes() for k, p in made.blobs.items()
    }
    assert is_bundle(there)
    assert sorted(p.name for p in there.iterdir()) == ["blobs", "card.md", "manifest.json"]
    assert [p.name for p in there.parent.iterdir()] == [there.name]  # nothing is left beside it


def test_a_bundle_has_the_content_of_the_bare_file(source: Path, there: Path, tmp_path: Path) -> None:
    again = make_bundle(BundleRequest(source, created="2020-01-01T00:00:00Z"), tmp_path / "again")
    assert read_bundle(there).content == again.content


def test_another_bundle_takes_its_place(made: Bundle, there: Path, source: Path, tmp_path: Path) -> None:
    other = make_bundle(BundleRequest(source, flags={"name": "other"}), tmp_path / "scratch")
    write_bundle(other, there)
    assert read_bundle(there).manifest.name == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == [there.name, "scratch"]


def test_what_is_no_bundle_is_not_overwritten(made: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(Rejected, match="is no bundle"):
            write_bundle(made, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert read_bundle(write_bundle(made, tmp_path / "empty")).content == made.content
    with pytest.raises(Unavailable, match="cannot be made"):
        write_bundle(made, tmp_path / "file" / "x.bundle")


def spoil(there: Path, how: str) -> None:
    blob = sorted((there / "blobs").iterdir())[0]
    manifest = there / "manifest.json"
    plain = json.loads(manifest.read_bytes())
    match how:
        case "missing":
            blob.unlink()
        case "shorter":
            blob.write_bytes(blob.read_bytes()[:-1])
        case "other":
            raw = bytearray(blob.read_bytes())
            raw[-1] ^= 1
            blob.write_bytes(raw)
        case "link":
            blob.rename(there.parent / "elsewhere")
            blob.symlink_to(there.parent / "elsewhere")
        case "foreign":
            (there / "notes.txt").write_text("mine")
        case "foreign blob":
            (there / "blobs" / ("0" * 64)).write_text("mine")
        case "no blobs":
            shutil.rmtree(there / "blobs")
        case "no manifest":
            manifest.unlink()
        case "newer":
            manifest.write_text(json.dumps(plain | {"schema": "edgeward.manifest/2", "colour": 3}))
        case "unknown":
            manifest.write_text(json.dumps(plain | {"colour": 3}))
        case "no json":
            manifest.write_text("{")
        case "card":
            (there / "card.md").write_text("# It is perfect\n")
        case "no card":
            (there / "card.md").unlink()
        case "long":
            manifest.write_text(" " * (300 << 10))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "is not whole: the blob .* is missing"),
        ("shorter", r"the blob .* has \d+ bytes, not \d+"),
        ("other", "the blob .* has another hash"),
        ("link", "the blob .* is missing"),
        ("foreign", "not part of the bundle: notes.txt"),
        ("foreign blob", "not part of the bundle: blobs/000"),
        ("no blobs", "has no blobs directory"),
        ("no manifest", r"is not a bundle: it has no manifest\.json"),
        ("newer", "newer Edgeward: its manifest is edgeward.manifest/2; this one reads edgeward.manifest/1"),
        ("unknown", "colour"),
        ("no json", r"manifest\.json is not valid"),
        ("card", r"card\.md is not the one that was written"),
        ("no card", r"card\.md is missing"),
        ("long", "at most"),
    ],
)
def test_a_bundle_that_is_not_as_it_was_says_why(there: Path, how: str, says: str) -> None:
    spoil(there, how)
    with pytest.raises(Rejected, match=says) as caught:
        read_bundle(there)
    assert caught.value.next_step or how in ("unknown", "no json", "long")
    assert is_bundle(there)  # it is still meant to be one: deploy says this, and not that it is no ONNX file


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_as_a_manifest_are_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    home = tmp_path_factory.mktemp("junk")
    (home / "manifest.json").write_bytes(raw)
    (home / "blobs").mkdir()
    with contextlib.suppress(Rejected):
        read_bundle(home)
        raise AssertionError("it was read")


# --- a directory that is no bundle yet


def test_a_directory_with_one_model_is_that_model(source: Path, tmp_path: Path) -> None:
    assert find_model(source) == source
    assert find_model(source.parent) == source
    home = tmp_path / "quantised"
    home.mkdir()
    for name in ("a.onnx", "a-arm64.onnx", "a.toml"):
        (home / name).write_text("")
    assert find_model(home) == home / "a.onnx"
    (home / "a-arm64.toml").write_text("")
    with pytest.raises(Rejected, match=r"several models: a-arm64\.onnx, a\.onnx"):
        find_model(home)
    with pytest.raises(Rejected, match="no model"):
        find_model(tmp_path)
