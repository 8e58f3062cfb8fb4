"""A real runner process without a model: it does what the manifest's annotations say.

`serve`: ok (default), whole (as its file is), fail, crash, hang.
`live`: ok (default), crash, errors, stall, slow, mute.
A source below /nowhere is down; of one below /later nothing is said, and it delivers nothing.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from talk import Talk

from edgeward_agent import messages
from edgeward_wire.histogram import Recorder
from edgeward_wire.result import ResultMessage
from edgeward_wire.telemetry import Measures

BEAT_S = 0.05


class Runner:
    def __init__(self) -> None:
        self.talk = Talk()
        self.configured: messages.Configure | None = None
        self.serving: messages.Serve | None = None
        self.frames = self.errors = self.in_window = 0
        self.window_due = 0.0

    def run(self) -> None:
        print("the test's runner starts", flush=True)
        self.talk.say(messages.Ready(runtime={"onnxruntime": "0"}))
        for line in self.talk.lines(BEAT_S):
            if line is None:
                self.beat()
                continue
            message = messages.TO_RUNNER.validate_json(line)
            if isinstance(message, messages.Configure):
                self.configure(message)
            else:
                self.serve(message)
        if self.serving:
            self.window()  # the last one, on the way out

    def configure(self, message: messages.Configure) -> None:
        self.configured = message
        for source in message.sources:
            if source.uri.startswith("/later"):
                continue
            up = not source.uri.startswith("/nowhere")
            detail = "" if up else "not there"
            self.talk.say(messages.SourceChanged(source=source.name, up=up, detail=detail))

    def serve(self, message: messages.Serve) -> None:
        match message.manifest.annotations.get("serve", "ok"):
            case "fail":
                self.talk.say(messages.ServeFailed(id=message.id, reason="it is not loadable"))
            case "whole" if not self.whole(message):
                self.talk.say(messages.ServeFailed(id=message.id, reason="Protobuf parsing failed."))
            case "crash":
                print("about to crash", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                time.sleep(600)
            case _:
                self.serving = message
                self.talk.say(messages.ServingNow(id=message.id, gap_ms=1.5))

    def whole(self, message: messages.Serve) -> bool:
        """Whether the model's file is what it should be, as a parser would notice."""
        sha256 = message.manifest.variants[message.plan.variant].model.sha256
        return hashlib.sha256((Path(message.blobs) / sha256).read_bytes()).hexdigest() == sha256

    def beat(self) -> None:
        live = self.serving.manifest.annotations.get("live", "ok") if self.serving else "ok"
        stalled = 0.0
        sources = self.configured.sources if self.configured else ()
        up = any(not source.uri.startswith(("/nowhere", "/later")) for source in sources)
        if self.serving and up:
            match live:
                case "crash":
                    os.abort()
                case "errors":
                    self.errors += 2
                    self.frames += 1
                case "stall":
                    stalled = 1000.0
                case _:
                    self.frames += 5
                    self.in_window += 5
        self.talk.say(messages.Heartbeat(frames=self.frames, errors=self.errors, stalled_s=stalled))
        if self.serving and up and self.configured and time.monotonic() >= self.window_due:
            self.window_due = time.monotonic() + min(self.configured.window_s, 0.2)
            self.window()

    def window(self) -> None:
        assert self.serving
        assert self.configured
        slow = self.serving.manifest.annotations.get("live") == "slow"
        found = []
        for source in self.configured.sources:
            inference = Recorder()
            for _ in range(max(60, self.in_window)):
                inference.record(500.0 if slow else 5.0)
            taken = inference.take()
            found.append(
                Measures(
                    pipeline=self.configured.pipeline,
                    source=source.name,
                    model=self.serving.model,
                    variant=self.serving.plan.variant,
                    provider=self.serving.plan.provider,
                    start=time.time(),
                    duration_s=0.2,
                    frames=taken.count,
                    stages={"inference": taken, "end_to_end": taken},
                    labels={"a": taken.count},
                )
            )
            result = ResultMessage(
                pipeline=self.configured.pipeline,
                source=source.name,
                time=time.time(),
                model=self.serving.model.name,
                version=self.serving.model.version,
                latency_ms=5,
                top=(),
            )
            self.talk.say(messages.ResultSeen(result=result))
        self.in_window = 0
        self.talk.say(messages.WindowClosed(measures=tuple(found)))


if __name__ == "__main__":
    try:
        Runner().run()
    except BrokenPipeError:
        sys.exit(0)
