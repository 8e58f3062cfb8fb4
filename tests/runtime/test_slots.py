"""The hand-over between capture and inference."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgeward_runtime.slots import BUFFERS, Buffers, Frame, Slots


def frame(source: int = 0, mark: int = 0) -> Frame:
    return Frame(source, np.full((1, 1, 3), mark, np.uint8), 0.0, 0.0, 0.0)


def marks(slots: Slots, count: int) -> list[int]:
    taken = [slots.take(lambda: False) for _ in range(count)]
    return [int(f.data[0, 0, 0]) for f in taken if f is not None]


def test_latest_keeps_the_newest_and_counts_the_rest() -> None:
    slots = Slots(["latest"])
    buffers, replaced = Buffers(), frame(mark=1)
    replaced.buffers = buffers
    for one in (replaced, frame(mark=2), frame(mark=3)):
        assert slots.put(one) == 0
    assert marks(slots, 1) == [3]
    assert slots.take_dropped() == [2]
    assert slots.take_dropped() == [0]
    assert buffers.take() is replaced.data, "its memory goes back to the capture"


def test_every_loses_nothing_and_waits() -> None:
    slots = Slots(["every"])
    done = threading.Event()

    def capture() -> None:
        for mark in range(20):
            assert slots.put(frame(mark=mark)) == 0
        done.set()

    thread = threading.Thread(target=capture)
    thread.start()
    assert not done.is_set()
    assert marks(slots, 20) == list(range(20))
    thread.join(10)
    assert done.is_set()
    assert slots.take_dropped() == [0]


def test_sources_are_taken_in_turn() -> None:
    slots = Slots(["latest", "latest", "latest"])
    for round_ in range(2):
        for source in range(3):
            slots.put(frame(source, 10 * round_ + source))
    order = []
    for _ in range(3):
        taken = slots.take(lambda: False)
        assert taken is not None
        order.append(taken.source)
        slots.put(frame(0, 99))  # a busy source does not push in front of the others
    assert order == [0, 1, 2]


@pytest.mark.parametrize("how", ["close", "stop"])
def test_who_waits_for_a_frame_is_let_go(how: str) -> None:
    slots, stop, got = Slots(["latest"]), threading.Event(), []
    thread = threading.Thread(target=lambda: got.append(slots.take(stop.is_set)))
    thread.start()
    if how == "close":
        slots.close()
    else:
        stop.set()
        slots.wake()
    thread.join(10)
    assert got == [None]


def test_who_waits_for_room_is_let_go() -> None:
    slots, got = Slots(["every"]), []
    thread = threading.Thread(target=lambda: got.append(slots.put(frame())))
    thread.start()
    slots.close()
    thread.join(10)
    assert got == [None]
    assert slots.put(frame()) is None
    assert slots.take(lambda: False) is None


def test_memory_goes_round() -> None:
    buffers = Buffers()
    assert [buffers.take() for _ in range(BUFFERS)] == [None] * BUFFERS, "nothing is there to be used again"
    images = [np.zeros((1, 1, 3), np.uint8) for _ in range(3)]
    for image in images:
        buffers.give(image)
    assert [buffers.take() is image for image in images[:BUFFERS]] == [True] * BUFFERS
    assert buffers.take() is None, "what never comes back is replaced in the end"
    one = frame()
    one.buffers = buffers
    one.release()
    one.release()
    assert buffers.take() is one.data
    assert buffers.take() is None, "given back once"
