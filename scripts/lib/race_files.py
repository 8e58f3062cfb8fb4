"""One process of the quantise bench: times files in turn, and holds each against its own exact outputs.

Reads a job from stdin and prints what came of it, both JSON:

    {"feeds": "feeds.npz", "seconds": 8,
     "contenders": [{"name": "fp32", "file": "m.onnx", "provider": "CPU"}]}

`feeds` holds `<k>.<input>`. It is a process of its own because whose ONNX Runtime it loads is what is varied.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgeward_models.machine import facts
from edgeward_models.race import Contender, race
from edgeward_runtime import parity
from edgeward_runtime.sessions import NotLoaded, RunFailed, open_exact, open_session
from edgeward_wire.verdict import Plan

Feeds = dict[str, np.ndarray[Any, Any]]
OPTIONS = {"OpenVINO": {"device_type": "CPU", "num_of_threads": "1"}, "CPU": {}}
GATE = 0.99
VECTORS = 4


def read_feeds(path: Path) -> list[Feeds]:
    found: dict[int, Feeds] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            k, _, name = key.partition(".")
            found.setdefault(int(k), {})[name] = arrays[key]
    return [found[k] for k in sorted(found)]


def own_cosine(contender: Contender, feeds: list[Feeds]) -> float | None:
    """The worst cosine with the file's own exact outputs; None when it does not load or run."""
    try:
        exact, mine = open_exact(contender.file), open_session(contender.file, contender.plan)
        pairs = [(mine.run(f), exact.run(f)) for f in feeds[:VECTORS]]
    except (NotLoaded, RunFailed):
        return None
    return min(parity.cosine(a, b) for ours, golden in pairs for a, b in zip(ours, golden, strict=True))


def main() -> None:
    job = json.load(sys.stdin)
    feeds = read_feeds(Path(job["feeds"]))
    contenders = [
        Contender(
            one["name"],
            Path(one["file"]),
            Plan(
                provider=f"{one['provider']}ExecutionProvider",
                variant="int8",
                threads=1,
                options=OPTIONS[one["provider"]],
            ),
        )
        for one in job["contenders"]
    ]
    timings = race(contenders, feeds, goal_s=job["seconds"], least=12)
    rows = []
    for contender, timing in zip(contenders, timings, strict=True):
        cosine = own_cosine(contender, feeds)
        passed = timing.ratio is not None and cosine is not None and cosine >= GATE
        rows.append({**asdict(timing), "cosine": cosine, "passed": passed})
    json.dump({"rows": rows, "machine": facts().plain()}, sys.stdout)


if __name__ == "__main__":
    main()
