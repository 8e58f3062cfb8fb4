"""Execution plans and the verdict on them: what a device proved about how to run a model.

A plan is data: provider, its options, variant, session options. A plan that does not load is an
outcome with a reason, not an error. The verdict keeps the numbers of the plans that lost.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from edgeward_wire.document import Open
from edgeward_wire.identifiers import Key, Milliseconds, Reason, Sha256, ShortText, UnixTime, VariantName

MAX_PLANS = 64
_PREFIX = re.compile(r"^(session\.|edgeward\.)(intra_op\.)?")


class Plan(Open):
    """One way to run one variant on one provider."""

    provider: Key
    """ONNX Runtime's name, e.g. CPUExecutionProvider."""
    variant: VariantName
    threads: int = Field(default=1, ge=1, le=1024)
    options: dict[Key, ShortText] = Field(default_factory=dict, max_length=32)
    """The provider's options."""
    session: dict[Key, ShortText] = Field(default_factory=dict, max_length=32)
    """Session configuration entries, e.g. session.x64quantprecision = 1."""
    optimisation: Literal["none", "basic", "extended", "all"] = "all"

    @property
    def title(self) -> str:
        """One line for people: `CPU int8 x2 x64quantprecision=1`."""
        short = self.provider.removesuffix("ExecutionProvider")
        extra = [f"{_PREFIX.sub('', key)}={value}" for key, value in sorted(self.session.items())]
        level = [] if self.optimisation == "all" else [f"opt={self.optimisation}"]
        return " ".join([short, self.variant, f"x{self.threads}", *level, *extra])


Outcome = Literal[
    "chosen",
    "passed",
    "not_loaded",
    "wrong_provider",
    "wrong_output",
    "over_limit",
    "skipped",
]


class PlanOutcome(Open):
    """What came of trying one plan. Numbers are absent where it did not get so far."""

    plan: Plan
    outcome: Outcome
    reason: Reason = ""
    nodes_on_provider: int | None = None
    nodes_total: int | None = None
    parity: float | None = None
    """The smallest cosine of any golden output."""
    p50_ms: Milliseconds | None = None
    p99_ms: Milliseconds | None = None
    ratio: float | None = None
    """Paired latency against the plan that led before the finals; below 1 is faster."""
    load_ms: Milliseconds | None = None
    memory_mb: float | None = None
    unverified: bool = False
    """This kind of plan was never run on its hardware before it was released."""


class Verdict(Open):
    """What qualify found for one model on one device."""

    schema_: Literal["edgeward.verdict/1"] = Field(default="edgeward.verdict/1", alias="schema")
    model_sha256: Sha256
    key: Sha256
    """Digest of (model, runtime and provider versions, device fingerprint, power mode, threads)."""
    chosen: Plan | None = None
    plans: tuple[PlanOutcome, ...] = Field(default=(), max_length=MAX_PLANS)
    reason: Reason = ""
    """Why nothing was chosen."""
    runtime: dict[Key, ShortText] = Field(default_factory=dict, max_length=32)
    evidence: Literal["strong", "weak"] = "strong"
    provisional: bool = False
    """Measured while throttled or crowded."""
    decided_at: UnixTime = 0
    took_s: float = Field(default=0, ge=0)
