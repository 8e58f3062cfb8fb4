"""A runner and a serving process for tests, as the daemon starts them, and a plain HTTP client."""

from __future__ import annotations

import http.client
import json
import queue
from pathlib import Path
from typing import Any

import numpy as np

from agent.test_runner import Child as Runner
from edgeward_agent import local_socket
from edgeward_agent.messages import Configure, Serve, ServingNow, SourceSpec
from edgeward_agent.serving.supervising import _COMMAND
from edgeward_agent.serving.wire import FROM_SERVER, Listening, Refused, Start
from edgeward_agent.workers import Child, Exit
from edgeward_wire.verdict import Plan
from runtime.bundles import Bundle


class Serving:
    """`runner` and the server in front of it."""

    def __init__(self, home: Path, bundle: Bundle, *, source: str = "", **settings: Any) -> None:
        self.run = home / "run"
        self._bundle, self._source, self._orders = bundle, source, 0
        self.runner = self.start_runner()
        self.heard: queue.SimpleQueue[Listening | Refused | Exit] = queue.SimpleQueue()
        wanted = {"host": "127.0.0.1", "port": 0, "max_body": 32 << 20, "queue": 16, **settings}
        self.start = Start(run=str(self.run), pipelines=("main",), **wanted)
        self.server: Child[Listening | Refused] = Child(
            "serving", _COMMAND, FROM_SERVER, self.heard.put, self.heard.put
        )
        self.server.send(self.start)
        said = self.heard.get(timeout=30)
        assert isinstance(said, Listening), said
        self.port = said.port

    def start_runner(self) -> Runner:
        runner = Runner()
        sources = tuple(
            SourceSpec(name="cam", uri=uri, loop=True, realtime=True) for uri in (self._source,) if uri
        )
        runner.send(
            Configure(pipeline="main", sources=sources, window_s=60, result_interval_s=1, run=str(self.run))
        )
        self.serve(self._bundle, runner)
        return runner

    def serve(self, bundle: Bundle, runner: Runner | None = None) -> None:
        """Let the runner serve this, and wait until it does."""
        runner, self._orders = runner or self.runner, self._orders + 1
        variant = next(iter(bundle.manifest.variants))
        plan = Plan(provider="CPUExecutionProvider", variant=variant)
        runner.send(
            Serve(
                id=self._orders,
                model=bundle.ref,
                manifest=bundle.manifest,
                blobs=str(bundle.blobs),
                plan=plan,
            )
        )
        runner.until(ServingNow)

    def about(self) -> dict[str, Any]:
        return local_socket.about(self.run, "main")

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            link.request(method, path, body or None, headers or {})
            response = link.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            link.close()

    def json(
        self, method: str, path: str, said: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        body = said if isinstance(said, bytes) else b"" if said is None else json.dumps(said).encode()
        status, _, raw = self.ask(method, path, body, headers)
        return status, json.loads(raw)

    def close(self) -> None:
        self.server.end(10)
        self.runner.close()


def tensor(colour: tuple[float, float, float] = (0.9, 0.1, 0.1), size: int = 32) -> np.ndarray:
    """(1, 3, size, size) of one colour."""
    return np.broadcast_to(np.array(colour, np.float32)[None, :, None, None], (1, 3, size, size)).copy()


def infer_json(array: np.ndarray, **more: Any) -> dict[str, Any]:
    entry = {
        "name": "image",
        "datatype": "FP32",
        "shape": list(array.shape),
        "data": array.reshape(-1).tolist(),
    }
    return {"inputs": [{**entry, **more}]}


def infer_binary(array: np.ndarray, *, binary_out: bool = True, **more: Any) -> tuple[bytes, dict[str, str]]:
    entry = {
        "name": "image",
        "datatype": "FP32",
        "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }
    head = json.dumps(
        {"id": "7", "inputs": [{**entry, **more}], "parameters": {"binary_data_output": binary_out}}
    ).encode()
    return head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
