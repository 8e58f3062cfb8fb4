"""How versions grow and metadata ages: pure functions of a time that the caller brings.

Invariants: a version never goes back, also when a cloud was restored from an old backup; a role is
signed again at half of its life, so that a cloud that was off for half of it still serves clients.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

from edgeward_cloud.files import TEMPORARY

DAY = 86_400.0
KEEP_S = 2 * DAY
"""How long a superseded file stays: a client that began before it may finish."""

LIVES: dict[str, float] = {
    "timestamp": 7 * DAY,
    "snapshot": 7 * DAY,
    "director": 30 * DAY,
    "bin": 30 * DAY,
    "models": 365 * DAY,
    "agent": 365 * DAY,
    "targets": 365 * DAY,
    "root": 730 * DAY,
}
"""Seconds from signing to expiry. The bins of the director are `bin-<hex>`."""

WARN_S = 60 * DAY
"""How long before the expiry of what only people can sign we start to say so."""

_VERSIONED = re.compile(r"^(?P<version>[1-9][0-9]{0,18})\.(?P<role>[a-z0-9-]+)\.json$")


def next_version(previous: int, now: float) -> int:
    """The next version of what is signed online: max(previous + 1, Unix seconds)."""
    return max(previous + 1, int(now))


def life(role: str) -> float:
    """Seconds from signing to expiry of a role."""
    return LIVES[role.split("-", maxsplit=1)[0]]


def expiry(role: str, now: float) -> datetime:
    """When a role that is signed now expires (UTC, whole seconds)."""
    return datetime.fromtimestamp(int(now), timezone.utc) + timedelta(seconds=life(role))


def resign_at(role: str, expires: datetime) -> float:
    """When a role that expires then should be signed again, in Unix seconds."""
    return expires.timestamp() - life(role) / 2


def signed_at(now: float) -> str:
    """The timestamp role's `x-edgeward-signed-at`: ISO 8601, UTC."""
    return datetime.fromtimestamp(int(now), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def split_name(name: str) -> tuple[int, str] | None:
    """(version, role) of a versioned metadata file's name; None when it is not one."""
    match = _VERSIONED.match(name)
    return (int(match["version"]), match["role"]) if match else None


def may_be_pruned(name: str, current: dict[str, int], modified: float, now: float) -> bool:
    """Whether a metadata file has been out of force for long enough.

    `current` is role -> version in force; `modified` is when the file was superseded, for superseding
    touches it. Roots stay for ever: a client may come from any of them. What a crash left behind goes too.
    """
    if name.startswith(".") and name.endswith(TEMPORARY):
        return modified + KEEP_S < now
    parts = split_name(name)
    if parts is None or parts[1] == "root":
        return False
    version, role = parts
    return current.get(role) != version and modified + KEEP_S < now
