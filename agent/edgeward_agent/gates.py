"""What live frames say about a model: probation's gates, and whether a verdict still fits. Decides only.

Invariants: missing data never passes a gate (no frames, no commit, as long as the pipeline has a source);
time is the monotonic clock, and stands still while no source delivers; only windows of the model on
probation count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from edgeward_agent.states import Breached, Deployment, Event, Held
from edgeward_wire.histogram import Histogram, merge
from edgeward_wire.reported import SourceReport
from edgeward_wire.telemetry import Measures
from edgeward_wire.verdict import Verdict

MAX_ERROR_SHARE = 0.05
MIN_FOR_ERRORS = 20
MIN_FOR_P99 = 50
NO_FRAMES_S = 30.0
STALE_RATIO = 1.2
STALE_WINDOWS = 3
MIN_FOR_STALE = 30


class Probation:
    """One candidate's probation. All times in seconds on the monotonic clock."""

    def __init__(self, deployment: Deployment, *, now: float, spent_s: float = 0.0) -> None:
        self._deployment = deployment
        self._duration_s = deployment.row.probation_s
        self._began = now - spent_s
        self._judged = now
        self._flowed = now
        self._first: tuple[int, int] | None = None
        self.frames = 0
        self.errors = 0
        self._inference = Histogram()
        self._end_to_end = Histogram()

    def heartbeat(self, frames: int, errors: int, now: float) -> None:
        """The runner's counters, which go on from before the switch."""
        first = self._first = self._first or (frames, errors)
        if frames - first[0] > self.frames:
            self._flowed = now
        self.frames, self.errors = frames - first[0], errors - first[1]

    def windows(self, measures: Iterable[Measures]) -> None:
        """What the runner measured."""
        mine = [m for m in measures if m.model == self._deployment.row.model]
        self._inference = merge(
            [self._inference, *(m.stages["inference"] for m in mine if "inference" in m.stages)]
        )
        whole = (m.stages["end_to_end"] for m in mine if "end_to_end" in m.stages)
        self._end_to_end = merge([self._end_to_end, *whole])

    def spent_s(self, now: float) -> float:
        """How long it has lasted."""
        return max(0.0, now - self._began)

    def progress(self, now: float) -> float:
        """0 to 1."""
        return 1.0 if self._duration_s <= 0 else min(1.0, self.spent_s(now) / self._duration_s)

    def detail(self, now: float, sources: Mapping[str, SourceReport]) -> str:
        """One line for people."""
        left = self._duration_s - self.spent_s(now)
        if left > 0 and (not sources or any(s.up for s in sources.values())):
            return f"{self.frames} frames, {left:.0f} s to go"
        down = [f"{name}: {s.detail}" if s.detail else name for name, s in sources.items() if not s.up]
        return f"waits for frames; down: {', '.join(down)}"[:200] if down else "waits for frames"

    def numbers(self) -> dict[str, float]:
        """What it came to."""
        figures = {"probation_frames": float(self.frames), "probation_errors": float(self.errors)}
        for name, histogram in (("inference", self._inference), ("end_to_end", self._end_to_end)):
            if histogram.count:
                figures[f"live_{name}_p50_ms"] = round(histogram.percentile(0.5), 3)
                figures[f"live_{name}_p99_ms"] = round(histogram.percentile(0.99), 3)
        return figures

    def judge(self, now: float, sources: Mapping[str, SourceReport]) -> Event | None:
        """`Breached`, `Held`, or None while it goes on. The clock stands still while every source is down.

        `sources`: all that the pipeline has, also those that were not heard of yet.
        """
        if sources and not any(source.up for source in sources.values()):
            self._began += now - self._judged
        self._judged = now
        over = self.spent_s(now) >= self._duration_s
        reason = self._breach(now, sources, over=over)
        if reason:
            return Breached(reason, self.numbers())
        return Held(self.numbers()) if over and (self.frames or not sources) else None

    def _breach(self, now: float, sources: Mapping[str, SourceReport], *, over: bool) -> str:
        total = self.frames + self.errors
        if self.errors and (total >= MIN_FOR_ERRORS or over) and self.errors / total > MAX_ERROR_SHARE:
            return f"{self.errors} of {total} frames failed in probation."
        limit = self._deployment.contents.limits.p99_ms
        if limit is not None and self._inference.count >= MIN_FOR_P99:
            p99 = self._inference.percentile(0.99)
            if p99 > limit:
                return f"p99 of inference is {p99:.1f} ms on live frames; the manifest allows {limit:.1f} ms."
        up = sorted(name for name, source in sources.items() if source.up)
        if not up:
            self._flowed = now  # nothing can flow; that is the camera's fault and not the model's
        elif now - self._flowed > NO_FRAMES_S:
            return f"No frame was served for {NO_FRAMES_S:.0f} s although {', '.join(up)} delivers."
        return ""


class LatencyWatch:
    """Live p50 above 1.2 x the verdict's, window after window, marks the verdict stale."""

    def __init__(self) -> None:
        self._verdict: Verdict | None = None
        self._slow = 0
        self.stale = False
        self.finding = ""
        """Why, in one sentence."""

    def look(self, deployment: Deployment, measures: Iterable[Measures]) -> bool:
        """Take one window of the committed model, the measures of all its sources together.

        True when its verdict has just become stale.
        """
        verdict = deployment.verdict
        if verdict != self._verdict:
            self._verdict, self._slow, self.stale = verdict, 0, False
        promised = verdict_numbers(verdict).get("p50_ms") if verdict else None
        before = self.stale
        live = merge(m.stages["inference"] for m in measures if "inference" in m.stages)
        if promised and live.count >= MIN_FOR_STALE:
            self._weigh(live.percentile(0.5), promised)
        return self.stale and not before

    def _weigh(self, live: float, promised: float) -> None:
        slow = live > STALE_RATIO * promised
        self._slow = self._slow + 1 if slow else 0
        self.stale = self._slow >= STALE_WINDOWS or (self.stale and slow)
        if slow:
            self.finding = f"Inference takes {live:.1f} ms; its verdict, now stale, says {promised:.1f} ms."


def verdict_numbers(verdict: Verdict) -> dict[str, float]:
    """The chosen plan's figures, for reports."""
    chosen = next((p for p in verdict.plans if p.outcome == "chosen"), None)
    figures: dict[str, float | None] = {"qualify_s": round(verdict.took_s, 3)}
    if chosen is not None:
        figures |= {
            "p50_ms": chosen.p50_ms,
            "p99_ms": chosen.p99_ms,
            "parity": chosen.parity,
            "load_ms": chosen.load_ms,
            "memory_mb": chosen.memory_mb,
        }
    return {name: value for name, value in figures.items() if value is not None}
