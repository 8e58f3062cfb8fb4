"""What /proc and /sys say of heat, throttling, power, load and memory: a machine, a Jetson, a Raspberry Pi.

Invariants: a fact that the system does not give is absent, never a guess; every read and every listing is
bounded; nothing is run and nothing is written. `root` is where `/proc`, `/sys`, `/etc` and `/var` are.
Figures that are differences (load, energy, throttle counts) are those since the look before.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from edgeward_wire.vitals import Vitals

ROOT = Path("/")
CALM_S = 30.0
"""Without throttling for so long, it has ended: hot cores are slowed down and let go by turns."""
_MAX_FILE_BYTES = 64 << 10
_MANY = 64
_MAX_CORES = 1024
_PLAUSIBLE_C = (-40.0, 150.0)
_CPU_SENSORS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal"})
_POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")
_COOLED_BY_SLOWNESS = re.compile(
    r"(thermal-)?(cpufreq|devfreq|idle|cpu-idle)\b|Processor$|intel_powerclamp$|.*-throttle-alert$"
)
"""Cooling devices that slow something down; others are fans, alerts and offsets that are always there."""
_FIRMWARE = {1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
"""Bits of a Raspberry Pi's get_throttled that hold now. Bit 0 (too little voltage) alone slows nothing."""
_GPU_LOADS = (
    "sys/devices/platform/gpu.0/load",
    "sys/devices/gpu.0/load",
    "sys/devices/platform/*.ga10b/load",
    "sys/devices/platform/*.gpu/load",
    "sys/devices/platform/bus@0/*.gpu/load",
)
_PLACEHOLDERS = ("pmic",)
"""Zones that answer a constant: a Jetson's PMIC-Die says 100 °C whatever the weather."""


class Sensors:
    """Looks at one machine again and again."""

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._ticks: tuple[int, int] | None = None
        self._counts: int | None = None
        self._energy: dict[str, int] = {}
        self._looked_at = 0.0

    def read(self) -> Vitals:
        """One look; some milliseconds."""
        now = self._clock()
        by = self._throttling()
        memory = _memory(self._root)
        found = Vitals(
            temperatures_c=temperatures_c(self._root),
            throttled=None if by is None else bool(by),
            throttled_by=tuple(name[:200] for name in (by or ())[:16]),
            power_mw={**_rails_mw(self._root), **self._packages_mw(now)},
            cpu_load=self._cpu_load(),
            gpu_load=_gpu_load(self._root),
            memory_available_mb=memory.get("MemAvailable"),
            memory_total_mb=memory.get("MemTotal"),
        )
        self._looked_at = now
        return found

    @property
    def counted(self) -> bool:
        """Whether throttling shows (also) in counters, of which one look says nothing."""
        return self._counts is not None

    def _throttling(self) -> list[str] | None:
        """What slows the machine down; None where nothing can be known."""
        slowed = _slowed_by(self._root)
        counts, before = _throttle_counts(self._root), self._counts
        self._counts = counts
        if counts is None:
            return slowed
        grown = before is not None and counts > before
        return [*(slowed or []), *(["cores throttled"] if grown else [])]

    def _cpu_load(self) -> float | None:
        ticks, before = _cpu_ticks(self._root), self._ticks
        self._ticks = ticks
        if ticks is None or before is None or ticks[1] <= before[1]:
            return None
        share = (ticks[0] - before[0]) / (ticks[1] - before[1])
        return round(min(1.0, max(0.0, share)), 4)

    def _packages_mw(self, now: float) -> dict[str, float]:
        """Intel's energy counters, as power since the look before; often only root may read them."""
        found: dict[str, float] = {}
        seconds = now - self._looked_at
        for zone in _some(self._root / "sys/class/powercap", "intel-rapl:*"):
            if zone.name.count(":") != 1:
                continue  # a part of a package, counted there
            name, energy = _key(_read(zone / "name")), _integer(_read(zone / "energy_uj"))
            if not name or energy is None:
                continue
            before = self._energy.get(name)
            self._energy[name] = energy
            if before is None or seconds <= 0:
                continue
            if energy < before:
                energy += _integer(_read(zone / "max_energy_range_uj")) or 0
            if energy >= before:
                found[name] = round((energy - before) / seconds / 1000, 1)
        return found


class Throttling:
    """From looks to a fault that begins once and ends once. Pure."""

    def __init__(self) -> None:
        self._seen_at = -math.inf
        self._detail = ""

    def look(self, vitals: Vitals, now: float) -> str:
        """Why the device is slowed down at `now` (monotonic seconds); empty when it is not."""
        if vitals.throttled:
            self._seen_at, self._detail = now, self._detail or f"The device is slowed down: {vitals.title}."
        elif now - self._seen_at >= CALM_S:
            self._detail = ""
        return self._detail


def temperatures_c(root: Path = ROOT) -> dict[str, float]:
    """Zone -> degrees Celsius; a processor's own sensors count as one zone."""
    found: dict[str, float] = {}
    for zone in _some(root / "sys/class/thermal", "thermal_zone*"):
        name, celsius = _zone_name(_read(zone / "type")), _celsius(zone / "temp")
        if celsius is not None and not name.startswith(_PLACEHOLDERS):
            _put(found, name, celsius)
    for monitor in _some(root / "sys/class/hwmon", "hwmon*"):
        name = _read(monitor / "name")
        if name not in _CPU_SENSORS:
            continue
        cores = [_celsius(sensor) for sensor in _some(monitor, "temp*_input")]
        hottest = max((c for c in cores if c is not None), default=None)
        if hottest is not None and _zone_name(name) not in found:
            _put(found, _zone_name(name), hottest)
    return found


def temperature_c(root: Path = ROOT) -> float | None:
    """The hottest zone in degrees Celsius; None where there is no sensor."""
    return max(temperatures_c(root).values(), default=None)


def power_mode(root: Path = ROOT) -> str:
    """What decides clocks: `nvpmodel 15W` on a Jetson, else `cpufreq performance`, else empty."""
    status = re.search(r"(\d+)", _read(root / "var/lib/nvpmodel/status"))
    if status:
        names = {int(n): name for n, name in _POWER_MODEL.findall(_read(root / "etc/nvpmodel.conf"))}
        mode = int(status.group(1))
        return f"nvpmodel {names.get(mode, mode)}"
    policies = _some(root / "sys/devices/system/cpu/cpufreq", "policy*")
    governors = {_read(policy / "scaling_governor") for policy in policies} - {""}
    return f"cpufreq {'/'.join(sorted(governors))}" if governors else ""


# --- one kind of fact each


def _slowed_by(root: Path) -> list[str] | None:
    """Cooling devices that are at work by slowing something down, and the Raspberry Pi's firmware."""
    states: dict[str, float] = {}
    for device in _some(root / "sys/class/thermal", "cooling_device*"):
        kind, state = _read(device / "type"), _number(_read(device / "cur_state"))
        if state is not None and _COOLED_BY_SLOWNESS.match(kind):
            states[kind] = max(state, states.get(kind, 0))
    slowed = sorted(kind for kind, state in states.items() if state > 0)
    firmware = [_integer(_read(path), 16) for path in _firmware(root)]
    flags = [flags for flags in firmware if flags is not None]
    slowed += [f"firmware: {what}" for bit, what in _FIRMWARE.items() if any(f >> bit & 1 for f in flags)]
    return slowed if states or flags else None


def _firmware(root: Path) -> Iterator[Path]:
    return _some(root / "sys/devices/platform", "soc*/*firmware*/get_throttled")


def _throttle_counts(root: Path) -> int | None:
    """How often cores and packages have been slowed down since the machine started; None without counters."""
    cores = islice((root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle"), _MAX_CORES)
    kinds = ("core_throttle_count", "package_throttle_count")
    known = [n for core in cores for kind in kinds if (n := _integer(_read(core / kind))) is not None]
    return sum(known) if known else None


def _rails_mw(root: Path) -> dict[str, float]:
    """The INA3221's rails by their labels, as voltage times current."""
    found: dict[str, float] = {}
    for monitor in _some(root / "sys/class/hwmon", "hwmon*"):
        if _read(monitor / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            label = _key(_read(monitor / f"in{channel}_label"))
            millivolts = _number(_read(monitor / f"in{channel}_input"))
            milliamperes = _number(_read(monitor / f"curr{channel}_input"))
            if label and label != "nc" and millivolts is not None and milliamperes is not None:
                _put(found, label, round(millivolts * milliamperes / 1000, 1))
    return found


def _cpu_ticks(root: Path) -> tuple[int, int] | None:
    """(busy, all) of all cores since the machine started."""
    first = _read(root / "proc/stat").partition("\n")[0].split()
    ticks = [int(text) for text in first[1:9] if text.isdecimal()]
    if len(ticks) < 5 or first[0] != "cpu":
        return None
    idle = ticks[3] + ticks[4]  # waiting for a disk is idle
    return sum(ticks) - idle, sum(ticks)


def _gpu_load(root: Path) -> float | None:
    """A Tegra's GPU says it in thousandths."""
    for pattern in _GPU_LOADS:
        for path in islice(root.glob(pattern), _MANY):
            load = _number(_read(path))
            if load is not None and 0 <= load <= 1000:
                return load / 1000
    return None


def _memory(root: Path) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for line in _read(root / "proc/meminfo").splitlines()[:_MANY]:
        key, _, rest = line.partition(":")
        kilobytes = _number(rest.partition("kB")[0])
        if key in ("MemTotal", "MemAvailable") and kilobytes is not None and kilobytes >= 0:
            found[key] = round(kilobytes / 1024, 1)
    return found


# --- reading


def _zone_name(kind: str) -> str:
    """`cpu-thermal`, `CPU-therm`, `cpu_thermal` -> `cpu`."""
    name = _key(kind)
    return re.sub(r"_therm(al)?$", "", name) or name


def _key(text: str) -> str:
    """A kernel's name as a part of a metric's: at most 48 of a-z, 0-9 and the underscore."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:48]


def _put(found: dict[str, float], name: str, value: float) -> None:
    """Keep every one of those that share a name: `acpitz`, `acpitz_2`."""
    k, key = 1, name or "zone"
    while key in found:
        k += 1
        key = f"{name or 'zone'}_{k}"
    if len(found) < _MANY // 2:
        found[key] = value


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


def _integer(text: str, base: int = 10) -> int | None:
    if len(text) > 32:
        return None
    with contextlib.suppress(ValueError):
        return value if (value := int(text, base)) >= 0 else None
    return None


def _some(directory: Path, pattern: str) -> Iterator[Path]:
    """At most `_MANY`, always in the same order."""
    return iter(sorted(islice(directory.glob(pattern), _MANY), key=lambda path: (len(path.name), path.name)))


def _read(path: Path) -> str:
    """The first `_MAX_FILE_BYTES` of a file, stripped; empty when it cannot be read."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_MAX_FILE_BYTES).decode(errors="replace").strip("\0 \n\t\r")
    return ""
