"""What the device says of itself: retained documents, events, windows, metrics, and status.json.

Invariants: called on the machine's thread only. Retained documents go out when they change and on every
connect; mere progress at most once a second. Faults are told as transitions: once when something breaks,
once when it works again. Nothing here blocks on the broker or fails for it.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from edgeward_agent.sensors import power_mode
from edgeward_agent.status import STATUS_FILE, Figures, StatusFile, write_status
from edgeward_agent.sysinfo import Machine
from edgeward_wire import __version__
from edgeward_wire.ack import Ack
from edgeward_wire.command import CommandResponse
from edgeward_wire.event import Event, Fault, Happening
from edgeward_wire.metrics import flat_metrics
from edgeward_wire.reported import PipelineReport, Reported, fitted
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth
from edgeward_wire.telemetry import Measures, Window
from edgeward_wire.vitals import Vitals

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
HEAT_S, HEAT_C = 60.0, 5.0
"""The heat alone is told at most so often, and when it has changed by so much."""
Direct = Literal["birth", "reported", "metrics", "result"]
"""What is published at once or not at all."""


class Outlet(Protocol):
    """The part of `mqtt.Link` that is used here."""

    @property
    def connected(self) -> bool: ...

    @property
    def trouble(self) -> str: ...

    def publish(self, kind: Direct, payload: bytes) -> bool: ...

    def respond(self, answer: CommandResponse) -> bool: ...

    def wake(self) -> None: ...


class Store(Protocol):
    """The part of `spool.Spool` that is used here."""

    @property
    def fault(self) -> str: ...

    def append_window(
        self, measures: Measures, *, clock: Literal["trusted", "untrusted"] = "trusted"
    ) -> Window | None: ...

    def append_event(self, what: Happening, *, time: float) -> Event | None: ...

    def acked(self, ack: Ack) -> None: ...


class Reporter:
    """Speaks for one device and one run of the daemon."""

    def __init__(
        self,
        *,
        device: str,
        fleet: str,
        boot_id: str,
        state: Path,
        spool: Store,
        machine: Machine,
        pipelines: Mapping[str, tuple[str, ...]],
        clock: Callable[[], float] = time.time,
        clock_trusted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._device = device
        self._fleet = fleet
        self._boot_id = boot_id
        self._path = state / STATUS_FILE
        self._spool = spool
        self._machine = machine
        self._pipelines = dict(pipelines)
        self._clock = clock
        self._clock_trusted = clock_trusted
        self._started_at = clock()
        self._link: Outlet | None = None
        self._told: Reported | None = None
        self._told_at = -PROGRESS_S
        self._figures: dict[str, dict[str, Figures]] = {}
        self._faults: dict[str, str] = {}
        self._vitals: Vitals | None = None
        self._status_due = True
        self._broker = False, ""

    @property
    def boot_id(self) -> str:
        """Of this run of the daemon."""
        return self._boot_id

    def attach(self, link: Outlet) -> None:
        """Where to publish; before it, all stays in the spool and in status.json."""
        self._link = link

    def connected(self) -> None:
        """The broker is there (again): it may have forgotten what it retained."""
        self._publish("birth", self.birth().to_bytes())
        if self._told is not None:
            self._publish("reported", fitted(self._told).to_bytes())
        self._status_due = True

    def birth(self) -> Birth:
        """Who this device is."""
        machine = self._machine
        return Birth(
            device=self._device,
            boot_id=self._boot_id,
            time=self._clock(),
            agent=__version__,
            arch=machine.arch,
            cores=machine.cores,
            memory_mb=machine.memory_mb,
            os=machine.os,
            board=machine.board,
            isa=machine.isa,
            runtime=machine.runtime,
            pipelines=self._pipelines,
            power_mode=power_mode()[:200],
        )

    def vitals(self, vitals: Vitals) -> None:
        """The newest look at the sensors: it goes out with what is told anyway, and when it matters."""
        self._vitals = vitals

    def reported(
        self, pipelines: Mapping[str, PipelineReport], *, revision: int, registry: str, now: float
    ) -> None:
        """What runs now; told when it differs from what was told. `now` in monotonic seconds."""
        new = Reported(
            device=self._device,
            boot_id=self._boot_id,
            time=self._clock(),
            revision=revision,
            pipelines=dict(pipelines),
            registry=registry[:200],
            vitals=self._vitals,
        )
        told, since = self._told, now - self._told_at
        if (
            told is None
            or _essence(new) != _essence(told)
            or (since >= PROGRESS_S and new.pipelines != told.pipelines)
            or (since >= HEAT_S and _warmth(new.vitals, told.vitals) >= HEAT_C)
        ):
            self._tell(new, now)
        if self._link is not None and (self._link.connected, self._link.trouble) != self._broker:
            self._broker = self._link.connected, self._link.trouble
            self._status_due = True
        self.fault("spool", self._spool.fault)
        if self._status_due:
            self._write_status()

    def _tell(self, new: Reported, now: float) -> None:
        self._told, self._told_at = new, now
        self._status_due = True
        self._publish("reported", fitted(new).to_bytes())

    def happening(self, what: Happening) -> None:
        """One event, spooled."""
        self._spool.append_event(what, time=self._clock())
        if self._link is not None:
            self._link.wake()

    def fault(self, subject: str, detail: str) -> None:
        """The present fault of a subject; empty when it works. Only changes are told."""
        before = self._faults.get(subject, "")
        if bool(before) == bool(detail):
            return
        if detail:
            log.warning("%s: %s", subject, detail)
            self._faults[subject] = detail
        else:
            log.info("%s: works again", subject)
            del self._faults[subject]
        self.happening(Fault(subject=subject[:200], recovered=not detail, detail=(detail or before)[:2000]))

    def windows(self, measures: Iterable[Measures]) -> None:
        """Telemetry windows: spooled, and flattened for other people's dashboards."""
        measures = tuple(_with_vitals(window, self._vitals) for window in measures)
        clock: Literal["trusted", "untrusted"] = "trusted" if self._clock_trusted() else "untrusted"
        for window in measures:
            self._spool.append_window(window, clock=clock)
            self._figures.setdefault(window.pipeline, {})[window.source] = _figures(window)
        self._publish("metrics", _json(flat_metrics(measures, self._vitals)))
        if self._link is not None:
            self._link.wake()
        self._status_due = True

    def response(self, response: CommandResponse) -> None:
        """How far a command is. Not spooled: `Commands` says its last words again on every connect."""
        if self._link is not None and self._link.connected:
            self._link.respond(response)

    def result(self, result: ResultMessage) -> None:
        """What the model saw."""
        self._publish("result", result.to_bytes())

    def _publish(self, kind: Direct, payload: bytes) -> None:
        if self._link is not None and self._link.connected:
            self._link.publish(kind, payload)

    def _write_status(self) -> None:
        if self._told is None:
            return
        self._status_due = False
        status = StatusFile(
            agent=__version__,
            pid=os.getpid(),
            device=self._device,
            fleet=self._fleet,
            started_at=self._started_at,
            broker=self._broker[0],
            broker_trouble=self._broker[1][:200],
            reported=self._told,
            figures=self._figures,
        )
        try:
            write_status(self._path, status)
        except OSError as error:
            self._status_due = True  # what is there is old, whether or not anything else happens
            self.fault("status", f"status.json cannot be written: {error.strerror}")
        else:
            self.fault("status", "")


def _essence(reported: Reported) -> object:
    """A document without what changes all the time: time, progress, detail."""
    pipelines = {
        name: p.model_copy(
            update={
                "update": p.update.model_copy(update={"progress": 0.0, "detail": ""}) if p.update else None
            }
        )
        for name, p in reported.pipelines.items()
    }
    throttled = reported.vitals.throttled if reported.vitals else None
    return pipelines, reported.revision, reported.registry, throttled


def _warmth(a: Vitals | None, b: Vitals | None) -> float:
    """How far the hottest zones are apart; infinite when only one is known."""
    new, old = a.temperature_c if a else None, b.temperature_c if b else None
    if new is None or old is None:
        return 0.0 if new == old else float("inf")
    return abs(new - old)


def _with_vitals(window: Measures, vitals: Vitals | None) -> Measures:
    if vitals is None:
        return window
    return window.model_copy(update={"temperature_c": vitals.temperature_c, "throttled": vitals.throttled})


def _figures(window: Measures) -> Figures:
    whole = window.stages.get("end_to_end")
    return Figures(
        fps=round(window.fps, 2),
        p50_ms=round(whole.percentile(0.5), 2) if whole else 0,
        p99_ms=round(whole.percentile(0.99), 2) if whole else 0,
        dropped=window.dropped,
        errors=window.errors,
        seen=max(window.labels, key=lambda label: window.labels[label], default=""),
        stages={
            stage: (round(taken.percentile(0.5), 2), round(taken.percentile(0.99), 2))
            for stage, taken in window.stages.items()
        },
    )


def _json(flat: Mapping[str, float]) -> bytes:
    return json.dumps(flat, sort_keys=True, separators=(",", ":")).encode()
