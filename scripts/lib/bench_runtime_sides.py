"""The two sides that `bench_runtime` holds against each other: our processes, and what others would write.

A side is a process of its own, started anew for each round, so that no lucky layout of memory decides.
`python bench_runtime_sides.py overhead MODEL PICTURE RUNS` is our side of `overhead`: the runtime itself,
fed on one thread and taken on another; it prints one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import queue
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgeward_agent import messages
from edgeward_agent.workers import Child, Exit
from edgeward_runtime.contract_guess import Guess, guess
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant
from edgeward_wire.telemetry import Stage
from edgeward_wire.verdict import Plan

ZOO = Path(__file__).resolve().parents[2] / "models/zoo"
PICTURES = tuple(
    ZOO / "pictures" / name for name in ("camera.jpg", "coffee.jpg", "chelsea.jpg", "rocket.jpg")
)
PROVIDER = "CPUExecutionProvider"
WAIT_S = 120.0
M = TypeVar("M")
Pair = tuple[float, float]
"""Of one round: (ours, theirs)."""

# What somebody writes who wants frames through a model: capture, prepare, run, read, again. argv: model,
# kind, video, threads. A line "first" after the first answer, then on each line of input the frames so far
# and the time, so that whoever asks decides how long a window is.
LOOP = """
import os, select, sys, time
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import cv2, numpy as np, onnxruntime as ort
model, kind, video, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name

def classify(frame):
    h, w = frame.shape[:2]
    r = 256 / min(h, w)
    small = cv2.resize(frame, (round(w * r), round(h * r)), interpolation=cv2.INTER_CUBIC)
    h, w = small.shape[:2]
    y, x = (h - 224) // 2, (w - 224) // 2
    rgb = cv2.cvtColor(small[y : y + 224, x : x + 224], cv2.COLOR_BGR2RGB)
    tensor = ((rgb.astype(np.float32) - 127) / 128).transpose(2, 0, 1)[None]
    scores = session.run(None, {name: np.ascontiguousarray(tensor)})[0][0]
    return scores.argsort()[-5:]

def detect(frame):
    h, w = frame.shape[:2]
    r = 640 / max(h, w)
    small = cv2.resize(frame, (round(w * r), round(h * r)), interpolation=cv2.INTER_LINEAR)
    h, w = small.shape[:2]
    top, left = (640 - h) // 2, (640 - w) // 2
    border = (top, 640 - h - top, left, 640 - w - left)
    padded = cv2.copyMakeBorder(small, *border, cv2.BORDER_CONSTANT, value=(114, 114, 114))
    blob = cv2.dnn.blobFromImage(padded, 1 / 255, swapRB=True)
    out = session.run(None, {name: blob})[0][0].T
    best = out[:, 4:].argmax(1)
    scores = out[:, 4:].max(1)
    keep = scores >= 0.25
    boxes = out[keep, :4]
    boxes[:, :2] -= boxes[:, 2:] / 2
    boxes[:, :2] -= (left, top)
    boxes /= r
    return cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores[keep].tolist(), best[keep].tolist(), 0.25, 0.7)

see, seen = {"classification": classify, "detection": detect}[kind], 0
capture = cv2.VideoCapture(video)
while True:
    ok, frame = capture.read()
    if not ok:
        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        continue
    see(frame)
    seen += 1
    if seen == 1:
        print("first", flush=True)
    if select.select([0], [], [], 0)[0]:
        if not sys.stdin.readline():
            break
        print(seen, time.monotonic(), flush=True)
"""

# argv: model, picture, runs. Its own clock of the session's time is subtracted, which favours it: that
# time has conversions in it which are not the session's.
PREDICT = """
import json, os, sys, time
os.environ["YOLO_AUTOINSTALL"] = "false"
import cv2
from ultralytics import YOLO
model, runs = YOLO(sys.argv[1], task="detect"), int(sys.argv[3])
frame, took = cv2.imread(sys.argv[2]), []
for k in range(runs + 5):
    began = time.perf_counter()
    result = model.predict(frame, imgsz=640, device="cpu", verbose=False)[0]
    if k >= 5:
        took.append((time.perf_counter() - began) * 1e3 - result.speed["inference"])
pss = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Pss:"))
print(json.dumps({"ms": took, "memory_mb": int(pss.split()[1]) * 1024 / 1e6, "found": len(result.boxes)}))
"""


# --- taking turns


def in_turn(count: int, ours: Callable[[], float], theirs: Callable[[], float]) -> list[Pair]:
    """Both sides measured so often, each going first in every other round: (ours, theirs)."""
    found = []
    for k in range(count):
        if k % 2:
            other = theirs()
            found.append((ours(), other))
        else:
            mine = ours()
            found.append((mine, theirs()))
    return found


def ratio_of(pairs: Sequence[Pair]) -> float:
    """The median of the rounds' ratios, ours to theirs."""
    return statistics.median(ours / theirs for ours, theirs in pairs)


def spread(pairs: Sequence[Pair]) -> str:
    """Of the rounds' ratios, for the note."""
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return f"{len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}"


def chosen_file(out: Path) -> Path | None:
    """The file that a quantisation chose."""
    report = out / "report.json"
    if not report.exists():
        return None
    file = json.loads(report.read_text())["targets"][0]["file"]
    return None if file is None else out / file


def skipped(what: str, why: str) -> None:
    """Say what was left out."""
    print(f"# without {what}: {why}", file=sys.stderr, flush=True)


# --- models


@dataclass(frozen=True)
class Model:
    """A file, and all that is known of it."""

    title: str
    file: Path
    known: Guess

    @property
    def task(self) -> str:
        """As the contract has it."""
        return self.known.contract.task


def model_of(title: str, file: Path) -> Model:
    """A file with its sidecar."""
    return Model(title, file, guess(file).complete())


# --- the runner


def order(model: Model, home: Path, threads: int) -> messages.Serve:
    """What makes a runner serve this model. Its blobs are put into `home`, once."""
    blobs = home / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    ref = _blob(blobs, model.file)
    labels = _blob(blobs, model.known.labels) if model.known.labels else None
    precision = model.known.precision
    variant = Variant(model=ref, precision=precision, golden=ref, evidence="weak", opset=model.known.opset)
    manifest = Manifest(
        name="benched",
        version="1",
        created="2026-01-01T00:00:00Z",
        contract=model.known.contract,
        variants={"only": variant},
        preprocess=ref,
        labels=labels,
    )
    reference = ModelRef(path=manifest.path, sha256=hashlib.sha256(manifest.to_bytes()).hexdigest())
    plan = Plan(provider=PROVIDER, variant="only", threads=threads)
    return messages.Serve(id=1, model=reference, manifest=manifest, blobs=str(blobs), plan=plan)


def _blob(blobs: Path, path: Path) -> BlobRef:
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if not (blobs / digest).exists():
        (blobs / digest).write_bytes(raw)
    return BlobRef(sha256=digest, length=len(raw))


class Runner:
    """The real runner as the daemon starts it: all frames of a video, over and over, without pacing."""

    def __init__(self, serve: messages.Serve, video: Path, window_s: float, run: Path) -> None:
        self._heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._child: Child[messages.RunnerMessage] = Child(
            "runner",
            [sys.executable, "-m", "edgeward_agent.runner"],
            messages.FROM_RUNNER,
            self._heard.put,
            self._heard.put,
        )
        self.pid = self._child.pid
        source = messages.SourceSpec(name="cam", uri=str(video), slot="every", loop=True)
        # A file in the slot `every` is not paced.
        self._child.send(
            messages.Configure(pipeline="main", sources=(source,), window_s=window_s, run=str(run))
        )
        self._child.send(serve)

    def until(self, kind: type[M]) -> M:
        """The next message of this kind; what else is said meanwhile is not kept. RuntimeError: it ended."""
        while True:
            said = self._heard.get(timeout=WAIT_S)
            if isinstance(said, kind):
                return said
            if isinstance(said, (Exit, messages.ServeFailed)):
                raise RuntimeError(f"the runner does not serve: {said}")

    def heard(self, seconds: float) -> None:
        """Let it run; its messages are dropped. RuntimeError: it ended."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                said = self._heard.get(timeout=left)
            except queue.Empty:
                return
            if isinstance(said, Exit):
                raise RuntimeError(f"the runner ended: {said.text}")

    def close(self) -> None:
        """End it."""
        self._child.end(5)


def runner_rate(serve: messages.Serve, video: Path, seconds: float, run: Path) -> float:
    """Frames a second of one whole window, after one that does not count."""
    runner = Runner(serve, video, seconds, run)
    try:
        runner.until(messages.ServingNow)
        runner.until(messages.WindowClosed)
        (measures,) = runner.until(messages.WindowClosed).measures
    finally:
        runner.close()
    if measures.errors or measures.dropped:
        raise RuntimeError(f"the runner had {measures.errors} errors and dropped {measures.dropped} frames")
    return measures.frames / measures.duration_s


# --- the hand-written loop


@contextmanager
def hand_written(model: Model, video: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    """The loop, once it had its first answer."""
    words = [str(model.file), model.task, str(video), str(threads)]
    loop = subprocess.Popen(
        [sys.executable, "-c", LOOP, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert loop.stdout is not None
        if not select.select([loop.stdout], [], [], WAIT_S)[0] or loop.stdout.readline() != "first\n":
            raise RuntimeError("the hand-written loop does not run")
        yield loop
    finally:
        loop.kill()
        loop.communicate()


def loop_rate(model: Model, video: Path, threads: int, seconds: float) -> float:
    """Frames a second of the loop: as long a window as the runner's, after as long a one."""
    with hand_written(model, video, threads) as loop:
        time.sleep(seconds)
        before = _asked(loop)
        time.sleep(seconds)
        after = _asked(loop)
    return (after[0] - before[0]) / (after[1] - before[1])


def _asked(loop: subprocess.Popen[str]) -> tuple[int, float]:
    assert loop.stdin is not None
    assert loop.stdout is not None
    loop.stdin.write("\n")
    loop.stdin.flush()
    frames, now = loop.stdout.readline().split()
    return int(frames), float(now)


# --- everything but the session's own time


def overhead_of(command: Sequence[str]) -> dict[str, Any]:
    """What a side's process printed: `ms` of each frame, `memory_mb`, and how many objects it `found`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: exit code {done.returncode}: {done.stderr[-800:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def ours(file: Path, picture: Path, runs: int) -> dict[str, Any]:
    """From the frame in its slot to the answer counted, on the inference thread, without the session."""
    from edgeward_agent.runner import prepare_process

    prepare_process()
    import cv2

    from edgeward_runtime.resources import give_back, pss_mb
    from edgeward_runtime.slots import Slots

    frame, slots, answers = cv2.imread(str(picture)), Slots(["every"]), queue.SimpleQueue[tuple[float, int]]()
    inference = threading.Thread(target=_infer, args=(model_of("ours", file), slots, answers), daemon=True)
    inference.start()
    took = [_fed(frame, slots, answers) for _ in range(runs + 5)][5:]
    give_back()
    memory = pss_mb()
    slots.close()
    inference.join()
    return {"ms": [ms for ms, _ in took], "memory_mb": memory, "found": took[-1][1]}


def _fed(frame: Any, slots: Any, answers: queue.SimpleQueue[tuple[float, int]]) -> tuple[float, int]:
    from edgeward_runtime.slots import Frame

    slots.put(Frame(0, frame, time.monotonic(), 0.0, 0.0))
    return answers.get(timeout=WAIT_S)


def _infer(model: Model, slots: Any, answers: queue.SimpleQueue[tuple[float, int]]) -> None:
    """The inference thread of the pipeline, but that it tells of each frame."""
    from edgeward_runtime.engine import Engine, Recipe
    from edgeward_runtime.labels import read_labels
    from edgeward_runtime.meter import Meter, Series

    assert model.known.labels is not None
    plan = Plan(provider=PROVIDER, variant="only", threads=1)
    reference = ModelRef(path="models/benched/1.json", sha256="0" * 64)
    labels = read_labels(model.known.labels)
    engine = Engine(Recipe(reference, model.known.contract, model.file, labels, plan))
    engine.warm()
    meter = Meter(Series("main", ("cam",), reference, plan), time.monotonic())
    while (frame := slots.take(lambda: False)) is not None:
        for look in engine.looks(frame):
            counted = look.answer.labels()
            stages: dict[Stage, float] = {
                "preprocess": look.preprocess_ms,
                "inference": look.inference_ms,
                "postprocess": look.postprocess_ms,
            }
            meter.record(0, stages, counted)
            passed_ms = (time.monotonic() - frame.captured_at) * 1e3
            found = len(getattr(look.answer, "boxes", ()))
            answers.put((passed_ms - look.inference_ms, found))
    engine.close()


if __name__ == "__main__":
    print(json.dumps(ours(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
