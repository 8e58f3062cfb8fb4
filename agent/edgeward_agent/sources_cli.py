"""`edgeward-agent sources` and `snapshot`: what is configured, what the machine has, and whether it delivers.

A camera can be open once: what a running daemon holds is not tried, the daemon's word is taken. Nothing
that is printed holds a password. numpy and OpenCV are imported by the handlers only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward_agent.files import is_there
from edgeward_agent.local_cli import table
from edgeward_agent.sysinfo import this_machine
from edgeward_wire.errors import EdgewardError, Rejected

if TYPE_CHECKING:
    from edgeward_agent.config import Config
    from edgeward_agent.messages import SourceSpec
    from edgeward_runtime.sources.options import SourceOptions
    from edgeward_runtime.sources.tryout import Findings

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_ONCE = ("v4l2", "microphone", "pipe", "gstreamer")
"""Kinds that one process at a time can read."""
_MAX_SIDE = 4096


@dataclass(frozen=True)
class Row:
    """A source, and what came of trying it."""

    name: str
    uri: str
    """Without secrets."""
    findings: Findings


def add_sources(subparsers: Subparsers, places: Any) -> None:
    """`sources`; `places` adds --state and --config."""
    parser = subparsers.add_parser("sources", help="try the cameras, streams and microphones")
    places(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--seconds", type=_seconds, default=2.0, metavar="S", help="how long to read each one (2)"
    )
    parser.set_defaults(handler=sources)


def add_snapshot(subparsers: Subparsers, places: Any) -> None:
    """`snapshot`; `places` adds --state and --config."""
    parser = subparsers.add_parser("snapshot", help="save what a source sees or hears")
    parser.add_argument(
        "source", metavar="SOURCE", help="its name, PIPELINE/NAME, or an address, device or file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jpg, .png or .wav")
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    parser.add_argument(
        "--seconds", type=_seconds, default=3.0, metavar="S", help="how much sound to save (3)"
    )
    places(parser)
    parser.set_defaults(handler=snapshot)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.1 <= number <= 60:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number of seconds from 0.1 to 60")
    return number


def _prepare() -> None:
    if (fault := this_machine().runtime_fault) is not None:
        raise fault
    from edgeward_agent.runner import prepare_process

    prepare_process()


# --- sources


def sources(arguments: argparse.Namespace) -> int:
    """Exit code 0, or 1 when a configured source is down."""
    from edgeward_agent.config import load_config

    config = load_config(arguments.config)
    _prepare()
    configured = _configured(config, arguments.state, arguments.seconds)
    used = {spec.uri for pipeline in config.pipelines.values() for spec in pipeline.sources}
    machine, notes = _machine(used, arguments.seconds)
    if arguments.json:
        plain = {"configured": [*map(_plain, configured)], "machine": [*map(_plain, machine)], "notes": notes}
        print(json.dumps(plain))
    else:
        print("\n".join(report(configured, machine, notes)))
    return _leave(0 if all(row.findings.up for row in configured) else 1)


def _configured(config: Config, state: Path, seconds: float) -> list[Row]:
    from edgeward_agent.runner import options_of
    from edgeward_runtime.sources.address import shown
    from edgeward_runtime.sources.tryout import Findings, try_all

    named = [(name, spec) for name, pipeline in config.pipelines.items() for spec in pipeline.sources]
    held = _held(state)
    told: dict[tuple[str, str], Findings] = {}
    for pipeline, spec in named:
        options = options_of(spec)
        kind = _kind(options)
        if kind in _ONCE and (pipeline, spec.name) in held:
            up, detail = held[pipeline, spec.name]
            word = "the agent reads it" if up else detail or "the agent cannot read it"
            told[pipeline, spec.name] = Findings(kind, up, reason=word)
    asked = [(name, spec) for name, spec in named if (name, spec.name) not in told]
    tried = try_all([options_of(spec) for _, spec in asked], seconds)
    told.update({(name, spec.name): found for (name, spec), found in zip(asked, tried, strict=True)})
    return [Row(f"{name}/{spec.name}", shown(spec.uri), told[name, spec.name]) for name, spec in named]


def _held(state: Path) -> dict[tuple[str, str], tuple[bool, str]]:
    """(pipeline, source) -> (up, why not), of a daemon that runs now."""
    from edgeward_agent.status import daemon_lives, read_status

    if not daemon_lives(state):
        return {}
    try:
        pipelines = read_status(state).reported.pipelines
    except EdgewardError:  # it has just begun
        return {}
    return {
        (name, source): (report.up, report.detail)
        for name, pipeline in pipelines.items()
        for source, report in pipeline.sources.items()
    }


def _kind(options: SourceOptions) -> str:
    from edgeward_runtime.sources import kind_of

    try:
        return kind_of(options)
    except EdgewardError:
        return ""


def _machine(used: set[str], seconds: float) -> tuple[list[Row], list[str]]:
    """What is there besides, and what could not be looked for."""
    from edgeward_runtime.sources.microphone import microphones
    from edgeward_runtime.sources.options import SourceOptions
    from edgeward_runtime.sources.tryout import MAX_DEVICES, cameras, try_all, try_source

    # A camera may be configured by a name of its own, which is a link: /dev/v4l/by-id/...
    devices = {os.path.realpath(device) for uri in used if (device := SourceOptions("", uri).device)}
    free = [camera for camera in cameras() if camera.uri not in devices]
    found = try_all([SourceOptions("", camera.uri) for camera in free], seconds)
    rows = [Row(camera.name, camera.uri, findings) for camera, findings in zip(free, found, strict=True)]
    try:
        heard = microphones()[:MAX_DEVICES]
    except EdgewardError as error:
        return rows, [f"{error.what} {error.next_step}"]
    for one in heard:
        # One after the other: several names often mean the same sound card.
        uri = f"mic:{one.number}"
        rows.append(Row(one.name, uri, try_source(SourceOptions("", uri), min(seconds, 1.0))))
    return rows, []


def _plain(row: Row) -> dict[str, Any]:
    findings = {key: value for key, value in asdict(row.findings).items() if value not in (None, "")}
    if "fps" in findings:
        findings["fps"] = round(findings["fps"], 2)
    return {"name": row.name, "uri": row.uri, **findings}


def report(configured: Sequence[Row], machine: Sequence[Row], notes: Sequence[str]) -> list[str]:
    """What a person reads."""
    lines = ["No source is configured."] if not configured else _lines(configured)
    if machine:
        lines += ["", "Also on this machine:", *_lines(machine)]
    return [*lines, *(["", *notes] if notes else [])]


def _lines(rows: Sequence[Row]) -> list[str]:
    cells: list[tuple[str, ...]] = [("source", "address", "kind", "state", "gives", "per second")]
    for row in rows:
        found = row.findings
        gives = f"{found.width} x {found.height}" if found.width else f"{found.rate} Hz" if found.rate else ""
        pace = f"{found.fps:.1f}" if found.fps is not None else ""
        state = "up" if found.up else "down"
        cells.append((row.name, row.uri[:60], found.kind, state, gives, pace))
    lines = table(cells, right=frozenset({5}))
    for row in rows:
        for word, said in (("", row.findings.reason), ("next: ", row.findings.next_step)):
            if said:
                lines.append(f"{row.name}: {word}{said}")
        if row.findings.lost_s:
            lines.append(f"{row.name}: {row.findings.lost_s:.3g} s of sound were lost.")
    return lines


# --- snapshot


def snapshot(arguments: argparse.Namespace) -> int:
    """Exit code 0. Raises Rejected, Unavailable."""
    from edgeward_agent.config import load_config

    out: Path = arguments.out
    if is_there(out) and not arguments.force:
        raise Rejected(f"{out} is there already.", "Name another file, or add --force.")
    pipeline, spec = chosen(load_config(arguments.config), arguments.source)
    _prepare()
    from edgeward_agent.runner import options_of
    from edgeward_runtime.sources.tryout import PATIENCE_S, bounded, encoded, look

    options = options_of(spec)
    up, _ = _held(arguments.state).get((pipeline, spec.name), (False, ""))
    if up and _kind(options) in _ONCE:
        raw = _from_the_agent(arguments.state, pipeline, spec.name, out.suffix.lower())
    else:
        seen = bounded(lambda: look(options, arguments.seconds), PATIENCE_S + arguments.seconds)
        raw = encoded(seen, out.suffix.lower())
    save(out, raw, force=arguments.force)
    print(out)
    return _leave(0)


def _from_the_agent(state: Path, pipeline: str, source: str, suffix: str) -> bytes:
    """The frame that the agent took last of a source that it holds, as JPEG. Raises Rejected, Unavailable."""
    from edgeward_agent import local_socket

    _, raw = local_socket.frame(state / local_socket.RUN, pipeline, source, _MAX_SIDE)
    if not raw:
        raise Rejected(
            f"The agent hears {source} now, and gives no sound away.",
            "Stop the agent first, or record elsewhere.",
        )
    if suffix not in (".jpg", ".jpeg"):
        raise Rejected(
            f"The agent reads {source} now, and gives its pictures as JPEG only.",
            "Name a file that ends in .jpg, or stop the agent first.",
        )
    return raw


def chosen(config: Config, wanted: str) -> tuple[str, SourceSpec]:
    """(pipeline, source) of that name; else ("", whatever is at that address). Raises Rejected."""
    found = [
        (name, spec)
        for name, pipeline in config.pipelines.items()
        for spec in pipeline.sources
        if wanted in (spec.name, f"{name}/{spec.name}")
    ]
    if len(found) > 1:
        names = " or ".join(f"{name}/{spec.name}" for name, spec in found)
        raise Rejected(f"Several sources are called {wanted}.", f"Name one wholly: {names}.")
    return found[0] if found else ("", _unnamed(wanted))


def _unnamed(uri: str) -> SourceSpec:
    """Whatever is at this address. Raises Rejected."""
    from pydantic import ValidationError

    from edgeward_agent.messages import SourceSpec
    from edgeward_wire.document import faults

    try:
        return SourceSpec(name="snapshot", uri=uri)
    except ValidationError as error:
        raise Rejected(
            f"What is named is neither a source nor an address: {faults(error)}.",
            "See `edgeward-agent sources`.",
        ) from None


def save(path: Path, raw: bytes, *, force: bool) -> None:
    """Whole or not at all; never over a file that is there unless forced to. Raises Rejected."""
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
        os.chmod(temporary, 0o600)
        if force:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
            os.unlink(temporary)
        temporary = None
    except FileExistsError:
        raise Rejected(f"{path} is there already.", "Name another file, or add --force.") from None
    except OSError as error:
        raise Rejected(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)


def _leave(code: int) -> int:
    """End the process here when a driver still holds one of our threads: it would be torn down inside it."""
    if any(thread.name == "try-source" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
