"""What the machine says of itself, on this very machine, and what verdicts hang on."""

from __future__ import annotations

import platform
from dataclasses import replace

from agent.models import manifest
from edgeward_agent.sysinfo import available_mb, this_machine, usable_cores
from edgeward_agent.variants import needed_blobs, usable_variants
from edgeward_wire.manifest import TargetHints

HERE = replace(this_machine(), arch="aarch64", features=frozenset({"asimd", "asimddp"}))


def test_this_machine() -> None:
    machine = this_machine()
    assert machine.arch == platform.machine()
    assert machine.cores == usable_cores() >= 1
    assert machine.memory_mb > available_mb() > 0
    assert "CPU" in machine.providers
    assert len(machine.runtime_fingerprint) == 64


def test_a_verdict_hangs_on_all_that_decides() -> None:
    def key(
        model: str = "a" * 64,
        threads: int = 2,
        providers: tuple[str, ...] = (),
        power: str = "",
        arch: str = "x",
    ) -> str:
        machine = replace(HERE, arch=arch)
        return machine.verdict_key(model, threads=threads, providers=providers, power=power)

    others = {
        key(model="b" * 64),
        key(threads=1),
        key(providers=("CPU",)),
        key(power="MAXN"),
        key(arch="y"),
        replace(HERE, arch="x", runtime={"onnxruntime": "9"}).verdict_key(
            "a" * 64, threads=2, providers=(), power=""
        ),
    }
    assert len(others) == 6
    assert key() not in others
    assert key() == key()


def test_providers_follow_the_build() -> None:
    assert replace(HERE, runtime={"onnxruntime-gpu": "1"}).providers == ("Tensorrt", "CUDA", "CPU")
    assert replace(HERE, runtime={}).providers == ("CPU",)


def test_hints() -> None:
    def fits(only: tuple[str, ...] = (), **hints: tuple[str, ...]) -> bool:
        return usable_variants(manifest(targets=TargetHints(**hints)), HERE, only) == ("int8",)

    assert fits()
    assert fits(arch=("x86_64", "aarch64"))
    assert not fits(arch=("x86_64",))
    assert fits(isa=("asimddp",))
    assert fits(isa=("asimddp", "i8mm")), "one is enough, as plans.fits has it"
    assert not fits(isa=("avx512_vnni", "i8mm"))
    assert fits(providers=("cuda", "cpu"))
    assert not fits(providers=("Tensorrt",))
    assert fits(("TensorrtExecutionProvider",), providers=("Tensorrt",)), "agent.toml insists"


def test_only_what_may_be_used_is_fetched() -> None:
    model = manifest(targets=TargetHints(arch=("x86_64",)))
    assert [ref.name for ref in needed_blobs(model, HERE)] == ["labels.txt"]
    assert {ref.name for ref in needed_blobs(manifest(), HERE)} == {"labels.txt", "model.onnx", "golden.npz"}


def test_builds_that_exclude_one_another_are_named() -> None:
    both = replace(this_machine(), runtime={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"})
    fault = both.runtime_fault
    assert fault is not None
    assert "onnxruntime and onnxruntime-gpu" in fault.what
    assert replace(both, runtime={"onnxruntime": "1.32.0"}).runtime_fault is None
