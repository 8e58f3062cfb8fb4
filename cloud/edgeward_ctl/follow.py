"""Following a rollout until it is decided. The judgement is pure; `follow` asks, waits and tells.

Invariants: an offline device is pending, never failed; whoever was online once while we watched is waited
for; a cloud that does not answer for a while ends nothing before the time is up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edgeward_wire.api import Rollout, TargetProgress
from edgeward_wire.errors import Unavailable

OK, FAILED, USAGE, UNDECIDED, INTERRUPTED = 0, 1, 2, 3, 130
POLL_S = 0.5
MARGIN_S = 900.0
"""What a device may take before its probation begins: download, engine builds, probes."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a rollout's targets amount to now."""

    decided: bool
    """Nothing is left to wait for."""
    exit_code: int
    """What it would be if we stopped here."""
    succeeded: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    """Online, or were while we watched, and without a result."""
    offline: tuple[str, ...] = ()
    """Not seen online, and without a result: they take it up when they come back."""


def judge(rollout: Rollout, awaited: Iterable[str]) -> Judgement:
    """`awaited`: the devices that were online at any time while we watched."""
    known = set(awaited)
    by: dict[str, list[str]] = {"succeeded": [], "failed": [], "waiting": [], "offline": []}
    for target in rollout.targets:
        by[_standing(target, known)].append(target.device)
    ended = rollout.state in ("superseded", "canceled")
    if by["failed"] or ended:
        code = FAILED
    elif by["waiting"] or not by["succeeded"]:
        code = UNDECIDED
    else:
        code = OK
    return Judgement(
        decided=ended or not by["waiting"],
        exit_code=code,
        **{name: tuple(devices) for name, devices in by.items()},
    )


def _standing(target: TargetProgress, awaited: set[str]) -> str:
    if target.result is not None:
        return "succeeded" if target.result == "succeeded" else "failed"
    return "waiting" if target.online or target.device in awaited else "offline"


def serves(target: TargetProgress) -> bool:
    """Whether frames go through the new model already (in probation, or for good)."""
    return target.result == "succeeded" or (target.result is None and target.state == "probation")


class Board(Protocol):
    """Where the way of each device is shown."""

    def device(self, target: TargetProgress) -> None:
        """A device moved."""

    def say(self, text: str) -> None:
        """One line for the reader."""


@dataclass(frozen=True, slots=True)
class Followed:
    """How it ended."""

    rollout: Rollout
    judgement: Judgement
    exit_code: int
    interrupted: bool = False
    serving_after_s: Mapping[str, float] = field(default_factory=dict)
    """Device -> seconds from `began` to its first frame through the new model, as far as we saw it."""


def follow(
    fetch: Callable[[], Rollout],
    first: Rollout,
    board: Board,
    *,
    timeout_s: float,
    began: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> Followed:
    """Ask until the rollout is decided, `timeout_s` is over, or the reader presses Ctrl-C."""
    watcher = _Watcher(first, board, began, clock)
    deadline = clock() + timeout_s
    try:
        while not watcher.look().decided and clock() < deadline:
            wait(POLL_S)
            watcher.ask(fetch)
    except KeyboardInterrupt:
        return watcher.ended(interrupted=True)
    return watcher.ended(interrupted=False)


class _Watcher:
    """What was seen so far."""

    def __init__(self, first: Rollout, board: Board, began: float, clock: Callable[[], float]) -> None:
        self.rollout = first
        self._board, self._began, self._clock = board, began, clock
        self._awaited: set[str] = set()
        self._serving: dict[str, float] = {}
        self._away = False

    def look(self) -> Judgement:
        """Show where each device is, and judge."""
        for target in self.rollout.targets:
            if target.online:
                self._awaited.add(target.device)
            if serves(target):
                self._serving.setdefault(target.device, self._clock() - self._began)
            self._board.device(target)
        return judge(self.rollout, self._awaited)

    def ask(self, fetch: Callable[[], Rollout]) -> None:
        """The newest state, or the old one while the cloud is away; that is said once."""
        try:
            self.rollout = fetch()
        except Unavailable as error:
            if not self._away:
                self._board.say(f"{error.what} Still trying; the rollout goes on without us.")
            self._away = True
            return
        if self._away:
            self._board.say("The cloud answers again.")
        self._away = False

    def ended(self, *, interrupted: bool) -> Followed:
        """How it ended."""
        judgement = judge(self.rollout, self._awaited)
        code = INTERRUPTED if interrupted else judgement.exit_code
        return Followed(self.rollout, judgement, code, interrupted, self._serving)
