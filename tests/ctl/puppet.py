"""A device without a mind: enrolled for real, on the real broker, and it reports what a test tells it to."""

from __future__ import annotations

import secrets
import threading
import time
from types import TracebackType
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgeward_agent.identity import Identity
from edgeward_wire import topics
from edgeward_wire.api import Rollout
from edgeward_wire.document import Document
from edgeward_wire.event import Event, Finished, StateChanged
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import PipelineReport, Reported, Serving, Update
from edgeward_wire.status import Status
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict

WAIT_S = 60.0
PLAN = Plan(provider="CPUExecutionProvider", variant="int8", threads=1)


class Puppet:
    """`online` from its start; `play` sends one state of one rollout."""

    def __init__(self, identity: Identity) -> None:
        self.device = identity.device
        self.address = identity.broker
        self._connected = threading.Event()
        self._boot_id = secrets.token_hex(16)
        self._seq = 0
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self.device, protocol=MQTTProtocolVersion.MQTTv5
        )
        self.client.tls_set_context(identity.client_context())
        self.client.on_connect = lambda *_: self._connected.set()
        self.client.will_set(
            topics.up(self.device, "status"), self._status("offline").to_bytes(), qos=1, retain=True
        )

    def __enter__(self) -> Puppet:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0
        self.client.connect(self.address.host, self.address.port, properties=properties)
        self.client.loop_start()
        assert self._connected.wait(WAIT_S)
        self._publish("status", self._status("online"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publish("status", self._status("offline"))
        self.client.disconnect()
        self.client.loop_stop()

    def play(self, rollout: Rollout, state: str, result: str | None = None, **more: Any) -> None:
        """Report a state of this rollout, and the event that goes with it."""
        now = time.time()
        update = Update(
            **{
                "rollout": rollout.id,
                "model": rollout.model,
                "attempt": 1,
                "state": state,
                "result": result,
                "started_at": now - 1,
                "finished_at": now if result else None,
                "verdict": _verdict(rollout.model) if result else None,
                **more,
            }
        )
        serving = None
        if state == "probation" or result == "succeeded":
            serving = Serving(
                model=rollout.model,
                variant="int8",
                provider=PLAN.provider,
                plan=PLAN,
                committed=result is not None,
            )
        report = PipelineReport(serving=serving, update=update)
        reported = Reported(
            device=self.device, boot_id=self._boot_id, time=now, pipelines={rollout.pipeline: report}
        )
        self._publish("reported", reported)
        what = (
            Finished(pipeline=rollout.pipeline, update=update)
            if result
            else StateChanged(pipeline=rollout.pipeline, state=update.state, update=update)
        )
        self._seq += 1
        self._publish("event", Event(boot_id=self._boot_id, seq=self._seq, time=now, what=what))

    def succeed(self, rollout: Rollout) -> None:
        """The whole good way."""
        for state in ("downloading", "preparing", "validating", "switching"):
            self.play(rollout, state)
        self.play(rollout, "probation")
        numbers = {"p50_ms": 8.0, "live_end_to_end_p50_ms": 10.0, "live_end_to_end_p99_ms": 20.0}
        self.play(rollout, "idle", "succeeded", numbers=numbers)

    def fail(self, rollout: Rollout, result: str, reason: str) -> None:
        """To probation, and no further."""
        self.play(rollout, "probation")
        self.play(rollout, "idle", result, reason=reason)

    def _status(self, state: Any) -> Status:
        return Status(state=state, boot_id=self._boot_id)

    def _publish(self, kind: topics.Up, document: Document) -> None:
        sent = self.client.publish(
            topics.up(self.device, kind),
            document.to_bytes(),
            qos=topics.qos(kind),
            retain=kind in topics.RETAINED,
        )
        sent.wait_for_publish(WAIT_S)
        assert sent.is_published()


def _verdict(model: ModelRef) -> Verdict:
    chosen = PlanOutcome(plan=PLAN, outcome="chosen", p50_ms=8, p99_ms=9, ratio=1, parity=0.999)
    lost = PlanOutcome(
        plan=PLAN.model_copy(update={"threads": 2}), outcome="wrong_output", reason="cosine 0.7", parity=0.7
    )
    return Verdict(model_sha256=model.sha256, key="0" * 64, chosen=PLAN, plans=(chosen, lost), took_s=3)
