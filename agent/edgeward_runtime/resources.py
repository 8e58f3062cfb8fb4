"""What /proc and the C library say about this process and machine. Absent facts are None or empty."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def pss_mb() -> float | None:
    """Proportional set size of this process in MB (1e6 bytes); resident size where there is no PSS."""
    return _kilobytes(Path("/proc/self/smaps_rollup"), "Pss:") or _kilobytes(
        Path("/proc/self/status"), "VmRSS:"
    )


def private_mb() -> float | None:
    """Memory that only this process holds, in MB: what comes back when it ends."""
    path = Path("/proc/self/smaps_rollup")
    parts = [_kilobytes(path, key) for key in ("Private_Clean:", "Private_Dirty:")]
    known = [part for part in parts if part is not None]
    return sum(known) if known else _kilobytes(Path("/proc/self/status"), "VmRSS:")


def available_mb() -> float | None:
    """Memory that can be had without swapping, in MB."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def throttle_count() -> int:
    """How often this machine's cores have been slowed down for heat since it started."""
    total = 0
    for path in sorted(
        Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count")
    ):
        with contextlib.suppress(OSError, ValueError):
            total += int(path.read_text())
    return total


def machine() -> str:
    """The architecture as `platform.machine()` prints it: x86_64, aarch64."""
    return platform.machine()


def isa() -> frozenset[str]:
    """The processor's features by the kernel's names: avx2, avx512_vnni, asimddp, ..."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def save_memory() -> None:
    """Keep glibc from hoarding: two arenas, and large blocks go straight back to the system."""
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def _libc(name: str) -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
        return found
    except (OSError, AttributeError):
        return None  # another C library than glibc


def _kilobytes(path: Path, key: str) -> float | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024 / 1e6
    return None
