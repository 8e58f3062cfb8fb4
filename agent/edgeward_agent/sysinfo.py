"""What this machine is, read from /proc, /sys and the installed distributions. Never imports what it names.

Every reader tolerates absence: a container, a Jetson and a laptop all answer, each with what it has.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import Sha256

_MAX_READ = 64 << 10
# What decides how a model runs: a verdict holds only for these versions.
_RUNTIME = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "numpy",
    "opencv-python-headless",
    "opencv-python",
    "openvino",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime",
)
_ISA = frozenset(
    (
        *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8"),
        *("asimd", "asimddp", "i8mm", "sve", "sve2", "bf16"),
    )
)
_PROVIDERS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("CPU",),
    "onnxruntime-gpu": ("Tensorrt", "CUDA", "CPU"),
    "onnxruntime-openvino": ("OpenVINO", "CPU"),
}
# malloc.h: M_ARENA_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_MALLOC = ((-8, 1), (-1, 64 << 10), (-2, 4 << 10))
_NEEDED = ("numpy", "cv2", "onnxruntime")


@dataclass(frozen=True)
class Machine:
    """What does not change while the daemon runs."""

    arch: str
    cores: int
    memory_mb: float
    os: str
    board: str
    features: frozenset[str]
    """All of the processor's, by the kernel's names; empty when nobody knows."""
    runtime: dict[str, str]
    """Distribution -> version."""

    @property
    def isa(self) -> tuple[str, ...]:
        """The features that matter to inference."""
        return tuple(sorted(self.features & _ISA))

    @property
    def providers(self) -> tuple[str, ...]:
        """Which providers may work, by the installed build of ONNX Runtime. Short names."""
        found = [p for build, names in _PROVIDERS.items() if build in self.runtime for p in names]
        return tuple(dict.fromkeys(found)) or ("CPU",)

    @property
    def runtime_fault(self) -> Rejected | None:
        """Why no model can run here, or only by luck; None when all is well. Imports nothing."""
        builds = [build for build in _PROVIDERS if build in self.runtime]
        if len(builds) > 1:
            return Rejected(
                f"{' and '.join(builds)} are installed together: they overwrite each other's files.",
                "Uninstall all of them, then install one of edgeward[cpu], [gpu] and [openvino] anew.",
            )
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            return Rejected(
                f"No model can run in this environment: {', '.join(missing)} cannot be imported.",
                "Install one of edgeward[cpu], [gpu] and [openvino]; on a Jetson see docs/operations.md.",
            )
        return None

    @property
    def runtime_fingerprint(self) -> Sha256:
        """Changes when the libraries that run models do."""
        return _digest(self.runtime, self.board, _read("/etc/nv_tegra_release"))

    def verdict_key(
        self, model_sha256: str, *, threads: int, providers: tuple[str, ...], power: str
    ) -> Sha256:
        """What a verdict is cached under: it holds for this model on this machine in this mode only."""
        device = (self.arch, self.cores, round(self.memory_mb / 256), self.board, self.isa)
        return _digest(model_sha256, self.runtime_fingerprint, device, power, threads, providers)


@cache
def this_machine() -> Machine:
    """Read once: the distributions take some milliseconds to list."""
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return Machine(
        arch=platform.machine()[:64],
        cores=usable_cores(),
        memory_mb=round(_meminfo("MemTotal"), 1),
        os=release.get("PRETTY_NAME", platform.system())[:200],
        board=_board()[:200],
        features=frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split()),
        runtime=_runtime(),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return max(1, len(os.sched_getaffinity(0)))


def available_mb() -> float:
    """Memory that can be had without swapping, in MB; within the cgroup's limit when there is one."""
    free = _meminfo("MemAvailable")
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        free = min(free, max(0.0, (int(limit) - int(used)) / 2**20))
    return free


def save_memory() -> None:
    """Before threads start: one arena for all of them, and what is freed goes back at once.

    glibc otherwise gives each thread an arena and keeps a growing reserve: 2 MB of the daemon's memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return
    for option, value in _MALLOC:
        mallopt(option, value)


def release_memory() -> None:
    """After a burst of work (an update): give back to the system what Python and libc hold in reserve."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
    if trim is not None:
        trim(0)


def cpu_name() -> str:
    """The processor as the kernel names it; empty where it does not."""
    return _cpuinfo("model name") or _cpuinfo("Model")


def _runtime() -> dict[str, str]:
    wanted = set(_RUNTIME)
    found: dict[str, str] = {}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in wanted:
            found.setdefault(name, distribution.version)
    return dict(sorted(found.items()))


def _board() -> str:
    board = _read("/proc/device-tree/model").rstrip("\0") or _read("/sys/class/dmi/id/product_name")
    return board or _cpuinfo("model name")


def _cpuinfo(key: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _meminfo(key: str) -> float:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_READ).strip()
    except OSError:
        return ""


def _digest(*parts: object) -> Sha256:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
