"""The commands that only look: status, watch, devices, fleets, models, log, telemetry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from edgeward_ctl import screen, views
from edgeward_ctl.client import Client
from edgeward_ctl.deploying import unknown_fleet
from edgeward_ctl.profile import Profile
from edgeward_wire.api import Device
from edgeward_wire.errors import Unavailable

RECENT_S = 90.0
"""What counts as now: three windows of the usual 30 s."""
REFRESH_S = 1.0
_LOG_DEPTH = 10
"""Events of a device's log for each row that is shown: an update passes through some eight states."""


def status(profile: Profile, fleet: str | None, as_json: bool) -> None:
    """What runs where, now."""
    with Client(profile) as client:
        rows = _overview(client, fleet)
    if as_json:
        screen.print_json([asdict(row) for row in rows])
        return
    _print_overview(rows, fleet)


def watch(profile: Profile, fleet: str | None, as_json: bool) -> None:
    """The same, again and again, until Ctrl-C. A cloud that is away is waited for."""
    with Client(profile) as client:
        frames = _frames(lambda: _overview(client, fleet))
        try:
            if as_json:
                for rows, error in frames:
                    screen.print_json(
                        {"error": error}
                        if error
                        else {"time": time.time(), "rows": [asdict(r) for r in rows]}
                    )
            elif screen.out().is_terminal:
                _live(frames)
            else:
                for rows, error in frames:
                    screen.out().print(error or _table(rows))
        except KeyboardInterrupt:
            return


def _live(frames: Iterator[tuple[Sequence[views.Row], str]]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=screen.out(), auto_refresh=False, screen=False) as live:
        for rows, error in frames:
            foot = Text(error, "red") if error else Text(f"{screen.clock(time.time())}   Ctrl-C ends", "dim")
            live.update(Group(_table(rows), Text(), foot), refresh=True)


def _frames(ask: Callable[[], Sequence[views.Row]]) -> Iterator[tuple[Sequence[views.Row], str]]:
    """(newest rows, why there are no newer ones), once in `REFRESH_S`; the first failure is raised."""
    rows = ask()
    yield rows, ""
    while True:
        time.sleep(REFRESH_S)
        error = ""
        try:
            rows = ask()
        except Unavailable as away:
            error = away.what
        yield rows, error


def _overview(client: Client, fleet: str | None) -> list[views.Row]:
    _known(client, fleet)
    found = client.devices(fleet)
    return views.overview(found, client.telemetry(fleet=fleet, since=time.time() - RECENT_S).rows)


def _known(client: Client, fleet: str | None) -> None:
    if fleet is not None:
        names = {known.name for known in client.fleets()}
        if fleet not in names:
            raise unknown_fleet(fleet, names)


def _table(rows: Sequence[views.Row]) -> Table:
    return screen.overview_table(rows, screen.out().width)


def _print_overview(rows: Sequence[views.Row], fleet: str | None) -> None:
    if rows:
        screen.out().print(_table(rows))
        return
    whom = f" --fleet {fleet}" if fleet else " --fleet NAME"
    screen.say(f"No devices yet. Next: agent-ctl enroll-token{whom}")


def devices(profile: Profile, fleet: str | None, as_json: bool) -> None:
    """Who is enrolled, and on what hardware."""
    with Client(profile) as client:
        _known(client, fleet)
        found = client.devices(fleet)
    if as_json:
        screen.print_json([_plain(device) for device in found])
    elif not found:
        _print_overview([], fleet)
    else:
        now = time.time()
        columns = ("device", "fleet", "admission", "online", "seen", "agent", "hardware", "onnxruntime")
        lines = (
            (
                device.id,
                device.fleet,
                device.admission,
                "yes" if device.online else "no",
                screen.ago(device.last_seen, now),
                *_hardware(device),
            )
            for device in sorted(found, key=lambda d: (d.fleet, d.id))
        )
        screen.out().print(screen.table(columns, lines))


def _hardware(device: Device) -> tuple[str, str, str]:
    birth = device.birth
    if birth is None:
        return "", "", ""
    what = f"{birth.board or birth.arch}, {birth.cores} cores, {birth.memory_mb / 1024:.1f} GB"
    vitals = device.reported.vitals if device.reported and device.online else None
    what += f"; {vitals.title}" if vitals is not None and vitals.title else ""
    return birth.agent, what, birth.runtime.get("onnxruntime", "")


def fleets(profile: Profile, as_json: bool) -> None:
    """All fleets."""
    with Client(profile) as client:
        found = client.fleets()
    if as_json:
        screen.print_json([_plain(fleet) for fleet in found])
    elif not found:
        screen.say("No fleets yet. Next: agent-ctl fleets create NAME")
    else:
        lines = (
            (
                fleet.name,
                str(fleet.devices),
                str(fleet.online),
                ", ".join(f"{p}: {ref.name} {ref.version}" for p, ref in sorted(fleet.assigned.items())),
            )
            for fleet in sorted(found, key=lambda f: f.name)
        )
        columns = ("fleet", "devices", "online", "assigned")
        screen.out().print(screen.table(columns, lines, right=("devices", "online")))


def models(profile: Profile, as_json: bool) -> None:
    """All releases."""
    with Client(profile) as client:
        found = client.models()
    if as_json:
        screen.print_json([_plain(model) for model in found])
    elif not found:
        screen.say("No models yet. Next: agent-ctl deploy MODEL.onnx --fleet NAME")
    else:
        lines = (
            (
                model.name,
                model.version,
                model.created,
                ", ".join(sorted({str(p) for p in model.variants.values()})),
                (model.content or "")[:12],
            )
            for model in found
        )
        screen.out().print(screen.table(("model", "version", "created", "variants", "content"), lines))


def log(profile: Profile, device: str, *, limit: int, verbose: bool, as_json: bool) -> None:
    """Each deployment of a device with its reason and numbers; with `verbose` the plans that were tried."""
    with Client(profile) as client:
        # JSON has the events as they are; people read them in deployments.
        entries = client.log(device, limit if as_json else min(1000, limit * _LOG_DEPTH))
    if as_json:
        screen.print_json([_plain(entry) for entry in entries])
        return
    found = views.chapters(entries)[:limit]
    if not found:
        screen.say(f"{device} has no log yet.")
        return
    console = screen.out()
    if not verbose:
        console.print(screen.chapters_table(found))
        return
    for chapter in found:
        console.print(screen.chapters_table([chapter]))
        for name, value in sorted((chapter.numbers or {}).items()):
            console.print(f"    {name} = {value:g}", markup=False)
        if chapter.verdict is not None:
            console.print(_verdict_line(chapter), markup=False)
            console.print(screen.verdict_table(chapter.verdict))
        console.print()


def _verdict_line(chapter: views.Chapter) -> str:
    verdict = chapter.verdict
    if verdict is None:
        return ""
    hedged = ", provisional: measured while throttled or crowded" if verdict.provisional else ""
    return f"    {len(verdict.plans)} plans in {verdict.took_s:.1f} s, evidence: {verdict.evidence}{hedged}"


def telemetry(profile: Profile, fleet: str | None, device: str | None, since: float, as_json: bool) -> None:
    """Latencies since a moment, true percentiles."""
    with Client(profile) as client:
        found = client.telemetry(fleet=fleet, device=device, since=since)
    rows = found.rows
    if found.complete_since > since:
        # Also with --json: its list has no place for it, and stderr leaves it as it is.
        moment = screen.short_clock(found.complete_since, time.time())
        screen.say(
            f"Complete only since {moment}: the cloud does not merge more windows at once."
            " Ask for less time, or for one device."
        )
    if as_json:
        screen.print_json([_plain(row) for row in rows])
    elif not rows:
        screen.say("No telemetry in that time.")
    else:
        lines = []
        for row in rows:
            figures = row.stages.get("end_to_end")
            inference = row.stages.get("inference")
            lines.append(
                (
                    row.device or "all",
                    row.source or "all",
                    f"{row.model.name} {row.model.version}",
                    views.short_provider(row.provider),
                    row.variant,
                    str(row.frames),
                    str(row.dropped),
                    str(row.errors),
                    screen.number(row.fps),
                    *((screen.number(figures.p50), screen.number(figures.p99)) if figures else ("", "")),
                    screen.number(inference.p50) if inference else "",
                )
            )
        numbers = ("frames", "dropped", "errors", "fps", "p50 ms", "p99 ms", "inference p50")
        columns = ("device", "source", "model", "provider", "variant", *numbers)
        screen.out().print(screen.table(columns, lines, right=numbers))


def _plain(document: BaseModel) -> dict[str, Any]:
    return document.model_dump(mode="json", by_alias=True)
