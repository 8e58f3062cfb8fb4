"""A real qualify process that measures nothing: it finds what the manifest's annotation `qualify` says.

ok (default), none, crash, exit, later, babble, hang, hungry. Each start is noted in `<scratch>/../starts`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from talk import Talk

from edgeward_agent import messages
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict


def judge(order: messages.Qualify, *, memory_mb: float) -> Verdict:
    plan = Plan(
        provider="CPUExecutionProvider", variant=sorted(order.manifest.variants)[0], threads=order.threads
    )
    figures = {"p50_ms": 5.0, "p99_ms": 9.0, "parity": 0.999, "memory_mb": memory_mb}
    chosen = PlanOutcome(plan=plan, outcome="chosen", **figures)
    return Verdict(model_sha256=order.model.sha256, key=order.key, chosen=plan, plans=(chosen,), took_s=0.1)


def main() -> int:
    talk = Talk()
    line = next(talk.lines(None))
    assert line is not None
    order = messages.Qualify.model_validate_json(line)
    with (Path(order.scratch).parent / "starts").open("a") as file:
        file.write(f"{order.model.version}\n")
    talk.say(messages.QualifyProgress(phase="preparing", done=1, total=4, note="CPU int8 x1"))
    match order.manifest.annotations.get("qualify", "ok"):
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            print("no such thing", file=sys.stderr, flush=True)
            return 3
        case "later":
            marker = Path(order.scratch) / "later"
            if not marker.exists():
                marker.touch()
                return 75
        case "babble":
            talk.socket.sendall(b'{"kind": "gossip"}\n')
            time.sleep(600)
        case "hang":
            time.sleep(600)
        case "none":
            talk.say(messages.QualifyProgress(phase="validating", done=1, total=4))
            reason = "No plan passed: int8 gives wrong output (0.71)."
            verdict = Verdict(model_sha256=order.model.sha256, key=order.key, reason=reason)
            talk.say(messages.QualifyDone(verdict=verdict))
            return 0
    talk.say(messages.QualifyProgress(phase="validating", done=3, total=4))
    hungry = order.manifest.annotations.get("qualify") == "hungry"
    talk.say(messages.QualifyDone(verdict=judge(order, memory_mb=1e9 if hungry else 1.0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
