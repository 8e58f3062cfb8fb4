"""SIGINT, SIGTERM and SIGHUP as one KeyboardInterrupt, which never hides a child that was just started.

Invariant: after the first of them none is heard again, so that the end is in order.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Held:
    depth = 0
    wanted = False


def end_in_order() -> None:
    """From now on any of the signals raises KeyboardInterrupt, once."""
    for one in _SIGNALS:
        signal.signal(one, _heard)


@contextmanager
def held() -> Iterator[None]:
    """What comes meanwhile is raised at the end."""
    _Held.depth += 1
    try:
        yield
    finally:
        _Held.depth -= 1
    if _Held.wanted and not _Held.depth:
        _raise()


def _heard(_number: int, _frame: FrameType | None) -> None:
    if _Held.depth:
        _Held.wanted = True
    else:
        _raise()


def _raise() -> None:
    _Held.wanted = False
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt
