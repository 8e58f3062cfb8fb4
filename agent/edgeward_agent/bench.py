"""One measurement of a released model beside what serves: verify, fetch, try every plan, forget.

Invariants: everything here runs on the machine's thread. Trust, blobs and the trial are those of an update:
the registry's signatures, the security floor, the hardware hints, the one lock of this machine. Nothing is
switched, and nothing is written that a restart would take up. It ends exactly once, unless `stop`ped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgeward_agent import messages, states
from edgeward_agent.config import Config
from edgeward_agent.fetching import Fetching
from edgeward_agent.qualifying import qualify_order
from edgeward_agent.running import Post
from edgeward_agent.sensors import power_mode, temperature_c
from edgeward_agent.states import Event
from edgeward_agent.supply import Supply
from edgeward_agent.sysinfo import Machine, cpu_name
from edgeward_agent.trial import Trial
from edgeward_agent.variants import needed_blobs, usable_variants
from edgeward_wire import __version__
from edgeward_wire.command import Bench, MachineFacts, Phase
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import FEATURES, BlobRef, Manifest, ModelRef
from edgeward_wire.verdict import Verdict

Ask = Callable[[ModelRef, Callable[["Manifest | Rejected | Unavailable"], None]], None]
"""Have a released model's manifest verified; the answer may come on any thread."""

Outcome = Verdict | Rejected | Unavailable
_SHARE = 0.7
"""Of the time that is left, for trying plans: the finals, and the slowest plan's end, want some too."""
_PREPARING = 0.85
"""Of the measuring: sessions are made one after another, then the best run in turn."""


@dataclass(frozen=True)
class Means:
    """What a measurement is made with."""

    config: Config
    hardware: Machine
    state: Path
    supply: Supply
    qualify: tuple[str, ...]
    """The program."""
    post: Post
    ask: Ask
    floor: Callable[[str], int]
    """The security floor of a model's name."""

    def threads(self, wish: Bench) -> int:
        """The budget that plans are made for."""
        return wish.threads or self.config.thread_budget(self.hardware.cores)


class Benchmark:
    """One run. `ended` gets the verdict, or whose fault it was that there is none."""

    def __init__(self, wish: Bench, means: Means, ended: Callable[[Outcome], None]) -> None:
        self.model = wish.model
        self.blobs: tuple[BlobRef, ...] = ()
        """What must not be pruned meanwhile."""
        self.phase: Phase = "verifying"
        self.progress = 0.0
        self.detail = ""
        self._wish = wish
        self._means = means
        self._ended = ended
        self._over = False
        self._deadline = time.monotonic() + wish.seconds
        self._manifest: Manifest | None = None
        self._before_c: float | None = None
        self._trial: Trial | None = None
        self._fetching = Fetching(means.state / "blobs", means.supply, means.post, emit=self._fetched)
        means.ask(wish.model, lambda found: means.post(partial(self._verified, found)))

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._over = True
        self._fetching.stop_all()
        if self._trial is not None:
            self._trial.kill()

    def tick(self, now: float) -> None:
        """Deadlines, and how far it is."""
        if self._over:
            return
        if now > self._deadline:
            at = f"{self.phase}: {self.detail}" if self.detail else self.phase
            what = f"It was not done within {self._wish.seconds:g} s (it was {at})."
            self._end(Unavailable(what, "Give it more with --seconds."))
            return
        self._fetching.tick(now)
        if self._trial is not None:
            self._trial.tick(now)
        elif self.phase == "downloading":
            self.progress, self.detail = self._fetching.progress, self._fetching.detail

    def facts(self, beside: tuple[str, ...]) -> MachineFacts:
        """What it was measured on."""
        hardware = self._means.hardware
        return MachineFacts(
            arch=hardware.arch,
            cores=hardware.cores,
            memory_mb=hardware.memory_mb,
            cpu=cpu_name()[:200],
            board=hardware.board,
            os=hardware.os,
            isa=hardware.isa,
            power_mode=power_mode()[:200],
            temperature_before_c=self._before_c,
            temperature_after_c=temperature_c(),
            threads=self._means.threads(self._wish),
            beside=tuple(line[:200] for line in beside[:16]),
            agent=__version__,
        )

    # --- the steps

    def _verified(self, found: Manifest | Rejected | Unavailable) -> None:
        if self._over:
            return
        if not isinstance(found, Manifest):
            self._end(found)
            return
        refusal = self._refusal(found)
        if refusal:
            self._end(Rejected(refusal))
            return
        self._manifest = found
        self.blobs = needed_blobs(found, self._means.hardware, self._means.config.qualify.providers)
        self._enter("downloading")
        self._fetching.fetch(self.blobs)

    def _refusal(self, manifest: Manifest) -> str:
        """Why this device will not run this model; empty when it will."""
        hardware, floor = self._means.hardware, self._means.floor(manifest.name)
        if manifest.security_epoch < floor:
            return f"Its security epoch {manifest.security_epoch} is below this device's floor {floor}."
        lacking = sorted(set(manifest.requires) - FEATURES)
        if lacking:
            return f"This agent lacks what the model requires: {', '.join(lacking)}."
        if not usable_variants(manifest, hardware, self._means.config.qualify.providers):
            there = f"{hardware.arch}, {', '.join(hardware.providers)}"
            return f"No variant of it is meant for this device ({there})."
        return ""

    def _fetched(self, event: Event) -> None:
        """What `Fetching` says."""
        if self._over:
            return
        match event:
            case states.Fetched():
                self._fetching.verify(self.blobs)
            case states.Missing():
                self._fetching.fetch(self.blobs)
            case states.Verified():
                self._measure()
            case states.Failed():
                fault = Rejected if event.result == "rejected" else Unavailable
                self._end(fault(event.reason))

    def _measure(self) -> None:
        assert self._manifest is not None
        self._fetching.stop()
        self._enter("measuring")
        self._before_c = temperature_c()
        means = self._means
        try:
            self._trial = Trial(
                "qualify-bench",
                means.qualify,
                qualify_order(
                    self.model,
                    self._manifest,
                    config=means.config,
                    hardware=means.hardware,
                    state=means.state,
                    threads=means.threads(self._wish),
                    budget_s=max(1.0, _SHARE * (self._deadline - time.monotonic())),
                ),
                means.post,
                progressed=self._progressed,
                ended=self._end,
            )
        except OSError as error:
            self._end(Unavailable(f"Qualify cannot be started: {error}."))

    def _progressed(self, message: messages.QualifyProgress) -> None:
        if self._over:
            return
        share = message.done / message.total if message.total else 0.0
        self._enter("waiting" if message.phase == "waiting" else "measuring")
        if message.phase == "preparing":
            self.progress = _PREPARING * min(1.0, share)
        elif message.phase == "validating":
            self.progress = _PREPARING + (1 - _PREPARING) * min(1.0, share)
        self.detail = message.note[:200]

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            self.phase, self.progress, self.detail = phase, 0.0, ""

    def _end(self, outcome: Outcome) -> None:
        if self._over:
            return
        self.stop()
        self._ended(outcome)
