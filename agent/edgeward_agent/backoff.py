"""Full-jitter exponential backoff: a fleet that lost the same server must not come back in step."""

from __future__ import annotations

import random


class Backoff:
    """Delays in seconds: uniform between 0 and a ceiling that doubles from `base_s` up to `cap_s`."""

    def __init__(self, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self.failures = 0
        """In a row."""

    def next(self) -> float:
        """Count one more failure; how long to wait before the next try."""
        ceiling = min(self._cap_s, self._base_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return random.uniform(0.0, ceiling)  # jitter, not a secret

    def reset(self) -> None:
        """It worked."""
        self.failures = 0
