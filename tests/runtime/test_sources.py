"""Sources and the threads that read them."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeward_agent.config import load_config
from edgeward_agent.messages import SourceSpec
from edgeward_agent.runner import options_of
from edgeward_runtime import capture, images
from edgeward_runtime.backoff import Backoff
from edgeward_runtime.capture import STALE_S, Pace
from edgeward_runtime.sources import kind_of, open_source
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import Rejected, Unavailable
from runtime.builders import COLOURS, frame, picture_directory, picture_file, video_file
from runtime.capturing import Running, colour_of


@pytest.mark.parametrize(
    ("uri", "device"),
    [
        ("0", "/dev/video0"),
        ("12", "/dev/video12"),
        ("/dev/video3", "/dev/video3"),
        ("/dev/v4l/by-id/usb-Cam_1-video-index0", "/dev/v4l/by-id/usb-Cam_1-video-index0"),
        ("/dev/door", "/dev/door"),
        ("/dev/shm/film.mp4", None),
        ("a.mp4", None),
        ("-1", None),
    ],
)
def test_a_number_is_a_camera(uri: str, device: str | None) -> None:
    assert SourceOptions("cam", uri).device == device


def test_any_character_device_is_a_camera(tmp_path: Path) -> None:
    (tmp_path / "door").symlink_to("/dev/null")
    options = SourceOptions("cam", str(tmp_path / "door"))
    assert kind_of(options) == "v4l2"
    with pytest.raises(Unavailable, match="door cannot be opened"):
        open_source(options)


def test_a_camera_is_asked_for_its_format_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From agent.toml to OpenCV, whose place is taken here: there is no camera."""
    wishes: list[tuple[int, float]] = []

    class Camera:
        def __init__(self, *_: object) -> None: ...
        def isOpened(self) -> bool:  # noqa: N802  as OpenCV calls it
            return True

        def set(self, key: int, value: float) -> None:
            wishes.append((key, value))

        def release(self) -> None: ...

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    (tmp_path / "agent.toml").write_text(
        '[[pipelines.main.sources]]\nname = "c"\nuri = "/dev/null"\nfps = 30\nwidth = 1920\nformat = "MJPG"\n'
    )
    (spec,) = load_config(tmp_path / "agent.toml").pipelines["main"].sources
    open_source(options_of(spec)).close()
    assert wishes == [
        (cv2.CAP_PROP_FOURCC, int.from_bytes(b"MJPG", "little")),
        (cv2.CAP_PROP_FRAME_WIDTH, 1920),
        (cv2.CAP_PROP_FPS, 30),
    ]


@pytest.mark.parametrize("fourcc", ["", "MJPEG", "MJP", "MJP\n", "MJ;G", "M\u00fcPG"])
def test_a_format_is_four_letters(fourcc: str) -> None:
    with pytest.raises(ValidationError):
        SourceSpec(name="cam", uri="0", format=fourcc)
    assert SourceSpec(name="cam", uri="0", format="Y16 ").format == "Y16 "


def test_slots_and_pace_follow_the_kind() -> None:
    assert SourceOptions("s", "0").policy == "latest"
    assert SourceOptions("s", "a.mp4").policy == "every"
    assert SourceOptions("s", "a.mp4", realtime=True).policy == "latest"
    assert SourceOptions("s", "a.mp4", slot="every", realtime=True).policy == "every"
    assert not SourceOptions("s", "0", realtime=True).paced
    assert SourceOptions("s", "a.mp4", slot="latest").paced
    assert not SourceOptions("s", "a.mp4").paced


def test_a_video_gives_its_frames(tmp_path: Path) -> None:
    source = open_source(SourceOptions("s", str(video_file(tmp_path / "v.avi", frames_each=3, fps=12))))
    assert source.fps == 12
    seen, buffer = [], None
    while source.grab():
        buffer = source.retrieve(buffer)
        seen.append(colour_of(buffer))
    assert seen == [c for c in COLOURS for _ in range(3)]
    source.rewind()
    assert source.grab()
    again = source.retrieve(buffer)
    assert again is buffer, "the same memory is filled again"
    assert colour_of(again) == "red"
    assert source.retrieve(np.empty((1, 1, 3), np.uint8)).shape == again.shape, "a buffer that does not fit"
    source.close()


def test_a_directory_gives_its_pictures_in_order(tmp_path: Path) -> None:
    directory = picture_directory(tmp_path / "p", ["blue", "red", "green"])
    (directory / "notes.txt").write_text("no picture")
    source = open_source(SourceOptions("s", str(directory)))
    seen = []
    while source.grab():
        seen.append(colour_of(source.retrieve(None)))
    assert seen == ["blue", "red", "green"]


def test_one_picture_is_a_source(tmp_path: Path) -> None:
    source = open_source(SourceOptions("s", str(picture_file(tmp_path / "p.jpg", "green"))))
    assert source.grab()
    assert colour_of(source.retrieve(None)) == "green"
    assert not source.grab()


def test_what_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="is not there"):
        kind_of(SourceOptions("s", str(tmp_path / "none.mp4")))
    with pytest.raises(Unavailable, match="/dev/video63 is not there"):
        open_source(SourceOptions("s", "63"))
    with pytest.raises(Unavailable, match="holds no pictures"):
        open_source(SourceOptions("s", str(tmp_path)))
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(Unavailable, match=r"v\.mp4 cannot be opened as a video"):
        open_source(SourceOptions("s", str(tmp_path / "v.mp4")))


ODD = [
    "\0",
    "a\0b.mp4",
    "\udcff.mp4",
    "\udcff.wav",
    "x" * 300,
    "/x" * 2000,
    "9" * 5000,
    "\u0663",
    "!",
    "://",
    "/dev/video" + "9" * 300,
    "rtsp://cam..local/x",
    f"rtsps://{'a' * 70}.local/x",
    "http://.cam/x",
    f"https://{'a' * 70}/x",
    "http://[::1/x",
    "http://[::1%25nowhere]:1/x",
    "http://127.0.0.1:0/x",
    "mic:\0",
    "pipe:",
    "pipe:\0",
    "pipe:" + "x" * 300,
]
"""Addresses that nothing is at."""


@pytest.mark.parametrize("uri", ["", *ODD], ids=lambda uri: ascii(uri[:30]))
def test_an_odd_address_is_a_source_that_is_down(uri: str) -> None:
    with Running(SourceOptions("cam", uri)) as running:
        assert running.await_down("").endswith(".")


def test_what_may_not_be_read_is_a_source_that_is_down(tmp_path: Path) -> None:
    """A process's memory opens, and reading its beginning fails: as from a broken disk."""
    (tmp_path / "s.wav").symlink_to("/proc/self/mem")
    with Running(SourceOptions("cam", str(tmp_path / "s.wav"))) as running:
        running.await_down("s.wav cannot be read: Input/output error.")


def test_a_bad_picture_among_good_ones_is_passed_over(tmp_path: Path) -> None:
    directory = picture_directory(tmp_path / "p", ["red", "green"])
    (directory / "000-bad.png").write_bytes(b"bad")
    with Running(SourceOptions("s", str(directory))) as running:
        assert [colour_of(f.data) for f in running.take(2)] == ["red", "green"]
        running.await_change(("s", False, "end of file"))


def test_frames_are_stamped_and_the_end_is_reported(tmp_path: Path) -> None:
    options = SourceOptions("cam", str(video_file(tmp_path / "v.avi", frames_each=2)))
    before = time.monotonic()
    with Running(options) as running:
        frames = running.take(6)
        running.await_change(("cam", False, "end of file"))
    stamps = [f.captured_at for f in frames]
    assert stamps == sorted(stamps)
    assert before <= stamps[0] <= stamps[-1] <= time.monotonic()
    assert all(f.capture_ms >= 0 and f.decode_ms >= 0 for f in frames)
    assert running.changes == [("cam", True, ""), ("cam", False, "end of file")]
    assert running.slots.take_dropped() == [0]


@pytest.mark.parametrize("make", [video_file, picture_directory], ids=["video", "pictures"])
def test_a_loop_begins_again(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "v.avi")
    with Running(SourceOptions("cam", str(path), loop=True)) as running:
        count = 2 * (30 if make is video_file else 3) + 1
        seen = [colour_of(f.data) for f in running.take(count)]
    assert seen[: count // 2] == seen[count // 2 : count - 1]
    assert seen[-1] == "red"
    assert running.changes == [("cam", True, "")]


def test_a_source_that_is_not_there_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late.avi"
    with Running(SourceOptions("cam", str(path))) as running:
        running.await_change(("cam", False, f"{path} is not there."))
        made = video_file(tmp_path / "made.avi")
        shutil.move(made, path)
        running.await_change(("cam", True, ""))
        running.take(1)
    assert running.changes[:2] == [("cam", False, f"{path} is not there."), ("cam", True, "")]


def test_a_directory_that_goes_away_is_reported_and_comes_back(tmp_path: Path) -> None:
    directory = picture_directory(tmp_path / "p")
    with Running(SourceOptions("cam", str(directory), loop=True)) as running:
        running.take(4)
        shutil.rmtree(directory)
        drain = iter(lambda: running.slots.take(lambda: bool(len(running.changes) > 1)), None)
        assert sum(1 for _ in drain) < 100
        assert running.changes[1][:2] == ("cam", False)
        picture_directory(directory, ["green"])
        assert colour_of(running.take(1)[0].data) == "green"
        assert running.changes[-1] == ("cam", True, "")


def test_a_read_that_hangs_is_reported(tmp_path: Path) -> None:
    """Judged from outside, for the thread itself hangs in the driver: here it is only told that it does."""
    options = SourceOptions("cam", str(video_file(tmp_path / "v.avi")))
    with Running(options) as running:
        running.take(1)
        while running.slots._frames[0] is None:  # it is inside a read still, and that could be stale
            time.sleep(0.001)
        running.capture.check_stale(time.monotonic() + 1000)
        assert running.changes == [("cam", True, "")], "waiting for inference is not the camera's fault"
        running.capture._reading.since = 1.0
        running.capture.check_stale(2.0)
        assert running.changes == [("cam", True, "")]
        running.capture.check_stale(1.0 + STALE_S + 0.1)
        assert running.changes[-1] == ("cam", False, "no frame for 5 s")
        running.capture._reading.since = 0.0
        running.take(2)
        running.await_change(("cam", True, ""))


def test_realtime_keeps_the_pace_of_the_file(tmp_path: Path) -> None:
    path = video_file(tmp_path / "v.avi", frames_each=4, fps=20)
    starts = []
    with Running(SourceOptions("cam", str(path), realtime=True, slot="every")) as running:
        for _ in range(12):
            (one,) = running.take(1)
            starts.append(one.captured_at - one.capture_ms / 1e3)
            one.release()  # else it is waited for, and that alone would take the time
    assert starts[-1] - starts[0] >= 10 / 20, "eleven periods, less the one that a late first frame takes"


def test_each_frame_of_a_loop_takes_one_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    class Counted(Pace):
        def wait_s(self, now: float) -> float:
            turns.append(super().wait_s(now))
            return 0.0

    monkeypatch.setattr(capture, "Pace", Counted)
    options = SourceOptions(
        "cam", str(picture_directory(tmp_path / "p")), realtime=True, slot="every", loop=True
    )
    with Running(options) as running:
        running.take(10)
        assert 10 <= len(turns) <= 11, "of a loop of three: the eleventh may be read already"
    assert min(turns[1:]) > 0


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=50), st.floats(1, 100))
def test_a_pace_never_hurries_and_never_catches_up_much(busy: list[float], fps: float) -> None:
    pace, now, starts = Pace(fps), 1000.0, []
    for work in busy:
        now += pace.wait_s(now)
        starts.append(now)
        now += work
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    for first, second in itertools.islice(itertools.pairwise(starts), 1):
        assert second - first >= 1 / fps * 0.999, "the first one is not hurried after"
    for k in range(2, len(starts)):
        assert starts[k] - starts[k - 2] >= 1 / fps * 0.999, "two frames in one period at most"
    assert all(gap <= max(1 / fps, *busy) * 1.001 + 1e-9 for gap in gaps)


def test_backoff_grows_to_its_end_and_starts_over() -> None:
    backoff = Backoff(0.5, 4.0)
    waits = [backoff.wait_s() for _ in range(20)]
    assert 0.25 <= waits[0] <= 0.5
    assert all(2.0 <= wait <= 4.0 for wait in waits[4:])
    backoff.reset()
    assert backoff.wait_s() <= 0.5


def test_pictures_from_outside_are_bounded() -> None:
    with pytest.raises(Rejected, match="0 bytes"):
        images.decode(b"")
    raw = images.encode_png(frame("red"))
    np.testing.assert_array_equal(images.decode(raw), frame("red"))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    images.be_light()
