"""When served work runs between live frames: the schedule, jobs, and both through the slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.jobs import MAX_WAITING, PER_LIVE, Busy, Changed, Job, Schedule
from edgeward_runtime.slots import Frame, Slots
from edgeward_wire.errors import Rejected, Unavailable

ENGINE: Any = None


def beating(interval: float, count: int = 20, run_s: float = 0.01) -> Schedule:
    """A schedule that saw frames at 0, interval, ..."""
    schedule = Schedule(1)
    for k in range(count):
        schedule.arrived(0, k * interval)
    schedule.served_ran(run_s)
    return schedule


def never() -> bool:
    return False


def steps(count: int, done: list[int]) -> Job:
    def work(_engine: object) -> Iterator[None]:
        for k in range(count):
            done.append(k)
            yield

    return Job("m", work)


def frame(source: int = 0) -> Frame:
    return Frame(source, np.zeros((1, 1, 3), np.uint8), 0.0, 0.0, 0.0)


def test_a_run_starts_when_it_will_be_over_before_the_next_frame() -> None:
    schedule = beating(0.1)
    last = 19 * 0.1
    assert schedule.wait_s(last + 0.01) == 0
    assert schedule.wait_s(last + 0.08) == 0
    assert schedule.wait_s(last + 0.095) > 0, "it would be in the way of the next one"


def test_without_live_frames_nothing_waits() -> None:
    assert Schedule(0).wait_s(5.0) == 0
    assert Schedule(3).wait_s(5.0) == 0


def test_a_source_that_stopped_is_not_waited_for() -> None:
    schedule = beating(0.1)
    assert schedule.wait_s(19 * 0.1 + 0.15) > 0, "late: it may come at any moment"
    assert schedule.wait_s(19 * 0.1 + 0.31) == 0


def test_a_pause_does_not_change_the_rhythm() -> None:
    schedule = beating(0.1)
    schedule.arrived(0, 60.0)
    assert schedule.wait_s(60.01) == 0
    assert schedule.wait_s(60.095) > 0


def test_irregular_frames_are_expected_earlier() -> None:
    schedule, now = Schedule(1), 0.0
    for k in range(50):
        now += 0.06 if k % 2 else 0.14
        schedule.arrived(0, now)
    schedule.served_ran(0.01)
    assert schedule.wait_s(now + 0.08) > 0


def test_a_camera_that_comes_when_it_likes_is_not_waited_for() -> None:
    schedule, now = Schedule(1), 0.0
    for k in range(20):
        now += 120.0 if k % 2 else 20.0
        schedule.arrived(0, now)
    schedule.served_ran(0.01)
    for _ in range(3):
        now += schedule.wait_s(now)
        assert schedule.wait_s(now) == 0
        schedule.served_ran(0.01)
    assert now <= 20 * 70 + 3 * 0.2 + 1e-6, "a run every 0.2 s, and a frame that comes waits for one of them"


def test_regular_frames_are_waited_for_whatever_is_between_them() -> None:
    for interval, run_s in ((1 / 30, 0.03), (0.2, 0.18), (30.0, 2.0)):
        schedule = beating(interval, run_s=run_s)
        last = 19 * interval
        too_late = last + interval - run_s / 2
        assert schedule.wait_s(too_late) > 0
        assert schedule.wait_s(last + interval - 1e-6) > 0


@given(
    st.lists(st.floats(0.0005, 2) | st.floats(60, 600), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(0, 10),
)
def test_nothing_waits_for_ever(gaps: list[float], run_s: float, later: float) -> None:
    schedule, now = Schedule(1), 0.0
    for gap in gaps:
        now += gap
        schedule.arrived(0, now)
    schedule.served_ran(run_s)
    wait = schedule.wait_s(now + later)
    assert 0 <= wait <= max(4 * run_s, 0.2) + 1e-6, "whatever the intervals are"
    assert wait == 0 or schedule.wait_s(now + later + wait + 1e-6) == 0


def test_served_work_is_not_starved_by_frames_that_are_always_there() -> None:
    slots, done = Slots(["latest"]), list[int]()
    slots.submit(steps(1, done))
    taken: list[object] = []
    while not any(isinstance(one, Job) for one in taken):
        slots.put(frame())
        taken.append(slots.take(never))
    assert 1 < len(taken) <= PER_LIVE + 1


def test_steps_of_one_job_end_it() -> None:
    done: list[int] = []
    job = steps(3, done)
    assert [job.step(ENGINE, "m") for _ in range(4)] == [True, True, True, False]
    job.wait(0)
    assert done == [0, 1, 2]


def test_a_job_for_another_model_is_told() -> None:
    job = steps(1, [])
    assert not job.step(ENGINE, "another")
    with pytest.raises(Changed, match="took over"):
        job.wait(0)


def test_a_job_does_not_go_on_with_another_plan_of_its_model() -> None:
    engines: list[Any] = [object(), object()]
    done: list[int] = []
    job = steps(3, done)
    assert job.step(engines[0], "m")
    assert not job.step(engines[1], "m"), "its first engine has been closed"
    with pytest.raises(Changed, match="took over"):
        job.wait(0)
    assert done == [0]


def test_the_fault_of_a_job_is_its_own() -> None:
    def work(_engine: object) -> Iterator[None]:
        raise Rejected("no")
        yield

    job = Job("m", work)
    assert not job.step(ENGINE, "m")
    with pytest.raises(Rejected, match="no"):
        job.wait(0)


def test_who_does_not_wait_any_more_costs_nothing() -> None:
    done: list[int] = []
    job = steps(1, done)
    with pytest.raises(Unavailable, match="did not get to it"):
        job.wait(0)
    assert not job.step(ENGINE, "m")
    assert not done


def test_what_waits_is_bounded_and_fails_when_all_ends() -> None:
    slots = Slots([])
    jobs = [steps(1, []) for _ in range(MAX_WAITING)]
    for job in jobs:
        slots.submit(job)
    with pytest.raises(Busy):
        slots.submit(steps(1, []))
    slots.close()
    for job in jobs:
        with pytest.raises(Unavailable, match="stops"):
            job.wait(0)
    with pytest.raises(Unavailable, match="stops"):
        slots.submit(steps(1, []))


def test_a_job_wakes_who_waits_for_frames() -> None:
    slots, got = Slots(["latest"]), list[object]()
    thread = threading.Thread(target=lambda: got.append(slots.take(never)))
    thread.start()
    job = steps(1, [])
    slots.submit(job)
    thread.join(10)
    assert got == [job]
