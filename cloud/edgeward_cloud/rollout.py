"""Who should run what, decided purely: no clock, no database, no network.

Invariants: a rollout covers at least one device; of one pipeline a device is to run the model of the newest
rollout of its fleet that lists it; a device's result, once there, is final (only what the cloud wrote by
itself gives way to what the device says); a rollout is finished when every target has a result; offline
devices are pending, never failed. Histories are ordered oldest first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgeward_wire.api import RolloutState
from edgeward_wire.assignment import PipelineAssignment
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Result, State, Update

DEFAULT_PROBATION_S = 300.0
_OURS: tuple[Result, ...] = ("superseded", "canceled")
"""Results that the cloud writes when it stops waiting for a device."""


@dataclass(frozen=True, slots=True)
class Target:
    """One device of a rollout, as far as it has told."""

    device: str
    state: State = "pending"
    result: Result | None = None
    reason: str = ""
    progress: float = 0.0
    detail: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    variant: str | None = None
    provider: str | None = None
    former: bool = False
    """Of hardware that had this id before: history, and nothing that the present one is to run or has run."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One model for one pipeline of a fleet, or of one `device` of it."""

    id: str
    fleet: str
    pipeline: str
    model: ModelRef
    attempt: int
    created_at: float
    created_by: str
    device: str | None = None
    probation_s: float = DEFAULT_PROBATION_S
    restores: str | None = None
    """The rollout whose model a rollback brings back."""
    state: RolloutState = "running"
    revision: int = 0
    finished_at: float | None = None
    targets: tuple[Target, ...] = ()

    def target(self, device: str) -> Target | None:
        """A device's row; None when it is not in this rollout."""
        return next((t for t in self.targets if t.device == device), None)

    @property
    def scope(self) -> str:
        """Whom it is for, in words."""
        return f"device {self.device}" if self.device else f"fleet {self.fleet}"


def members(fleet: str, device: str | None, accepted: Sequence[str]) -> tuple[str, ...]:
    """The devices of a new rollout: the one named, or all accepted ones of the fleet.

    Raises:
        Rejected: there is none.
    """
    if device is not None:
        if device not in accepted:
            raise Rejected(f"Device {device} is not accepted.", f"Accept it: agent-ctl accept {device}")
        return (device,)
    if not accepted:
        raise Rejected(
            f"Fleet {fleet} has no accepted device.",
            f"Enrol one with `agent-ctl enroll-token --fleet {fleet}`.",
        )
    return tuple(sorted(accepted))


def attempt_number(history: Iterable[Rollout], pipeline: str, model: ModelRef) -> int:
    """1 + the rollouts of this very model so far: a new number lifts a device's denylist."""
    return 1 + sum(r.pipeline == pipeline and r.model.sha256 == model.sha256 for r in history)


def supersede(newer: Rollout, running: Iterable[Rollout], now: float) -> list[Rollout]:
    """What becomes of rollouts that run while `newer` starts: only those that change."""
    changed = []
    for old in running:
        if old.id == newer.id or (old.fleet, old.pipeline) != (newer.fleet, newer.pipeline):
            continue
        after = _without(old, {t.device for t in newer.targets})
        if newer.device is None or old.device == newer.device:
            after = replace(after, state="superseded", finished_at=now)
        after = _settle(after, now)
        if after != old:
            changed.append(after)
    return changed


def _without(rollout: Rollout, devices: set[str]) -> Rollout:
    def left(target: Target) -> Target:
        if target.device in devices and target.result is None:
            return replace(target, result="superseded", reason="A newer rollout took its place.")
        return target

    return replace(rollout, targets=tuple(left(t) for t in rollout.targets))


def advance(rollout: Rollout, reports: Mapping[str, Update], now: float) -> Rollout:
    """The rollout after these reports (device -> its newest update); others' reports change nothing."""
    targets = tuple(
        _observe(t, reports[t.device])
        if t.device in reports and reports[t.device].rollout == rollout.id
        else t
        for t in rollout.targets
    )
    return _settle(replace(rollout, targets=targets), now)


def _observe(target: Target, update: Update) -> Target:
    if target.former:
        return target
    if target.result not in (None, *_OURS) or (target.result and not update.result):
        return target
    chosen = update.verdict.chosen if update.verdict else None
    return replace(
        target,
        state=update.state,
        result=update.result,
        reason=update.reason,
        progress=update.progress,
        detail=update.detail,
        numbers=dict(update.numbers),
        variant=chosen.variant if chosen else target.variant,
        provider=chosen.provider if chosen else target.provider,
    )


def _settle(rollout: Rollout, now: float) -> Rollout:
    if rollout.state == "running" and all(t.result is not None for t in rollout.targets):
        return replace(rollout, state="finished", finished_at=now)
    return rollout


def leave(rollout: Rollout, device: str, now: float) -> Rollout:
    """The rollout without waiting for a device that is no longer admitted."""

    def gone(target: Target) -> Target:
        if target.device == device and target.result is None:
            return replace(target, result="canceled", reason="The device is no longer admitted.")
        return target

    return _settle(replace(rollout, targets=tuple(gone(t) for t in rollout.targets)), now)


def for_newcomer(history: Sequence[Rollout]) -> list[Rollout]:
    """The fleet rollouts that a newly admitted device joins: per pipeline the newest that may yet succeed.

    One that ended without a single success is skipped: its model is no place to begin.
    """
    newest: dict[str, Rollout] = {}
    for rollout in history:
        hopeful = rollout.state == "running" or _succeeded(rollout, None)
        if rollout.device is None and hopeful:
            newest[rollout.pipeline] = rollout
    return list(newest.values())


def desired(device: str, history: Sequence[Rollout]) -> dict[str, PipelineAssignment]:
    """What a device is to run: per pipeline the newest rollout that lists it and was not canceled."""
    rows: dict[str, PipelineAssignment] = {}
    for rollout in history:
        if rollout.target(device) and rollout.state != "canceled":
            rows[rollout.pipeline] = PipelineAssignment(
                model=rollout.model,
                rollout=rollout.id,
                attempt=rollout.attempt,
                probation_s=rollout.probation_s,
            )
    return rows


def way_back(history: Sequence[Rollout], fleet: str, pipeline: str, device: str | None) -> Rollout:
    """The rollout that a rollback restores: the newest earlier one in which another model succeeded.

    Going back twice goes back two models: a rollback stands where the rollout that it restored stood.

    Raises:
        Rejected: there is nothing to go back from, or to; says which.
    """
    whose = f"device {device}" if device else f"fleet {fleet}"
    mine = [
        r
        for r in history
        if r.pipeline == pipeline
        and r.fleet == fleet
        and (r.target(device) is not None if device else r.device is None)
    ]
    if not mine:
        raise Rejected(
            f"Nothing was ever deployed to pipeline {pipeline} of {whose}.",
            "Deploy a model: agent-ctl deploy",
        )
    current = _origin(mine[-1], history)
    place = next((k for k, r in enumerate(mine) if r.id == current.id), len(mine) - 1)
    for earlier in reversed(mine[:place]):
        if earlier.model.sha256 != current.model.sha256 and _succeeded(earlier, device):
            return _origin(earlier, history)
    raise Rejected(
        f"There is nothing to roll {whose} back to: no model before {current.model.name} "
        f"{current.model.version} was ever committed on pipeline {pipeline}.",
        "Deploy the model that you want: agent-ctl deploy",
    )


def _origin(rollout: Rollout, history: Sequence[Rollout]) -> Rollout:
    by_id = {r.id: r for r in history}
    seen: set[str] = set()
    while rollout.restores in by_id and rollout.id not in seen:
        seen.add(rollout.id)
        rollout = by_id[rollout.restores]
    return rollout


def _succeeded(rollout: Rollout, device: str | None) -> bool:
    return any(t.result == "succeeded" and device in (None, t.device) for t in rollout.targets)
