"""Qualify as a process, and its lock."""

from __future__ import annotations

import fcntl
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeward_agent.messages import (
    FROM_QUALIFY,
    Qualify,
    QualifyDone,
    QualifyMessage,
    QualifyProgress,
    encode,
)
from edgeward_agent.qualify import EXIT_ABANDONED, machine_lock, qualify
from edgeward_wire.errors import Unavailable
from edgeward_wire.manifest import Limits
from edgeward_wire.verdict import Plan
from runtime.bundles import Bundle, colour_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("bundle"), float_too=True)


def order(bundle: Bundle, directory: Path, **more: object) -> Qualify:
    return Qualify.model_validate(
        {
            "model": bundle.ref,
            "manifest": bundle.manifest,
            "blobs": str(bundle.blobs),
            "threads": 1,
            "key": "a" * 64,
            "lock": str(directory / "qualify.lock"),
            "scratch": str(directory),
            **more,
        }
    )


class Child:
    """A qualify, its order sent."""

    def __init__(self, wanted: Qualify) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(60)
        command = [sys.executable, "-m", "edgeward_agent.qualify", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self._link.sendall(encode(wanted))
        self._lines = self._link.makefile("rb")

    def messages(self) -> Iterator[QualifyMessage]:
        for line in self._lines:
            yield FROM_QUALIFY.validate_json(line)

    def hang_up(self) -> None:
        self._lines.close()
        self._link.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self.process.kill()
        self.process.wait()


def outcome_of(wanted: Qualify) -> tuple[list[QualifyProgress], QualifyDone]:
    with Child(wanted) as child:
        *progress, done = child.messages()
        assert child.process.wait(30) == 0
    assert isinstance(done, QualifyDone)
    return [p for p in progress if isinstance(p, QualifyProgress)], done


def test_a_verdict(bundle: Bundle, tmp_path: Path) -> None:
    progress, done = outcome_of(order(bundle, tmp_path))
    assert [p.phase for p in progress][:1] == ["preparing"]
    assert progress[-1].phase == "validating"
    verdict = done.verdict
    assert verdict.chosen is not None
    assert verdict.model_sha256 == bundle.ref.sha256
    assert verdict.key == "a" * 64
    assert {o.plan.variant for o in verdict.plans} == {"int8", "fp32"}
    assert verdict.evidence == "strong"
    assert verdict.took_s > 0
    assert set(verdict.runtime) == {"onnxruntime", "numpy", "opencv"}


def test_only_what_was_fetched_is_tried(bundle: Bundle, tmp_path: Path) -> None:
    """A device that may not use a variant has not fetched its file."""
    there = tmp_path / "blobs"
    there.mkdir()
    for blob in bundle.manifest.blobs():
        if blob.sha256 != bundle.manifest.variants["fp32"].model.sha256:
            (there / blob.sha256).symlink_to(bundle.blob(blob))
    _, done = outcome_of(order(bundle, tmp_path, blobs=str(there)))
    assert {o.plan.variant for o in done.verdict.plans} == {"int8"}


def test_what_cannot_run_is_a_verdict_with_a_reason(bundle: Bundle, tmp_path: Path) -> None:
    tight = bundle.with_manifest(limits=Limits(p99_ms=1e-6))
    _, done = outcome_of(order(tight, tmp_path))
    assert done.verdict.chosen is None
    assert "the manifest allows" in done.verdict.reason
    _, done = outcome_of(order(bundle, tmp_path, providers=("Qnn",)))
    assert done.verdict.reason == "No plan passed. Qnn is not in this build of ONNX Runtime."
    contract = bundle.manifest.contract.model_copy(update={"task": "segmentation"})
    _, done = outcome_of(order(bundle.with_manifest(contract=contract), tmp_path))
    assert "A segmentation has an output (1, classes, height, width)" in done.verdict.reason


def test_the_incumbent_is_paired_with_the_others(bundle: Bundle, tmp_path: Path) -> None:
    held = Plan(provider="CPUExecutionProvider", variant="fp32", threads=1, optimisation="basic")
    _, done = outcome_of(order(bundle, tmp_path, incumbent=held))
    assert next(o for o in done.verdict.plans if o.plan == held).ratio is not None


def test_one_at_a_time_on_a_machine(bundle: Bundle, tmp_path: Path) -> None:
    wanted = order(bundle, tmp_path)
    with open(wanted.lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Child(wanted) as child:
            messages = child.messages()
            first = next(messages)
            assert isinstance(first, QualifyProgress)
            assert first.phase == "waiting"
            fcntl.flock(held, fcntl.LOCK_UN)
            assert isinstance(list(messages)[-1], QualifyDone)
            assert child.process.wait(30) == 0


def test_sigterm_ends_it_at_once_and_frees_the_lock(bundle: Bundle, tmp_path: Path) -> None:
    with Child(order(bundle, tmp_path)) as child:
        next(child.messages())
        child.process.send_signal(signal.SIGTERM)
        assert child.process.wait(30) == -signal.SIGTERM
    with machine_lock(tmp_path / "qualify.lock", lambda _: pytest.fail("somebody holds the lock")):
        pass


def test_it_ends_when_the_daemon_is_gone(bundle: Bundle, tmp_path: Path) -> None:
    wanted = order(bundle, tmp_path)
    with open(wanted.lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with Child(wanted) as child:
            next(child.messages())
            child.hang_up()
            assert child.process.wait(30) == EXIT_ABANDONED


def test_the_wait_for_the_lock_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    waited: list[float] = []
    with (
        machine_lock(path, waited.append),
        pytest.raises(Unavailable, match="has held"),
        machine_lock(path, waited.append, limit_s=0.05),
    ):
        pass
    assert len(waited) == 1
    with pytest.raises(Unavailable, match="cannot be opened"), machine_lock(tmp_path, waited.append):
        pass


# --- a device that is hot


THROTTLED = "sys/class/thermal/cooling_device1/cur_state"


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """Where /proc and /sys of a Jetson are."""
    return Path(shutil.copytree(Path(__file__).parent / "jetson_orin", tmp_path / "orin"))


def test_it_waits_while_the_device_is_throttled(bundle: Bundle, tmp_path: Path, orin: Path) -> None:
    (orin / THROTTLED).write_text("2\n")
    with Child(order(bundle, tmp_path, root=str(orin))) as child:
        messages = child.messages()
        first = next(messages)
        assert isinstance(first, QualifyProgress)
        assert first.phase == "waiting"
        assert first.note.startswith("The device is slowed down (cpufreq-cpu0).")
        (orin / THROTTLED).write_text("0\n")
        *progress, done = messages
        assert child.process.wait(30) == 0
    assert {p.phase for p in progress if isinstance(p, QualifyProgress)} <= {
        "waiting",
        "preparing",
        "validating",
    }
    assert isinstance(done, QualifyDone)
    assert done.verdict.chosen is not None


def test_it_pauses_where_it_is(bundle: Bundle, tmp_path: Path, orin: Path) -> None:
    """The device grows hot while plans are tried: what was measured then is provisional.

    Not as a process: it would have looked for the last time before a slow test has made it hot.
    """
    said: list[QualifyProgress] = []

    def say(message: QualifyMessage) -> None:
        assert isinstance(message, QualifyProgress)
        said.append(message)
        if len(said) == 1:
            (orin / THROTTLED).write_text("1\n")
        elif message.phase == "waiting":
            (orin / THROTTLED).write_text("0\n")

    verdict = qualify(order(bundle, tmp_path, root=str(orin)), say)
    assert said[0].phase == "preparing"
    waits = [message.note for message in said if message.phase == "waiting"]
    assert waits
    assert "cpufreq-cpu0" in waits[0]
    assert said[-1].phase == "validating", "it went on"
    assert verdict.chosen is not None
    assert verdict.provisional


def test_it_measures_at_last_and_says_that_it_is_provisional(
    bundle: Bundle, tmp_path: Path, orin: Path
) -> None:
    progress, done = outcome_of(order(bundle, tmp_path, root=str(orin), max_temp_c=40, cool_s=0.5))
    assert progress[0].phase == "waiting"
    assert progress[0].note.startswith("The device is at 52 °C; max_temp_c is 40.")
    assert done.verdict.chosen is not None
    assert done.verdict.provisional
