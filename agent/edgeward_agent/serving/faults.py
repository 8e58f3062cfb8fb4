"""What a client is told when it does not get an answer: a status and one sentence."""

from __future__ import annotations


class Fault(Exception):
    """An HTTP status with its reason. `retry_s`: when to ask again."""

    def __init__(self, status: int, reason: str, retry_s: int | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_s = status, reason, retry_s
