"""The GPU build on a machine without a GPU: it lists CUDA and TensorRT, and neither works.

Each such plan must end as a verdict with its reason, and the CPU must win: that is what a fleet meets when
a driver is missing. scripts/test-matrix makes the environment and runs `-m gpu_build`.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import missing
from edgeward_agent.messages import FROM_QUALIFY, Qualify, QualifyDone, QualifyProgress, encode
from edgeward_runtime.plans import CPU, CUDA, TENSORRT
from edgeward_runtime.sessions import (
    NotLoaded,
    WrongProvider,
    available_providers,
    open_session,
    tensorrt_major,
)
from edgeward_wire.verdict import Plan, PlanOutcome, Verdict
from runtime.builders import int8_classifier, picture_directory
from runtime.bundles import Bundle, colour_bundle

pytestmark = pytest.mark.gpu_build

SHIPPED = Path(__file__).parents[2] / "models/zoo/efficientnet-lite0.onnx"


@pytest.fixture(scope="module", autouse=True)
def build() -> None:
    if CUDA not in available_providers():
        missing("the GPU build of ONNX Runtime")
    if Path("/dev/nvidia0").exists() or Path("/dev/nvgpu").exists():
        pytest.skip("this machine has a GPU")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("gpu"), float_too=True)


def agent(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeward_agent.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def verdict_of(bundle: Bundle, directory: Path, *providers: str) -> tuple[Verdict, list[str]]:
    """What the qualify child says, and what it was at; it must end by itself and in order."""
    order = Qualify(
        model=bundle.ref,
        manifest=bundle.manifest,
        blobs=str(bundle.blobs),
        threads=1,
        providers=providers,
        key="a" * 64,
        lock=str(directory / "qualify.lock"),
        scratch=str(directory),
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        words = [sys.executable, "-m", "edgeward_agent.qualify", "--fd", str(theirs.fileno())]
        with subprocess.Popen(words, pass_fds=[theirs.fileno()]) as process:
            theirs.close()
            ours.sendall(encode(order))
            with ours.makefile("rb") as lines:
                messages = [FROM_QUALIFY.validate_json(line) for line in lines]
        assert process.returncode == 0
    done = messages[-1]
    assert isinstance(done, QualifyDone)
    return done.verdict, [m.note for m in messages if isinstance(m, QualifyProgress)]


def refused(outcome: PlanOutcome) -> bool:
    """A verdict on an accelerator: that it does not work here, why on one line, and no numbers."""
    return (
        outcome.outcome in {"not_loaded", "wrong_provider"}
        and bool(outcome.reason)
        and "\n" not in outcome.reason
        and outcome.unverified
        and outcome.p50_ms is outcome.parity is None
    )


def test_the_list_of_providers_is_a_list_of_what_was_compiled() -> None:
    assert available_providers()[:2] == (TENSORRT, CUDA)


@pytest.mark.parametrize(("provider", "fault"), [(TENSORRT, NotLoaded), (CUDA, WrongProvider)])
def test_a_session_does_not_come_up_on_it(
    provider: str, fault: type[NotLoaded], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(fault):
        open_session(int8_classifier(tmp_path / "m.onnx"), Plan(provider=provider, variant="int8"))
    assert capfd.readouterr() == ("", "")


def test_all_are_tried_and_the_cpu_is_chosen(bundle: Bundle, tmp_path: Path) -> None:
    verdict, notes = verdict_of(bundle, tmp_path)
    tried = [(o.plan.provider, o.plan.variant) for o in verdict.plans if o.plan.provider != CPU]
    assert tried == [(TENSORRT, "int8"), (TENSORRT, "fp32"), (CUDA, "fp32"), (CUDA, "int8")]
    assert all(refused(o) for o in verdict.plans if o.plan.provider != CPU)
    assert {o.outcome for o in verdict.plans if o.plan.provider == CPU} == {"passed", "chosen"}
    assert verdict.chosen is not None
    assert verdict.chosen.provider == CPU
    assert any(note.startswith("Tensorrt") for note in notes)


def test_without_the_cpu_nothing_is_chosen_and_the_reason_is_told(bundle: Bundle, tmp_path: Path) -> None:
    verdict, _ = verdict_of(bundle, tmp_path, "tensorrt", "cuda")
    assert verdict.chosen is None
    assert len(verdict.plans) == 4
    assert all(map(refused, verdict.plans))
    assert verdict.reason.startswith("No plan passed. Tensorrt int8 x1: ")


def test_probe_shows_it_all_and_is_fine() -> None:
    said = agent("probe", SHIPPED)
    assert (said.returncode, said.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in said.stdout.splitlines()]
    assert "Tensorrt int8 x1 * not loaded" in lines
    assert "CUDA int8 x1 * wrong provider" in lines
    assert "CUDA int8 x1: CUDA was asked for, and the session came up on CPU." in said.stdout
    assert "Best: CPU int8 x" in said.stdout


def test_run_takes_the_cpu_and_refuses_a_gpu_by_name(bundle: Bundle, tmp_path: Path) -> None:
    pictures = picture_directory(tmp_path / "pictures")
    words = ("run", "--model", bundle.blobs.parent / "files-1/int8.onnx", "--source", pictures, "--json")
    said = agent(*words, "--probe")
    assert said.returncode == 0, said.stderr
    *frames, summary = (json.loads(line) for line in said.stdout.splitlines())
    assert [frame["top"][0]["label"] for frame in frames] == ["red", "green", "blue"]
    assert summary["plan"].startswith("CPU ")
    said = agent(*words, "--provider", "cuda")
    assert said.returncode == 1
    assert said.stderr.startswith("error: CUDA was asked for, and the session came up on CPU.\nnext: ")
    assert "Traceback" not in said.stderr


def test_the_build_says_which_tensorrt_it_links() -> None:
    """Which decides the flags: TensorRT 11 has none for precision."""
    assert tensorrt_major() in range(8, 20)
