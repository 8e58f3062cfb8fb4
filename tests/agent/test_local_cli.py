"""`edgeward-agent run` and `probe`, as commands."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from edgeward_agent import local_cli
from edgeward_agent.cli import main
from edgeward_agent.local_cli import table
from edgeward_agent.sensors import Sensors
from edgeward_runtime.pipeline import Pipeline, SourceChange
from edgeward_wire.telemetry import Stage
from runtime.builders import (
    int8_classifier,
    labels_file,
    listener,
    listener_sidecar,
    picture_directory,
    sidecar_file,
    video_file,
    wav_file,
)

RUN = ("run", "--model", "{tmp}/m.onnx", "--source")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    labels_file(tmp_path / "labels.txt")
    sidecar_file(tmp_path / "m.toml")
    return int8_classifier(tmp_path / "m.onnx")


def command(*words: object) -> int:
    parser = argparse.ArgumentParser()
    local_cli.register(parser.add_subparsers(required=True))
    arguments = parser.parse_args([str(word) for word in words])
    code: int = arguments.handler(arguments)
    return code


def test_run_shows_labels_and_latencies(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = video_file(tmp_path / "v.avi", ["green"], frames_each=12)
    assert command("run", "--model", model, "--source", video) == 0
    out = capsys.readouterr().out
    assert out.startswith("green ")
    assert "12 frames" in out
    assert all(stage in out for stage in ("capture", "decode", "preprocess", "inference", "end to end"))


def test_run_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = picture_directory(tmp_path / "p")
    assert command("run", "--model", model, "--source", pictures, "--loop", "--frames", 5, "--json") == 0
    *frames, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [f["top"][0]["label"] for f in frames] == ["red", "green", "blue", "red", "green"]
    assert summary["frames"] == 5
    assert set(summary["stages"]) >= {"inference", "end_to_end"}


def test_no_frame_waits_for_the_loading_of_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, served = Pipeline.start, list[bool]()

    def watched(pipeline: Pipeline) -> None:
        served.append(pipeline.serving is not None)
        start(pipeline)

    monkeypatch.setattr(Pipeline, "start", watched)
    assert command("run", "--model", model, "--source", picture_directory(tmp_path / "p"), "--json") == 0
    assert served == [True]


class Stuck(io.StringIO):
    """A standard output that takes nothing until the pipeline has come to rest, as `| less` does."""

    def __init__(self, pipelines: list[Pipeline]) -> None:
        super().__init__()
        self._pipelines = pipelines
        self.ahead = 0

    def write(self, text: str) -> int:
        if not self.ahead:
            before = -1
            while (frames := self._pipelines[0].totals.frames) != before:
                before = frames
                time.sleep(0.5)
            self.ahead = frames
        return super().write(text)


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """Those that were started."""
    start, started = Pipeline.start, list[Pipeline]()

    def watched(pipeline: Pipeline) -> None:
        started.append(pipeline)
        start(pipeline)

    monkeypatch.setattr(Pipeline, "start", watched)
    return started


def test_a_file_waits_for_who_reads_and_loses_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelines: list[Pipeline]
) -> None:
    out = Stuck(pipelines)
    monkeypatch.setattr(sys, "stdout", out)
    film = video_file(tmp_path / "v.avi", ["green"], frames_each=300)
    assert command("run", "--model", model, "--source", film, "--json") == 0
    assert out.ahead < 100, "what nobody has read yet is bounded"
    *answers, summary = map(json.loads, out.getvalue().splitlines())
    assert len(answers) == 300
    assert (summary["frames"], summary["lost"]) == (300, 0)


def test_a_live_source_waits_for_nobody_and_what_is_lost_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelines: list[Pipeline]
) -> None:
    """A pipe of sound: its answers come as fast as it is written."""
    path = listener(tmp_path / "ear.onnx")
    listener_sidecar(tmp_path / "ear.toml")
    sound = wav_file(tmp_path / "s.wav", np.zeros(64_000))
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", 'exec cat "$0" > "$1"', sound, tmp_path / "pipe"])
    out = Stuck(pipelines)
    monkeypatch.setattr(sys, "stdout", out)
    uri = f"pipe:{tmp_path}/pipe"
    assert command("run", "--model", path, "--source", uri, "--json", "--frames", 60) == 0
    writer.kill()
    writer.wait(60)
    *answers, summary = map(json.loads, out.getvalue().splitlines())
    assert len(answers) == 60
    assert summary["lost"] > 0


def test_who_is_held_up_is_let_go_when_nobody_listens() -> None:
    inbox = local_cli._Inbox(patient=True)
    for _ in range(local_cli._MAX_WAITING):
        inbox.put(SourceChange("cam", up=True, detail=""))
    late = threading.Thread(target=inbox.put, args=(SourceChange("cam", up=False, detail=""),))
    late.start()
    inbox.close()
    late.join(60)
    assert not late.is_alive()


def test_frames_a_second_are_counted_between_answers() -> None:
    stages: dict[Stage, float] = {"inference": 1.0}
    tally = local_cli._Tally()
    for now in (10.0, 10.5, 11.0):
        tally.add(stages, now)
    assert (tally.frames, tally.fps()) == (3, 2.0)
    follows = local_cli._Tally(tally.until)
    follows.add(stages, 12.0)
    assert (follows.frames, follows.fps()) == (1, 1.0)
    assert local_cli._Tally().fps() == 0


def test_run_on_the_plan_that_a_probe_found(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = picture_directory(tmp_path / "p")
    assert command("run", "--model", model, "--source", pictures, "--probe", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["plan"].startswith("CPU int8")


def test_probe_prints_the_table_of_plans(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("probe", model, "--provider", "Qnn", "--provider", "cpu", "--threads", 2) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan ")
    assert ["Qnn", "int8", "x1", "*", "not", "loaded"] in [line.split() for line in out.splitlines()]
    assert "Qnn int8 x1: Qnn is not in this build of ONNX Runtime." in out
    assert "made of noise" in out
    assert "Best: CPU int8" in out


def test_probe_waits_for_a_hot_device_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    orin = Path(shutil.copytree(Path(__file__).parent / "jetson_orin", tmp_path / "orin"))
    (orin / "sys/class/thermal/cooling_device1/cur_state").write_text("2\n")
    monkeypatch.setattr(local_cli, "Sensors", lambda: Sensors(orin))
    monkeypatch.setattr(local_cli, "PATIENCE_S", 0.1)
    assert command("probe", model, "--json") == 0
    out, err = capsys.readouterr()
    assert err.startswith("The device is slowed down (cpufreq-cpu0). It waits at most ")
    assert json.loads(out)["provisional"]


def test_probe_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = picture_directory(tmp_path / "p")
    assert command("probe", model, "--json", "--samples", pictures) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["provider"] == "CPUExecutionProvider"
    assert found["evidence"] == "strong"
    assert command("probe", model, "--json", "--provider", "Qnn") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("probe", "{tmp}/none.onnx"), "cannot be read"),
        (("probe", "{tmp}/labels.txt"), "labels.txt is not an ONNX file"),
        ((*RUN, "{tmp}/none.mp4"), "none.mp4 is not there"),
        ((*RUN, "{tmp}/v", "--labels", "{tmp}/none"), "labels file"),
        ((*RUN, "{tmp}/v", "--provider", "Qnn"), "not in this build"),
        ((*RUN, "0", "--task", "vad"), "voice activity is one score"),
    ],
)
def test_errors_say_what_and_what_next(
    model: Path, tmp_path: Path, words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture_directory(tmp_path / "v")
    assert command(*(word.format(tmp=tmp_path) for word in words)) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert error in err
    assert "\nnext: " in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("probe", "m.onnx", "--threads", "5000"), "--threads: 5000 is not a whole number from 1 to 1024"),
        (("probe", "m.onnx", "--threads", "two"), "--threads: two is not a whole number"),
        ((*RUN, "0", "--threads", "0"), "--threads: 0 is not a whole number"),
        ((*RUN, "0", "--frames", "-1"), "--frames: -1 is not a whole number"),
        ((*RUN, "0", "--frames", "9" * 5000), "is not a whole number"),
        ((*RUN, "0", "--provider", "x" * 100), "is no provider's name"),
        (("probe", "m.onnx", "--provider", "C P U"), "is no provider's name"),
        (
            ("snapshot", "0", "--out", "p.wav", "--seconds", "abc"),
            "--seconds: abc is not a number of seconds",
        ),
        (("sources", "--seconds", "nan"), "--seconds: nan is not a number of seconds from 0.1 to 60"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_a_line(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_nothing_heavy_is_imported_for_the_command_line() -> None:
    code = (
        "import argparse, sys; from edgeward_agent import local_cli;"
        "local_cli.register(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(bool({'numpy', 'cv2', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tables_line_up() -> None:
    assert table([("a", "bb"), ("ccc", "1")], right=frozenset({1})) == ["a    bb", "───  ──", "ccc   1"]


def test_voice_activity_on_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model with state hears a WAV file; its samples are WAV files too."""
    path = listener(tmp_path / "ear.onnx")
    listener_sidecar(tmp_path / "ear.toml")
    sound = wav_file(tmp_path / "s.wav", np.concatenate([np.zeros(8_000), np.full(8_000, 0.25)]))
    assert command("run", "--model", path, "--source", sound, "--json") == 0
    *answers, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert summary["frames"] == 100
    assert [answer["speech"]["active"] for answer in answers] == [False] * 50 + [True] * 50
    assert command("probe", path, "--samples", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["evidence"] == "strong"


def test_a_source_of_the_wrong_kind_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = wav_file(tmp_path / "s.wav", np.zeros(8_000))
    assert command("run", "--model", model, "--source", sound) == 1
    assert "error: Not one frame of the source could be run." in capsys.readouterr().err
