"""One pipeline's blobs: fetching them with patience, hashing them again, and mending what a disk has lost.

Invariants: everything here runs on the machine's thread; the work itself is the blob thread's. At most one
ticket per pipeline counts: what an earlier one still says is ignored. Retries wait with full jitter, are
bounded, and say in `detail` when the next one comes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edgeward_agent import states
from edgeward_agent.backoff import Backoff
from edgeward_agent.running import Post
from edgeward_agent.states import Event
from edgeward_agent.supply import Supply, Ticket
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import BlobRef

SPARE_BYTES = 64 << 20
"""Free disk that qualify needs at least."""
FRUITLESS = 40
"""Tries in a row that brought nothing; with the backoff's cap that is more than an hour."""
FRUITLESS_ON_A_FULL_DISK = 3
LOSSES = 3
"""Blobs fetched and then not there, in a row: a disk that does not keep them."""

Fault = Rejected | Unavailable | None


class Fetching:
    """The blobs of one pipeline's candidate, or of a model that should be served."""

    def __init__(self, blobs: Path, supply: Supply, post: Post, emit: Callable[[Event], None]) -> None:
        self._blobs = blobs
        self._supply = supply
        self._post = post
        self._emit = emit
        self._refs: tuple[BlobRef, ...] = ()
        self._ticket: Ticket | None = None
        self._repair: Ticket | None = None
        self._backoff = Backoff(2.0, 300.0)
        self._again_at: float | None = None
        self._fetched = 0
        self._lost = 0
        self.progress = 0.0
        self.detail = ""

    def fetch(self, refs: tuple[BlobRef, ...]) -> None:
        """`Fetched` or `Failed` follows, however long it takes."""
        self._refs = refs
        self._backoff.reset()
        self._fetched = 0
        self._fetch()

    def verify(self, refs: tuple[BlobRef, ...]) -> None:
        """Hash once more what is about to be loaded: disks lie. `Verified`, `Missing` or `Failed` follows."""
        self.stop()
        if refs != self._refs:
            self._refs, self._lost = refs, 0
        self._ticket = self._submit(self._verified, rehash=True)

    def repair(self, refs: tuple[BlobRef, ...], done: Callable[[Fault], None]) -> None:
        """Fetch what a model needs that should be served now, beside whatever else goes on."""
        if self._repair is not None:
            self._repair.stop.set()

        def told(ticket: Ticket, fault: Fault) -> None:
            if self._repair is ticket:
                self._repair = None
                done(fault)

        self._repair = self._submit(told, refs=refs)

    def suspect(self, refs: tuple[BlobRef, ...]) -> None:
        """Hash these again; what a disk has hurt is removed, so that the next try to serve mends it."""
        self._supply.submit(Ticket(refs, lambda _fault: None, rehash=True))

    def stop(self) -> None:
        """Forget the candidate's blobs; what came so far is kept on disk."""
        self._again_at = None
        self.progress, self.detail = 0.0, ""
        if self._ticket is not None:
            self._ticket.stop.set()
            self._ticket = None

    def stop_all(self) -> None:
        """The daemon stops."""
        self.stop()
        if self._repair is not None:
            self._repair.stop.set()

    def tick(self, now: float) -> None:
        """The next try."""
        if self._again_at is not None and now >= self._again_at:
            self._fetch()

    def _fetch(self) -> None:
        self.stop()
        self._ticket = self._submit(self._done)

    def _submit(
        self,
        done: Callable[[Ticket, Fault], None],
        *,
        refs: tuple[BlobRef, ...] | None = None,
        rehash: bool = False,
    ) -> Ticket:
        ticket = Ticket(
            self._refs if refs is None else refs,
            lambda fault: self._post(partial(done, ticket, fault)),
            lambda got, total: self._post(partial(self._progressed, ticket, got, total)),
            rehash=rehash,
        )
        self._supply.submit(ticket)
        return ticket

    def _progressed(self, ticket: Ticket, got: int, total: int) -> None:
        if self._ticket is not ticket:
            return
        self.progress = got / total if total else 1.0
        self.detail = f"{got / 1e6:.1f} of {total / 1e6:.1f} MB"
        if got > self._fetched:
            self._fetched = got
            self._backoff.reset()

    def _done(self, ticket: Ticket, fault: Fault) -> None:
        if self._ticket is not ticket:
            return
        self._ticket = None
        if fault is None:
            self._emit(states.Fetched())
        elif isinstance(fault, Rejected):
            self._emit(states.Failed(str(fault), result="rejected", deny=True))
        else:
            self._try_again(fault)

    def _try_again(self, fault: Unavailable) -> None:
        pause = self._backoff.next()
        tries = self._backoff.failures
        if tries >= (FRUITLESS_ON_A_FULL_DISK if self._disk_is_full() else FRUITLESS):
            self._emit(states.Failed(f"{fault} Given up after {tries} tries."))
            return
        self._again_at = time.monotonic() + pause
        self.detail = f"{fault.what} Again in {pause:.0f} s."[:200]

    def _disk_is_full(self) -> bool:
        missing = sum(ref.length for ref in self._refs if not (self._blobs / ref.sha256).exists())
        return self._free() < missing - self._fetched + SPARE_BYTES // 4

    def _free(self) -> int:
        here = self._blobs if self._blobs.exists() else self._blobs.parent
        return shutil.disk_usage(here).free

    def _verified(self, ticket: Ticket, fault: Fault) -> None:
        if self._ticket is not ticket:
            return
        self._ticket = None
        self._lost = self._lost + 1 if fault is not None else 0
        free = self._free()
        if fault is not None and self._lost < LOSSES:
            self._emit(states.Missing())
        elif fault is not None:
            self._emit(states.Failed(f"{fault} The disk loses what is written to it."))
        elif free < SPARE_BYTES:
            needed = f"{SPARE_BYTES / 1e6:.0f} MB are needed to try it"
            self._emit(states.Failed(f"disk full: {free / 1e6:.0f} MB are free; {needed}."))
        else:
            self._emit(states.Verified())
