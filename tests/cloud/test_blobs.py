"""The blob store on a real disk."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_cloud.registry import BlobStore
from edgeward_wire.errors import Rejected, Unavailable


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", max_bytes=1000)


def left_over(store: BlobStore) -> list[Path]:
    return list((store.path("0" * 64).parent.parent / "incoming").iterdir())


def test_a_blob_lies_under_its_digest(store: BlobStore, tmp_path: Path) -> None:
    data = b"weights" * 20
    assert store.length(digest(data)) is None
    assert store.put(digest(data), [data[:50], b"", data[50:]], len(data)) is True
    path = tmp_path / "blobs" / "sha256" / digest(data)
    assert store.path(digest(data)) == path
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o444
    assert store.length(digest(data)) == len(data)
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("name", "length", "says"),
    [
        (digest(b"other"), None, "has sha256"),
        (digest(b"data"), 3, "longer than 3"),
        (digest(b"data"), 5, "has 4 bytes, not 5"),
        (digest(b"data"), 1001, "too long"),
        ("../../etc/passwd", None, "Not a sha256"),
        (digest(b"data").upper(), None, "Not a sha256"),
        (digest(b"data") + "\n", None, "Not a sha256"),
    ],
)
def test_what_is_not_as_declared_is_refused_and_gone(
    store: BlobStore, name: str, length: int | None, says: str
) -> None:
    with pytest.raises(Rejected, match=says):
        store.put(name, [b"data"], length)
    assert left_over(store) == []
    assert store.length(digest(b"data")) is None


def test_an_undeclared_blob_has_a_bound_too(store: BlobStore) -> None:
    with pytest.raises(Rejected, match="longer than 1000"):
        store.put(digest(b"x" * 2000), (b"x" * 100 for _ in range(20)))


def test_an_upload_that_ends_early_leaves_nothing(store: BlobStore) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"da"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store.put(digest(b"data"), chunks(), 4)
    assert left_over(store) == []
    assert store.length(digest(b"data")) is None


def test_what_is_there_is_never_written_again(store: BlobStore) -> None:
    data = b"data"
    assert store.put(digest(data), [data])
    before = store.path(digest(data)).stat()
    assert store.put(digest(data), [b"other"]) is False, "not even looked at"
    with store.writer(digest(data)) as writer:
        writer.write(data)
        assert writer.commit() is False
    after = store.path(digest(data)).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_damaged_blob_is_replaced_by_a_sound_upload(store: BlobStore) -> None:
    data = b"weights"
    store.put(digest(data), [data])
    path = store.path(digest(data))
    path.chmod(0o644)
    path.write_bytes(b"weighty")
    assert not store.sound(digest(data))
    with pytest.raises(Rejected, match="has sha256"):
        store.put(digest(data), [b"other"])
    assert path.read_bytes() == b"weighty", "only what is sound replaces it"
    assert store.put(digest(data), [data]) is True
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o444
    assert store.sound(digest(data))
    assert left_over(store) == []


def test_the_same_blob_from_many_at_once_lands_once(store: BlobStore) -> None:
    data, won, gate = b"data" * 100, [], threading.Barrier(8)

    def work() -> None:
        with store.writer(digest(data), len(data)) as writer:
            writer.write(data)
            gate.wait(60)
            won.append(writer.commit())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == [False] * 7 + [True]
    assert store.path(digest(data)).read_bytes() == data
    assert left_over(store) == []


def test_a_full_disk_is_named(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one way to a full disk that needs no root: the device that always is.
    writer = store.writer(digest(b"data"), 4)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._fd)
    os.close(full)
    with writer, pytest.raises(Unavailable, match="is full"):
        writer.write(b"data")


def test_clean_removes_only_abandoned_uploads(store: BlobStore) -> None:
    old, new = store.writer(digest(b"old")), store.writer(digest(b"new"))
    os.utime(old._path, (0, 0))
    assert store.clean() == 1
    assert [path.name for path in left_over(store)] == [new._path.name]
    assert store.clean(time.time() + 90_000) == 1
    for writer in (old, new):
        writer.__exit__(None, None, None)


@given(chunks=st.lists(st.binary(max_size=64), max_size=10))
def test_any_chunks_make_the_same_blob(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes]) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    data = b"".join(chunks)
    assert store.put(digest(data), chunks, len(data))
    assert store.path(digest(data)).read_bytes() == data
