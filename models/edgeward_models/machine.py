"""What a measurement was taken on: the processor, what it can do with 8-bit numbers, its power mode and heat.

Invariants: a fact that the system does not give is None or empty, never a guess; every read is bounded;
nothing is run, only `/proc`, `/sys` and the like are read. Files are those of Linux and of Jetsons.
"""

from __future__ import annotations

import contextlib
import math
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgeward_runtime import resources, sessions

_ISA = (
    *("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "fphp"),
)
"""The features that decide how fast a network runs, by the kernel's names."""
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})
_MAX_FILE_BYTES = 64 << 10  # /proc/cpuinfo repeats itself for each core: the first one is all we need
_MAX_ZONES = 64
_PLAUSIBLE_C = (-40.0, 150.0)
_CPU_SENSORS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal"})
_POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")


@dataclass(frozen=True)
class Machine:
    """A machine at one moment."""

    cpu: str
    arch: str
    """As `platform.machine()` prints it."""
    cores: int
    """Those that this process may use."""
    isa: tuple[str, ...]
    vnni: bool
    """An x86 processor that adds 8-bit products in 32 bits: INT8 cannot saturate, and is faster."""
    power_mode: str
    """A Jetson's nvpmodel, else the cpufreq governor, else empty."""
    temperature_c: float | None
    """The hottest sensor."""
    load: float | None
    """Processes that wanted a core, on average over the last minute."""
    ort: str
    python: str

    @property
    def capability(self) -> str:
        """What to expect of INT8 here, in one sentence."""
        if self.vnni:
            return "VNNI: 8-bit products are added in 32 bits, nothing saturates"
        if self.arch in ("aarch64", "arm64"):
            dot = [name for name in ("asimddp", "i8mm") if name in self.isa]
            return f"8-bit dot products ({', '.join(dot)})" if dot else "no 8-bit dot products"
        return "no VNNI: INT8 gains less than on newer processors, and its 16-bit sums may saturate"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "isa": list(self.isa), "capability": self.capability}


def facts(root: Path = Path("/")) -> Machine:
    """This machine, now. `root` is where its `/proc`, `/sys` and `/etc` are."""
    cpuinfo = _read(root / "proc/cpuinfo")
    features = set((_field(cpuinfo, "flags") or _field(cpuinfo, "Features")).split())
    arch = platform.machine()
    return Machine(
        cpu=_cpu(root, cpuinfo) or arch,
        arch=arch,
        cores=resources.cores(),
        isa=tuple(name for name in _ISA if name in features),
        vnni=bool(features & _VNNI),
        power_mode=_power_mode(root),
        temperature_c=temperature_c(root),
        load=_number(_read(root / "proc/loadavg").partition(" ")[0]),
        ort=sessions.version(),
        python=platform.python_version(),
    )


def temperature_c(root: Path = Path("/")) -> float | None:
    """The hottest of the thermal zones and the processor's own sensors, in °C; None without any."""
    readings = [_celsius(zone / "temp") for zone in _some(root / "sys/class/thermal", "thermal_zone*")]
    for monitor in _some(root / "sys/class/hwmon", "hwmon*"):
        if _read(monitor / "name") in _CPU_SENSORS:
            readings += [_celsius(sensor) for sensor in _some(monitor, "temp*_input")]
    return max((celsius for celsius in readings if celsius is not None), default=None)


def lines(machine: Machine) -> list[tuple[str, str]]:
    """The facts as (what, value) for people."""
    heat = "" if machine.temperature_c is None else f"{machine.temperature_c:.0f} °C"
    return [
        ("processor", f"{machine.cpu}, {machine.arch}, {_plural(machine.cores, 'core')}"),
        ("instructions", ", ".join(machine.isa) or "not known"),
        ("INT8", machine.capability),
        ("power mode", machine.power_mode or "not known"),
        ("temperature", heat or "not known"),
        ("load", "not known" if machine.load is None else f"{machine.load:.2f}"),
        ("runtime", f"ONNX Runtime {machine.ort}, Python {machine.python}"),
    ]


def _cpu(root: Path, cpuinfo: str) -> str:
    board = _read(root / "proc/device-tree/model").rstrip("\0")
    return board or _field(cpuinfo, "model name") or _field(cpuinfo, "Model")


def _power_mode(root: Path) -> str:
    """`nvpmodel 15W` on a Jetson, `cpufreq performance` elsewhere."""
    status = re.search(r"(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if status:
        names = {int(n): name for n, name in _POWER_MODEL.findall(_read(root / "etc/nvpmodel.conf"))}
        mode = int(status.group(1))
        return f"nvpmodel {names.get(mode, mode)}"
    governors = {
        _read(policy / "scaling_governor")
        for policy in _some(root / "sys/devices/system/cpu/cpufreq", "policy*")
    } - {""}
    return f"cpufreq {'/'.join(sorted(governors))}" if governors else ""


def _field(text: str, key: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _celsius(path: Path) -> float | None:
    millidegrees = _number(_read(path))
    if millidegrees is None:
        return None
    celsius = millidegrees / 1000
    low, high = _PLAUSIBLE_C
    return celsius if low < celsius < high else None  # sensors that are off answer nonsense


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        return value if math.isfinite(value := float(text)) else None
    return None


def _some(directory: Path, pattern: str) -> Iterator[Path]:
    return islice(directory.glob(pattern), _MAX_ZONES)


def _read(path: Path) -> str:
    """The first `_MAX_FILE_BYTES` of a file, stripped; empty when it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_MAX_FILE_BYTES).decode(errors="replace").strip()
    return ""


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
