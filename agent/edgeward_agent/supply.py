"""The blob thread: fetches, rehashes and prunes, one job after another. Sole owner of the blob store.

Invariants: a job's outcome is told exactly once, unless its ticket was stopped. A stopped ticket ends a
download within a second, so a newer assignment never waits behind an old one's gigabytes.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edgeward_agent.blobs import BlobStore
from edgeward_agent.http import Http, Token
from edgeward_agent.lifetime import Pulse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import BlobRef

log = logging.getLogger(__name__)

PULSE_S = 180.0
"""More than the longest silence that Http allows a server."""
_IDLE_S = 5.0


@dataclass(frozen=True, eq=False)
class Ticket:
    """One job. All callbacks run on the blob thread and must only post."""

    refs: tuple[BlobRef, ...]
    done: Callable[[Rejected | Unavailable | None], None]
    progress: Callable[[int, int], None] = lambda done, total: None
    rehash: bool = False
    """Not a download: hash what is here again. A blob that is gone or wrong is `Unavailable`."""
    stop: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Prune:
    keep: frozenset[str]


class Supply:
    """A queue of jobs and the thread function that does them."""

    def __init__(self, store: BlobStore, http: Http | None, token: Token | None) -> None:
        """Without `http` only what is here already can be had."""
        self._store = store
        self._http = http
        self._token = token
        self._jobs: queue.SimpleQueue[Ticket | _Prune | None] = queue.SimpleQueue()
        self._current: Ticket | None = None
        self._stopping = False

    def submit(self, ticket: Ticket) -> None:
        """Queue a job; from any thread."""
        self._jobs.put(ticket)

    def prune(self, keep: Iterable[str]) -> None:
        """Queue the removal of all other blobs; from any thread."""
        self._jobs.put(_Prune(frozenset(keep)))

    def stop(self) -> None:
        """End the thread soon; what came so far is kept."""
        self._stopping = True
        self._jobs.put(None)
        current = self._current
        if current is not None:
            current.stop.set()

    def run(self, pulse: Pulse) -> None:
        """The thread."""
        while not self._stopping:
            pulse.beat()
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if isinstance(job, _Prune):
                self._prune(job)
            elif job is not None and not job.stop.is_set():
                self._current = job
                self._do(job, pulse)
                self._current = None

    def _do(self, job: Ticket, pulse: Pulse) -> None:
        fault: Rejected | Unavailable | None = None
        try:
            if job.rehash:
                self._rehash(job, pulse)
            else:
                self._fetch(job, pulse)
        except (Rejected, Unavailable) as error:
            fault = error
        except OSError as error:  # looking at what is here: fetching words its own
            fault = Unavailable(f"The disk of the blobs fails: {error.strerror}.", "Check that disk.")
        if not job.stop.is_set():
            job.done(fault)

    def _fetch(self, job: Ticket, pulse: Pulse) -> None:
        total = sum(ref.length for ref in job.refs)
        before = 0
        for ref in job.refs:

            def progress(done: int, _length: int, before: int = before) -> None:
                pulse.beat()
                job.progress(before + done, total)

            if not self._store.has(ref):
                if self._http is None or self._token is None:
                    raise Unavailable(f"Blob {ref.sha256[:12]} is not here, and there is no registry.")
                self._store.fetch(ref, self._http, self._token, progress, job.stop)
            before += ref.length
            progress(0, 0, before)

    def _rehash(self, job: Ticket, pulse: Pulse) -> None:
        bad: BlobRef | None = None
        for ref in job.refs:  # all of them, so that all that is wrong is removed
            if job.stop.is_set():
                return
            pulse.beat()
            if not self._store.verify(ref):
                bad = bad or ref
        if bad is not None:
            raise Unavailable(f"Blob {bad.sha256[:12]} is gone or damaged.")

    def _prune(self, job: _Prune) -> None:
        try:
            freed = self._store.prune(set(job.keep))
        except OSError as error:
            log.warning("Old blobs could not be removed: %s.", error.strerror)
            return
        if freed:
            log.info("Removed old blobs: %.1f MB.", freed / 1e6)
