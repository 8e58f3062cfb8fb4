"""A capture thread and what comes of it, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from edgeward_runtime.backoff import Backoff
from edgeward_runtime.capture import Capture
from edgeward_runtime.slots import Frame, Slots
from edgeward_runtime.sources.options import SourceOptions


def colour_of(image: np.ndarray) -> str:
    """red, green or blue: the strongest of the mean colours."""
    blue, green, red = image.reshape(-1, 3).mean(axis=0)
    return max({"red": red, "green": green, "blue": blue}.items(), key=lambda item: item[1])[0]


class Running:
    """A capture thread and what comes of it."""

    def __init__(self, options: SourceOptions) -> None:
        self.changes: list[tuple[str, bool, str]] = []
        self.crashes: list[BaseException] = []
        self.slots = Slots([options.policy])
        self._changed = threading.Condition()
        self.capture = Capture(
            0,
            options,
            self.slots,
            on_change=self._on_change,
            on_crash=self.crashes.append,
            backoff=Backoff(0.01, 0.02),
        )

    def __enter__(self) -> Running:
        self.capture.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.stop()
        self.slots.close()
        self.capture.join(10)
        assert not self.capture.is_alive()
        assert not self.crashes

    def _on_change(self, source: str, up: bool, detail: str) -> None:
        with self._changed:
            self.changes.append((source, up, detail))
            self._changed.notify_all()
        self.slots.wake()

    def await_down(self, words: str, after: int = 0) -> str:
        """The reason of the first report since number `after` that it is down and holds `words`."""

        def found() -> list[str]:
            return [d for _, up, d in self.changes[after:] if not up and words in d]

        with self._changed:
            assert self._changed.wait_for(found, 20), self.changes
            return found()[0]

    def await_up(self, after: int) -> None:
        """Until it is reported up, past the first `after` reports."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(up for _, up, _ in self.changes[after:]), 20), (
                self.changes
            )

    def find_stale(self, ahead_s: float, until: Callable[[], object]) -> None:
        """Look for stale reads as if it were so much later, until something holds."""
        with self._changed:
            for _ in range(2000):
                if until():
                    return
                self._changed.wait(0.01)
                self._changed.release()
                try:
                    self.capture.check_stale(time.monotonic() + ahead_s)
                finally:
                    self._changed.acquire()
        raise AssertionError(self.changes)

    def await_change(self, change: tuple[str, bool, str]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: change in self.changes, 10), self.changes

    def take(self, count: int) -> list[Frame]:
        deadline = threading.Timer(20, self.slots.close)
        deadline.start()
        try:
            frames = [self.slots.take(lambda: False) for _ in range(count)]
        finally:
            deadline.cancel()
        assert None not in frames
        return [f for f in frames if f is not None]
