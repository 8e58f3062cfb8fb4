"""Commands from the cloud: whether to obey, one at a time, and what is answered.

Invariants: everything here runs on the machine's thread. A command is no authority: what it may name is
decided by the registry's signatures. It is obeyed at most once in one run of the agent, and never in another;
nothing of it is persisted, so that a crash ends it. An update comes first: it refuses a command, and ends one
that is under way. Each command that is not a copy gets exactly one final answer and one line in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from edgeward_agent.bench import Benchmark, Means, Outcome
from edgeward_wire.command import (
    MAX_COMMAND_BYTES,
    Command,
    CommandResponse,
    CommandState,
    MachineFacts,
    fitted,
)
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import BlobRef
from edgeward_wire.verdict import Verdict

log = logging.getLogger(__name__)

PROGRESS_S = 1.0
REMEMBERED = 8
"""Answers that are given again when a copy of their command comes, and on every connect."""


@dataclass(frozen=True)
class Circumstances:
    """What decides whether a command is obeyed now."""

    boot_id: str
    now: float
    """Trusted time, Unix seconds."""
    newest: int
    """The largest number of any command so far in this run."""
    cores: int
    at_work: int | None = None
    """The number of the command that is under way."""
    update: str = ""
    """The update that is under way, in words."""
    fault: str = ""
    """Why no model can run here at all."""


def judge(number: int, payload: bytes, here: Circumstances) -> Command | tuple[CommandState, str]:
    """The command when it is to be obeyed, else how it is answered and why. Pure."""
    try:
        command = parse(Command, payload, limit=MAX_COMMAND_BYTES, name="The command")
    except Rejected as error:
        return "refused", error.what
    misfit = _misfit(command, number, here)
    if misfit:
        return "refused", misfit
    if here.now > command.expires_at:
        late = here.now - command.expires_at
        return "expired", f"It came {late:.0f} s too late by this device's clock."
    obstacle = _obstacle(command, here)
    return ("refused", obstacle) if obstacle else command


def _misfit(command: Command, number: int, here: Circumstances) -> str:
    """Why it is not for us, or not any more."""
    if command.n != number:
        return f"It says that it is number {command.n}, but came as number {number}."
    if command.boot_id != here.boot_id:
        return "It was meant for another run of this agent: the agent has started anew since."
    if command.n <= here.newest:
        return f"It is not newer than command {here.newest}, which came before it."
    return ""


def _obstacle(command: Command, here: Circumstances) -> str:
    """Why it cannot be done now, or here."""
    if here.at_work is not None:
        return f"Command {here.at_work} is under way; one runs at a time."
    if here.update:
        return f"An update comes first: {here.update}."
    threads = command.what.threads
    if threads is not None and threads > here.cores:
        return f"It asks for {threads} threads; this device has {here.cores} cores."
    return here.fault


@dataclass(frozen=True)
class Hooks:
    """What commands need of the machine."""

    respond: Callable[[CommandResponse], None]
    update: Callable[[], str]
    """The update that is under way, in words; empty when there is none."""
    beside: Callable[[], tuple[str, ...]]
    """What serves, a line each."""
    prune: Callable[[], None]
    """Forget the blobs that nothing needs."""
    now: Callable[[], float]
    """Trusted time, Unix seconds."""


class Commands:
    """All commands of one run of the agent."""

    def __init__(self, boot_id: str, hooks: Hooks) -> None:
        self._boot_id = boot_id
        self._hooks = hooks
        self._means: Means | None = None
        self._newest = 0
        self._at_work: tuple[int, Benchmark, float] | None = None
        """Number, the measurement, and when it was accepted (monotonic)."""
        self._answers: dict[int, CommandResponse] = {}
        self._told_at = 0.0

    def attach(self, means: Means) -> None:
        """With what to measure; before it, every command is refused."""
        self._means = means

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """What must not be pruned now."""
        return self._at_work[1].blobs if self._at_work else ()

    @property
    def models(self) -> tuple[str, ...]:
        """sha256 of the manifest that is measured now."""
        return (self._at_work[1].model.sha256,) if self._at_work else ()

    def take(self, number: int, payload: bytes) -> None:
        """A command came."""
        known = self._answers.get(number)
        if known is not None:  # QoS 1: at least once
            self._hooks.respond(known)
            return
        verdict = judge(number, payload, self._circumstances())
        if not isinstance(verdict, Command):
            self._conclude(number, *verdict)
            return
        self._newest = number
        model = verdict.what.model
        log.info("Command %d: bench of %s %s accepted.", number, model.name, model.version)
        self._say(number, "accepted")
        assert self._means is not None  # `_circumstances` names its absence
        self._told_at = 0.0
        benchmark = Benchmark(verdict.what, self._means, self._ended)
        self._at_work = (number, benchmark, time.monotonic())

    def turn(self, now: float) -> None:
        """Deadlines and progress; an update that has begun ends what is under way."""
        if self._at_work is None:
            return
        number, benchmark, _ = self._at_work
        update = self._hooks.update()
        if update:
            self._break_off(f"superseded: an update comes first: {update}.")
            return
        benchmark.tick(now)
        if self._at_work is not None:
            self._say_progress(number, benchmark, now)

    def connected(self) -> None:
        """The broker is there (again): what was answered last may not have reached the cloud."""
        for answer in self._answers.values():
            self._hooks.respond(answer)

    def stop(self) -> None:
        """The agent stops, and with it what is under way."""
        if self._at_work is not None:
            self._break_off("The agent was stopped.")

    # --- its end

    def _break_off(self, reason: str) -> None:
        assert self._at_work is not None
        number, benchmark, began = self._at_work
        benchmark.stop()
        self._at_work = None
        self._hooks.prune()
        self._conclude(number, "failed", reason, began=began)

    def _ended(self, outcome: Outcome) -> None:
        assert self._at_work is not None
        number, benchmark, began = self._at_work
        facts = benchmark.facts(self._hooks.beside())
        self._at_work = None
        self._hooks.prune()  # before the answer: what is fetched after it must not be taken for a leftover
        if isinstance(outcome, Verdict):
            self._conclude(number, "done", outcome.reason, began=began, verdict=outcome, machine=facts)
        else:
            # What the device has tried and could not do is a failure; what it would not try, a refusal.
            refused = isinstance(outcome, Rejected) and benchmark.phase == "verifying"
            state: CommandState = "refused" if refused else "failed"
            self._conclude(number, state, str(outcome), began=began, machine=facts)

    def _conclude(
        self,
        number: int,
        state: CommandState,
        reason: str,
        *,
        began: float | None = None,
        verdict: Verdict | None = None,
        machine: MachineFacts | None = None,
    ) -> None:
        level = logging.INFO if state == "done" else logging.WARNING
        log.log(level, "Command %d: %s%s", number, state, f": {reason}" if reason else ".")
        took_s = round(time.monotonic() - began, 3) if began is not None else 0.0
        self._say(number, state, reason=reason[:2000], verdict=verdict, machine=machine, took_s=took_s)

    # --- answers

    def _say_progress(self, number: int, benchmark: Benchmark, now: float) -> None:
        told = self._answers[number]
        new_phase = (told.state, told.phase) != ("running", benchmark.phase)
        moved = (told.progress, told.detail) != (round(benchmark.progress, 3), benchmark.detail)
        if new_phase or (moved and now - self._told_at >= PROGRESS_S):
            self._told_at = now
            self._say(
                number,
                "running",
                phase=benchmark.phase,
                progress=round(benchmark.progress, 3),
                detail=benchmark.detail[:200],
            )

    def _say(self, number: int, state: CommandState, **more: object) -> None:
        answer = fitted(
            CommandResponse.model_validate(
                {"n": number, "boot_id": self._boot_id, "time": self._hooks.now(), "state": state, **more}
            )
        )
        self._answers[number] = answer
        while len(self._answers) > REMEMBERED:
            self._answers.pop(next(n for n in self._answers if n != self._busy_with))
        self._hooks.respond(answer)

    @property
    def _busy_with(self) -> int | None:
        return self._at_work[0] if self._at_work else None

    def _circumstances(self) -> Circumstances:
        means = self._means
        fault = means.hardware.runtime_fault if means else "This agent has no registry to ask."
        return Circumstances(
            boot_id=self._boot_id,
            now=self._hooks.now(),
            newest=self._newest,
            cores=means.hardware.cores if means else 1,
            at_work=self._busy_with,
            update=self._hooks.update(),
            fault=str(fault) if fault else "",
        )
