"""`agent-ctl results`: what the devices see, once or as it comes.

The cloud keeps the newest result of each source and stores none: following is asking again, so of a device
that tells several within `POLL_S` the last is shown. Every one of them is on the broker and, on the device,
on its local socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgeward_ctl import screen
from edgeward_ctl.client import Client
from edgeward_ctl.deploying import unknown_fleet
from edgeward_ctl.follow import INTERRUPTED
from edgeward_ctl.profile import Profile
from edgeward_wire.api import Device
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.result import ResultMessage, headline

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Told:
    """A result, and who told it."""

    device: str
    online: bool
    result: ResultMessage

    @property
    def key(self) -> tuple[str, str, str]:
        """Whose newest result it is."""
        return self.device, self.result.pipeline, self.result.source


def told(devices: Iterable[Device]) -> list[Told]:
    """The newest result of each source, by device, pipeline and source."""
    found = [Told(device.id, device.online, result) for device in devices for result in device.results]
    return sorted(found, key=lambda one: one.key)


def fresh(now: Iterable[Told], before: dict[tuple[str, str, str], float]) -> list[Told]:
    """What is new since the last call, in the order of its time; `before` is brought up to date."""
    new = [one for one in now if before.get(one.key) != one.result.time]
    before.update({one.key: one.result.time for one in new})
    return sorted(new, key=lambda one: one.result.time)


def show(profile: Profile, *, fleet: str | None, device: str | None, follow: bool, as_json: bool) -> int:
    """Print what is seen now; with `follow` what is new, until Ctrl-C. Returns the exit code."""
    with Client(profile) as client:
        ask = _asker(client, fleet, device)
        if follow:
            return _follow(ask, as_json)
        found = ask()
    if as_json:
        for one in found:
            screen.print_json(_plain(one))
    elif found:
        screen.out().print(_table(found, time.time()))
    else:
        screen.say("No results yet: nothing serves, or nothing was seen since the cloud started.")
    return 0


def _asker(client: Client, fleet: str | None, device: str | None) -> Callable[[], list[Told]]:
    if fleet is not None and device is not None:
        raise Rejected("Say for whom: --fleet NAME or --device NAME, one of the two.")
    if device is not None:
        return lambda: told([client.device(device)])
    if fleet is not None and fleet not in (names := {known.name for known in client.fleets()}):
        raise unknown_fleet(fleet, names)
    return lambda: told(client.devices(fleet))


def _follow(ask: Callable[[], list[Told]], as_json: bool) -> int:
    before: dict[tuple[str, str, str], float] = {}
    away = False
    try:
        new = fresh(ask(), before)  # the first time, a cloud that is away is an error
        while True:
            for one in new:
                _tell(one, as_json)
            time.sleep(POLL_S)
            try:
                new = fresh(ask(), before)
            except Unavailable as error:
                if not away:
                    screen.say(f"{error.what} Still trying.")
                away, new = True, []
                continue
            if away:
                screen.say("The cloud answers again.")
            away = False
    except KeyboardInterrupt:
        return INTERRUPTED


def _tell(one: Told, as_json: bool) -> None:
    if as_json:
        screen.print_json(_plain(one))
        return
    clock = time.strftime("%H:%M:%S", time.localtime(one.result.time))
    line = f"{clock}  {one.device}  {_where(one.result)}  {_words(one.result)}"
    screen.out().print(line, markup=False, soft_wrap=True)


def _plain(one: Told) -> dict[str, object]:
    """The result as MQTT has it, and its device."""
    return {"device": one.device, **one.result.model_dump(mode="json", by_alias=True, exclude_none=True)}


def _table(found: Sequence[Told], now: float) -> object:
    lines = (
        (
            one.device,
            "yes" if one.online else "no",
            _where(one.result),
            _words(one.result),
            screen.ago(one.result.time, now),
            f"{one.result.model} {one.result.version}",
            screen.number(one.result.latency_ms),
        )
        for one in found
    )
    columns = ("device", "online", "source", "sees", "when", "model", "latency ms")
    return screen.table(columns, lines, right=("latency ms",))


def _where(result: ResultMessage) -> str:
    return result.source if result.pipeline == "main" else f"{result.pipeline}/{result.source}"


def _words(result: ResultMessage) -> str:
    """What a device says is shown on one line, whatever it is."""
    return "".join(c if c.isprintable() else " " for c in headline(result))
