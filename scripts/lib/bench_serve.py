"""`serve`: local serving against the common pattern, and what it does to live frames.

The common pattern is a FastAPI server with JSON in and `session.run` in the async handler. Both run Lite0
INT8 with the same session options; eight clients ask each in turn, in rounds. Clients are a process of
their own: `python bench_serve.py load PORT PATH SECONDS BODY HEADERS` prints the latencies.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import queue
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from camera import make_video
from rows import Row, at_least, at_most, told

from edgeward_agent import messages
from edgeward_agent.serving.wire import FROM_SERVER, Listening, Start
from edgeward_agent.workers import Child
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.golden import make_golden
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant
from edgeward_wire.verdict import Plan

ZOO = Path(__file__).resolve().parents[2] / "models/zoo"
MODEL = ZOO / "efficientnet-lite0.onnx"
CLIENTS = 8
ROUNDS = 3
WINDOW_S = 5.0
LIVE_FPS = 10.0
INFER = "/v2/models/lite0/infer"

COMMON = """
import sys
import numpy as np, onnxruntime as ort, uvicorn
from fastapi import FastAPI, Request
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
app = FastAPI()
@app.get("/health")
async def health():
    return {"ok": True}
@app.post("/infer")
async def infer(request: Request):
    said = await request.json()
    tensor = np.array(said["data"], dtype=np.float32).reshape(said["shape"])
    return {"data": session.run(None, {name: tensor})[0].tolist()}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="error", access_log=False)
"""


@dataclass
class Side:
    """One of what is compared: where, what is sent, and what was measured."""

    port: int
    path: str
    body: Path
    headers: dict[str, str]
    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def measure(self, seconds: float) -> None:
        """One round, with somebody who asks for /health meanwhile."""
        loader = self.load(seconds)
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        out, _ = loader.communicate()
        stop.set()
        watcher.join()
        if self.faults:
            raise RuntimeError(self.faults[0])
        took = json.loads(out)
        self.latencies += took
        self.rates.append(len(took) / seconds)

    def load(self, seconds: float) -> subprocess.Popen[str]:
        """The clients."""
        words = [str(self.port), self.path, str(seconds), str(self.body), json.dumps(self.headers)]
        return subprocess.Popen([sys.executable, __file__, "load", *words], stdout=subprocess.PIPE, text=True)

    def _watch(self, stop: threading.Event) -> None:
        stop.wait(1.0)  # the clients are still starting
        while not stop.wait(0.1):
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            began = time.perf_counter()
            link.request("GET", "/health")
            answer = link.getresponse()
            said = answer.read()
            self.health.append((time.perf_counter() - began) * 1e3)
            link.close()
            if answer.status != 200:
                self.faults.append(f"/health: {answer.status}: {said[:200]!r}")


def load(port: int, path: str, seconds: float, body: Path, headers: dict[str, str]) -> list[float]:
    """Milliseconds of each request that eight clients got answered."""
    raw, took, faults = body.read_bytes(), list[float](), list[str]()
    until = time.perf_counter() + seconds

    def client() -> None:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (began := time.perf_counter()) < until:
            link.request("POST", path, raw, headers)
            answer = link.getresponse()
            said = answer.read()
            if answer.status != 200:
                faults.append(f"{answer.status}: {said[:200]!r}")
                return
            took.append((time.perf_counter() - began) * 1e3)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(faults[0])
    return took


class Served:
    """A runner with Lite0 and the server before it."""

    def __init__(self, home: Path, threads: int, video: Path | None) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.runner: Child[messages.RunnerMessage] = Child(
            "runner",
            [sys.executable, "-m", "edgeward_agent.runner"],
            messages.FROM_RUNNER,
            self.heard.put,
            self.heard.put,
        )
        sources = (
            (messages.SourceSpec(name="cam", uri=str(video), loop=True, realtime=True),) if video else ()
        )
        run = str(home / "run")
        self.runner.send(messages.Configure(pipeline="main", sources=sources, window_s=WINDOW_S, run=run))
        self.runner.send(order(home, threads))
        self.until(messages.ServingNow)
        self.server: Child[Any] = Child(
            "serving",
            [sys.executable, "-m", "edgeward_agent.serving"],
            FROM_SERVER,
            self.heard.put,
            self.heard.put,
        )
        self.server.send(
            Start(run=run, pipelines=("main",), host="127.0.0.1", port=0, max_body=32 << 20, queue=16)
        )
        self.port: int = self.until(Listening).port

    def until(self, kind: type) -> Any:
        """The next message of this kind."""
        while not isinstance(said := self.heard.get(timeout=120), kind):
            pass
        return said

    def live(self, windows: int) -> list[Histogram]:
        """End-to-end latencies of that many windows; the one that is under way does not count."""
        while not self.heard.empty():
            self.heard.get()
        self.until(messages.WindowClosed)
        return [self.until(messages.WindowClosed).measures[0].stages["end_to_end"] for _ in range(windows)]

    def close(self) -> None:
        """End both."""
        self.server.end(5)
        self.runner.end(5)


def order(home: Path, threads: int) -> messages.Serve:
    """What makes a runner serve Lite0."""
    known = guess(MODEL).complete()
    blobs = home / "blobs"
    blobs.mkdir(exist_ok=True)
    ref, labels = (_blob(blobs, path.read_bytes()) for path in (MODEL, ZOO / "imagenet-labels.txt"))
    golden = _blob(blobs, make_golden(MODEL, known.contract, count=1))
    variant = Variant(model=ref, precision="int8", golden=golden, evidence="weak", opset=known.opset)
    manifest = Manifest(
        name="lite0",
        version="1",
        created="2026-01-01T00:00:00Z",
        contract=known.contract,
        variants={"int8": variant},
        preprocess=ref,
        labels=labels,
    )
    model = ModelRef(path=manifest.path, sha256=hashlib.sha256(manifest.to_bytes()).hexdigest())
    plan = Plan(provider="CPUExecutionProvider", variant="int8", threads=threads)
    return messages.Serve(id=1, model=model, manifest=manifest, blobs=str(blobs), plan=plan)


def _blob(blobs: Path, raw: bytes) -> BlobRef:
    digest = hashlib.sha256(raw).hexdigest()
    (blobs / digest).write_bytes(raw)
    return BlobRef(sha256=digest, length=len(raw))


def bodies(home: Path) -> dict[str, tuple[Path, dict[str, str]]]:
    """The same tensor as each side takes it: file and headers."""
    port = next(p for p in guess(MODEL).complete().contract.inputs if p.bind == "source")
    shape = [side if isinstance(side, int) else 1 for side in port.shape]
    array = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    numbers = array.reshape(-1).tolist()
    entry = {"name": port.name, "datatype": "FP32", "shape": shape}
    size = {"parameters": {"binary_data_size": array.nbytes}}
    head = json.dumps({"inputs": [{**entry, **size}], "parameters": {"binary_data_output": True}}).encode()
    made = {
        "common": (json.dumps({"shape": shape, "data": numbers}).encode(), {}),
        "json": (json.dumps({"inputs": [{**entry, "data": numbers}]}).encode(), {}),
        "binary": (head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}),
    }
    found = {}
    for name, (raw, headers) in made.items():
        (home / name).write_bytes(raw)
        found[name] = (home / name, {"Content-Type": "application/json", **headers})
    return found


def serve(minutes: float) -> Iterator[Row]:
    """Requests a second beside the common pattern (FastAPI), /health meanwhile, and live frames' p99."""
    seconds = max(3.0, minutes * 60 / 20)
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        sent = bodies(home)
        yield from _against_the_common(home, seconds, threads, sent)
        yield from _beside_live_frames(home, sent)


def _against_the_common(
    home: Path, seconds: float, threads: int, sent: dict[str, tuple[Path, dict[str, str]]]
) -> Iterator[Row]:
    with ExitStack() as stack:
        served = Served(home, threads, None)
        stack.callback(served.close)
        port = _start_common(stack, threads)
        sides = {
            "common": Side(port, "/infer", *sent["common"]),
            "json": Side(served.port, INFER, *sent["json"]),
            "binary": Side(served.port, INFER, *sent["binary"]),
        }
        for _ in range(ROUNDS):
            for side in sides.values():
                side.measure(seconds)
    common = sides["common"]
    yield told("serve", "common_requests", statistics.median(common.rates), "1/s", "FastAPI, JSON")
    yield told("serve", "common_p99", _p99(common.latencies), "ms", f"{CLIENTS} clients")
    yield told("serve", "common_health_p99", _p99(common.health), "ms")
    for name, goal in (("json", 1.5), ("binary", 3.0)):
        side = sides[name]
        ratio = statistics.median(a / b for a, b in zip(side.rates, common.rates, strict=True))
        yield told("serve", f"{name}_requests", statistics.median(side.rates), "1/s")
        yield at_least("serve", f"{name}_requests_ratio", ratio, "x", goal=goal, note="to the common pattern")
        yield at_most(
            "serve", f"{name}_p99", _p99(side.latencies), "ms", goal=round(_p99(common.latencies), 1)
        )
        yield at_most("serve", f"{name}_health_p99", _p99(side.health), "ms", goal=50)


def _start_common(stack: ExitStack, threads: int) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", COMMON, str(MODEL), str(threads), str(port)])
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + 60
    with socket.socket() as link:
        link.settimeout(1)
        while link.connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline:
                raise RuntimeError("the common pattern does not start")
            time.sleep(0.2)
    return port


def _beside_live_frames(home: Path, sent: dict[str, tuple[Path, dict[str, str]]]) -> Iterator[Row]:
    video = home / "camera.avi"
    pictures = [ZOO / "pictures" / name for name in ("camera.jpg", "coffee.jpg")]
    make_video(video, pictures, fps=LIVE_FPS)
    idle: list[Histogram] = []
    loaded: list[Histogram] = []
    with ExitStack() as stack:
        # One core for inference: the other has the clients, which are not on a device.
        served = Served(home, 1, video)
        stack.callback(served.close)
        side = Side(served.port, INFER, *sent["binary"])
        for _ in range(ROUNDS):
            idle += served.live(2)
            loader = side.load(4 * WINDOW_S)
            loaded += served.live(2)
            loader.communicate()
    before, after = merge(idle), merge(loaded)
    yield told(
        "serve", "live_frames_loaded", after.count / (2 * ROUNDS * WINDOW_S), "1/s", f"{LIVE_FPS:g} come"
    )
    yield at_most(
        "serve",
        "live_p99_ratio",
        after.percentile(0.99) / before.percentile(0.99),
        "x",
        goal=1.3,
        note=f"{before.percentile(0.99):.1f} to {after.percentile(0.99):.1f} ms; p50"
        f" {before.percentile(0.5):.1f} to {after.percentile(0.5):.1f}",
    )


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        print(
            json.dumps(
                load(
                    int(sys.argv[2]),
                    sys.argv[3],
                    float(sys.argv[4]),
                    Path(sys.argv[5]),
                    json.loads(sys.argv[6]),
                )
            )
        )
    else:
        for row in serve(float(sys.argv[1]) if sys.argv[1:] else 1.0):
            print(row, flush=True)
