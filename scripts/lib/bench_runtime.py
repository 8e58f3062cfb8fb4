"""What the runtime costs as a process: `runner`, `startup`, `soak`. Of a frame: `bench_runtime_frames`.

Where two sides are compared they run in turn, in an order that alternates, and the figure is the median of
the rounds' ratios. The other sides are in `bench_runtime_sides`. Everything is measured on one idle machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import bench_runtime_sides as sides
import numpy as np
from bench_runtime_frames import overhead, preprocess
from bench_runtime_sides import PICTURES, ZOO, in_turn, ratio_of, skipped, spread
from camera import make_video
from rows import Row, at_least, at_most, told

from edgeward_agent import messages
from edgeward_runtime import resources
from edgeward_wire.errors import EdgewardError

WORK = ZOO.parents[1] / ".bench"
ROUNDS = 6
SETTLED = 0.2
"""Of a soak, what is warming up."""
LEAST_MINUTES = 20.0
"""After the warm-up: a shorter soak says nothing of an hour."""
BLOCKS = 20
_HOUR_S = 3600.0


# --- runner


def runner(minutes: float) -> Iterator[Row]:
    """Frames a second of the runner to those of a hand-written loop with the same session options."""
    models = [sides.model_of("lite0", ZOO / "efficientnet-lite0.onnx"), *_yolo(minutes)]
    counts = sorted({1, resources.cores()})
    # Of each side and round two windows, of which one counts.
    seconds = max(1.0, minutes * 60 / (len(models) * len(counts) * ROUNDS * 4))
    with tempfile.TemporaryDirectory() as directory:
        video = Path(directory) / "camera.avi"
        make_video(video, PICTURES)
        for model in models:
            for threads in counts:
                yield from _against_the_loop(model, threads, video, seconds)


def _against_the_loop(model: sides.Model, threads: int, video: Path, seconds: float) -> Iterator[Row]:
    home = video.parent
    serve = sides.order(model, home, threads)
    pairs = in_turn(
        ROUNDS,
        partial(sides.runner_rate, serve, video, seconds, home / "run"),
        partial(sides.loop_rate, model, video, threads, seconds),
    )
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    label = f"{model.title}_x{threads}"
    yield told("runner", f"{label}_hand_written", other, "fps", f"{threads} threads, 480p")
    yield told("runner", f"{label}_runner", mine, "fps")
    yield at_least("runner", f"{label}_ratio", ratio_of(pairs), "x", goal=0.97, note=spread(pairs))


def _yolo(minutes: float) -> list[sides.Model]:
    """YOLOv8-s INT8 as `quantise` left it, or made now; nothing, with the reason, when it cannot be."""
    for side in ("as_it_is", "vnni", "no_vnni", "zoo"):
        found = sides.chosen_file(WORK / f"yolov8s-{side}")
        if found is not None:
            return [sides.model_of("yolov8s", found)]
    try:
        from edgeward_models import zoo

        zoo.quantised("yolov8s", WORK / "yolov8s-zoo", budget_s=max(60.0, minutes * 60))
    except (EdgewardError, ImportError) as error:
        skipped("YOLOv8-s", str(error))
        return []
    found = sides.chosen_file(WORK / "yolov8s-zoo")
    if found is None:
        skipped("YOLOv8-s", "INT8 does not pay on this machine, says its quantisation")
        return []
    return [sides.model_of("yolov8s", found)]


# --- startup


def startup(minutes: float) -> Iterator[Row]:
    """From the start of the runner's process to its first result, with a verdict that is there already."""
    count = max(4, min(20, round(minutes * 4)))
    model, threads = sides.model_of("lite0", ZOO / "efficientnet-lite0.onnx"), resources.cores()
    with tempfile.TemporaryDirectory() as directory, _as_installed(Path(directory)):
        home = Path(directory)
        video = home / "camera.avi"
        make_video(video, PICTURES[:1], seconds_each=1)
        serve = sides.order(model, home, threads)

        def ours() -> float:
            began = time.monotonic()
            started = sides.Runner(serve, video, 30, home / "run")
            try:
                started.until(messages.ResultSeen)
                return time.monotonic() - began
            finally:
                started.close()

        def loop() -> float:
            began = time.monotonic()
            with sides.hand_written(model, video, threads):
                return time.monotonic() - began

        cold = ours()  # compiles Python files, fills the page cache
        loop()
        pairs = in_turn(count, ours, loop)
    took = [mine for mine, _ in pairs]
    baseline = round(statistics.median(other for _, other in pairs), 3)
    note = f"{count} starts; the first of all took {cold:.2f} s"
    yield told("startup", "hand_written_median", baseline, "s", "to its first answer")
    yield at_most("startup", "median", statistics.median(took), "s", goal=1.5, baseline=baseline)
    yield at_most("startup", "worst", max(took), "s", goal=1.5, note=note)


@contextmanager
def _as_installed(home: Path) -> Iterator[None]:
    """Processes that are started find compiled Python files, as they do on a device."""
    before = dict(os.environ)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(home / "compiled")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- soak


@dataclass(frozen=True)
class Sample:
    """What the kernel says of a process."""

    at_s: float
    rss_mb: float
    threads: int
    descriptors: int


def soak(minutes: float) -> Iterator[Row]:
    """The runner at full speed: whether its memory, threads and descriptors grow (an hour: --minutes 60)."""
    model = sides.model_of("lite0", ZOO / "efficientnet-lite0.onnx")
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        video = home / "camera.avi"
        make_video(video, PICTURES)
        running = sides.Runner(sides.order(model, home, resources.cores()), video, 5, home / "run")
        try:
            running.until(messages.WindowClosed)
            samples = _watched(running, minutes * 60)
            (measures,) = running.until(messages.WindowClosed).measures
        finally:
            running.close()
    yield from _grown(samples)
    yield told("soak", "rate", measures.fps, "fps", f"{measures.errors} errors in the last window")


def _grown(samples: Sequence[Sample]) -> Iterator[Row]:
    """Of what came after the warm-up."""
    began = samples[0].at_s + SETTLED * (samples[-1].at_s - samples[0].at_s)
    settled = [one for one in samples if one.at_s >= began]
    hours = (settled[-1].at_s - settled[0].at_s) / _HOUR_S
    yield _slope(settled, hours)
    fifth = max(1, len(settled) // 5)
    first, last = (
        statistics.median(one.rss_mb for one in part) for part in (settled[:fifth], settled[-fifth:])
    )
    note = f"from {first:.2f} to {last:.2f} MB in {hours * 60:.1f} minutes"
    yield at_most("soak", "rss_growth", last - first, "MB", goal=1, note=note)
    for what in ("threads", "descriptors"):
        counts = [int(getattr(one, what)) for one in settled]
        note = f"{counts[0]} at first, {min(counts)} to {max(counts)}, {counts[-1]} at last"
        yield at_most("soak", f"{what}_growth", max(counts) - counts[0], "more", goal=0, note=note)


def _slope(settled: Sequence[Sample], hours: float) -> Row:
    """Megabytes an hour; a short soak, in which a tenth of a megabyte still settles, decides nothing."""
    slope, error = slope_of([(one.at_s / _HOUR_S, one.rss_mb) for one in settled])
    low, high = slope - 2 * error, slope + 2 * error
    seen = "shown" if high <= 1 else "not excluded" if low <= 1 else "exceeded"
    if hours * 60 < LEAST_MINUTES:
        seen = "not decided by so little"
    holds = {"shown": True, "exceeded": False}.get(seen)
    note = f"{low:.2f} to {high:.2f} at 95 %, from {hours * 60:.1f} minutes: the goal is {seen}"
    return Row("soak", "rss_slope", round(slope, 3), "MB/h", goal="<= 1", holds=holds, note=note)


def _watched(running: sides.Runner, seconds: float) -> list[Sample]:
    """A sample a second, more often in a short run."""
    began, samples = time.monotonic(), list[Sample]()
    apart = min(1.0, seconds / 100)
    while (now := time.monotonic() - began) < seconds or len(samples) < BLOCKS * 2:
        samples.append(_sample(running.pid, now))
        running.heard(apart)
    return samples


def _sample(pid: int, now: float) -> Sample:
    status: Mapping[str, str] = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    rss_mb = int(status["VmRSS"].split()[0]) * 1024 / 1e6
    return Sample(now, rss_mb, int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd")))


def slope_of(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares over the means of `BLOCKS` stretches: the slope, and its standard error.

    Neighbouring samples of a process's memory are nearly the same number, so that an error from all of them
    would be far too small.
    """
    blocks = [np.mean(block, axis=0) for block in np.array_split(np.array(points), BLOCKS)]
    x, y = np.array(blocks).T
    away = x - x.mean()
    slope = float(away @ (y - y.mean()) / (away @ away))
    rest = y - y.mean() - slope * away
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (away @ away)))


BENCHES: Mapping[str, Callable[[float], Iterator[Row]]] = {
    "runner": runner,
    "overhead": overhead,
    "preprocess": preprocess,
    "startup": startup,
    "soak": soak,
}


def main() -> int:
    """`python bench_runtime.py NAME [MINUTES]`: the rows as they are, without `scripts/bench`."""
    for row in BENCHES[sys.argv[1]](float(sys.argv[2]) if sys.argv[2:] else 1.0):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
