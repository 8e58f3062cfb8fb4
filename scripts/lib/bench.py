"""The benches: each a function that yields rows. Ratios are of two sides measured in turn in one run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from bench_plans import bench_plans
from bench_quantise import quantise
from bench_runtime import BENCHES as OF_THE_RUNTIME
from bench_serve import serve
from camera import make_video
from rows import Row, at_most
from stack import Stack

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "models/zoo"
MODEL = ZOO / "efficientnet-lite0.onnx"
SETTLE_S = 5.0
PICTURES = ("camera.jpg", "coffee.jpg", "chelsea.jpg", "rocket.jpg")


def pss_mb(pid: int) -> float:
    """Proportional set size of one process, in MB (10^6 bytes), as the kernel counts it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no Pss")


def children(pid: int) -> dict[int, str]:
    """Children of a process, by pid, with their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found[int(child)] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    return found


HAND_WRITTEN = """
import os, sys, time, cv2, numpy as np
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime as ort
model, video, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
cv2.setNumThreads(1)
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
while True:
    capture = cv2.VideoCapture(video)
    while True:
        ok, frame = capture.read()
        if not ok:
            break
        h, w = frame.shape[:2]
        r = 256 / min(h, w)
        small = cv2.resize(frame, (round(w * r), round(h * r)), interpolation=cv2.INTER_CUBIC)
        h, w = small.shape[:2]
        y, x = (h - 224) // 2, (w - 224) // 2
        rgb = cv2.cvtColor(small[y : y + 224, x : x + 224], cv2.COLOR_BGR2RGB)
        tensor = ((rgb.astype(np.float32) - 127) / 128).transpose(2, 0, 1)[None]
        session.run(None, {"image": np.ascontiguousarray(tensor)})[0].argmax()
        time.sleep(0.1)
"""


def fleet_of_one(stack: Stack, video: Path) -> int:
    """A cloud, and one device that serves Lite0 on that video. Returns the daemon's pid."""
    stack.init_cloud()
    stack.start_cloud()
    stack.ctl_json("fleets", "create", "bench")
    token = stack.ctl_json("enroll-token", "--fleet", "bench")["enrolment"]
    camera = f'uri = "{video}"\nslot = "latest"\nrealtime = true\nloop = true'
    stack.add_device("bench-1", token, {"cam": camera})
    agent = stack.start_agent("bench-1")
    stack.wait_for(lambda: stack.online() == 1, "the device", agent)
    done = stack.ctl("deploy", str(MODEL), "--fleet", "bench", "--probation", "5")
    if done.returncode:
        raise RuntimeError(done.stderr)
    return agent.pid


def footprint(minutes: float) -> Iterator[Row]:
    """Memory of daemon and runner after `minutes` of serving Lite0, and of a bare hand-written loop.

    As on a device: the cloud is stopped before the reading, since pages that it shares with the daemon would
    be counted as half. The loop runs alone, for a minute: it does not grow.
    """
    for name, size, goal in (("480p", (640, 480), 120), ("1080p", (1920, 1080), 150)):
        with tempfile.TemporaryDirectory() as home:
            video = Path(home) / "camera.avi"
            make_video(video, [ZOO / "pictures" / p for p in PICTURES], width=size[0], height=size[1])
            with Stack(Path(home) / "stack", window_s=30) as stack:
                daemon = fleet_of_one(stack, video)
                time.sleep(minutes * 60)
                stack.stop("cloud")
                time.sleep(SETTLE_S)
                runner = next(pid for pid, line in children(daemon).items() if "runner" in line)
                daemon_mb, runner_mb = pss_mb(daemon), pss_mb(runner)
            yield at_most("footprint", f"daemon_{name}", daemon_mb, "MB PSS", goal=50)
            bare = round(bare_loop_mb(video), 2)
            yield at_most("footprint", f"runner_{name}", runner_mb, "MB PSS", goal=goal, baseline=bare)


def bare_loop_mb(video: Path) -> float:
    """The hand-written loop's memory after a minute."""
    loop = subprocess.Popen([sys.executable, "-c", HAND_WRITTEN, str(MODEL), str(video), "1"])
    try:
        time.sleep(60)
        return pss_mb(loop.pid)
    finally:
        loop.kill()
        loop.wait()


def deploy(minutes: float) -> Iterator[Row]:
    """From key press to serving on three local devices, three times, each time without cached verdicts."""
    del minutes
    took: list[float] = []
    serving: list[float] = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as home, Stack(Path(home) / "stack") as stack:
            video = Path(home) / "camera.avi"
            make_video(video, [ZOO / "pictures" / p for p in PICTURES])
            stack.init_cloud()
            stack.start_cloud()
            stack.ctl_json("fleets", "create", "bench")
            token = stack.ctl_json("enroll-token", "--fleet", "bench", "--uses", "3")["enrolment"]
            for k in range(3):
                camera = f'uri = "{video}"\nslot = "latest"\nrealtime = true\nloop = true'
                stack.add_device(f"bench-{k}", token, {"cam": camera})
                stack.start_agent(f"bench-{k}")
            stack.wait_for(lambda s=stack: s.online() == 3, "devices")
            began = time.monotonic()
            result = stack.ctl_json("deploy", str(MODEL), "--fleet", "bench", "--probation", "0")
            took.append(time.monotonic() - began)
            serving.append(max(row["serving_after_s"] for row in result["devices"]))
    yield at_most("deploy", "key_press_to_serving_median", statistics.median(serving), "s", goal=30)
    yield at_most("deploy", "key_press_to_serving_worst", max(serving), "s", goal=30)
    yield Row("deploy", "whole_command_median", round(statistics.median(took), 2), "s")


BENCHES: dict[str, Callable[[float], Iterator[Row]]] = {
    "footprint": footprint,
    "deploy": deploy,
    "quantise": quantise,
    "plans": bench_plans,
    "serve": serve,
    **OF_THE_RUNTIME,
}


def machine() -> str:
    """What it was measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    flags = Path("/proc/cpuinfo").read_text()
    isa = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp") if name in flags]
    cores = len(
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")]
    )
    return f"{cpu}, {cores} cores, {' '.join(isa)}, Python {platform.python_version()}"


def table(row: Row) -> str:
    mark = {True: "holds", False: "MISSED", None: ""}[row.holds]
    against = f"({row.ratio:g} x {row.baseline:g})" if row.ratio is not None else row.note
    return f"{row.metric:40} {row.value:>9g} {row.unit:8} {row.goal:10} {mark:7} {against}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(BENCHES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.0,
        help="footprint: how long to serve before measuring; quantise: the budget of each search",
    )
    arguments = parser.parse_args()
    if arguments.name is None:
        for name, bench in sorted(BENCHES.items()):
            print(f"{name:12} {(bench.__doc__ or '').splitlines()[0]}")
        return 0
    print(f"# {machine()}", file=sys.stderr)
    missed = False
    for row in BENCHES[arguments.name](arguments.minutes):
        print(json.dumps(asdict(row)) if arguments.json else table(row), flush=True)
        missed = missed or row.holds is False
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
