"""What becomes an event: each state when it is entered, each result once, and nothing else."""

from __future__ import annotations

from dataclasses import replace

from agent.models import deployment, manifest, verdict
from edgeward_agent.pipeline_report import happening
from edgeward_agent.states import (
    Assigned,
    Breached,
    Event,
    Fetched,
    Held,
    Lacking,
    Prepared,
    Record,
    Restarted,
    RunnerDied,
    Satisfied,
    Served,
    Superseded,
    Validated,
    Verified,
    step,
)
from edgeward_wire.event import Finished

ONE, TWO = manifest("1"), manifest("2")
DEPLOYED = (
    Assigned(deployment(ONE)),
    Fetched(),
    Verified(),
    Prepared(),
    Validated(verdict(ONE)),
    Served(),
    Held(),
)


def told(*events: Event) -> list[tuple[str, str]]:
    """State or result, and reason, of all that is told on this way from nothing."""
    record, found = Record(), []
    for at, event in enumerate(events, 1):
        before, now = record, replace(event, at=float(at))
        record = step(before, now).record
        what = happening("main", before, record, now)
        if what is not None:
            word = what.update.result if isinstance(what, Finished) else what.state
            found.append((str(word), what.update.reason))
    return found


def test_a_deployment_is_told_state_by_state() -> None:
    ways = ["downloading", "verifying", "preparing", "validating", "switching", "probation"]
    assert told(*DEPLOYED) == [(way, "") for way in (*ways, "succeeded")]


def test_nothing_is_told_twice() -> None:
    first = told(*DEPLOYED)
    assert told(*DEPLOYED, Restarted(), RunnerDied("it fell"), Served(), RunnerDied("again")) == first
    assert told(*DEPLOYED[:6], Served()) == first[:6], "the runner may say again that it serves"


def test_the_same_result_of_another_attempt_is_told() -> None:
    again = Satisfied(deployment(ONE, attempt=2))
    assert told(*DEPLOYED, again, Satisfied(deployment(ONE, attempt=3)))[-3:] == [
        ("succeeded", ""),
        ("succeeded", "It serves already."),
        ("succeeded", "It serves already."),
    ]


def test_a_pending_one_is_told_with_each_reason() -> None:
    wish = deployment(TWO)
    assert told(Lacking(wish, "no pipeline"), Lacking(wish, "no feature"), Superseded("a newer one")) == [
        ("pending", "no pipeline"),
        ("pending", "no feature"),
        ("superseded", "a newer one"),
    ]


def test_the_way_back_is_told_with_its_reason() -> None:
    assert told(*DEPLOYED[:6], Breached("too slow"), Served())[-2:] == [
        ("rolling_back", "too slow"),
        ("failed_rolled_back", "too slow"),
    ]
