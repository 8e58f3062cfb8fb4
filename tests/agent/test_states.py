"""The table is held to its promises: by name, by property, and by a crash at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models import FINGERPRINT, deployment, manifest, row, verdict
from edgeward_agent import states
from edgeward_agent.states import (
    SAFE,
    STATES,
    TABLE,
    Assigned,
    Breached,
    Canceled,
    Crashed,
    Deployment,
    Event,
    Facts,
    Failed,
    Fetched,
    Held,
    Lacking,
    Missing,
    Op,
    Prepared,
    Record,
    Refused,
    Restarted,
    RunnerDied,
    Satisfied,
    Served,
    ServeFailed,
    Superseded,
    Unrestorable,
    Validated,
    Verified,
    Want,
    consider,
    resume_events,
    step,
)
from edgeward_wire.manifest import Manifest
from edgeward_wire.reported import Result, State

ONE, TWO, THREE = manifest("1"), manifest("2"), manifest("3")
FACTS = Facts(configured=True, fingerprint=FINGERPRINT)
UPGRADED = replace(FACTS, fingerprint="0" * 64)


def run(record: Record, *events: Event) -> Record:
    for event in events:
        record = step(record, event).record
    return record


def deploy(of: Manifest, attempt: int = 1) -> list[Event]:
    """The happy way, each event in order."""
    return [
        Assigned(deployment(of, attempt=attempt)),
        Fetched(),
        Verified(),
        Prepared(),
        Validated(verdict(of)),
        Served(),
        Held(),
    ]


def serving(of: Manifest) -> Record:
    return run(Record(), *deploy(of))


def events() -> st.SearchStrategy[Event]:
    deployments = st.sampled_from([deployment(m, attempt=a) for m in (ONE, TWO, THREE) for a in (1, 2)])
    reasons = st.sampled_from(["it broke", "nobody knows"])
    return st.one_of(
        st.builds(Assigned, deployments),
        st.builds(Lacking, deployments, reasons),
        st.builds(lambda d: Refused(d.row, "no"), deployments),
        st.sampled_from(
            [Fetched(), Missing(), Verified(), Prepared(), Served(), Held(), Restarted(), Crashed()]
        ),
        st.builds(Validated, st.sampled_from([verdict(m) for m in (ONE, TWO, THREE)])),
        st.builds(Failed, reasons, deny=st.booleans()),
        st.one_of(*(st.builds(kind, reasons) for kind in _EXPLAINED)),
    )


_EXPLAINED = (Superseded, Canceled, ServeFailed, RunnerDied, Breached, Unrestorable)


def test_the_way_of_a_good_update() -> None:
    record, seen = Record(), []
    for event in deploy(ONE):
        record = step(record, event).record
        seen.append(record.state)
    assert seen == ["downloading", "verifying", "preparing", "validating", "switching", "probation", "idle"]
    assert record.committed is not None
    assert record.committed.row == row(ONE)
    assert record.committed.verdict == verdict(ONE)
    assert record.update is not None
    assert record.update.result == "succeeded"
    assert record.previous is None


def test_previous_is_what_was_committed_before() -> None:
    record = run(serving(ONE), *deploy(TWO))
    assert record.previous is not None
    assert record.previous.row == row(ONE)
    again = run(record, *deploy(TWO, attempt=2))
    assert again.previous == record.previous, "the same model again is not its own predecessor"


@given(st.lists(events(), max_size=40))
def test_no_sequence_of_events_loses_the_committed_model(sequence: list[Event]) -> None:
    record = serving(ONE)
    for event in sequence:
        if isinstance(event, Satisfied):
            continue
        before = record
        record = step(before, event).record
        assert record.committed is not None
        if record.committed != before.committed:
            assert isinstance(event, Held)
            assert record.committed == before.candidate
            assert record.previous in (before.committed, before.previous)
        assert (record.candidate is not None) == (record.state not in ("idle",)), "idle has no candidate"
        assert record.update is None or (record.update.result is None) == (record.state != "idle")


@given(st.lists(events(), max_size=30), st.booleans())
def test_idle_can_always_be_reached(sequence: list[Event], committed: bool) -> None:
    record = run(serving(ONE) if committed else Record(), *sequence)
    record = run(record, Failed("stop"), Unrestorable("stop"))
    assert record.state == "idle"


@given(st.lists(events(), max_size=30))
def test_a_record_survives_the_journal_at_every_step(sequence: list[Event]) -> None:
    record = run(Record(), *sequence)
    assert Record.model_validate_json(record.to_bytes()) == record


@given(st.lists(events(), max_size=30))
def test_bookkeeping_effects_and_denylist_are_bounded(sequence: list[Event]) -> None:
    record = run(serving(ONE), *(sequence * 3))
    assert len(record.denied) <= states.MAX_DENIED


@pytest.mark.parametrize("state", STATES)
def test_every_state_resumes_after_both_kinds_of_stop(state: State) -> None:
    assert (state, Restarted) in TABLE
    assert (state, Crashed) in TABLE


@pytest.mark.parametrize("state", sorted(SAFE))
def test_a_newer_assignment_takes_over_at_every_safe_point(state: State) -> None:
    assert (state, Superseded) in TABLE
    assert (state, Canceled) in TABLE


def test_the_table_names_every_state_and_only_known_ones() -> None:
    assert {state for state, _ in TABLE} == set(get_args(State))
    assert all(target in STATES for target, _ in TABLE.values())


@dataclass(frozen=True)
class Row:
    """At `at`, `happens`: how the update ends, and with which model."""

    at: State
    happens: Event
    result: Result
    then: str
    """`1`, `2`: the committed version afterwards; `-` for none."""
    first: bool = False
    """There was no committed model before."""
    denied: bool = True


# Which step fails, which step dies: what follows. `first`: there is nothing to go back to.
CRASHES = [
    # fails_at
    Row("downloading", Failed("404", result="rejected", deny=True), "rejected", "1"),
    Row("downloading", Failed("disk full"), "failed_no_change", "1", denied=False),
    Row("verifying", Failed("not for this arch"), "failed_no_change", "1", denied=False),
    Row("preparing", Failed("qualify died of SIGSEGV", deny=True), "failed_no_change", "1"),
    Row("validating", Failed("wrong output", deny=True), "failed_no_change", "1"),
    Row("switching", ServeFailed("cannot load"), "failed_no_change", "1"),
    Row("switching", RunnerDied("SIGSEGV"), "failed_rolled_back", "1"),
    Row("probation", RunnerDied("SIGSEGV"), "failed_rolled_back", "1"),
    Row("probation", Breached("p99"), "failed_rolled_back", "1"),
    Row("probation", Failed("disk full"), "failed_rolled_back", "1", denied=False),
    Row("switching", RunnerDied("SIGSEGV"), "failed_unable_to_roll_back", "-", first=True),
    Row("probation", Breached("p99"), "failed_unable_to_roll_back", "-", first=True),
    Row("preparing", Failed("no plan", deny=True), "failed_no_change", "-", first=True),
    # dies_at: the daemon, the device or the watchdog
    Row("downloading", Crashed(), "succeeded", "2", denied=False),
    Row("verifying", Crashed(), "succeeded", "2", denied=False),
    Row("preparing", Crashed(), "succeeded", "2", denied=False),
    Row("validating", Crashed(), "succeeded", "2", denied=False),
    Row("switching", Crashed(), "failed_rolled_back", "1"),
    Row("probation", Crashed(), "failed_rolled_back", "1"),
    Row("probation", Crashed(), "failed_unable_to_roll_back", "-", first=True),
    # stops in order
    Row("downloading", Restarted(), "succeeded", "2", denied=False),
    Row("validating", Restarted(), "succeeded", "2", denied=False),
    Row("switching", Restarted(), "succeeded", "2", denied=False),
    Row("probation", Restarted(), "succeeded", "2", denied=False),
    # somebody wants something else
    Row("downloading", Superseded("newer"), "superseded", "1", denied=False),
    Row("validating", Superseded("newer"), "superseded", "1", denied=False),
    Row("probation", Superseded("newer"), "superseded", "1", denied=False),
    Row("probation", Superseded("newer"), "superseded", "-", first=True, denied=False),
    Row("probation", Canceled("nobody"), "canceled", "1", denied=False),
]


def go_on(record: Record) -> Record:
    """What a healthy world answers in each state, until the update has ended."""
    answers: dict[State, Event] = {
        "downloading": Fetched(),
        "verifying": Verified(),
        "preparing": Prepared(),
        "validating": Validated(verdict(TWO)),
        "switching": Served(),
        "probation": Held(),
    }
    while record.state != "idle":
        if record.state == "rolling_back":
            event: Event = Served() if record.committed else Unrestorable("nothing committed")
        else:
            event = answers[record.state]
        record = step(record, event).record
    return record


@pytest.mark.parametrize("case", CRASHES, ids=lambda c: f"{c.at}-{type(c.happens).__name__}-{c.result}")
def test_a_crash_is_a_column(case: Row) -> None:
    record = Record() if case.first else serving(ONE)
    for event in deploy(TWO):
        if record.state == case.at:
            break
        record = step(record, event).record
    assert record.state == case.at
    end = go_on(step(record, case.happens).record)
    assert end.update is not None
    assert end.update.result == case.result
    assert (end.committed.row.model.version if end.committed else "-") == case.then
    assert bool(end.denied) == case.denied
    if case.result == "failed_unable_to_roll_back":
        assert "nothing committed" in end.update.reason


@pytest.mark.parametrize("at", ["preparing", "validating"])
def test_a_model_that_takes_the_device_down_thrice_is_given_up(at: State) -> None:
    record = run(serving(ONE), *deploy(TWO)[:3])
    for _ in range(states.MAX_CRASHES_IN_QUALIFY):
        record = run(record, *resume_events(record, orderly=False))
        if record.state == "verifying":
            record = run(record, Verified(), *([Prepared()] if at == "validating" else []))
    assert record.state == "idle"
    assert record.update is not None
    assert record.update.result == "failed_no_change"
    assert "3 times" in record.update.reason
    assert record.denied


def test_orderly_restarts_continue_a_probation_but_not_for_ever() -> None:
    record = run(serving(ONE), *deploy(TWO)[:6])
    for _ in range(states.MAX_RESTARTS_IN_PROBATION):
        record = run(record, *resume_events(record, orderly=True))
        assert record.state == "probation"
    record = run(record, *resume_events(record, orderly=True))
    assert record.state == "rolling_back"


def want(of: Manifest, attempt: int = 1) -> Want:
    return Want(row(of, attempt=attempt), of.to_bytes().decode())


def test_what_failed_is_refused_with_its_reason_until_a_new_attempt() -> None:
    failed = run(serving(ONE), *deploy(TWO)[:2], Failed("wrong output", {"parity": 0.7}, deny=True))
    other = Want(row(TWO, rollout="another"), TWO.to_bytes().decode())
    refusal = consider(failed, other, FACTS)
    assert isinstance(refusal, Refused)
    assert "wrong output" in refusal.reason
    refused = step(failed, refusal).record
    assert refused.update is not None
    assert refused.update.result == "rejected"
    assert consider(refused, other, FACTS) is None, "said once"
    assert isinstance(consider(refused, want(TWO, attempt=2), FACTS), Assigned)
    assert isinstance(consider(refused, other, Facts(configured=True, fingerprint="0" * 64)), Assigned)


def test_a_new_runtime_tries_again_what_failed_under_the_old_one() -> None:
    failed = run(serving(ONE), *deploy(TWO)[:3], Failed("no plan", deny=True))
    assert consider(failed, want(TWO), FACTS) is None
    assert isinstance(consider(failed, want(TWO), Facts(configured=True, fingerprint="0" * 64)), Assigned)


NOT_ITS_FAULT: list[list[Event]] = [
    [Failed("No variant of it is meant for this device.", result="rejected")],
    [Failed("Given up after 40 tries.")],
    [Fetched(), Failed("disk full")],
    [Fetched(), Verified(), Failed("It needs 800 MB of memory and 600 MB are available.")],
    [Fetched(), Verified(), Prepared(), Validated(verdict(TWO)), Failed("The journal cannot be written.")],
]


@pytest.mark.parametrize("ways", NOT_ITS_FAULT, ids=lambda ways: f"{len(ways) - 1}-steps")
def test_a_new_runtime_tries_once_also_when_that_try_denies_nothing(ways: list[Event]) -> None:
    failed = run(serving(ONE), *deploy(TWO)[:3], Failed("no plan", deny=True))
    again = consider(failed, want(TWO), UPGRADED)
    assert isinstance(again, Assigned)
    record = run(failed, again, *ways)
    record = run(record, *([Served()] if record.state == "rolling_back" else []))
    assert record.state == "idle"
    assert record.denied == failed.denied
    assert consider(record, want(TWO), UPGRADED) is None
    assert isinstance(consider(record, want(TWO), replace(FACTS, fingerprint="1" * 64)), Assigned)


@given(st.lists(events(), max_size=30), st.sampled_from([ONE, TWO, THREE]), st.booleans())
def test_what_was_tried_and_failed_is_not_wanted_again_at_once(
    sequence: list[Event], of: Manifest, deny: bool
) -> None:
    record = run(serving(ONE), *deploy(of)[:2], Failed("no", deny=True), *sequence)
    event = consider(record, want(of), UPGRADED)
    if isinstance(event, Assigned):
        assert consider(run(record, event, Failed("no", deny=deny)), want(of), UPGRADED) is None


def test_wants_are_judged_in_order() -> None:
    needy = manifest("9", requires=("teleportation",))
    lacking = consider(Record(), want(needy), FACTS)
    assert isinstance(lacking, Lacking)
    assert "teleportation" in lacking.reason
    pending = step(Record(), lacking).record
    assert pending.state == "pending"
    assert pending.update is not None
    assert "teleportation" in pending.update.reason
    assert consider(pending, want(needy), FACTS) is None
    able = Facts(configured=True, fingerprint=FINGERPRINT, features=frozenset({"teleportation"}))
    assert isinstance(consider(pending, want(needy), able), Assigned)
    assert isinstance(consider(pending, want(ONE), FACTS), Superseded)
    unknown = consider(Record(), want(ONE), Facts(configured=False, fingerprint=FINGERPRINT))
    assert isinstance(unknown, Lacking)
    below = consider(Record(), want(ONE), Facts(configured=True, fingerprint=FINGERPRINT, floor=3))
    assert isinstance(below, Refused)
    assert "floor 3" in below.reason
    tampered = consider(serving(ONE), Want(row(TWO), None, "bad signature"), FACTS)
    assert tampered == Refused(row(TWO), "bad signature")


def test_a_pipeline_without_a_row_keeps_serving() -> None:
    assert consider(serving(ONE), None, FACTS) is None
    assert isinstance(consider(run(Record(), *deploy(ONE)[:2]), None, FACTS), Canceled)


def test_the_committed_model_asked_for_again_succeeds_at_once_unless_it_is_stale() -> None:
    again = Want(row(ONE, rollout="again"), ONE.to_bytes().decode())
    event = consider(serving(ONE), again, FACTS)
    assert isinstance(event, Satisfied)
    done = step(serving(ONE), event).record
    assert done.update is not None
    assert (done.update.result, done.update.rollout) == ("succeeded", "again")
    assert consider(done, again, FACTS) is None
    stale = Facts(configured=True, fingerprint=FINGERPRINT, stale=True)
    assert isinstance(consider(serving(ONE), again, stale), Assigned)


def test_a_canceled_row_may_come_back() -> None:
    record = run(serving(ONE), *deploy(TWO)[:2], Canceled("nobody"))
    assert isinstance(consider(record, want(TWO), FACTS), Assigned)


@pytest.mark.parametrize("state", ["switching", "rolling_back"])
def test_nothing_interrupts_the_short_states(state: State) -> None:
    record = run(serving(ONE), *deploy(TWO)[: 5 if state == "switching" else 6])
    if state == "rolling_back":
        record = step(record, Breached("p99")).record
    assert record.state == state
    assert consider(record, want(THREE), FACTS) is None


def test_the_floor_is_raised_before_the_journal_says_committed() -> None:
    effects = step(run(Record(), *deploy(ONE)[:6]), Held()).effects
    assert effects[0] is Op.RAISE_FLOOR
    assert states.EARLY == (Op.RAISE_FLOOR,)


def test_a_deployment_reads_its_manifest() -> None:
    assert isinstance(deployment(ONE), Deployment)
    assert deployment(ONE).contents == ONE
