"""The runner: one pipeline's frames through its model. `python -m edgeward_agent.runner --fd N`.

A child of the daemon; the two speak `messages` over the socket on file descriptor N. End of file on it
ends the runner. The main thread owns the socket, the windows and the heartbeat; the pipeline's threads
only queue what happened. An exception that nobody foresaw ends the process: the daemon restarts it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeward_agent.local_socket import Handler, LocalSocket, Request
from edgeward_agent.messages import (
    MAX_LINE,
    TO_RUNNER,
    Configure,
    Heartbeat,
    Ready,
    ResultSeen,
    RunnerMessage,
    SamplesSpec,
    Serve,
    ServeFailed,
    ServingNow,
    SourceChanged,
    SourceSpec,
    WindowClosed,
    encode,
)
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

if TYPE_CHECKING:
    from edgeward_runtime import pipeline as runtime
    from edgeward_runtime.engine import Recipe
    from edgeward_runtime.sampling import SampleOptions
    from edgeward_runtime.sources.options import SourceOptions
    from edgeward_wire.result import ResultMessage

log = logging.getLogger("edgeward.runner")

HEARTBEAT_S = 1.0
_RECEIVE = 1 << 16
_MAX_DETAIL = 200
_MAX_REASON = 2000
_MAX_WAITING = 256
"""Answers that only local readers want, before the newest are lost to them."""
_SHOT_S = 2.0
_MAX_SIDE = 4096


def recipe_of(order: Serve) -> Recipe:
    """What the engine of an order is made of. Raises Rejected, Unavailable."""
    from edgeward_runtime.engine import Recipe
    from edgeward_runtime.labels import read_labels
    from edgeward_runtime.parity import gate

    manifest, blobs = order.manifest, Path(order.blobs)
    variant = manifest.variants.get(order.plan.variant)
    if variant is None:
        raise Rejected(f"The model has no variant {order.plan.variant!r}.")
    labels = read_labels(blobs / manifest.labels.sha256) if manifest.labels else ()
    return Recipe(
        model=order.model,
        contract=manifest.contract,
        file=blobs / variant.model.sha256,
        labels=labels,
        plan=order.plan,
        golden=blobs / variant.golden.sha256,
        least_cosine=gate(variant.parity.cosine, variant.precision, order.plan.provider),
    )


def options_of(source: SourceSpec) -> SourceOptions:
    """The runtime's view of a source."""
    from edgeward_runtime.sources.options import Rules, SourceOptions

    said = source.model_dump(exclude={"thresholds", "classes", "zones"})
    rules = Rules(source.thresholds, frozenset(source.classes), source.zones)
    return SourceOptions(**said, rules=rules)


def samples_of(wanted: SamplesSpec | None) -> SampleOptions | None:
    """The runtime's view of what is kept."""
    from edgeward_runtime.sampling import SampleOptions

    if wanted is None:
        return None
    said = wanted.model_dump(exclude={"directory", "most_mb"})
    return SampleOptions(Path(wanted.directory), **said, most_bytes=int(wanted.most_mb * (1 << 20)))


class Runner:
    """One pipeline behind one socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._received = bytearray()
        self._happened: queue.SimpleQueue[runtime.Happening] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._configuration: Configure | None = None
        self._pipeline: runtime.Pipeline | None = None
        self._window_due = self._heartbeat_due = 0.0
        self._local: LocalSocket | None = None
        self._unheard = 0
        self._ordered: dict[int, Serve] = {}
        self._serving: Serve | None = None
        self._up: dict[str, SourceChanged] = {}
        self._doubts: Mapping[str, str] = {}

    def run(self) -> None:
        """Until the daemon closes the socket."""
        self._send(Ready(runtime=versions()))
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S
        try:
            while self._turn():
                pass
        except (BrokenPipeError, ConnectionResetError):
            log.info("the daemon has gone")
        finally:
            if self._local is not None:
                self._local.close()
            if self._pipeline is not None:
                self._pipeline.stop()

    def _turn(self) -> bool:
        """Wait for something to do, and do it. False: the daemon closed the socket."""
        due = min(self._heartbeat_due, self._window_due or self._heartbeat_due)
        wait = max(0.0, due - time.monotonic())
        link = self._link.fileno()
        readable, _, _ = select.select([link, self._wake_read], [], [], wait)
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        self._report()
        if link in readable and not self._receive():
            return False
        self._on_time(time.monotonic())
        return True

    # --- from the daemon

    def _receive(self) -> bool:
        raw = self._link.recv(_RECEIVE)
        if not raw:
            return False
        self._received += raw
        *lines, rest = self._received.split(b"\n")
        if max(map(len, (*lines, rest))) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE} bytes came from the daemon")
        self._received = rest
        for line in lines:
            self._obey(line)
        return True

    def _obey(self, line: bytes | bytearray) -> None:
        message = TO_RUNNER.validate_json(bytes(line))
        if isinstance(message, Configure):
            self._configure(message)
        else:
            self._serve(message)

    def _configure(self, wanted: Configure) -> None:
        from edgeward_runtime.pipeline import Pipeline

        before, self._configuration = self._configuration, wanted
        self._window_due = time.monotonic() + wanted.window_s
        if self._pipeline is not None and before is not None and before.sources == wanted.sources:
            self._pipeline.result_interval_s = wanted.result_interval_s
            return
        if self._pipeline is not None:
            raise ValueError("the sources of a runner cannot change: start another one")
        self._pipeline = Pipeline(
            wanted.pipeline,
            [options_of(source) for source in wanted.sources],
            self._emit,
            result_interval_s=wanted.result_interval_s,
            samples=samples_of(wanted.samples),
        )
        self._pipeline.start()
        self._open_socket(wanted, self._pipeline)

    def _open_socket(self, wanted: Configure, pipeline: runtime.Pipeline) -> None:
        if not wanted.run:
            return

        def listening(somebody: bool) -> None:
            pipeline.listening = somebody

        from edgeward_agent.serving.in_runner import Desk

        desk = Desk(pipeline, wanted.pipeline)
        handlers: dict[str, Handler] = {
            "frame": self._show_frame,
            "about": self._tell_about,
            "infer": desk,
        }
        local = LocalSocket(Path(wanted.run), wanted.pipeline, handlers, listening)
        try:
            local.start()
        except OSError as error:  # inference goes on without it
            log.warning("no local socket in %s: %s", wanted.run, error.strerror or error)
            return
        self._local = local

    def _serve(self, order: Serve) -> None:
        if self._pipeline is None:
            raise ValueError("a model came before the configuration")
        try:
            recipe = recipe_of(order)
        except EdgewardError as error:
            self._send(ServeFailed(id=order.id, reason=error.what[:_MAX_REASON]))
            return
        self._ordered[order.id] = order
        self._pipeline.serve(order.id, recipe)

    # --- to local programs: on their threads

    def _show_frame(self, request: Request) -> None:
        from edgeward_agent import results

        pipeline, configuration = self._pipeline, self._configuration
        assert pipeline is not None
        assert configuration is not None
        max_side = request.number("max_side", 1280, 16, _MAX_SIDE)
        if self._serving is None:
            raise Unavailable("No model serves yet, so no frame is taken.", "See `edgeward-agent status`.")
        shot = pipeline.shots.ask(request.text("source"), _SHOT_S)
        picture, width, height = shot.jpeg(max_side)
        result = results.message(shot.result, configuration.pipeline)
        header = {
            "ok": True,
            "width": width,
            "height": height,
            "length": len(picture),
            "age_s": round(time.monotonic() - shot.at, 3),
            "result": result.model_dump(mode="json", by_alias=True),
        }
        request.line(header, picture)

    def _tell_about(self, request: Request) -> None:
        configuration, serving = self._configuration, self._serving
        assert configuration is not None
        known: dict[str, object] = {"state": "serving" if serving else "preparing"}
        if self._pipeline is not None:
            known["frames"] = self._pipeline.totals.frames
        if serving is not None:
            contract = serving.manifest.contract
            known |= {
                "model": serving.model.name,
                "version": serving.model.version,
                "sha256": serving.model.sha256,
                "variant": serving.plan.variant,
                "provider": serving.plan.provider,
                "threads": serving.plan.threads,
                "contract": contract.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            }
        up = {
            source.name: {"up": change.up, "detail": change.detail}
            if (change := self._up.get(source.name))
            else {"up": False, "detail": "no frame yet"}
            for source in configuration.sources
        }
        request.line({"ok": True, "pipeline": configuration.pipeline, **known, "sources": up})

    # --- to the daemon

    def _emit(self, happening: runtime.Happening) -> None:
        """Called on any thread."""
        if getattr(happening, "why", "") is None and self._happened.qsize() >= _MAX_WAITING:
            self._unheard += 1  # only local readers want it, and the main thread cannot follow
            return
        self._happened.put(happening)
        with contextlib.suppress(
            BlockingIOError, OSError
        ):  # full: it is awake already; closed: we are ending
            os.write(self._wake_write, b"\0")

    def _report(self) -> None:
        while True:
            try:
                happening = self._happened.get_nowait()
            except queue.Empty:
                return
            message = self._message(happening)
            if message is not None:
                self._send(message)

    def _message(self, happening: runtime.Happening) -> RunnerMessage | None:
        """What the daemon is told of it."""
        from edgeward_agent import results
        from edgeward_runtime import pipeline as runtime

        if isinstance(happening, runtime.Saw):
            assert self._configuration is not None
            result = results.message(happening, self._configuration.pipeline)
            self._publish(result)
            return None if happening.why is None else ResultSeen(result=result)
        if isinstance(happening, runtime.SourceChange):
            detail = happening.detail[:_MAX_DETAIL]
            log.info("source %s is %s %s", happening.source, "up" if happening.up else "down:", detail)
            return self._source_changed(happening.source, happening.up, detail)
        if isinstance(happening, runtime.Served):
            self._serving = self._ordered.pop(happening.id)
            self._doubts = happening.doubts
            for name, change in list(self._up.items()):
                if change.up and change.detail != self._doubts.get(name, "")[:_MAX_DETAIL]:
                    self._send(self._source_changed(name, up=True))
            return ServingNow(id=happening.id, gap_ms=max(0.0, happening.gap_ms))
        if isinstance(happening, runtime.NotServed):
            self._ordered.pop(happening.id, None)
            return ServeFailed(id=happening.id, reason=happening.reason[:_MAX_REASON])
        if isinstance(happening, runtime.WindowClosed):
            return WindowClosed(measures=happening.measures)
        raise happening.error

    def _source_changed(self, name: str, up: bool, detail: str = "") -> SourceChanged:
        """What is told of a source: while it is up, which of its settings do nothing."""
        if up and not detail:
            detail = self._doubts.get(name, "")[:_MAX_DETAIL]
        changed = self._up[name] = SourceChanged(source=name, up=up, detail=detail)
        return changed

    def _publish(self, result: ResultMessage) -> None:
        if self._local is None or self._pipeline is None or not self._pipeline.listening:
            return
        unheard, self._unheard = self._unheard, 0
        if unheard:
            self._local.lose(unheard)
        self._local.publish(result.source, result.to_bytes())

    def _on_time(self, now: float) -> None:
        pipeline, configuration = self._pipeline, self._configuration
        if pipeline is not None and configuration is not None and now >= self._window_due:
            measures = pipeline.close_window(now, time.time())
            if measures:
                self._send(WindowClosed(measures=measures))
            # On schedule, not from now: windows do not drift. What a stall missed is one long window.
            late = (now - self._window_due) // configuration.window_s
            self._window_due += (late + 1) * configuration.window_s
        if now >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_S
            if pipeline is None:
                self._send(Heartbeat(frames=0))
                return
            pipeline.tick(now)
            totals = pipeline.totals
            self._send(
                Heartbeat(frames=totals.frames, errors=totals.errors, stalled_s=pipeline.stalled_s(now))
            )

    def _send(self, message: RunnerMessage) -> None:
        self._link.sendall(encode(message))


def versions() -> dict[str, str]:
    """The versions of what runs the models here."""
    import numpy as np

    from edgeward_runtime import images, sessions

    return {"onnxruntime": sessions.version(), "numpy": np.__version__, "opencv": images.version()}


def prepare_process() -> None:
    """Before numpy, OpenCV and ONNX Runtime are imported: keep them from taking threads and memory."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from edgeward_runtime import resources

    resources.save_memory()
    from edgeward_runtime import images

    images.be_light()


def main() -> int:
    """Exit code 0 when the daemon closed the socket."""
    parser = argparse.ArgumentParser(prog="edgeward-runner")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the daemon")
    fd = parser.parse_args().fd
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="runner: %(levelname)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which closes the socket
    prepare_process()
    with socket.socket(fileno=fd) as link:
        link.setblocking(True)
        Runner(link).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
