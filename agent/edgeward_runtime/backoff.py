"""How long to wait before the next attempt: exponential with full jitter."""

from __future__ import annotations

import random


class Backoff:
    """Waits grow from `first_s` to `most_s`, each drawn from the upper half of its range."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0) -> None:
        self._first, self._most = first_s, most_s
        self._next = first_s

    def wait_s(self) -> float:
        """The next wait in seconds."""
        span, self._next = self._next, min(self._next * 2, self._most)
        return random.uniform(span / 2, span)

    def reset(self) -> None:
        """Things work again."""
        self._next = self._first
