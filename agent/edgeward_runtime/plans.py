"""Which plans are worth a try on a machine, and which one wins. Pure: nothing is loaded here.

Preference (TensorRT, CUDA, OpenVINO, CPU) says what is tried first; only measurements say what wins.
On the CPU the best of these are then refined, one session option at a time. The fastest that passed wins;
within 1 % is a tie: fewer threads, then less memory. An incumbent gives way only to a plan that is at least
10 % faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeward_wire.contract import Contract, DimensionRange
from edgeward_wire.manifest import Precision, TargetHints
from edgeward_wire.verdict import Plan, PlanOutcome

MAX_CANDIDATES = 16
TIE = 1.01
GAIN_TO_REPLACE = 0.90
GAIN_TO_REFINE = 0.99
"""An option that gives less than this has no place in a plan."""

TENSORRT = "TensorrtExecutionProvider"
CUDA = "CUDAExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
CPU = "CPUExecutionProvider"
PREFERENCE = (TENSORRT, CUDA, OPENVINO, CPU)

_WORTH: dict[str, tuple[Precision, ...]] = {
    TENSORRT: ("int8", "fp16", "fp32"),
    CUDA: ("fp16", "fp32", "int8"),  # its INT8 operators fall to the CPU: last
    OPENVINO: ("int8", "fp32", "fp16"),
    CPU: ("int8", "fp32", "fp16"),
}
_VERIFIED = frozenset({CPU, OPENVINO})
_ARM_BF16 = "mlas.enable_gemm_fastmath_arm64_bfloat16"
SPINNING = "session.intra_op.allow_spinning"
"""A plan's session entry: "1" lets worker threads spin within a run, never between runs (adr/0007)."""
ARENA = "edgeward.cpu_arena"
"""A plan's session entry that ONNX Runtime has as an option: "0" takes memory anew in each run."""
_WITHIN_REACH = 1.5
"""What is slower than the fastest by more cannot pass it by its options."""
_MAX_VARIANTS = 3
_MAX_OPTION = 200
"""Characters of an option's value, as `Plan` has it."""
_TYPED_BY_GRAPH = 11
"""From this TensorRT on, precision is in the graph alone, and the flags are gone."""


@dataclass(frozen=True)
class Machine:
    """What a plan depends on."""

    arch: str
    """As `platform.machine()` prints it."""
    isa: frozenset[str]
    """The processor's features by the kernel's names; empty when nobody knows."""
    providers: tuple[str, ...]
    """What this build of ONNX Runtime was compiled with."""
    tensorrt: int | None = None
    """The major version of TensorRT that it links; None when nobody knows."""


@dataclass(frozen=True)
class VariantFacts:
    """What a plan needs to know of a variant."""

    precision: Precision
    sha256: str
    targets: TargetHints = field(default_factory=TargetHints)


def candidates(
    variants: Mapping[str, VariantFacts],
    machine: Machine,
    *,
    threads: int,
    only: Sequence[str] = (),
    scratch: str = "",
    contract: Contract | None = None,
) -> list[Plan]:
    """At most `MAX_CANDIDATES` plans, the most promising first.

    `threads` is the budget; `only` names providers (with or without `ExecutionProvider`) and includes
    them even if this build lacks them, so that the verdict says so; `scratch` is where engines are cached;
    `contract` gives the shapes that an engine is built for, where the graph leaves them open.
    """
    wanted = {provider_name(name) for name in only}
    providers = [p for p in PREFERENCE if (p in wanted if wanted else p in machine.providers)]
    providers += sorted(wanted - set(PREFERENCE))
    room = _Room(machine, threads, scratch, contract)
    found: list[Plan] = []
    for provider in providers:
        fitting = {name: v for name, v in variants.items() if fits(v.targets, machine, provider)}
        found += _of_provider(provider, fitting, room)
    return found[:MAX_CANDIDATES]


def provider_name(name: str) -> str:
    """`cpu`, `CPU`, `CPUExecutionProvider` -> ONNX Runtime's name."""
    short = name.removesuffix("ExecutionProvider")
    known = {p.removesuffix("ExecutionProvider").lower(): p for p in PREFERENCE}
    return known.get(short.lower(), f"{short}ExecutionProvider")


def fits(targets: TargetHints, machine: Machine, provider: str) -> bool:
    """Whether a variant's hints allow this machine and provider: any value of a hint, or an empty hint."""
    if targets.arch and machine.arch not in targets.arch:
        return False
    if targets.isa and machine.isa and not set(targets.isa) & machine.isa:
        return False
    return not targets.providers or provider in {provider_name(p) for p in targets.providers}


def unverified(plan: Plan) -> bool:
    """Whether this kind of plan has never run on its hardware in our hands."""
    return plan.provider not in _VERIFIED or _ARM_BF16 in plan.session


def worth_refining(passed: Sequence[tuple[Plan, float]]) -> list[int]:
    """Which of these plans (with their latencies, in any unit) to refine: the CPU's fastest of each number
    of threads, where it is within reach of the fastest of all."""
    fastest = min((slowness for _, slowness in passed), default=0.0)
    best: dict[int, int] = {}
    for k in sorted(range(len(passed)), key=lambda k: passed[k][1]):
        if passed[k][0].provider == CPU and passed[k][1] <= fastest * _WITHIN_REACH:
            best.setdefault(passed[k][0].threads, k)
    return sorted(best.values())


def _spinning(plan: Plan) -> Plan | None:
    return _with(plan, SPINNING, "1") if plan.threads > 1 else None


def _without_arena(plan: Plan) -> Plan | None:
    return _with(plan, ARENA, "0")


def _extended(plan: Plan) -> Plan | None:
    """Without the layout that the processor likes best: its conversions can cost more than it gives."""
    return plan.model_copy(update={"optimisation": "extended"}) if plan.optimisation == "all" else None


def _basic(plan: Plan) -> Plan | None:
    """Without ONNX Runtime's own fused operators; tried only where the level above it has won already."""
    return plan.model_copy(update={"optimisation": "basic"}) if plan.optimisation == "extended" else None


REFINEMENTS: tuple[Callable[[Plan], Plan | None], ...] = (_spinning, _without_arena, _extended, _basic)
"""What is tried on a plan that is worth it, in this order: the same with one option more, or None."""


def _with(plan: Plan, key: str, value: str) -> Plan | None:
    return None if key in plan.session else plan.model_copy(update={"session": {**plan.session, key: value}})


def choose(outcomes: Sequence[PlanOutcome], incumbent: Plan | None = None) -> int | None:
    """The index of the winner among those that passed, or None."""
    passed = {k: o for k, o in enumerate(outcomes) if o.outcome == "passed"}
    slowness = {k: o.ratio for k, o in passed.items() if o.ratio is not None}
    if all(o.ratio is None for o in outcomes):  # without finals the screening decides
        slowness = {k: o.p50_ms for k, o in passed.items() if o.p50_ms is not None}
    if not slowness:
        return None

    def cost(k: int) -> tuple[int, float, float]:
        memory = passed[k].memory_mb
        return passed[k].plan.threads, math.inf if memory is None else memory, slowness[k]

    limit = min(slowness.values()) * TIE
    best = min((k for k, slow in slowness.items() if slow <= limit), key=cost)
    held = next((k for k in slowness if passed[k].plan == incumbent), None)
    if held is not None and slowness[best] > slowness[held] * GAIN_TO_REPLACE:
        return held
    return best


@dataclass(frozen=True)
class _Room:
    """What all plans of one call have in common."""

    machine: Machine
    threads: int
    scratch: str
    contract: Contract | None


def _of_provider(provider: str, variants: Mapping[str, VariantFacts], room: _Room) -> list[Plan]:
    worth = _WORTH.get(provider, ("int8", "fp16", "fp32"))
    names = sorted(variants, key=lambda name: (worth.index(variants[name].precision), name))
    if provider == CPU:
        return _cpu(names, variants, room.machine, room.threads)
    plans = []
    for name in names[:_MAX_VARIANTS]:
        options = _OPTIONS.get(provider, _no_options)(variants[name], room)
        own = room.threads if provider == OPENVINO else 1  # a GPU leaves the cores to the others
        plans.append(Plan(provider=provider, variant=name, threads=own, options=options))
    return plans


def _cpu(
    names: Sequence[str], variants: Mapping[str, VariantFacts], machine: Machine, threads: int
) -> list[Plan]:
    """Each variant as it is, on the whole budget and on one thread; then with the options that may help."""
    counts = sorted({threads, 1}, reverse=True)
    plain = [Plan(provider=CPU, variant=name, threads=n) for name in names[:_MAX_VARIANTS] for n in counts]
    special = [
        Plan(provider=CPU, variant=name, threads=n, session=session)
        for name in names[:_MAX_VARIANTS]
        for session in _cpu_sessions(variants[name].precision, machine)
        for n in counts
    ]
    return plain + special


def _cpu_sessions(precision: Precision, machine: Machine) -> list[dict[str, str]]:
    if machine.arch == "x86_64" and precision == "int8" and "avx512_vnni" not in machine.isa:
        # Without VNNI the sums of U8S8 saturate at 16 bits: exact is slower, and may be the one that passes.
        return [{"session.x64quantprecision": "1"}]
    if machine.arch == "aarch64" and precision == "fp32" and "bf16" in machine.isa:
        return [{_ARM_BF16: "1"}]
    return []


def _tensorrt(variant: VariantFacts, room: _Room) -> dict[str, str]:
    options = {"device_id": "0"}
    if room.machine.tensorrt is None or room.machine.tensorrt < _TYPED_BY_GRAPH:
        flag = {"int8": "trt_int8_enable", "fp16": "trt_fp16_enable"}.get(variant.precision)
        options |= {flag: "1"} if flag else {}
    if room.contract is not None:
        options |= _profiles(room.contract)
    if _cacheable(room.scratch):
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": room.scratch,
            # TensorRT's own key ignores the weights: two models of one architecture would share an engine.
            "trt_engine_cache_prefix": variant.sha256[:32],
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": room.scratch,
        }
    return options


def _profiles(contract: Contract) -> dict[str, str]:
    """The least, usual and greatest shapes of the inputs whose shapes are open: of all or of none."""
    if not any(isinstance(size, str) for port in contract.inputs for size in port.shape):
        return {}

    def shapes(which: Callable[[DimensionRange], int]) -> str:
        sizes = {
            port.name: [which(contract.dimensions[d]) if isinstance(d, str) else d for d in port.shape]
            for port in contract.inputs
            if any(isinstance(d, str) for d in port.shape)
        }
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items())

    found = {
        "trt_profile_min_shapes": shapes(lambda size: size.min),
        "trt_profile_opt_shapes": shapes(lambda size: size.default),
        "trt_profile_max_shapes": shapes(lambda size: size.max),
    }
    # Without profiles an engine is built for what comes first: the default shapes, of the golden inputs.
    return found if all(len(text) <= _MAX_OPTION for text in found.values()) else {}


def _cuda(variant: VariantFacts, room: _Room) -> dict[str, str]:
    return {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC"}


def _openvino(variant: VariantFacts, room: _Room) -> dict[str, str]:
    options = {"device_type": "CPU", "num_of_threads": str(room.threads)}
    # Compiled models, by OpenVINO's own digest of graph and weights.
    return options | ({"cache_dir": room.scratch} if _cacheable(room.scratch) else {})


def _no_options(variant: VariantFacts, room: _Room) -> dict[str, str]:
    return {}


def _cacheable(scratch: str) -> bool:
    """Whether it can be named in a plan's options; a cache is not worth a plan that cannot be told."""
    return 0 < len(scratch) <= _MAX_OPTION


_OPTIONS: dict[str, Callable[[VariantFacts, _Room], dict[str, str]]] = {
    TENSORRT: _tensorrt,
    CUDA: _cuda,
    OPENVINO: _openvino,
}
