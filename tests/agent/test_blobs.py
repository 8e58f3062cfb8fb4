from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import missing
from edgeward_agent.blobs import BlobStore
from edgeward_agent.http import Http
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.identifiers import blob_path
from edgeward_wire.manifest import BlobRef
from sim.repository import ref_of
from sim.server import Fault, Server

BLOB = os.urandom(300_000)
REF = ref_of(BLOB, "model.onnx")
PATH = f"/{blob_path(REF.sha256)}"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def served(server: Server) -> Server:
    server.files[PATH] = BLOB
    return server


def token(now: float) -> str:
    return f"token-{now > 0}"


def fetch(store: BlobStore, http: Http, ref: BlobRef = REF) -> Path:
    return store.fetch(ref, http, token, lambda done, total: None, threading.Event())


def part(store: BlobStore) -> Path:
    return store.path(f"{REF.sha256}.part")


def test_a_blob_is_fetched_verified_and_kept(store: BlobStore, http: Http, served: Server) -> None:
    told: list[tuple[int, int]] = []
    path = store.fetch(REF, http, token, lambda done, total: told.append((done, total)), threading.Event())
    assert path.read_bytes() == BLOB
    assert store.has(REF)
    assert store.verify(REF)
    assert not part(store).exists()
    assert told[0] == (0, len(BLOB))
    assert told[-1] == (len(BLOB), len(BLOB))
    assert served.requests[0].headers["Authorization"] == "Bearer token-True"
    fetch(store, http)
    assert len(served.requests) == 1, "what is here is not fetched again"


def test_an_empty_blob_needs_no_request(store: BlobStore, http: Http, served: Server) -> None:
    assert fetch(store, http, ref_of(b"")).read_bytes() == b""
    assert served.requests == []


def test_a_cut_download_goes_on_where_it_stopped(store: BlobStore, http: Http, served: Server) -> None:
    for _ in range(3):
        served.faults[PATH] = Fault(cut_after=80_000, times=1)
        with pytest.raises(Unavailable):
            fetch(store, http)
    assert fetch(store, http).read_bytes() == BLOB
    assert served.sent[PATH] <= len(BLOB) * 1.02
    assert ["Range" in r.headers for r in served.requests] == [False, True, True, True]


@pytest.mark.parametrize("fault", [Fault(ignore_range=True), Fault(wrong_range=True, times=1)])
def test_a_server_that_is_bad_at_ranges(store: BlobStore, http: Http, served: Server, fault: Fault) -> None:
    served.faults[PATH] = Fault(cut_after=80_000, times=1)
    with pytest.raises(Unavailable):
        fetch(store, http)
    served.faults[PATH] = fault
    if fault.wrong_range:
        with pytest.raises(Rejected, match="not asked for"):
            fetch(store, http)
    assert fetch(store, http).read_bytes() == BLOB


def test_a_tampered_blob_is_refused_and_nothing_of_it_is_kept(
    store: BlobStore, http: Http, served: Server
) -> None:
    served.files[PATH] = BLOB[:-1] + bytes([BLOB[-1] ^ 1])
    with pytest.raises(Rejected, match="do not match the signed sha256"):
        fetch(store, http)
    assert not store.has(REF)
    assert not part(store).exists()


def test_a_part_that_a_power_cut_hurt_is_not_blamed_on_the_registry(
    store: BlobStore, http: Http, served: Server
) -> None:
    part(store).parent.mkdir()
    part(store).write_bytes(b"\0" * 100_000)
    assert fetch(store, http).read_bytes() == BLOB


@pytest.mark.parametrize("length", [len(BLOB), len(BLOB) + 10])
def test_a_part_that_is_full_or_too_long_and_wrong(
    store: BlobStore, http: Http, served: Server, length: int
) -> None:
    part(store).parent.mkdir()
    part(store).write_bytes(b"x" * length)
    assert fetch(store, http).read_bytes() == BLOB


def test_a_full_part_that_is_right_needs_no_request(store: BlobStore, http: Http, served: Server) -> None:
    part(store).parent.mkdir()
    part(store).write_bytes(BLOB)
    assert fetch(store, http).read_bytes() == BLOB
    assert served.requests == []


def test_a_registry_that_sends_too_much_is_refused(store: BlobStore, http: Http, served: Server) -> None:
    served.files[PATH] = BLOB + b"more"
    with pytest.raises(Rejected, match="more than the signed length"):
        fetch(store, http)
    served.faults[PATH] = Fault(endless=True)
    with pytest.raises(Rejected, match="more than the signed length"):
        fetch(store, http)
    assert part(store).stat().st_size == 0


def test_a_registry_that_sends_too_little_is_asked_again(
    store: BlobStore, http: Http, served: Server
) -> None:
    served.files[PATH] = BLOB[:1000]
    with pytest.raises(Unavailable, match="broke off at 1000 of 300000"):
        fetch(store, http)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(404, Rejected), (410, Rejected), (401, Unavailable), (403, Unavailable), (500, Unavailable)],
)
def test_what_a_status_means(
    store: BlobStore, http: Http, served: Server, status: int, kind: type[Exception]
) -> None:
    served.faults[PATH] = Fault(status=status)
    with pytest.raises(kind, match=str(status)):
        fetch(store, http)


def test_a_slow_drip_is_left_and_what_came_is_kept(
    store: BlobStore, http: Http, hasty: Http, served: Server
) -> None:
    served.faults[PATH] = Fault(drip=True)
    for _ in range(30):  # a busy machine may be left before the first byte
        with pytest.raises(Unavailable, match="bytes a second"):
            fetch(store, hasty)
        if part(store).stat().st_size > 0:
            break
    assert part(store).stat().st_size > 0
    del served.faults[PATH]
    assert fetch(store, http).read_bytes() == BLOB


def test_a_download_can_be_stopped_while_nothing_comes(store: BlobStore, http: Http, served: Server) -> None:
    served.faults[PATH] = Fault(drip=True)
    stop = threading.Event()

    def progress(done: int, total: int) -> None:
        if done:  # the server has taken the request, and is at its body
            stop.set()

    with pytest.raises(Unavailable, match="stopped"):
        store.fetch(REF, http, token, progress, stop)
    del served.faults[PATH]
    assert fetch(store, http).read_bytes() == BLOB


def test_too_little_room_is_seen_before_anything_is_fetched(
    tmp_path: Path, http: Http, served: Server
) -> None:
    store = BlobStore(tmp_path / "blobs", reserve=1 << 60)
    with pytest.raises(Unavailable, match=r"blobs has .* MB free; model.onnx .* needs 0.3 MB"):
        fetch(store, http)
    assert served.requests == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; needs root."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        missing("the right to mount a small disk")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_fills_up_is_named_and_room_is_given_back(
    small_disk: Path, http: Http, served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(small_disk / "blobs", reserve=64 << 10)
    monkeypatch.setattr(store, "_check_space", lambda ref, needed: None)  # others fill it meanwhile
    with pytest.raises(Unavailable, match=r"blobs is full; model\.onnx"):
        fetch(store, http)
    assert shutil.disk_usage(small_disk).free >= 60 << 10
    assert part(store).stat().st_size > 100_000, "the rest is kept"


def test_pruning_keeps_what_is_needed(store: BlobStore, http: Http, served: Server) -> None:
    kept = fetch(store, http)
    other = ref_of(b"other")
    served.files[f"/{blob_path(other.sha256)}"] = b"other"
    fetch(store, http, other)
    store.path(f"{'0' * 64}.part").write_bytes(b"123")
    store.path("notes.txt").write_bytes(b"somebody else's")
    assert store.prune({REF.sha256}) == len(b"other") + 3
    assert sorted(p.name for p in kept.parent.iterdir()) == sorted([REF.sha256, "notes.txt"])


def test_a_blob_that_rots_is_found_out(store: BlobStore, http: Http, served: Server) -> None:
    path = fetch(store, http)
    path.write_bytes(bytes(len(BLOB)))
    assert store.has(REF)
    assert not store.verify(REF)
    assert not store.has(REF)
    assert hashlib.sha256(fetch(store, http).read_bytes()).hexdigest() == REF.sha256
