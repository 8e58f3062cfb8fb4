"""Which plans are tried, and which one wins."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime.plans import (
    ARENA,
    CPU,
    CUDA,
    GAIN_TO_REPLACE,
    MAX_CANDIDATES,
    OPENVINO,
    REFINEMENTS,
    SPINNING,
    TENSORRT,
    TIE,
    Machine,
    VariantFacts,
    candidates,
    choose,
    provider_name,
    unverified,
    worth_refining,
)
from edgeward_wire.contract import Contract
from edgeward_wire.manifest import TargetHints
from edgeward_wire.verdict import Plan, PlanOutcome

OLD_X86 = Machine("x86_64", frozenset({"avx2"}), (CPU,))
VNNI_X86 = Machine("x86_64", frozenset({"avx2", "avx512_vnni"}), (CPU,))
ORIN = Machine("aarch64", frozenset({"asimddp"}), (TENSORRT, CUDA, CPU))
INT8, FP32, FP16 = (VariantFacts(p, p * 8) for p in ("int8", "fp32", "fp16"))  # type: ignore[arg-type]


def titles(plans: list[Plan]) -> list[str]:
    return [plan.title for plan in plans]


def test_an_old_x86_also_tries_the_exact_sums() -> None:
    assert titles(candidates({"int8": INT8}, OLD_X86, threads=4)) == [
        "CPU int8 x4",
        "CPU int8 x1",
        "CPU int8 x4 x64quantprecision=1",
        "CPU int8 x1 x64quantprecision=1",
    ]


def test_vnni_has_exact_sums_anyway() -> None:
    assert titles(candidates({"int8": INT8, "fp32": FP32}, VNNI_X86, threads=1)) == [
        "CPU int8 x1",
        "CPU fp32 x1",
    ]


def test_an_arm_with_bf16_tries_it_for_fp32() -> None:
    machine = Machine("aarch64", frozenset({"bf16"}), (CPU,))
    assert titles(candidates({"fp32": FP32}, machine, threads=1))[1:] == [
        "CPU fp32 x1 mlas.enable_gemm_fastmath_arm64_bfloat16=1"
    ]


def test_the_accelerators_come_first_and_are_marked() -> None:
    found = candidates({"int8": INT8, "fp16": FP16}, ORIN, threads=2, scratch="/scratch")
    assert [p.provider for p in found][:4] == [TENSORRT, TENSORRT, CUDA, CUDA]
    assert [p.variant for p in found][:4] == ["int8", "fp16", "fp16", "int8"]
    assert [unverified(p) for p in found] == [p.provider != CPU for p in found]


def test_openvino_has_the_whole_budget_and_says_so() -> None:
    machine = Machine("x86_64", frozenset({"avx512_vnni"}), (OPENVINO, CPU))
    first, *_ = found = candidates({"int8": INT8}, machine, threads=4)
    assert titles(found) == ["OpenVINO int8 x4", "CPU int8 x4", "CPU int8 x1"]
    assert first.options == {"device_type": "CPU", "num_of_threads": "4"}
    assert not unverified(first)


def test_an_engine_is_cached_under_the_digest_of_its_weights() -> None:
    twin = VariantFacts("int8", "another")
    first, second = (
        candidates({"int8": facts}, ORIN, threads=1, scratch="/scratch")[0].options for facts in (INT8, twin)
    )
    assert first["trt_engine_cache_prefix"] != second["trt_engine_cache_prefix"]
    assert first["trt_engine_cache_path"] == "/scratch"


def tensorrt_options(
    facts: VariantFacts, major: int | None, contract: Contract | None = None
) -> dict[str, str]:
    machine = replace(ORIN, tensorrt=major)
    return candidates({"v": facts}, machine, threads=1, only=["tensorrt"], contract=contract)[0].options


@pytest.mark.parametrize(
    ("major", "flagged"), [(8, True), (10, True), (None, True), (11, False), (12, False)]
)
def test_precision_is_in_the_graph_from_tensorrt_11_on(major: int | None, flagged: bool) -> None:
    for facts, flag in ((INT8, "trt_int8_enable"), (FP16, "trt_fp16_enable")):
        assert (tensorrt_options(facts, major).get(flag) == "1") is flagged
    assert not {k for k in tensorrt_options(FP32, major) if k in {"trt_int8_enable", "trt_fp16_enable"}}


def test_an_engine_is_built_for_the_contract_s_shapes() -> None:
    """The names and the range of the dimensions come from the contract, never from a guess."""
    assert "trt_profile_min_shapes" not in tensorrt_options(
        FP32, 10, audio_contract({"batch": (1, 1, 1)}, fixed=True)
    )
    options = tensorrt_options(FP32, 10, audio_contract({"batch": (1, 2, 4), "n": (160, 512, 1600)}))
    assert options["trt_profile_min_shapes"] == "sound:1x160,state:2x1x8"
    assert options["trt_profile_opt_shapes"] == "sound:2x512,state:2x2x8"
    assert options["trt_profile_max_shapes"] == "sound:4x1600,state:2x4x8"


def audio_contract(ranges: dict[str, tuple[int, int, int]], *, fixed: bool = False) -> Contract:
    """A model with a state and a constant; `fixed`: no dimension is open."""
    batch: str | int = 1 if fixed else "batch"
    return Contract.model_validate(
        {
            "task": "tensor",
            "inputs": [
                {
                    "name": "sound",
                    "dtype": "float32",
                    "shape": [batch, 512 if fixed else "n"],
                    "bind": "source",
                },
                {"name": "state", "dtype": "float32", "shape": [2, batch, 8], "bind": "state:h"},
                {"name": "rate", "dtype": "int64", "shape": [], "bind": "const", "const": [16000]},
            ],
            "outputs": [
                {"name": "score", "dtype": "float32", "shape": [batch, 1]},
                {"name": "next", "dtype": "float32", "shape": [2, batch, 8], "bind": "state:h"},
            ],
            "dimensions": {
                name: {"min": low, "default": usual, "max": high}
                for name, (low, usual, high) in ranges.items()
            },
        }
    )


def test_a_directory_that_no_plan_can_name_is_no_cache() -> None:
    machine = Machine("x86_64", frozenset(), (TENSORRT, OPENVINO, CPU))
    near, far = (
        candidates({"int8": INT8}, machine, threads=1, scratch=scratch) for scratch in ("/s", "/s" * 101)
    )
    assert near[0].options["trt_engine_cache_path"] == near[1].options["cache_dir"] == "/s"
    assert "trt_engine_cache_enable" not in far[0].options
    assert "cache_dir" not in far[1].options


def test_the_exact_sums_are_tried_beside_whatever_else_there_is() -> None:
    """With every provider and three variants there is room for the plan that may be the only right one."""
    machine = Machine("x86_64", frozenset({"avx2"}), (TENSORRT, CUDA, CPU))
    found = candidates({"int8": INT8, "fp16": FP16, "fp32": FP32}, machine, threads=2)
    assert {"session.x64quantprecision": "1"} in [plan.session for plan in found]


def test_only_the_named_providers_even_if_this_build_lacks_them() -> None:
    assert titles(candidates({"int8": INT8}, VNNI_X86, threads=1, only=["cuda"])) == ["CUDA int8 x1"]
    assert provider_name("openvino") == OPENVINO
    assert provider_name("CPUExecutionProvider") == CPU
    assert provider_name("Qnn") == "QnnExecutionProvider"


def test_hints_keep_variants_off_other_machines() -> None:
    arm = VariantFacts("int8", "a", TargetHints(arch=("aarch64",)))
    new = VariantFacts("int8", "b", TargetHints(isa=("avx512_vnni", "avx_vnni")))
    gpu = VariantFacts("fp16", "c", TargetHints(providers=("CUDA", "Tensorrt")))
    variants = {"arm": arm, "new": new, "gpu": gpu, "any": FP32}
    assert {p.variant for p in candidates(variants, OLD_X86, threads=1)} == {"any"}
    assert {p.variant for p in candidates(variants, VNNI_X86, threads=1)} == {"any", "new"}
    assert next(p.variant for p in candidates(variants, ORIN, threads=1) if p.provider == TENSORRT) == "arm"
    assert "gpu" not in {p.variant for p in candidates(variants, ORIN, threads=1) if p.provider == CPU}


precisions = st.sampled_from(["int8", "fp16", "fp32"])
facts = st.builds(VariantFacts, precisions, st.just("0" * 64))


@given(
    variants=st.dictionaries(st.sampled_from([f"v{k}" for k in range(16)]), facts, max_size=16),
    arch=st.sampled_from(["x86_64", "aarch64", "riscv64"]),
    providers=st.lists(
        st.sampled_from([TENSORRT, CUDA, OPENVINO, CPU, "AzureExecutionProvider"]), unique=True
    ),
    threads=st.integers(1, 64),
)
def test_candidates_are_few_and_each_is_there_once(
    variants: dict[str, VariantFacts], arch: str, providers: list[str], threads: int
) -> None:
    found = candidates(variants, Machine(arch, frozenset(), tuple(providers)), threads=threads)
    assert len(found) <= MAX_CANDIDATES
    assert all(found.count(plan) == 1 for plan in found)
    assert all(p.threads <= threads and p.provider in providers and p.variant in variants for p in found)
    assert "AzureExecutionProvider" not in {p.provider for p in found}


def refined(plan: Plan) -> list[str]:
    """The titles of the plans that one more option makes of it."""
    return [found.title for refine in REFINEMENTS if (found := refine(plan)) is not None]


def test_a_plan_is_refined_by_one_option_at_a_time() -> None:
    plan = Plan(provider=CPU, variant="int8", threads=2, session={"session.x64quantprecision": "1"})
    assert refined(plan) == [
        "CPU int8 x2 allow_spinning=1 x64quantprecision=1",
        "CPU int8 x2 cpu_arena=0 x64quantprecision=1",
        "CPU int8 x2 opt=extended x64quantprecision=1",
    ]


def test_only_what_makes_a_difference_is_tried() -> None:
    """One thread waits for nobody; without fusion is worth a try where less layout helped."""
    assert refined(Plan(provider=CPU, variant="v")) == ["CPU v x1 cpu_arena=0", "CPU v x1 opt=extended"]
    assert refined(Plan(provider=CPU, variant="v", optimisation="extended"))[1:] == ["CPU v x1 opt=basic"]
    everything = Plan(
        provider=CPU, variant="v", threads=2, session={SPINNING: "1", ARENA: "0"}, optimisation="basic"
    )
    assert refined(everything) == []


def test_the_best_of_each_number_of_threads_is_refined_within_reach_of_the_fastest() -> None:
    def plan(threads: int, provider: str = CPU) -> Plan:
        return Plan(provider=provider, variant="v", threads=threads)

    assert worth_refining([]) == []
    assert worth_refining([(plan(1), 5.0), (plan(2), 4.0), (plan(2), 4.5)]) == [0, 1]
    assert worth_refining([(plan(1), 7.0), (plan(2), 4.0)]) == [1]
    assert worth_refining([(plan(1, CUDA), 1.0), (plan(2), 4.0)]) == []


def outcome(
    threads: int = 1,
    p50: float = 10.0,
    memory: float | None = 50.0,
    ratio: float | None = None,
    result: str = "passed",
) -> PlanOutcome:
    plan = Plan(provider=CPU, variant=f"v{p50}-{memory or 0}", threads=threads)
    return PlanOutcome(plan=plan, outcome=result, p50_ms=p50, memory_mb=memory, ratio=ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcomes", "winner"),
    [
        ([], None),
        ([outcome(result="not_loaded"), outcome(result="wrong_output", p50=1)], None),
        ([outcome(p50=10), outcome(p50=5)], 1),
        ([outcome(p50=5, result="wrong_output"), outcome(p50=10)], 1),
        ([outcome(p50=10, threads=4), outcome(p50=10.05, threads=1)], 1),  # a tie: fewer threads
        ([outcome(p50=10, threads=4), outcome(p50=10.2, threads=1)], 0),  # no tie
        ([outcome(p50=10, memory=90), outcome(p50=10.05, memory=40)], 1),  # a tie: less memory
        ([outcome(p50=10, memory=None), outcome(p50=10.05, memory=40)], 1),
        ([outcome(p50=3), outcome(p50=9, ratio=1.0, result="over_limit")], None),  # the finals were the test
        ([outcome(p50=3), outcome(p50=9, ratio=1.0), outcome(p50=8, ratio=1.2)], 1),  # pairs beat lone p50s
    ],
)
def test_choose(outcomes: list[PlanOutcome], winner: int | None) -> None:
    assert choose(outcomes) == winner


def test_an_incumbent_gives_way_to_ten_percent() -> None:
    held = outcome(p50=10, ratio=1.0)
    assert choose([held, outcome(p50=9.2, ratio=0.92)], held.plan) == 0
    assert choose([held, outcome(p50=8.9, ratio=0.89)], held.plan) == 1
    assert (
        choose([outcome(p50=10, ratio=1.0, result="wrong_output"), outcome(p50=20, ratio=2.0)], held.plan)
        == 1
    )


passing = st.builds(
    outcome,
    threads=st.integers(1, 8),
    p50=st.floats(0.1, 1000),
    memory=st.none() | st.floats(1, 1000),
    result=st.sampled_from(["passed", "passed", "not_loaded", "wrong_output", "over_limit"]),
)


@given(outcomes=st.lists(passing, max_size=12), held=st.integers(0, 11))
def test_the_winner_passed_and_is_nearly_the_fastest(outcomes: list[PlanOutcome], held: int) -> None:
    incumbent = outcomes[held].plan if held < len(outcomes) else None
    passed = [o for o in outcomes if o.outcome == "passed"]
    winner = choose(outcomes, incumbent)
    assert (winner is None) == (not passed)
    if winner is None:
        return
    best = min(o.p50_ms or 0 for o in passed)
    chosen = outcomes[winner]
    assert chosen in passed
    slack = 1 / GAIN_TO_REPLACE if chosen.plan == incumbent else 1.0
    assert (chosen.p50_ms or 0) <= best * TIE * slack * 1.0001
