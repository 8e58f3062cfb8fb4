"""When a rollout is decided, and with which exit code: a table, and what must hold for any rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_ctl.follow import FAILED, INTERRUPTED, OK, UNDECIDED, follow, judge, serves
from edgeward_ctl.views import endings, way
from edgeward_wire.api import Rollout, RolloutState, TargetProgress
from edgeward_wire.errors import Unavailable
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Result, State

MODEL = ModelRef(path="models/m/1.json", sha256="0" * 64)
TARGETS = st.builds(
    TargetProgress,
    device=st.sampled_from([f"d{k}" for k in range(6)]),
    online=st.booleans(),
    state=st.sampled_from(get_args(State)),
    result=st.one_of(st.none(), st.sampled_from(get_args(Result))),
    progress=st.floats(0, 1),
)


def rollout(*targets: TargetProgress, state: RolloutState = "running") -> Rollout:
    return Rollout(
        id="r", fleet="f", pipeline="main", model=MODEL, state=state, created_at=0, targets=targets
    )


def target(device: str, say: str, *, online: bool = True) -> TargetProgress:
    """A result, or a state."""
    if say in get_args(Result):
        return TargetProgress(device=device, online=online, state="idle", result=say)  # type: ignore[arg-type]
    return TargetProgress(device=device, online=online, state=say)  # type: ignore[arg-type]


GOOD, BAD, BUSY = "succeeded", "failed_rolled_back", "probation"


@pytest.mark.parametrize(
    ("targets", "awaited", "decided", "code"),
    [
        ([("a", GOOD, True), ("b", GOOD, True)], "ab", True, OK),
        ([("a", GOOD, True), ("b", "pending", False)], "a", True, OK),
        ([("a", GOOD, False), ("b", "pending", False)], "a", True, OK),
        ([("a", GOOD, True), ("b", BUSY, False)], "ab", False, UNDECIDED),
        ([("a", GOOD, True), ("b", BUSY, True)], "ab", False, UNDECIDED),
        ([("a", GOOD, True), ("b", BAD, True)], "ab", True, FAILED),
        ([("a", BUSY, True), ("b", BAD, True)], "ab", False, FAILED),
        ([("a", "rejected", True)], "a", True, FAILED),
        ([("a", "pending", False)], "", True, UNDECIDED),
        ([], "", True, UNDECIDED),
    ],
)
def test_the_table(targets: list[tuple[str, str, bool]], awaited: str, decided: bool, code: int) -> None:
    judgement = judge(rollout(*(target(d, s, online=o) for d, s, o in targets)), awaited)
    assert (judgement.decided, judgement.exit_code) == (decided, code)


@pytest.mark.parametrize("state", ["superseded", "canceled"])
def test_a_rollout_that_was_ended_is_decided_and_failed(state: RolloutState) -> None:
    judgement = judge(rollout(target("a", BUSY), state=state), "a")
    assert (judgement.decided, judgement.exit_code) == (True, FAILED)


@given(st.lists(TARGETS, max_size=6, unique_by=lambda t: t.device), st.sets(st.sampled_from("abcdef")))
def test_for_any_rollout(targets: list[TargetProgress], awaited: set[str]) -> None:
    judgement = judge(rollout(*targets), awaited)
    sorted_out = judgement.succeeded + judgement.failed + judgement.waiting + judgement.offline
    assert sorted(sorted_out) == sorted(t.device for t in targets)
    assert judgement.decided == (not judgement.waiting)
    if judgement.exit_code == OK:
        assert judgement.succeeded
        assert not judgement.failed
    if any(t.result not in (None, "succeeded") for t in targets):
        assert judgement.exit_code == FAILED


@given(TARGETS)
def test_the_way_is_a_share(one: TargetProgress) -> None:
    assert 0 <= way(one) <= 1


def test_the_way_only_goes_on() -> None:
    states: list[State] = [
        "pending",
        "downloading",
        "verifying",
        "preparing",
        "validating",
        "switching",
        "probation",
    ]
    shares = [
        way(TargetProgress(device="d", online=True, state=state, progress=progress))
        for state in states
        for progress in (0.0, 1.0)
    ]
    assert shares == sorted(shares)


class Script:
    """A cloud that gives these answers, a clock that goes on as we wait, and a board that remembers."""

    def __init__(self, answers: Sequence[Rollout | BaseException]) -> None:
        self.answers: Iterator[Rollout | BaseException] = iter(answers)
        self.now = 100.0
        self.said: list[str] = []
        self.moved: list[tuple[str, str]] = []

    def fetch(self) -> Rollout:
        answer = next(self.answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def say(self, text: str) -> None:
        self.said.append(text)

    def device(self, target: TargetProgress) -> None:
        self.moved.append((target.device, target.state))

    def follow(self, first: Rollout, timeout_s: float = 1000) -> object:
        return follow(
            self.fetch, first, self, timeout_s=timeout_s, began=90.0, clock=self.clock(), wait=self.wait
        )

    def clock(self) -> Callable[[], float]:
        return lambda: self.now


def test_a_device_is_followed_to_its_end_and_its_serving_is_timed() -> None:
    script = Script([rollout(target("a", s)) for s in ("preparing", "probation", "probation", GOOD)])
    followed = script.follow(rollout(target("a", "pending")))
    assert followed.exit_code == OK
    assert followed.serving_after_s == {"a": 11.0}  # began at 90, followed from 100, second answer
    assert [state for _, state in script.moved] == ["pending", "preparing", "probation", "probation", "idle"]
    (ending,) = endings(followed)
    assert (ending.result, ending.serving_after_s) == ("succeeded", 11.0)


def test_a_device_that_goes_away_meanwhile_is_waited_for_until_the_time_is_up() -> None:
    away = rollout(target("a", "preparing", online=False))
    script = Script([away] * 100)
    followed = script.follow(rollout(target("a", "preparing")), timeout_s=10)
    assert followed.exit_code == UNDECIDED
    assert followed.judgement.waiting == ("a",)
    assert script.now >= 110


def test_a_device_that_comes_online_is_waited_for() -> None:
    busy, done = target("b", GOOD), target("a", GOOD)
    script = Script(
        [
            rollout(busy, target("a", "downloading")),
            rollout(busy, target("a", "probation")),
            rollout(busy, done),
        ]
    )
    followed = script.follow(rollout(target("b", BUSY), target("a", "pending", online=False)))
    assert followed.judgement.succeeded == ("b", "a")


def test_nobody_online_ends_at_once() -> None:
    followed = Script([]).follow(rollout(target("a", "pending", online=False)))
    assert followed.exit_code == UNDECIDED
    assert endings(followed)[0].result == "offline, pending"


def test_a_cloud_that_is_away_for_a_while_is_said_once() -> None:
    gone = Unavailable("Nothing answers.")
    script = Script([gone, gone, gone, rollout(target("a", GOOD))])
    assert script.follow(rollout(target("a", BUSY))).exit_code == OK
    assert len(script.said) == 2


def test_ctrl_c_while_waiting_is_said_with_its_own_code() -> None:
    followed = Script([KeyboardInterrupt()]).follow(rollout(target("a", BUSY)))
    assert followed.exit_code == INTERRUPTED
    assert followed.interrupted


def test_serving_is_probation_or_success() -> None:
    assert serves(target("a", "probation"))
    assert serves(target("a", GOOD))
    assert not serves(target("a", "switching"))
    assert not serves(target("a", BAD))
