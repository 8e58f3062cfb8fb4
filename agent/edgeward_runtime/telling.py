"""Which answers of a source are told to the daemon: one in each interval, what is new, or all. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from edgeward_runtime.sources.options import Why

LEAST_APART_S = 0.02
"""However often a source's answers change, and with `every`: the broker is not the place for more."""


class Telling:
    """One source's policy at work.

    `interval`: the first answer after each interval. `change`: one whose signs (labels, and the zones of
    objects) differ from the last that was told, and one an interval beside, so that a quiet camera is not
    taken for a dead one. `every`: all (at most one in `LEAST_APART_S`; the local socket has the rest).
    """

    def __init__(self, policy: Why) -> None:
        self._policy = policy
        self._signs: frozenset[Hashable] | None = None
        self._told_at = float("-inf")

    def why(self, signs: Iterable[Hashable], now: float, interval_s: float) -> Why | None:
        """Why an answer with these signs is to be told at `now` (monotonic seconds); None: it is not."""
        these = frozenset(signs)
        reason = self._reason(these, now - self._told_at, interval_s)
        if reason is not None:
            self._signs, self._told_at = these, now
        return reason

    def _reason(self, signs: frozenset[Hashable], since_s: float, interval_s: float) -> Why | None:
        if self._policy == "change" and self._signs not in (None, signs) and since_s >= LEAST_APART_S:
            return "change"
        if since_s >= interval_s:
            return "every" if self._policy == "every" else "interval"
        return "every" if self._policy == "every" and since_s >= LEAST_APART_S else None
