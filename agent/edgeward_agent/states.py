"""The way of one pipeline's update, as one table: (state, event) -> (next state, operations). Pure.

Invariants, which `tests/agent/test_states.py` hypothesises about:

- `committed` changes in one operation only, `COMMIT`, and never becomes None: whatever happens in whatever
  order, the last model that proved itself stays known.
- From every state a failure leads to `idle`, so nothing can block the queue.
- An event that the table does not name for a state changes nothing: late answers are harmless.
- Every saved state has a row for `Restarted` (after an orderly stop) and for `Crashed` (after anything else).

An operation is either bookkeeping, done here on the record, or an effect that the machine carries out
after the record has been journalled (`RAISE_FLOOR` before it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import get_args

from pydantic import Field

from edgeward_wire.assignment import PipelineAssignment
from edgeward_wire.document import Document, parse
from edgeward_wire.identifiers import Key, Reason, Sha256
from edgeward_wire.manifest import FEATURES, MAX_MANIFEST_BYTES, Manifest
from edgeward_wire.reported import Result, State, Update
from edgeward_wire.verdict import Verdict

STATES: tuple[State, ...] = get_args(State)
SAFE: frozenset[State] = frozenset(
    {"pending", "downloading", "verifying", "preparing", "validating", "probation"}
)
"""Where a newer assignment may take over. `switching` and `rolling_back` are short, and end first."""

MAX_DENIED = 32
MAX_CRASHES_IN_QUALIFY = 3
MAX_RESTARTS_IN_PROBATION = 5


# --- what is remembered of a pipeline


class Deployment(Document):
    """A model that was asked for: the verified row and manifest, and how it runs here."""

    row: PipelineAssignment
    manifest: str = Field(max_length=MAX_MANIFEST_BYTES)
    """The manifest's verified text; its sha256 is `row.model.sha256`."""
    fingerprint: str = ""
    """Of the runtime at the time: a new ONNX Runtime deserves a new try."""
    verdict: Verdict | None = None

    @cached_property
    def contents(self) -> Manifest:
        """The manifest, read."""
        return parse(Manifest, self.manifest, limit=MAX_MANIFEST_BYTES)

    @property
    def title(self) -> str:
        """`name version`, for people."""
        return f"{self.row.model.name} {self.row.model.version}"


class Denied(Document):
    """A model that failed here, and why. A new attempt or a new runtime lifts it."""

    sha256: Sha256
    attempt: int
    fingerprint: str
    reason: Reason
    numbers: dict[Key, float] = Field(default_factory=dict, max_length=64)


class Record(Document):
    """One pipeline, as it is journalled."""

    state: State = "idle"
    row: PipelineAssignment | None = None
    """The newest row that was taken up."""
    candidate: Deployment | None = None
    committed: Deployment | None = None
    previous: Deployment | None = None
    """What was committed before `committed`."""
    update: Update | None = None
    ending: Result | None = None
    """How the update will have ended once the way back is done."""
    restarts: int = 0
    """Of the daemon, since the candidate reached its present stage."""
    probation_spent_s: float = 0
    tried: str = ""
    """Fingerprint of the runtime at the newest try, whatever became of it; older journals have none."""
    denied: tuple[Denied, ...] = ()


# --- events


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at` (wall clock, seconds)."""

    at: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True, slots=True)
class Assigned(Event):
    """A model that may be tried."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Lacking(Event):
    """A model that needs what this device does not have (yet)."""

    deployment: Deployment
    reason: str


@dataclass(frozen=True, slots=True)
class Satisfied(Event):
    """The model that is committed already, asked for again."""

    deployment: Deployment


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A model that will not be tried."""

    row: PipelineAssignment
    reason: str


@dataclass(frozen=True, slots=True)
class Explained(Event):
    """An event with a reason."""

    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)


class Superseded(Explained):
    """A newer assignment asks for something else."""


class Canceled(Explained):
    """Nobody asks for this model any more."""


class Fetched(Event):
    """All blobs are here."""


class Missing(Event):
    """A blob that was here is not here any more."""


class Verified(Event):
    """Blobs, space and hints are in order."""


class Prepared(Event):
    """Sessions load; comparing and measuring begins."""


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """A plan was chosen."""

    verdict: Verdict
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed(Explained):
    """The update cannot go on. `deny`: by its own fault."""

    result: Result = "failed_no_change"
    deny: bool = False


@dataclass(frozen=True, slots=True)
class Served(Event):
    """The runner takes frames with the model that it was last asked to serve."""

    numbers: Mapping[str, float] = field(default_factory=dict)


class ServeFailed(Explained):
    """The runner could not prepare the model; whatever ran before runs on."""


class RunnerDied(Explained):
    """The runner's process ended, or had to be killed."""


class Breached(Explained):
    """A gate of probation."""


@dataclass(frozen=True, slots=True)
class Held(Event):
    """Probation is over and every gate held."""

    numbers: Mapping[str, float] = field(default_factory=dict)


class Unrestorable(Explained):
    """There is nothing to go back to, or it cannot be served either."""


class Restarted(Event):
    """The daemon starts after an orderly stop."""


class Crashed(Event):
    """The daemon starts after a crash, a kill, a watchdog or a power cut."""


# --- operations


class Op(Enum):
    """Bookkeeping (in `_BOOKKEEPING`), or an effect for the machine."""

    BEGIN = auto()
    """Take up the event's deployment as the candidate."""
    ADOPT = auto()
    """The committed model under its new row: succeeded on the spot."""
    REFUSE = auto()
    """Report the row as rejected; nothing is taken up."""
    KEEP_VERDICT = auto()
    FINISH = auto()
    """End the update as the event, or the way back, says."""
    UNDO = auto()
    """Note why the way back is taken and how the update will have ended."""
    DENY = auto()
    COMMIT = auto()
    COUNT = auto()
    """One more restart of the daemon at this stage."""

    RAISE_FLOOR = auto()
    """Fsync the security floor of the candidate. Before the journal."""
    FETCH = auto()
    STOP_FETCH = auto()
    VERIFY = auto()
    QUALIFY = auto()
    KILL_QUALIFY = auto()
    SERVE_CANDIDATE = auto()
    """Serve it, or say `Failed` when agent.toml has lost the pipeline."""
    SERVE_COMMITTED = auto()
    """Serve the last committed model, or say `Unrestorable` during a way back when it cannot be."""
    RESTART = auto()
    """Bring the runner back with what it served, after a pause."""
    LET_GO = auto()
    """Serve nothing uncommitted any longer, unless it was merely superseded."""
    START_PROBATION = auto()
    STOP_PROBATION = auto()
    PRUNE = auto()
    """Forget blobs that no deployment needs."""


EARLY = (Op.RAISE_FLOOR,)

_BACK = (Op.STOP_PROBATION, Op.UNDO, Op.SERVE_COMMITTED)
_BACK_DENIED = (Op.STOP_PROBATION, Op.UNDO, Op.DENY, Op.SERVE_COMMITTED)
_DROP = (Op.FINISH, Op.PRUNE)
_COMMITTED = (Op.RAISE_FLOOR, Op.STOP_PROBATION, Op.COMMIT, Op.PRUNE)

# fmt: off
TABLE: Mapping[tuple[State, type[Event]], tuple[State, tuple[Op, ...]]] = {
    ("idle",         Assigned):     ("downloading",  (Op.BEGIN, Op.FETCH)),
    ("idle",         Lacking):      ("pending",      (Op.BEGIN,)),
    ("idle",         Satisfied):    ("idle",         (Op.ADOPT,)),
    ("idle",         Refused):      ("idle",         (Op.REFUSE,)),
    ("idle",         ServeFailed):  ("idle",         (Op.RESTART,)),
    ("idle",         RunnerDied):   ("idle",         (Op.RESTART,)),
    ("idle",         Restarted):    ("idle",         (Op.SERVE_COMMITTED,)),
    ("idle",         Crashed):      ("idle",         (Op.SERVE_COMMITTED,)),

    ("pending",      Assigned):     ("downloading",  (Op.BEGIN, Op.FETCH)),
    ("pending",      Lacking):      ("pending",      (Op.BEGIN,)),
    ("pending",      Satisfied):    ("idle",         (Op.ADOPT,)),
    ("pending",      Refused):      ("idle",         (Op.REFUSE,)),
    ("pending",      Superseded):   ("idle",         _DROP),
    ("pending",      Canceled):     ("idle",         _DROP),
    ("pending",      Failed):       ("idle",         _DROP),
    ("pending",      ServeFailed):  ("pending",      (Op.RESTART,)),
    ("pending",      RunnerDied):   ("pending",      (Op.RESTART,)),
    ("pending",      Restarted):    ("pending",      (Op.SERVE_COMMITTED,)),
    ("pending",      Crashed):      ("pending",      (Op.SERVE_COMMITTED,)),

    ("downloading",  Fetched):      ("verifying",    (Op.VERIFY,)),
    ("downloading",  Failed):       ("idle",         (Op.STOP_FETCH, Op.DENY, *_DROP)),
    ("downloading",  Superseded):   ("idle",         (Op.STOP_FETCH, *_DROP)),
    ("downloading",  Canceled):     ("idle",         (Op.STOP_FETCH, *_DROP)),
    ("downloading",  ServeFailed):  ("downloading",  (Op.RESTART,)),
    ("downloading",  RunnerDied):   ("downloading",  (Op.RESTART,)),
    ("downloading",  Restarted):    ("downloading",  (Op.SERVE_COMMITTED, Op.FETCH)),
    ("downloading",  Crashed):      ("downloading",  (Op.SERVE_COMMITTED, Op.FETCH)),

    ("verifying",    Verified):     ("preparing",    (Op.QUALIFY,)),
    ("verifying",    Missing):      ("downloading",  (Op.FETCH,)),
    ("verifying",    Failed):       ("idle",         (Op.DENY, *_DROP)),
    ("verifying",    Superseded):   ("idle",         _DROP),
    ("verifying",    Canceled):     ("idle",         _DROP),
    ("verifying",    ServeFailed):  ("verifying",    (Op.RESTART,)),
    ("verifying",    RunnerDied):   ("verifying",    (Op.RESTART,)),
    ("verifying",    Restarted):    ("verifying",    (Op.SERVE_COMMITTED, Op.VERIFY)),
    ("verifying",    Crashed):      ("verifying",    (Op.COUNT, Op.SERVE_COMMITTED, Op.VERIFY)),

    ("preparing",    Prepared):     ("validating",   ()),
    ("preparing",    Failed):       ("idle",         (Op.KILL_QUALIFY, Op.DENY, *_DROP)),
    ("preparing",    Superseded):   ("idle",         (Op.KILL_QUALIFY, *_DROP)),
    ("preparing",    Canceled):     ("idle",         (Op.KILL_QUALIFY, *_DROP)),
    ("preparing",    ServeFailed):  ("preparing",    (Op.RESTART,)),
    ("preparing",    RunnerDied):   ("preparing",    (Op.RESTART,)),
    ("preparing",    Restarted):    ("verifying",    (Op.SERVE_COMMITTED, Op.VERIFY)),
    ("preparing",    Crashed):      ("verifying",    (Op.COUNT, Op.SERVE_COMMITTED, Op.VERIFY)),

    ("validating",   Validated):    ("switching",    (Op.KEEP_VERDICT, Op.SERVE_CANDIDATE)),
    ("validating",   Failed):       ("idle",         (Op.KILL_QUALIFY, Op.DENY, *_DROP)),
    ("validating",   Superseded):   ("idle",         (Op.KILL_QUALIFY, *_DROP)),
    ("validating",   Canceled):     ("idle",         (Op.KILL_QUALIFY, *_DROP)),
    ("validating",   ServeFailed):  ("validating",   (Op.RESTART,)),
    ("validating",   RunnerDied):   ("validating",   (Op.RESTART,)),
    ("validating",   Restarted):    ("verifying",    (Op.SERVE_COMMITTED, Op.VERIFY)),
    ("validating",   Crashed):      ("verifying",    (Op.COUNT, Op.SERVE_COMMITTED, Op.VERIFY)),

    ("switching",    Served):       ("probation",    (Op.START_PROBATION,)),
    ("switching",    ServeFailed):  ("idle",         (Op.DENY, *_DROP, Op.LET_GO)),
    ("switching",    RunnerDied):   ("rolling_back", _BACK_DENIED),
    ("switching",    Failed):       ("rolling_back", _BACK_DENIED),
    ("switching",    Restarted):    ("verifying",    (Op.SERVE_COMMITTED, Op.VERIFY)),
    ("switching",    Crashed):      ("rolling_back", _BACK_DENIED),

    ("probation",    Served):       ("probation",    (Op.START_PROBATION,)),
    ("probation",    Held):         ("idle",         _COMMITTED),
    ("probation",    Breached):     ("rolling_back", _BACK_DENIED),
    ("probation",    ServeFailed):  ("rolling_back", _BACK_DENIED),
    ("probation",    RunnerDied):   ("rolling_back", _BACK_DENIED),
    ("probation",    Failed):       ("rolling_back", _BACK_DENIED),
    ("probation",    Superseded):   ("rolling_back", _BACK),
    ("probation",    Canceled):     ("rolling_back", _BACK),
    ("probation",    Restarted):    ("probation",    (Op.COUNT, Op.SERVE_CANDIDATE)),
    ("probation",    Crashed):      ("rolling_back", _BACK_DENIED),

    ("rolling_back", Served):       ("idle",         _DROP),
    ("rolling_back", Unrestorable): ("idle",         (*_DROP, Op.LET_GO)),
    ("rolling_back", ServeFailed):  ("rolling_back", (Op.RESTART,)),
    ("rolling_back", RunnerDied):   ("rolling_back", (Op.RESTART,)),
    ("rolling_back", Restarted):    ("rolling_back", (Op.SERVE_COMMITTED,)),
    ("rolling_back", Crashed):      ("rolling_back", (Op.SERVE_COMMITTED,)),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Step:
    """What one event came to: the record to journal, and the effects to carry out, in order."""

    record: Record
    effects: tuple[Op, ...] = ()


def step(record: Record, event: Event) -> Step:
    """Follow the table; an event that it does not name here changes nothing."""
    row = TABLE.get((record.state, type(event)))
    if row is None:
        return Step(record)
    state, operations = row
    after = record
    for operation in operations:
        book = _BOOKKEEPING.get(operation)
        after = book(after, event) if book else after
    update = after.update
    if update is not None and update.result is None:
        fresh = {} if state == record.state else {"progress": 0.0, "detail": ""}
        numbers = {**update.numbers, **getattr(event, "numbers", {})}
        update = update.model_copy(update={"state": state, "numbers": numbers, **fresh})
    if isinstance(event, Lacking) and update is not None:
        update = update.model_copy(update={"reason": event.reason[:2000], "detail": event.reason[:200]})
    after = after.model_copy(update={"state": state, "update": update})
    return Step(after, tuple(o for o in operations if o not in _BOOKKEEPING))


# --- bookkeeping


def _begin(record: Record, event: Event) -> Record:
    if not isinstance(event, Assigned | Lacking):
        raise TypeError(f"BEGIN needs a deployment, not {event}")
    return record.model_copy(
        update={
            "row": event.deployment.row,
            "candidate": event.deployment,
            "update": _update_of(event.deployment.row, event.at),
            "ending": None,
            "restarts": 0,
            "probation_spent_s": 0.0,
            "tried": event.deployment.fingerprint,
        }
    )


def _update_of(row: PipelineAssignment, at: float, result: Result | None = None, reason: str = "") -> Update:
    return Update(
        rollout=row.rollout,
        model=row.model,
        attempt=row.attempt,
        state="idle",
        started_at=at,
        result=result,
        reason=reason[:2000],
        progress=1 if result else 0,
        finished_at=at if result else None,
    )


def _adopt(record: Record, event: Event) -> Record:
    if not isinstance(event, Satisfied) or record.committed is None:
        raise TypeError(f"ADOPT needs a committed model, not {event}")
    row = event.deployment.row
    return record.model_copy(
        update={
            "row": row,
            "candidate": None,
            "committed": record.committed.model_copy(update={"row": row}),
            "update": _update_of(row, event.at, "succeeded", "It serves already."),
        }
    )


def _refuse(record: Record, event: Event) -> Record:
    if not isinstance(event, Refused):
        raise TypeError(f"REFUSE needs a refusal, not {event}")
    update = _update_of(event.row, event.at, "rejected", event.reason)
    return record.model_copy(update={"candidate": None, "update": update})


def _keep_verdict(record: Record, event: Event) -> Record:
    if not isinstance(event, Validated) or record.candidate is None or record.update is None:
        raise TypeError(f"KEEP_VERDICT needs a verdict, not {event}")
    candidate = record.candidate.model_copy(update={"verdict": event.verdict})
    update = record.update.model_copy(
        update={"verdict": event.verdict, "numbers": {**record.update.numbers, **event.numbers}}
    )
    return record.model_copy(update={"candidate": candidate, "update": update, "restarts": 0})


def _undo(record: Record, event: Event) -> Record:
    ending: Result = "failed_rolled_back"
    if isinstance(event, Superseded):
        ending = "superseded"
    elif isinstance(event, Canceled):
        ending = "canceled"
    if record.update is None:
        return record.model_copy(update={"ending": ending})
    numbers = {**record.update.numbers, **getattr(event, "numbers", {})}
    update = record.update.model_copy(update={"reason": _reason(record, event), "numbers": numbers})
    return record.model_copy(update={"ending": ending, "update": update})


def _reason(record: Record, event: Event) -> str:
    if isinstance(event, Explained):
        return event.reason[:2000]
    if isinstance(event, Crashed):
        return f"The device or its agent restarted unexpectedly in {record.state}."
    return ""


def _finish(record: Record, event: Event) -> Record:
    result, reason = _ending(record, event)
    update = record.update
    if update is not None:
        update = update.model_copy(
            update={
                "state": "idle",
                "result": result,
                "reason": reason[:2000],
                "progress": 1.0,
                "detail": "",
                "finished_at": event.at,
                "numbers": {**update.numbers, **getattr(event, "numbers", {})},
            }
        )
    row = None if result == "canceled" else record.row
    return record.model_copy(
        update={"row": row, "candidate": None, "update": update, "ending": None, "restarts": 0}
    )


def _ending(record: Record, event: Event) -> tuple[Result, str]:
    """The result and the reason with which an update ends."""
    if isinstance(event, Failed):
        return event.result, event.reason
    if isinstance(event, ServeFailed):
        return "failed_no_change", event.reason
    why = record.update.reason if record.update else ""
    if isinstance(event, Unrestorable):
        if record.ending in ("superseded", "canceled"):
            return record.ending, why
        return "failed_unable_to_roll_back", f"{why} {event.reason}".strip()
    if record.ending is not None:
        return record.ending, why
    if isinstance(event, Canceled):
        return "canceled", event.reason
    return "superseded", _reason(record, event)


def _deny(record: Record, event: Event) -> Record:
    candidate = record.candidate
    if candidate is None or (isinstance(event, Failed) and not event.deny):
        return record
    denied = Denied(
        sha256=candidate.row.model.sha256,
        attempt=candidate.row.attempt,
        fingerprint=candidate.fingerprint,
        reason=_reason(record, event),
        numbers=dict(getattr(event, "numbers", {})),
    )
    return record.model_copy(update={"denied": (*record.denied, denied)[-MAX_DENIED:]})


def _commit(record: Record, event: Event) -> Record:
    candidate, update = record.candidate, record.update
    if candidate is None:
        raise TypeError("COMMIT needs a candidate")
    old = record.committed
    same = old is not None and old.row.model.sha256 == candidate.row.model.sha256
    if update is not None:
        done = {"state": "idle", "result": "succeeded", "reason": "", "detail": "", "progress": 1.0}
        numbers = {**update.numbers, **getattr(event, "numbers", {})}
        update = update.model_copy(update={**done, "finished_at": event.at, "numbers": numbers})
    return record.model_copy(
        update={
            "candidate": None,
            "committed": candidate,
            "previous": record.previous if same else old,
            "update": update,
            "restarts": 0,
            "probation_spent_s": 0.0,
        }
    )


def _count(record: Record, _event: Event) -> Record:
    return record.model_copy(update={"restarts": record.restarts + 1})


_BOOKKEEPING: Mapping[Op, Callable[[Record, Event], Record]] = {
    Op.BEGIN: _begin,
    Op.ADOPT: _adopt,
    Op.REFUSE: _refuse,
    Op.KEEP_VERDICT: _keep_verdict,
    Op.UNDO: _undo,
    Op.FINISH: _finish,
    Op.DENY: _deny,
    Op.COMMIT: _commit,
    Op.COUNT: _count,
}


# --- decisions about what is asked for


@dataclass(frozen=True, slots=True)
class Want:
    """A pipeline's row in a verified assignment, with its manifest or why that was refused."""

    row: PipelineAssignment
    manifest: str | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What judging a want needs to know of the device."""

    configured: bool
    """Whether agent.toml has this pipeline."""
    fingerprint: str
    """Of the runtime."""
    floor: int = 0
    """The security floor of the wanted model's name."""
    stale: bool = False
    """The committed model's verdict no longer fits its live latencies."""
    features: frozenset[str] = FEATURES


def consider(record: Record, want: Want | None, facts: Facts) -> Event | None:
    """The event that a verified assignment means for a pipeline now; None when nothing is to be done.

    `want` is None when the assignment has no row for it: then it keeps serving what it has.
    """
    busy = record.state != "idle"
    if busy and record.state not in SAFE:
        return None
    if want is None:
        return Canceled("The assignment has no row for this pipeline any more.") if busy else None
    if busy and want.row != record.row:
        return Superseded(f"A newer assignment asks for {want.row.model.name} {want.row.model.version}.")
    if busy and record.state != "pending":
        return None
    if not busy and _handled(record, want.row, facts):
        return None
    return _judge(record, want, facts)


def _handled(record: Record, row: PipelineAssignment, facts: Facts) -> bool:
    """Whether this row has had its try. One that was denied gets another with each new runtime.

    What counts is the runtime of the newest try and not that of a denial: a try that ends without one (too
    little memory, no variant) would otherwise be repeated without end.
    """
    if record.row != row:
        return False
    update = record.update
    failed = update is not None and update.result not in (None, "succeeded") and update.rollout == row.rollout
    denied = any(denied.sha256 == row.model.sha256 for denied in record.denied)
    return not (failed and denied and record.tried != facts.fingerprint)


def _judge(record: Record, want: Want, facts: Facts) -> Event | None:
    row, update = want.row, record.update
    refusal = want.refusal if want.manifest is None else ""
    deployment = None
    if want.manifest is not None:
        deployment = Deployment(row=row, manifest=want.manifest, fingerprint=facts.fingerprint)
        refusal = _refusal(record, deployment, facts)
    if refusal or deployment is None:
        known = update is not None and update.result == "rejected"
        same = known and update is not None and update.reason == refusal[:2000]
        mine = update is not None and (update.rollout, update.model, update.attempt) == (
            row.rollout,
            row.model,
            row.attempt,
        )
        return None if same and mine else Refused(row, refusal or "The manifest is not there.")
    committed = record.committed
    if committed is not None and committed.row.model.sha256 == row.model.sha256 and not facts.stale:
        return Satisfied(deployment)
    reason = _lack(deployment, facts)
    if not reason:
        return Assigned(deployment)
    same = record.state == "pending" and update is not None and update.reason == reason[:2000]
    return None if same else Lacking(deployment, reason)


def _refusal(record: Record, deployment: Deployment, facts: Facts) -> str:
    row = deployment.row
    for denied in record.denied:
        key = (denied.sha256, denied.attempt, denied.fingerprint)
        if key == (row.model.sha256, row.attempt, facts.fingerprint):
            return f"It failed here before: {denied.reason}"
    epoch = deployment.contents.security_epoch
    if epoch < facts.floor:
        return f"Its security epoch {epoch} is below this device's floor {facts.floor} for {row.model.name}."
    return ""


def _lack(deployment: Deployment, facts: Facts) -> str:
    if not facts.configured:
        return "This device's agent.toml has no such pipeline; add it and restart the agent."
    lacking = sorted(set(deployment.contents.requires) - facts.features)
    return f"This agent lacks what the model requires: {', '.join(lacking)}." if lacking else ""


def resume_events(record: Record, *, orderly: bool) -> tuple[Event, ...]:
    """What a start of the daemon means for a saved record, with a bound on how often."""
    first: Event = Restarted() if orderly else Crashed()
    after = step(record, first).record
    if after.state == "verifying" and after.restarts >= MAX_CRASHES_IN_QUALIFY:
        reason = f"The device or its agent went down {after.restarts} times while it prepared this model."
        return first, Failed(reason, deny=True)
    if after.state == "probation" and after.restarts > MAX_RESTARTS_IN_PROBATION:
        return first, Breached(f"The agent was restarted {after.restarts} times in probation.")
    return (first,)
