"""`edgeward-agent results`: what the device's pipelines see, read from their local sockets.

With `--follow --json` it is the JSON-lines sink: one result a line, every one, for as long as it runs; a
runner that restarts is waited for. Loads no numpy, no OpenCV and no ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeward_agent import local_socket
from edgeward_wire.errors import Rejected, Unavailable

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PATIENCE_S = 5.0
"""For the first result of each source, without --follow."""
AGAIN_S = 0.5


def add_results(subparsers: Subparsers, places: Callable[[argparse.ArgumentParser], None]) -> None:
    """`results`; `places` adds --state. Its handler takes the arguments and returns the exit code."""
    parser = subparsers.add_parser("results", help="what the pipelines see now, or as it comes")
    parser.add_argument("--pipeline", default="main", metavar="NAME", help="default: main")
    parser.add_argument("--source", default="", metavar="NAME", help="default: all of the pipeline")
    parser.add_argument("--follow", "-f", action="store_true", help="every result, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, as MQTT has them")
    places(parser)
    parser.set_defaults(handler=_results)


def _results(arguments: argparse.Namespace) -> int:
    run = arguments.state / local_socket.RUN
    known = local_socket.about(run, arguments.pipeline)
    sources = set(known["sources"])
    if arguments.source and arguments.source not in sources:
        raise Rejected(
            f"Pipeline {arguments.pipeline} has no source {arguments.source!r}.",
            f"It has {', '.join(sorted(sources)) or 'none'}.",
        )
    if arguments.follow:
        for line in _every(run, arguments.pipeline, arguments.source):
            _show(line, as_json=arguments.json)
        return 0
    asked = {arguments.source} if arguments.source else sources
    awaited = {source for source in asked if known["sources"][source]["up"]}
    missing = _now(run, arguments, awaited) if awaited else set()
    for source in sorted(asked - awaited):
        print(f"{source} is down: {known['sources'][source]['detail']}", file=sys.stderr)
    for source in sorted(missing):
        print(f"No result of {source} came within {PATIENCE_S:g} s.", file=sys.stderr)
    return 1 if missing == awaited else 0


def _now(run: Path, arguments: argparse.Namespace, awaited: set[str]) -> set[str]:
    """Show one result of each source; returns the sources that had none in time."""
    missing = set(awaited)
    deadline = time.monotonic() + PATIENCE_S
    for line in local_socket.results(run, arguments.pipeline, arguments.source):
        source = json.loads(line).get("source") if line else None
        if source in missing:
            missing.remove(source)
            _show(line, as_json=arguments.json)
        if not missing or time.monotonic() > deadline:
            break
    return missing


def _every(run: Path, pipeline: str, source: str) -> Iterator[bytes]:
    """Every result, over the lives of several runners. Never ends by itself."""
    away = False
    while True:
        try:
            for line in local_socket.results(run, pipeline, source):
                if away:
                    away = False
                    print("The runner is back.", file=sys.stderr)
                if line:
                    yield line
        except Unavailable:
            pass  # nothing serves it at the moment
        if not away:
            away = True
            print(f"The runner of {pipeline} has ended; waiting for the next.", file=sys.stderr)
        time.sleep(AGAIN_S)


def _show(line: bytes, *, as_json: bool) -> None:
    if as_json:
        print(line.decode(), flush=True)
        return
    from pydantic import ValidationError

    from edgeward_wire.result import ResultMessage, headline

    said = json.loads(line)
    if lost := said.get("lost"):
        print(f"{lost} results were lost: this reader is too slow.", file=sys.stderr)
        return
    try:
        result = ResultMessage.model_validate(said)
    except ValidationError as error:
        raise Rejected("The runner's result is not understood.", "Restart the agent.") from error
    clock = time.strftime("%H:%M:%S", time.localtime(result.time)) + f"{result.time % 1:.2f}"[1:]
    print(f"{clock}  {result.source}  {result.latency_ms:7.1f} ms  {headline(result)}", flush=True)
