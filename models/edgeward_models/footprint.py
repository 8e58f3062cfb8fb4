"""What loading a file and running it once takes, in a process of its own: memory, time, and whether it lives.

Invariant: the figure is a fresh process's own memory, so that what other sessions left behind in this one's
heap counts neither for nor against a file; a file that kills the process is a reason, not a crash.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgeward_runtime import golden, resources
from edgeward_runtime.sessions import NotLoaded, RunFailed, open_session
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Plan

TIMEOUT_S = 600.0
"""A TensorRT engine takes that long to build."""


@dataclass(frozen=True)
class Footprint:
    """Figures are None where it did not get so far."""

    memory_mb: float | None = None
    load_ms: float | None = None
    """Loading and the first run."""
    reason: str = ""


def measure(
    file: Path, plan: Plan, feeds: Mapping[str, npt.NDArray[Any]], *, timeout_s: float = TIMEOUT_S
) -> Footprint:
    """Load and run a file once in a fresh process.

    Raises:
        Unavailable: no process can be started.
    """
    wish = plan.to_bytes() + b"\n" + golden.write_npz(feeds)
    command = [sys.executable, "-c", "from edgeward_models.footprint import main; main()", str(file)]
    try:
        done = subprocess.run(
            command,
            input=wish,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # what lies in the working directory is not ours
        )
    except subprocess.TimeoutExpired:
        return Footprint(reason=f"It took longer than {timeout_s:g} s to load.")
    except OSError as error:
        raise Unavailable(f"No process can be started: {error.strerror}.") from error
    if done.returncode < 0:
        return Footprint(reason=f"It crashes when it is loaded or run ({_signal(-done.returncode)}).")
    try:
        return Footprint(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return Footprint(reason=f"It ends with code {done.returncode}: {last[0][:200]}")


def main() -> None:
    """The child: the plan and the inputs on stdin, the footprint as one line of JSON on stdout."""
    raw = sys.stdin.buffer.read()
    head, _, packed = raw.partition(b"\n")
    found = _measure(Path(sys.argv[1]), parse(Plan, head), golden.read_npz(packed))
    sys.stdout.write("\n" + json.dumps(vars(found)) + "\n")  # providers may have left a line unfinished


def _measure(file: Path, plan: Plan, feeds: Mapping[str, npt.NDArray[Any]]) -> Footprint:
    resources.save_memory()
    before, began = resources.private_mb(), time.perf_counter()
    try:
        session = open_session(file, plan)
        session.run(feeds)
    except (NotLoaded, RunFailed, Rejected) as error:
        return Footprint(reason=error.what)
    took, after = time.perf_counter() - began, resources.private_mb()
    memory = max(0.0, after - before) if before is not None and after is not None else None
    return Footprint(memory, took * 1e3)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
