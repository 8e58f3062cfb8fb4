"""How a device is: heat, throttling, power, load, memory. What it cannot tell is absent, never guessed."""

from __future__ import annotations

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import Key, ShortText


class Vitals(Open):
    """One look at a device's sensors."""

    temperatures_c: dict[Key, float] = Field(default_factory=dict, max_length=64)
    """By thermal zone (`cpu`, `gpu`, `tj`), in degrees Celsius."""
    throttled: bool | None = None
    """Whether something is slowed down now; None where the device gives no way to know."""
    throttled_by: tuple[ShortText, ...] = Field(default=(), max_length=16)
    """What slows it down, by the kernel's names."""
    power_mw: dict[Key, float] = Field(default_factory=dict, max_length=32)
    """By rail, in milliwatts. Rails overlap: the input's is the whole board's."""
    cpu_load: float | None = Field(default=None, ge=0, le=1)
    """Share of all cores that was busy since the look before."""
    gpu_load: float | None = Field(default=None, ge=0, le=1)
    memory_available_mb: float | None = Field(default=None, ge=0)
    """What can be had without swapping; in the unit of `Birth.memory_mb`."""
    memory_total_mb: float | None = Field(default=None, ge=0)

    @property
    def temperature_c(self) -> float | None:
        """The hottest zone."""
        return max(self.temperatures_c.values(), default=None)

    @property
    def title(self) -> str:
        """One line for people: `61 °C, throttled (cpufreq-cpu0), 9.8 W`; empty when nothing is known."""
        parts = [] if self.temperature_c is None else [f"{self.temperature_c:.0f} °C"]
        if self.throttled:
            by = f" ({', '.join(self.throttled_by)})" if self.throttled_by else ""
            parts.append(f"throttled{by}")
        if (power := self.board_mw) is not None:
            parts.append(f"{power / 1000:.1f} W")
        return ", ".join(parts)

    @property
    def board_mw(self) -> float | None:
        """What the whole board takes, where one rail says so."""
        return next((self.power_mw[name] for name in BOARD_RAILS if name in self.power_mw), None)


BOARD_RAILS = ("vdd_in", "pom_5v_in", "psys")
"""The rails through which everything goes: of Jetson Orin NX and Nano, of the first Nano, of Intel."""
