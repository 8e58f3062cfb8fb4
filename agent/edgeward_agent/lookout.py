"""The registry thread: looks at the registry with jitter, and at once when somebody says "look again".

Invariants: nothing that goes wrong here ends the thread or touches what serves; it becomes one line of the
report and another look later. A hint over MQTT only moves the next look forward. A question (a command's
model) gets exactly one answer.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable

from edgeward_agent.backoff import Backoff
from edgeward_agent.enrol import renew
from edgeward_agent.http import Http
from edgeward_agent.identity import Identity
from edgeward_agent.lifetime import Pulse
from edgeward_agent.machine import Machine, Wanted
from edgeward_agent.trust import Desired, Registry
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Manifest, ModelRef

log = logging.getLogger(__name__)

PULSE_S = 300.0
"""A look is several requests, each with its own bounds."""
_NAP_S = 5.0
_HINT_JITTER_S = 0.5
_JITTER = 0.2
_RENEW_AGAIN_S = 600.0
"""A renewal may have been refused because nobody has accepted the device again, yet."""

Answer = Callable[["Manifest | Rejected | Unavailable"], None]
"""Called on the registry thread: it must only post."""


class Lookout:
    """One device's eye on the registry."""

    def __init__(
        self, identity: Identity, registry: Registry, http: Http, machine: Machine, interval_s: float
    ) -> None:
        self._identity = identity
        self._registry = registry
        self._http = http
        self._machine = machine
        self._interval_s = interval_s
        self._hint = threading.Event()
        self._questions: queue.SimpleQueue[tuple[ModelRef, Answer]] = queue.SimpleQueue()
        self._stopping = False
        self._backoff = Backoff(1.0, interval_s)
        self._renew_at = 0.0
        self._refused = False
        self._trouble = ""

    def refresh(self) -> None:
        """Look again soon; from any thread."""
        self._hint.set()

    def refused(self) -> None:
        """The broker does not take the certificate, which may have been revoked; from any thread."""
        self._refused = True

    def ask(self, ref: ModelRef, answer: Answer) -> None:
        """Verify a released model's manifest, soon; from any thread."""
        self._questions.put((ref, answer))
        self._hint.set()

    def stop(self) -> None:
        """End the thread soon."""
        self._stopping = True
        self._hint.set()

    def run(self, pulse: Pulse) -> None:
        """The thread."""
        while not self._stopping:
            self._answer(pulse)
            pulse.beat()
            pause = self._look()
            self._renew()
            self._wait(pause, pulse)

    def _answer(self, pulse: Pulse) -> None:
        while not self._stopping and not self._questions.empty():
            pulse.beat()
            ref, answer = self._questions.get()
            try:
                found: Manifest | Rejected | Unavailable = self._registry.manifest(ref).manifest
            except (Rejected, Unavailable) as error:
                found = error
            answer(found)

    def _look(self) -> float:
        """One look; returns the pause until the next, in seconds."""
        try:
            desired = self._registry.check()
        except (Rejected, Unavailable) as error:
            if not self._stopping:
                self._machine.registry(str(error))
            return self._backoff.next()
        self._backoff.reset()
        self._machine.registry(self._tell(desired) if desired is not None else "")
        interval = self._machine.remote.poll_interval_s or self._interval_s
        return interval * random.uniform(1 - _JITTER, 1 + _JITTER)

    def _tell(self, desired: Desired) -> str:
        """Hand the assignment to the machine; returns what could not be looked at now."""
        self._machine.wanted(wanted(desired))
        assigned = {row.model.sha256 for row in desired.assignment.pipelines.values()}
        self._registry.prune_manifests(assigned | self._machine.models)
        later = [f"{n}: {e}" for n, e in sorted(desired.refused.items()) if isinstance(e, Unavailable)]
        return "; ".join(later)

    def _renew(self) -> None:
        due = self._refused or self._identity.renewal_due(self._registry.trusted_time())
        if time.monotonic() < self._renew_at or not due:
            return
        self._refused = False
        self._renew_at = time.monotonic() + _RENEW_AGAIN_S
        try:
            self._identity = renew(self._identity, self._http)
        except (Rejected, Unavailable) as error:
            if str(error) != self._trouble:
                log.warning("The device's certificate could not be renewed: %s", error)
            self._trouble = str(error)
        else:
            self._trouble = ""
            log.info("The device's certificate was renewed.")

    def _wait(self, pause: float, pulse: Pulse) -> None:
        until = time.monotonic() + pause
        while not self._stopping and (left := until - time.monotonic()) > 0:
            pulse.beat()
            if self._hint.wait(min(left, _NAP_S)):
                self._hint.clear()
                if not self._stopping and self._questions.empty():
                    time.sleep(random.uniform(0.0, _HINT_JITTER_S))  # a fleet gets its hints at once
                return


def wanted(desired: Desired) -> Wanted:
    """What trust has verified, as the machine takes it."""
    return Wanted(
        assignment=desired.assignment,
        raw=desired.assignment_raw,
        manifests={name: m.raw.decode() for name, m in desired.manifests.items()},
        refused={name: str(e) for name, e in desired.refused.items() if isinstance(e, Rejected)},
    )
