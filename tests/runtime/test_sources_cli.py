"""`edgeward-agent sources` and `snapshot`, through the command line, on real files, pipes and streams."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeward_agent.cli import main
from edgeward_agent.local_socket import RUN, LocalSocket, Request
from edgeward_agent.sources_cli import save
from edgeward_agent.status import StatusFile, only_daemon, write_status
from edgeward_runtime import images
from edgeward_runtime.sources import tryout
from edgeward_runtime.sources.framing import Framing, untwisted
from edgeward_runtime.sources.options import Crop, Rotation, SourceOptions
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.reported import PipelineReport, Reported, SourceReport
from runtime.builders import (
    COLOURS,
    frame,
    int8_classifier,
    labels_file,
    picture_file,
    sidecar_file,
    video_file,
)
from runtime.capturing import Running, colour_of
from runtime.test_sources import ODD
from runtime.test_sources_sound import tone, wav_file
from sim.mjpeg import MjpegCamera


@pytest.fixture
def camera() -> Iterator[MjpegCamera]:
    with MjpegCamera([images.encode_jpeg(frame(colour)) for colour in COLOURS], auth="basic") as camera:
        yield camera


def configure(directory: Path, **uris: str) -> list[str]:
    """The options that name an agent.toml with these sources, and an empty state directory."""
    lines = [f'[[pipelines.main.sources]]\nname = "{name}"\nuri = "{uri}"\n' for name, uri in uris.items()]
    (directory / "agent.toml").write_text("\n".join(lines))
    return ["--config", str(directory / "agent.toml"), "--state", str(directory / "state")]


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_every_configured_source_is_tried(
    tmp_path: Path, camera: MjpegCamera, capsys: pytest.CaptureFixture[str]
) -> None:
    video_file(tmp_path / "film.avi", fps=12)
    wav_file(tmp_path / "s.wav")
    places = configure(
        tmp_path,
        door=camera.url("eve:s3cret%2Fword@"),
        yard=camera.url("eve:wrong@"),
        film="film.avi",
        sound="s.wav",
        cam="/dev/video63",
        csi="nvarguscamerasrc ! appsink",
    )
    assert main(["sources", "--json", "--seconds", "0.3", *places]) == 1
    out = listed(capsys)
    rows = {row["name"]: row for row in out["configured"]}
    assert list(rows) == [f"main/{n}" for n in ("door", "yard", "film", "sound", "cam", "csi")]
    door = rows["main/door"]
    assert (door["kind"], door["up"], door["width"], door["height"]) == ("http", True, 64, 48)
    assert door["fps"] > 0
    assert "wrong" not in json.dumps(out)
    assert "s3cret" not in json.dumps(out)
    assert not rows["main/yard"]["up"]
    assert "refuses the user name or password" in rows["main/yard"]["reason"]
    assert rows["main/film"]["fps"] == 12
    assert rows["main/sound"]["rate"] == 8000
    assert rows["main/cam"]["next_step"] == "Plug the camera in; `ls /dev/video*` lists them."
    assert rows["main/csi"]["kind"] == "gstreamer"


def test_pictures_have_a_rate_only_when_they_are_paced(tmp_path: Path) -> None:
    path = str(picture_file(tmp_path / "p" / "a.png", "red").parent)
    for options, fps in (
        (SourceOptions("p", path), None),
        (SourceOptions("p", path, fps=5), None),
        (SourceOptions("p", path, realtime=True), 1),
        (SourceOptions("p", path, realtime=True, fps=5), 5),
    ):
        assert tryout.try_source(options, 0.1).fps == fps


def test_a_person_reads_a_table(
    tmp_path: Path, camera: MjpegCamera, capsys: pytest.CaptureFixture[str]
) -> None:
    places = configure(tmp_path, door=camera.url("eve:s3cret%2Fword@"))
    assert main(["sources", "--seconds", "0.2", *places]) == 0
    assert "main/door  http://127.0.0.1:" in capsys.readouterr().out
    places = configure(tmp_path, door=camera.url(), gone="nowhere.mp4")
    assert main(["sources", "--seconds", "0.2", *places]) == 1
    out = capsys.readouterr().out
    assert "asks for a user name and password.\nmain/door: next: Put them into the address" in out
    assert f"main/gone: {tmp_path}/nowhere.mp4 is not there." in out
    assert main(["sources", *configure(tmp_path)]) == 0
    assert "No source is configured." in capsys.readouterr().out


def test_odd_addresses_are_told_and_nothing_crashes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [uri for uri in ODD if uri.isprintable() and not uri.isdecimal()]
    places = configure(tmp_path, **{f"s{number}": uri for number, uri in enumerate(odd)})
    assert main(["sources", "--json", "--seconds", "0.1", *places]) == 1
    rows = listed(capsys)["configured"]
    assert [(row["up"], bool(row["reason"])) for row in rows] == [(False, True)] * len(odd)


@pytest.mark.parametrize("uri", ["", *ODD], ids=lambda uri: ascii(uri[:30]))
def test_an_odd_address_has_no_picture(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", uri, "--out", str(tmp_path / "o.jpg"), *configure(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_an_odd_address_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels_file(tmp_path / "labels.txt")
    sidecar_file(tmp_path / "m.toml")
    model = int8_classifier(tmp_path / "m.onnx")
    for uri in ("", "\0", "\udcff.mp4", "x" * 300, "9" * 5000, "://"):
        assert main(["run", "--model", str(model), "--source", uri]) == 1
        assert capsys.readouterr().err.startswith("error: ")


@contextlib.contextmanager
def agent(state: Path, source: str, raw: bytes) -> Iterator[None]:
    """A daemon's lock, status and local socket, as a running one that reads this source has them.

    `raw` is the source's newest picture; empty for sound.
    """
    reports = {"main": PipelineReport(sources={source: SourceReport(up=True)})}
    said = Reported(device="edge-01", boot_id="b" * 32, time=0, pipelines=reports)
    status = StatusFile(agent="0.1.0", pid=1, device="edge-01", started_at=0, broker=True, reported=said)
    width, height = (64, 48) if raw else (0, 0)

    def show(request: Request) -> None:
        assert request.text("source") == source
        request.line({"ok": True, "length": len(raw), "width": width, "height": height, "result": None}, raw)

    with only_daemon(state):
        write_status(state / "status.json", status)
        server = LocalSocket(state / RUN, "main", {"frame": show}, lambda _: None)
        server.start()
        try:
            yield
        finally:
            server.close()


def test_what_the_daemon_reads_is_not_taken_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = configure(tmp_path, cam="/dev/video63")
    with agent(tmp_path / "state", "cam", images.encode_jpeg(frame("blue"))):
        assert main(["sources", "--json", *places]) == 0
        row = listed(capsys)["configured"][0]
        assert (row["up"], row["reason"]) == (True, "the agent reads it")
        assert main(["snapshot", "cam", "--out", str(tmp_path / "o.jpg"), *places]) == 0
        assert colour_of(images.decode((tmp_path / "o.jpg").read_bytes())) == "blue"
        assert main(["snapshot", "cam", "--out", str(tmp_path / "o.png"), *places]) == 1
        assert "gives its pictures as JPEG only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["o.jpg", "o.wav"])
def test_sound_that_the_daemon_hears_is_not_saved(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "p")
    places = configure(tmp_path, ears="pipe:p")
    with agent(tmp_path / "state", "ears", b""):
        assert main(["snapshot", "ears", "--out", str(tmp_path / name), *places]) == 1
    err = capsys.readouterr().err
    assert "The agent hears ears now" in err
    assert "Stop the agent first" in err
    assert not (tmp_path / name).exists()


def test_cameras_are_found_in_sysfs(tmp_path: Path) -> None:
    for number, (name, index) in {10: ("Rear", "0"), 2: ("Front", "0"), 3: ("Front", "1")}.items():
        node = tmp_path / f"class/video4linux/video{number}"
        node.mkdir(parents=True)
        (node / "name").write_text(f"{name}\n")
        (node / "index").write_text(f"{index}\n")
    assert tryout.cameras(tmp_path) == [
        tryout.Device("/dev/video2", "Front"),
        tryout.Device("/dev/video10", "Rear"),
    ]
    assert tryout.cameras(tmp_path / "none") == []


def test_a_source_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A picture that is a pipe: opening it waits for a writer, for ever."""
    os.mkfifo(tmp_path / "000.png")
    good = SourceOptions("good", str(picture_file(tmp_path / "p" / "a.png", "red")))
    stuck, fine = tryout.try_all([SourceOptions("bad", str(tmp_path)), good], 0.1, patience_s=0.4)
    assert (stuck.up, fine.up) == (False, True)
    assert stuck.reason.startswith("It did not answer within")
    with pytest.raises(Unavailable, match="did not answer"):
        tryout.bounded(lambda: tryout.look(SourceOptions("bad", str(tmp_path)), 1), 0.2)
    while any(thread.name == "try-source" for thread in threading.enumerate()):
        with contextlib.suppress(OSError):
            os.close(os.open(tmp_path / "000.png", os.O_WRONLY | os.O_NONBLOCK))


# --- snapshot


def test_a_picture_is_saved_and_not_written_over(
    tmp_path: Path, camera: MjpegCamera, capsys: pytest.CaptureFixture[str]
) -> None:
    out, places = tmp_path / "door.jpg", configure(tmp_path, door=camera.url("eve:s3cret%2Fword@"))
    assert main(["snapshot", "door", "--out", str(out), *places]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert images.decode(out.read_bytes()).shape == (48, 64, 3)
    out.write_bytes(b"mine")
    assert main(["snapshot", "main/door", "--out", str(out), *places]) == 1
    assert f"error: {out} is there already." in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main(["snapshot", "main/door", "--out", str(out), "--force", *places]) == 0
    assert out.stat().st_size > 100
    assert [p.name for p in tmp_path.glob(".door*")] == []


def test_sound_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = wav_file(tmp_path / "s.wav"), tmp_path / "out.wav"
    places = configure(tmp_path)
    assert main(["snapshot", str(source), "--out", str(out), "--seconds", "0.5", *places]) == 0
    with wave.open(str(out)) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 4000)
        np.testing.assert_array_equal(np.frombuffer(file.readframes(4000), "<i2"), tone(0.5))
    assert main(["snapshot", str(source), "--out", str(tmp_path / "o.jpg"), *places]) == 1
    assert "This source gives sound." in capsys.readouterr().err


def test_what_cannot_be_seen_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = configure(tmp_path)
    for source, reason in (
        ("99", "/dev/video99 is not there"),
        ("rtsp://eve:geheim@127.0.0.1:1/x", "refused"),
    ):
        assert main(["snapshot", source, "--out", str(tmp_path / "o.jpg"), *places]) == 1
        err = capsys.readouterr().err
        assert reason in err
        assert "geheim" not in err
    picture = picture_file(tmp_path / "a.png", "red")
    assert main(["snapshot", str(picture), "--out", str(tmp_path / "o.tiff"), *places]) == 1
    assert "ends in .jpg or .png" in capsys.readouterr().err
    assert main(["snapshot", str(picture), "--out", str(tmp_path / "no" / "o.png"), *places]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "o.jpg").write_bytes(b"mine")
    with pytest.raises(Rejected, match="is there already"):
        save(tmp_path / "o.jpg", b"new", force=False)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"mine"]


# --- turned and cut


@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [None, (0.0, 0.0, 0.5, 0.25), (0.25, 0.5, 1.0, 0.75)])
def test_turning_and_cutting_is_what_it_says(rotate: Rotation, crop: Crop | None) -> None:
    """Held against turning the whole picture first, and cutting then."""
    picture = np.arange(48 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 64, 3)
    turned = np.rot90(picture, -rotate // 90)
    height, width = turned.shape[:2]
    x1, y1, x2, y2 = crop or (0, 0, 1, 1)
    expected = turned[round(y1 * height) : round(y2 * height), round(x1 * width) : round(x2 * width)]
    framing = Framing(rotate, crop)
    cut = framing.cut(picture)
    assert cut.base is not None
    np.testing.assert_array_equal(framing.turn(cut, None), expected)


def test_a_cut_keeps_a_pixel() -> None:
    for rotate in (0, 90, 180, 270):
        x1, y1, x2, y2 = untwisted((0.999, 0.999, 0.9999, 0.9999), rotate, 64, 48)
        assert 0 <= x1 < x2 <= 64
        assert 0 <= y1 < y2 <= 48


@pytest.mark.parametrize("rotate", [0, 90])
def test_turned_and_cut_frames_use_their_memory_again(tmp_path: Path, rotate: Rotation) -> None:
    path = video_file(tmp_path / "v.avi", frames_each=4)
    options = SourceOptions("s", str(path), rotate=rotate, crop=(0.0, 0.0, 0.5, 1.0))
    memory, shapes, colours = set(), set(), []
    with Running(options) as running:
        for _ in range(12):
            (one,) = running.take(1)
            shapes.add(one.data.shape)
            colours.append(colour_of(one.data))
            whole = one.data if one.data.base is None else one.data.base
            memory.add(whole.__array_interface__["data"][0])
            one.release()
    height, width = (64, 24) if rotate else (48, 32)
    assert shapes == {(height, width, 3)}
    assert colours == [c for c in COLOURS for _ in range(4)]
    assert len(memory) <= 3
