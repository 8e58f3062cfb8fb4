"""The routes of local serving: Open Inference Protocol v2, /predict, /health and /metrics."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, unquote

import numpy as np

from edgeward_agent.serving import protocol
from edgeward_agent.serving.faults import Fault
from edgeward_agent.serving.link import Link, Model
from edgeward_agent.serving.metrics import Metrics
from edgeward_agent.serving.server import Query, Reply, refusal, told
from edgeward_wire import __version__

HEALTH_S = 1.0
HEALTH_WAIT_S = 0.02
_WAIT_S = 5.0
_STALE_S = 10.0
_MAX_PARTS = 8
_MAX_FIELDS = 4

_Handler = Callable[[Query, list[str]], Reply]


class Health:
    """A run on a golden input through the runner, at most once in `HEALTH_S`; its last outcome in between."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._asked_at = -HEALTH_S
        self._running = False
        self._state: dict[str, Any] = {"ok": False, "detail": "not asked yet"}
        self._at = -math.inf

    def look(self) -> dict[str, Any]:
        """The newest outcome, and how old it is. An outcome that is recent enough is not waited for: a slow
        run is told of next time. Where there is none, the run is, and only one that is late has failed."""
        with self._lock:
            now = time.monotonic()
            if not self._running and now - self._asked_at >= HEALTH_S:
                self._asked_at, self._running = now, True
                self._done.clear()
                threading.Thread(target=self._run, name="health", daemon=True).start()
            age = now - self._at
        stale = age > _STALE_S
        late = age >= 2 * HEALTH_S and not self._done.wait(_WAIT_S if stale else HEALTH_WAIT_S)
        with self._lock:
            age = time.monotonic() - self._at
            state = dict(self._state)
            if stale and late:
                state |= {"ok": False, "detail": f"a run has not ended within {_WAIT_S:g} s"}
            return {**state, "age_s": None if math.isinf(age) else round(age, 3)}

    def _run(self) -> None:
        state: dict[str, Any] = {"ok": False}
        try:
            model = self._link.model()
            if model is None:
                state["detail"] = "no model serves"
            else:
                state |= {"model": model.name, "version": model.version}
                with self._link.channel() as channel:
                    answer = channel.ask({"op": "check", "model": model.sha256})
                if answer.get("ok"):
                    state |= {"ok": True, "took_ms": answer["took_ms"], "cosine": answer["cosine"]}
                else:
                    state["detail"] = self._link.refused(answer).reason
        except Fault as fault:
            state["detail"] = fault.reason
            if fault.status == 429:  # it works, and has much to do: what was known stands
                state = self._state
        finally:
            with self._lock:
                self._state, self._at, self._running = state, time.monotonic(), False
            self._done.set()


class App:
    """Answers requests. For any thread."""

    def __init__(self, links: Sequence[Link], metrics: Metrics) -> None:
        self._links = {link.pipeline: link for link in links}
        self._metrics = metrics
        self._health = {name: Health(link) for name, link in self._links.items()}
        self._reading = threading.Lock()
        self._plain: dict[str, tuple[str, str, _Handler]] = {
            "v2": ("server", "GET", self._server),
            "v2/health/live": ("live", "GET", self._live),
            "v2/health/ready": ("ready", "GET", self._ready),
            "predict": ("predict", "POST", self._predict),
            "health": ("health", "GET", self._healthy),
            "metrics": ("metrics", "GET", self._tell_metrics),
        }
        self._of_model: dict[str, tuple[str, str, _Handler]] = {
            "": ("model", "GET", self._metadata),
            "ready": ("model_ready", "GET", self._model_ready),
            "infer": ("infer", "POST", self._infer),
        }

    def __call__(self, query: Query) -> Reply:
        """One request. Raises Fault for what is no route."""
        parts = [unquote(part) for part in query.path.strip("/").split("/")]
        if len(parts) > _MAX_PARTS:
            raise Fault(404, "There is nothing here.")
        route, wanted, handler = self._route(parts)
        if query.method != wanted:
            return refusal(Fault(405, f"Use {wanted}."), route)
        try:
            reply = handler(query, parts)
        except Fault as fault:
            reply = refusal(fault, route)
        return Reply(reply.status, reply.parts, reply.kind, reply.headers, route)

    def _route(self, parts: list[str]) -> tuple[str, str, _Handler]:
        """The route's name, its method, and who answers it. Raises Fault."""
        if parts[:2] == ["v2", "models"] and len(parts) > 2:
            end = parts[5:] if parts[3:4] == ["versions"] and len(parts) > 4 else parts[3:]
            found = self._of_model.get("/".join(end))
        else:
            found = self._plain.get("/".join(parts))
        if found is None:
            raise Fault(404, "There is nothing here: see /v2, /predict, /health and /metrics.")
        return found

    # --- what there is

    def _server(self, _query: Query, _parts: list[str]) -> Reply:
        return told(200, {"name": "edgeward", "version": __version__, "extensions": ["binary_tensor_data"]})

    def _live(self, _query: Query, _parts: list[str]) -> Reply:
        return told(200, {"live": True})

    def _ready(self, _query: Query, _parts: list[str]) -> Reply:
        absent = [name for name, link in self._links.items() if link.model() is None]
        return told(400 if absent else 200, {"ready": not absent, "absent": absent})

    def _metadata(self, _query: Query, parts: list[str]) -> Reply:
        _, model = self._find(parts)
        return told(200, protocol.metadata(model.name, model.version, model.contract))

    def _model_ready(self, _query: Query, parts: list[str]) -> Reply:
        _, model = self._find(parts)
        return told(200, {"name": model.name, "ready": True})

    def _find(self, parts: list[str]) -> tuple[Link, Model]:
        """The model that a path names. Raises Fault."""
        name, version = parts[2], parts[4] if len(parts) > 4 else ""
        serving: list[Model] = []
        # Those that were known to have it are asked first, so that no other runner is waited for.
        for link in sorted(self._links.values(), key=lambda link: not link.knows(name)):
            model = link.model()
            if model is not None and model.name == name and version in ("", model.version):
                return link, model
            serving += [] if model is None else [model]
        if not serving:
            raise Fault(503, "No model serves at the moment.", 1)
        if others := [model.version for model in serving if model.name == name]:
            raise Fault(404, f"Version {version[:64]} of {name} does not serve: {others[0]} does.")
        known = ", ".join(sorted(model.name for model in serving))
        raise Fault(404, f"No model {name[:64]!r} serves here; there is {known}.")

    # --- inference

    def _infer(self, query: Query, parts: list[str]) -> Reply:
        link, model = self._find(parts)
        if model.contract.stateful:
            raise Fault(400, f"{model.name} remembers what came before: send it sound with POST /predict.")
        said = query.header("Inference-Header-Content-Length")
        if said is not None and not (said.isascii() and said.isdecimal() and len(said) < 12):
            raise Fault(400, "Inference-Header-Content-Length is a whole number.")
        if said is None:
            with self._reading:  # one at a time: several would only wait for the same interpreter lock
                asked = protocol.read(query.body, None, model.contract)
        else:
            asked = protocol.read(query.body, int(said), model.contract)
        outputs = _run(link, model, asked)
        body, head = protocol.write(asked, model.name, model.version, outputs)
        if head is None:
            return Reply(200, body)
        headers = [("Inference-Header-Content-Length", str(head))]
        return Reply(200, body, "application/octet-stream", headers)

    def _predict(self, query: Query, _parts: list[str]) -> Reply:
        link = self._pipeline(query)
        model = link.model()
        if model is None:
            raise Fault(503, "No model serves at the moment.", 1)
        if not query.body:
            raise Fault(400, "Send a JPEG, PNG or WAV as the body.")
        with link.channel() as channel:
            channel.lay([query.body])
            answer = channel.ask({"op": "predict", "model": model.sha256, "length": len(query.body)})
            body = channel.mapped()[: answer["length"]] if answer.get("ok") else b""
        if not answer.get("ok"):
            raise link.refused(answer)
        return Reply(200, [body])

    def _pipeline(self, query: Query) -> Link:
        try:
            asked = parse_qs(query.parameters, max_num_fields=_MAX_FIELDS).get("pipeline", [""])[0]
        except ValueError:
            raise Fault(
                400, f"At most {_MAX_FIELDS} fields may follow /predict?, as pipeline=NAME."
            ) from None
        if not asked and len(self._links) == 1:
            return next(iter(self._links.values()))
        link = self._links.get(asked)
        if link is None:
            known = ", ".join(self._links) or "none"
            raise Fault(404 if asked else 400, f"Say which pipeline: /predict?pipeline=NAME, of {known}.")
        return link

    # --- how it is

    def _healthy(self, _query: Query, _parts: list[str]) -> Reply:
        found = {name: health.look() for name, health in self._health.items()}
        well = bool(found) and all(state["ok"] for state in found.values())
        return told(200 if well else 503, {"ok": well, "pipelines": found})

    def _tell_metrics(self, _query: Query, _parts: list[str]) -> Reply:
        gauges: dict[str, dict[str, float]] = {"edgeward_serving_waiting": {}, "edgeward_serving_busy": {}}
        gauges["edgeward_serving_ready"] = {}
        gauges["edgeward_live_frames_total"] = {}
        for name, link in self._links.items():
            label = f'pipeline="{name}"'
            gauges["edgeward_serving_waiting"][label] = link.waiting
            gauges["edgeward_serving_busy"][label] = link.busy
            gauges["edgeward_serving_ready"][label] = link.model() is not None
            if link.frames is not None:
                gauges["edgeward_live_frames_total"][label] = link.frames
        text = self._metrics.text(gauges)
        return Reply(200, [text.encode()], "text/plain; version=0.0.4; charset=utf-8")


def _run(link: Link, model: Model, asked: protocol.Asked) -> Mapping[str, protocol.Array]:
    arrays = {name: np.ascontiguousarray(array) for name, array in asked.inputs.items()}
    with link.channel() as channel:
        places = channel.lay([_bytes(array) for array in arrays.values()])
        told_inputs = [
            {"name": name, "dtype": array.dtype.name, "shape": array.shape, "offset": place}
            for (name, array), place in zip(arrays.items(), places, strict=True)
        ]
        answer = channel.ask(
            {
                "op": "tensors",
                "model": model.sha256,
                "inputs": told_inputs,
                "outputs": list(asked.outputs),
            }
        )
        outputs = {}
        if answer.get("ok"):
            memory = channel.mapped()
            for one in answer["outputs"]:
                dtype, shape = np.dtype(one["dtype"]), tuple(one["shape"])
                count = int(np.prod(shape, dtype=np.int64))
                flat = np.frombuffer(memory, dtype, count, one["offset"])
                outputs[one["name"]] = flat.reshape(shape).copy()  # the next request overwrites it
    if not answer.get("ok"):
        raise link.refused(answer)
    return outputs


def _bytes(array: protocol.Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
