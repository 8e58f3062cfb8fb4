"""Before measuring: wait until the device is cool. What is measured hot all the same is provisional.

Invariants: all waits of one qualify together are bounded by `patience_s`; whoever waits says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edgeward_agent.sensors import Sensors
from edgeward_wire.vitals import Vitals

log = logging.getLogger(__name__)

PATIENCE_S = 600.0
_POLL_S = 0.5
_CALM_S = 2.0
_SAY_S = 5.0
_MARGIN_C = 3.0
"""Below the limit by so much, the device is cool again."""


class Cooling:
    """Implements `edgeward_runtime.probe.Calm` on a device's sensors."""

    def __init__(
        self,
        sensors: Sensors,
        *,
        max_temp_c: float | None,
        patience_s: float,
        waiting: Callable[[str], None],
    ) -> None:
        """`waiting` is told why, now and then."""
        self._sensors = sensors
        self._max_temp_c = max_temp_c
        self._left_s = patience_s
        self._waiting = waiting
        self._measuring = False
        self._disturbed = False
        self._given_up = False

    def wait(self) -> float:
        """Return when the device is cool enough, or patience has run out; the seconds waited."""
        vitals = self._look()
        if not self._measuring and self._sensors.counted:
            time.sleep(_POLL_S)  # counters say something from the second look on
            vitals = self._sensors.read()
        self._measuring = True
        why = self._why(vitals, resuming=False)
        if not why or self._given_up:
            return 0.0
        started = time.monotonic()
        if not self._cooled(why, started + self._left_s):
            self._disturbed = self._given_up = True
            log.warning("It is still hot (%s). It is measured all the same; the verdict is provisional.", why)
        waited = time.monotonic() - started
        self._left_s = max(0.0, self._left_s - waited)
        return waited

    def disturbed(self) -> bool:
        """Whether anything was measured while the device was slowed down, or too hot."""
        self._look()
        return self._disturbed

    def _look(self) -> Vitals:
        vitals = self._sensors.read()
        if self._measuring and vitals.throttled:
            self._disturbed = True
        return vitals

    def _cooled(self, why: str, deadline: float) -> bool:
        """Poll until it has been cool for a while."""
        calm_since: float | None = None
        said_at = float("-inf")
        while (now := time.monotonic()) < deadline:
            if now - said_at >= _SAY_S:
                said_at = now
                self._waiting(f"{why} It waits at most {deadline - now:.0f} s for the device to cool.")
            time.sleep(min(_POLL_S, deadline - now))
            still = self._why(self._sensors.read(), resuming=True)
            if still:
                why, calm_since = still, None
                continue
            calm_since = calm_since if calm_since is not None else time.monotonic()
            if time.monotonic() - calm_since >= _CALM_S:
                return True
        return False

    def _why(self, vitals: Vitals, *, resuming: bool) -> str:
        """Why not to measure now; empty when it is cool."""
        if vitals.throttled:
            return f"The device is slowed down ({', '.join(vitals.throttled_by) or 'throttled'})."
        hottest, limit = vitals.temperature_c, self._max_temp_c
        if limit is not None and hottest is not None and hottest > limit - (_MARGIN_C if resuming else 0):
            return f"The device is at {hottest:.0f} °C; max_temp_c is {limit:g}."
        return ""
