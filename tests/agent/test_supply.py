"""The blob thread with a real store on a real disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.models import blob
from edgeward_agent.blobs import BlobStore
from edgeward_agent.lifetime import Pulse
from edgeward_agent.supply import Supply, Ticket
from edgeward_wire.errors import Unavailable

WAIT_S = 60.0


@pytest.fixture
def supply(tmp_path: Path) -> Iterator[Supply]:
    supply = Supply(BlobStore(tmp_path), None, None)
    thread = threading.Thread(target=supply.run, args=(Pulse("blobs", 60),))
    thread.start()
    yield supply
    supply.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def outcome(supply: Supply, *refs: Any, rehash: bool = False) -> Any:
    done: queue.Queue[Any] = queue.Queue()
    supply.submit(Ticket(tuple(refs), done.put, rehash=rehash))
    return done.get(timeout=WAIT_S)


def test_what_is_here_needs_no_registry(supply: Supply, tmp_path: Path) -> None:
    here = blob(b"one", tmp_path)
    assert outcome(supply, here) is None
    assert isinstance(outcome(supply, here, blob(b"two")), Unavailable)


def test_rehashing_finds_what_a_disk_has_lost(supply: Supply, tmp_path: Path) -> None:
    here = blob(b"one", tmp_path)
    assert outcome(supply, here, rehash=True) is None
    (tmp_path / here.sha256).write_bytes(b"0ne")
    assert isinstance(outcome(supply, here, rehash=True), Unavailable)
    assert not (tmp_path / here.sha256).exists(), "so that it is fetched again"


def test_rehashing_removes_all_that_is_wrong_at_once(supply: Supply, tmp_path: Path) -> None:
    one, two = blob(b"one", tmp_path), blob(b"two", tmp_path)
    (tmp_path / one.sha256).write_bytes(b"0ne")
    (tmp_path / two.sha256).unlink()
    (tmp_path / two.sha256).mkdir()  # looked at, it gives an OSError, as a bad sector does
    assert isinstance(outcome(supply, one, two, rehash=True), Unavailable)
    assert not (tmp_path / one.sha256).exists()


def test_a_disk_that_fails_is_an_answer_and_the_thread_goes_on(supply: Supply, tmp_path: Path) -> None:
    here = blob(b"one", tmp_path)
    loop = here.model_copy(update={"sha256": "f" * 64})
    (tmp_path / loop.sha256).symlink_to(tmp_path / loop.sha256)
    fault = outcome(supply, loop, rehash=True)
    assert isinstance(fault, Unavailable)
    assert "disk" in str(fault)
    assert outcome(supply, here) is None


def test_pruning_keeps_what_it_is_told(supply: Supply, tmp_path: Path) -> None:
    keep, drop = blob(b"keep", tmp_path), blob(b"drop", tmp_path)
    supply.prune({keep.sha256})
    assert outcome(supply, keep) is None
    assert {path.name for path in tmp_path.iterdir()} == {keep.sha256}
    assert isinstance(outcome(supply, drop), Unavailable)


def test_a_stopped_ticket_says_nothing(supply: Supply, tmp_path: Path) -> None:
    told: queue.Queue[Any] = queue.Queue()
    ticket = Ticket((blob(b"one", tmp_path),), told.put)
    ticket.stop.set()
    supply.submit(ticket)
    assert outcome(supply, blob(b"two", tmp_path)) is None
    assert told.empty()
