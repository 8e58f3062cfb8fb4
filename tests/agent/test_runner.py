"""The runner as a process, spoken to as the daemon does."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from edgeward_agent.messages import (
    FROM_RUNNER,
    Configure,
    Heartbeat,
    Ready,
    ResultSeen,
    RunnerMessage,
    Serve,
    ServeFailed,
    ServingNow,
    SourceChanged,
    SourceSpec,
    WindowClosed,
    encode,
)
from edgeward_wire.document import Document
from edgeward_wire.verdict import Plan
from runtime.builders import picture_directory, video_file
from runtime.bundles import Bundle, colour_bundle

M = TypeVar("M", bound=Document)


class Child:
    """A runner and the socket to it."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(30)
        command = [sys.executable, "-m", "edgeward_agent.runner", "--fd", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        self._lines = self._link.makefile("rb")
        self.heard: list[RunnerMessage] = []

    def send(self, message: Document) -> None:
        self._link.sendall(encode(message))

    def send_raw(self, raw: bytes) -> None:
        self._link.sendall(raw)

    def until(self, kind: type[M], holds: Callable[[M], bool] = lambda _: True) -> M:
        """Read on until such a message comes."""
        while True:
            line = self._lines.readline()
            assert line, f"the runner ended: {self.errors()}"
            message = FROM_RUNNER.validate_json(line)
            self.heard.append(message)
            if isinstance(message, kind) and holds(message):
                return message

    def all(self, kind: type[M]) -> list[M]:
        return [m for m in self.heard if isinstance(m, kind)]

    def hang_up(self) -> None:
        self._lines.close()
        self._link.close()

    def errors(self) -> str:
        self.process.wait(30)
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def close(self) -> None:
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def runner() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("bundle"), float_too=True)


def configure(uri: Path | str, *, window_s: float = 0.2, **more: object) -> Configure:
    source = SourceSpec.model_validate({"name": "cam", "uri": str(uri), "loop": True, **more})
    return Configure(pipeline="main", sources=(source,), window_s=window_s, result_interval_s=0.05)


def serve(bundle: Bundle, id: int = 1, variant: str = "int8", provider: str = "CPU") -> Serve:
    return Serve(
        id=id,
        model=bundle.ref,
        manifest=bundle.manifest,
        blobs=str(bundle.blobs),
        plan=Plan(provider=f"{provider}ExecutionProvider", variant=variant),
    )


def test_a_life(runner: Child, bundle: Bundle, tmp_path: Path) -> None:
    ready = runner.until(Ready)
    assert set(ready.runtime) == {"onnxruntime", "numpy", "opencv"}
    video = video_file(tmp_path / "v.avi", frames_each=10, fps=100)
    runner.send(configure(video, realtime=True, window_s=1.0))
    runner.send(serve(bundle))
    assert runner.until(ServingNow).id == 1
    result = runner.until(ResultSeen).result
    assert result.top[0].label in {"red", "green", "blue"}
    assert result.top[0].score > 0.9
    assert (result.model, result.version, result.source) == ("colours", "1", "cam")
    first = runner.until(WindowClosed).measures[0]
    second = runner.until(WindowClosed).measures[0]
    # Two clocks, read one after the other; a window that was lost would be missing wholly.
    assert second.start == pytest.approx(first.start + first.duration_s, abs=second.duration_s / 2)
    assert second.frames > 0
    assert second.model == bundle.ref
    runner.until(Heartbeat, lambda h: h.frames > 0 and h.errors == 0)
    assert SourceChanged(source="cam", up=True) in runner.all(SourceChanged)
    runner.hang_up()
    assert runner.process.wait(15) == 0


def test_models_change_under_a_playing_video(runner: Child, bundle: Bundle, tmp_path: Path) -> None:
    runner.send(configure(picture_directory(tmp_path / "p"), window_s=60))
    runner.send(serve(bundle, 1))
    runner.until(ResultSeen)
    runner.send(serve(bundle, 2, "fp32"))
    served = runner.until(ServingNow, lambda m: m.id == 2)
    assert served.gap_ms < 1000
    (closed,) = runner.all(WindowClosed)
    assert [m.variant for m in closed.measures] == ["int8"]
    runner.send(serve(bundle, 3, "fp32", provider="Qnn"))
    failed = runner.until(ServeFailed)
    assert failed == ServeFailed(id=3, reason="Qnn is not in this build of ONNX Runtime.")
    runner.until(ResultSeen)


def test_a_blob_that_is_missing_fails_the_order(runner: Child, bundle: Bundle, tmp_path: Path) -> None:
    runner.send(configure(picture_directory(tmp_path / "p")))
    runner.send(serve(bundle, 1).model_copy(update={"blobs": str(tmp_path)}))
    assert "cannot be read" in runner.until(ServeFailed).reason
    runner.send(serve(bundle, 2, variant="fp16"))
    assert runner.until(ServeFailed, lambda m: m.id == 2).reason == "The model has no variant 'fp16'."


def test_a_camera_that_is_not_there_is_reported_and_waited_for(
    runner: Child, bundle: Bundle, tmp_path: Path
) -> None:
    directory = tmp_path / "later"
    runner.send(configure(directory))
    runner.send(serve(bundle))
    down = runner.until(SourceChanged)
    assert down == SourceChanged(source="cam", up=False, detail=f"{directory} is not there.")
    runner.until(ServingNow)
    picture_directory(tmp_path / "made", ["blue"]).rename(directory)
    runner.until(SourceChanged, lambda m: m.up)
    assert runner.until(ResultSeen).result.top[0].label == "blue"


def test_a_setting_that_does_nothing_is_told_of_its_source(
    runner: Child, bundle: Bundle, tmp_path: Path
) -> None:
    runner.send(configure(picture_directory(tmp_path / "p"), classes=["gren", "blue"]))
    runner.send(serve(bundle))
    what = "classes: no label of the model is gren (near: green)."
    runner.until(SourceChanged, lambda m: m.up and m.detail == what)
    runner.until(ServingNow)
    runner.hang_up()
    assert runner.errors().count(f"source cam: {what}") == 1


def test_the_window_can_change(runner: Child, bundle: Bundle, tmp_path: Path) -> None:
    pictures = picture_directory(tmp_path / "p")
    runner.send(configure(pictures, window_s=3600))
    runner.send(serve(bundle))
    runner.until(ServingNow)
    runner.send(configure(pictures, window_s=0.1))
    window = runner.until(WindowClosed)
    assert window.measures[0].duration_s < 3600


def test_a_message_that_nobody_knows_is_a_bug_and_ends_it(runner: Child) -> None:
    runner.until(Ready)
    runner.send_raw(b'{"kind": "dance"}\n')
    assert runner.process.wait(15) != 0


def test_the_terminal_is_not_its_business(runner: Child) -> None:
    runner.until(Ready)
    runner.process.send_signal(signal.SIGINT)
    runner.until(Heartbeat)
    assert runner.process.poll() is None


def test_it_ends_when_the_daemon_is_gone_in_the_middle_of_everything(
    runner: Child, bundle: Bundle, tmp_path: Path
) -> None:
    runner.send(configure(picture_directory(tmp_path / "p"), window_s=0.1))
    runner.send(serve(bundle))
    runner.until(ResultSeen)
    runner.hang_up()
    assert runner.process.wait(15) == 0
