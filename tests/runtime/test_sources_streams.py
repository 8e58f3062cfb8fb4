"""Streams from cameras that are there, stall, drop, refuse and lie: RTSP and HTTP over real sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime import images
from edgeward_runtime.sources import SOURCES, address, kind_of, mjpeg, open_source, rtsp
from edgeward_runtime.sources.gstreamer import GstreamerSource
from edgeward_runtime.sources.options import SourceOptions
from edgeward_runtime.sources.tryout import Findings, look, try_source
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from runtime.builders import COLOURS, frame, video_file
from runtime.capturing import Running, colour_of
from sim.mjpeg import PASSWORD, USER, Auth, MjpegCamera
from sim.pki import Authority
from sim.rtsp import RtspCamera
from sim.tls import TlsFront

Camera = MjpegCamera | RtspCamera
both = pytest.mark.parametrize("kind", [MjpegCamera, RtspCamera], ids=["http", "rtsp"])
GOOD = f"{USER}:{PASSWORD.replace('/', '%2F')}@"


@pytest.fixture(autouse=True)
def _quiet() -> None:
    images.be_light()


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [images.encode_jpeg(frame(colour)) for colour in COLOURS]


def why(uri: str) -> str:
    """Why a source cannot be opened and read."""

    def try_it() -> None:
        source = open_source(SourceOptions("cam", uri))
        try:
            source.grab()
            source.retrieve(None)
        finally:
            source.close()

    with pytest.raises(EdgewardError) as caught:
        try_it()
    return caught.value.what


# --- what works


@both
def test_a_stream_gives_its_pictures(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures) as camera, Running(SourceOptions("cam", camera.url())) as running:
        seen = {colour_of(f.data) for f in running.take(12)}
        assert running.changes == [("cam", True, "")]
    assert seen == set(COLOURS)


@both
@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_credentials_are_proved(kind: type[Camera], auth: Auth, pictures: list[bytes]) -> None:
    with kind(pictures, auth=auth) as camera:
        source = open_source(SourceOptions("cam", camera.url(GOOD)))
        assert source.grab()
        source.close()


@pytest.mark.parametrize("auth", ["sha256", "several"])
def test_the_best_of_what_a_camera_offers_is_proved(auth: Auth, pictures: list[bytes]) -> None:
    with MjpegCamera(pictures, auth=auth) as camera:
        open_source(SourceOptions("cam", camera.url(GOOD))).close()
        assert "refuses the user name or password" in why(camera.url("eve:wrong@"))


@both
def test_a_proof_that_nobody_here_has_is_named(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures, auth="bearer") as camera:
        assert "only as bearer, digest SHA-512-256." in why(camera.url(GOOD))
        assert "asks for a user name" in why(camera.url())


def test_a_proof_that_ffmpeg_does_not_have_is_named(pictures: list[bytes]) -> None:
    with RtspCamera(pictures, auth="sha256") as camera:
        assert "only as digest SHA-256." in why(camera.url(GOOD))


@pytest.mark.parametrize(
    ("said", "best"),
    [
        ('Basic realm="r", Digest realm="d", nonce="n"', 'Digest username="u", realm="d", nonce="n"'),
        ('Digest realm="d", nonce="n", Basic realm="r"', 'Digest username="u", realm="d", nonce="n"'),
        ('Basic realm="digest algorithm=MD5"', "Basic dTpw"),
        ('Negotiate YII==, Basic realm="r"', "Basic dTpw"),
        ('Digest realm="a", nonce="n", algorithm=MD5-sess, Basic realm="r"', "Basic dTpw"),
        ('Digest realm="a\\"b, Basic", nonce=n', 'Digest username="u", realm="a\\"b, Basic", nonce="n"'),
        ("Digest", 'Digest username="u", realm="", nonce=""'),
        ("NTLM", None),
        ("", None),
        (", =,==", None),
    ],
)
def test_each_challenge_is_read_by_itself(said: str, best: str | None) -> None:
    found = address.credentials(address.parse("http://u:p@cam/x"), "GET", "/x", said)
    assert best is None if found is None else best is not None and found.startswith(best)


def test_rtsp_goes_over_tcp(pictures: list[bytes]) -> None:
    with RtspCamera(pictures) as camera:
        source = open_source(SourceOptions("cam", camera.url()))
        assert source.fps == 50
        source.close()
        assert all("TCP" in transport for transport in camera.transports)


@pytest.mark.parametrize("boundary", ["frontier", '"frontier"', "--frontier"])
@pytest.mark.parametrize("lengths", [True, False])
def test_every_way_of_marking_parts(boundary: str, lengths: bool, pictures: list[bytes]) -> None:
    with MjpegCamera(pictures) as camera:
        camera.kind, camera.lengths = f"multipart/x-mixed-replace;boundary={boundary}", lengths
        source = open_source(SourceOptions("cam", camera.url()))
        seen = []
        for _ in range(6):
            assert source.grab()
            seen.append(colour_of(source.retrieve(None)))
        source.close()
    assert seen == [*COLOURS, *COLOURS]


# --- films over HTTP


@pytest.fixture
def film(tmp_path: Path, pictures: list[bytes]) -> Iterator[MjpegCamera]:
    """A server of one film: twelve frames, at 20 a second; cut off in the middle while it is stalled."""
    raw = video_file(tmp_path / "v.avi", frames_each=4, fps=20).read_bytes()

    def serve(connection: socket.socket) -> None:
        head = f"HTTP/1.0 200 OK\r\nContent-Type: video/x-msvideo\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw[: 6000 if server.stalled.is_set() else None])

    with MjpegCamera(pictures) as server:
        server.hostile = serve
        yield server


def test_a_film_over_http_plays_at_its_pace_and_ends(film: MjpegCamera) -> None:
    starts, seen = [], []
    with Running(SourceOptions("cam", film.url(), slot="every")) as running:
        for _ in range(12):
            (one,) = running.take(1)
            starts.append(one.captured_at - one.capture_ms / 1e3)
            seen.append(colour_of(one.data))
            one.release()
        running.await_change(("cam", False, "end of file"))
    assert seen == [colour for colour in COLOURS for _ in range(4)]
    assert starts[-1] - starts[0] >= 10 / 20, "eleven periods, less the one that a late first frame takes"


def test_a_film_over_http_plays_again_if_it_shall(film: MjpegCamera) -> None:
    options = SourceOptions("cam", film.url(), slot="every", loop=True, fps=1000)
    with Running(options) as running:
        assert [colour_of(one.data) for one in running.take(16)][12:] == ["red"] * 4
        assert running.changes == [("cam", True, "")]


def test_a_film_over_http_is_tried_like_a_file(film: MjpegCamera) -> None:
    options = SourceOptions("cam", film.url())
    assert try_source(options, 60) == Findings("http", True, 64, 48, fps=20)
    assert isinstance(look(options, 1), np.ndarray)


def test_a_film_that_is_cut_off_has_not_ended(film: MjpegCamera) -> None:
    film.stalled.set()
    with Running(SourceOptions("cam", film.url(), fps=1000)) as running:
        running.await_down("ended, or stopped sending.")


# --- TLS


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The one authority that this process trusts."""
    authority = Authority.make("trusted")
    (tmp_path / "authorities.pem").write_text(authority.pem)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authorities.pem"))
    monkeypatch.delenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", raising=False)
    images.be_light()
    return authority


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_streams_over_tls(
    host: str, trusted: Authority, film: MjpegCamera, pictures: list[bytes], tmp_path: Path
) -> None:
    with RtspCamera(pictures) as camera, MjpegCamera(pictures) as web:
        servers = {"rtsps": camera.port, "https": web.port, "https:film": film.port}
        for name, port in servers.items():
            with TlsFront(trusted, tmp_path, port) as front:
                path = camera.url() if name == "rtsps" else web.url()
                uri = f"{name.partition(':')[0]}://{host}:{front.port}/{path.rpartition('/')[2]}"
                source = open_source(SourceOptions("cam", uri))
                assert source.grab()
                assert colour_of(source.retrieve(None)) in COLOURS
                source.close()


@pytest.mark.parametrize("scheme", ["rtsps", "https"])
def test_ffmpeg_trusts_nobody_else(
    scheme: str, trusted: Authority, film: MjpegCamera, pictures: list[bytes], tmp_path: Path
) -> None:
    """It connects by itself: what our own connection finds out holds for that one only."""
    if scheme == "rtsps" and images.version().startswith("4."):
        pytest.skip("FFmpeg 5 does not hand what it is told of TLS on from rtsps:// (docs/sources.md)")
    with RtspCamera(pictures) as camera:
        port = camera.port if scheme == "rtsps" else film.port
        for authority in (trusted, Authority.make("another")):
            with TlsFront(authority, tmp_path, port) as front:
                uri = f"{scheme}://localhost:{front.port}/stream"
                if authority is trusted:
                    images.Reader.of_stream(uri, "it", 10, 10).close()
                    continue
                with pytest.raises(Unavailable, match="cannot be opened"):
                    images.Reader.of_stream(uri, "it", 10, 10)
                assert "is not trusted" in why(uri)


# --- what comes and goes


@both
def test_a_camera_that_went_away_is_found_again(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures) as camera, Running(SourceOptions("cam", camera.url())) as running:
        running.take(2)
        camera.close()
        running.await_down("refused")
        before = len(running.changes)
        with kind(pictures, port=camera.port):
            running.await_up(before)
            running.take(2)


@both
def test_a_cut_connection_is_made_again(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures) as camera, Running(SourceOptions("cam", camera.url())) as running:
        running.take(2)
        camera.drop()
        running.await_down("")
        running.await_up(2)
        running.take(2)


@both
def test_a_stall_is_reported_and_its_end_too(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures) as camera, Running(SourceOptions("cam", camera.url())) as running:
        running.take(2)
        camera.stalled.set()
        running.find_stale(6, lambda: len(running.changes) > 1)
        assert running.changes[1] == ("cam", False, "no frame for 5 s")
        camera.stalled.clear()
        running.await_up(2)
        assert len(running.changes) == 3
        running.take(1)


# --- what is refused, each with one reason


@both
def test_reasons(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures, auth="digest") as camera:
        assert "asks for a user name" in why(camera.url())
        assert "refuses the user name or password" in why(camera.url("eve:wrong@"))
        assert "is not there (404)" in why(camera.url(GOOD, "/none"))
        port = camera.port
    scheme = camera.url().partition(":")[0]
    assert why(f"{scheme}://127.0.0.1:{port}/x").endswith("cannot be reached: Connection refused.")
    assert "is not known" in why(f"{scheme}://no-such-host.invalid/x")
    assert "is not an address" in why(f"{scheme}:///x")
    assert "is not an address" in why(f"{scheme}://eve%0d%0aX:y@host/x")
    assert "is not an address" in why(f"{scheme}://host:99999999/x")


def test_what_is_no_stream_is_told(pictures: list[bytes]) -> None:
    with MjpegCamera(pictures) as web, RtspCamera(pictures) as camera:
        web.kind = "text/html; charset=utf-8"
        assert why(web.url()).endswith("is text/html, not a stream.")
        web.kind = "multipart/x-mixed-replace"
        assert "names no boundary" in why(web.url())
        assert "does not answer as RTSP does" in why(web.url().replace("http:", "rtsp:"))
        assert "does not answer as HTTP does" in why(camera.url().replace("rtsp:", "http:"))
    assert "nothing here reads" in why("srt://host:9000")


@both
def test_no_reason_tells_a_secret(kind: type[Camera], pictures: list[bytes]) -> None:
    with kind(pictures, auth="basic") as camera:
        for path in ("/stream?user=eve&password=hush-hush", "/video?pwd=hush-hush"):
            for user in ("eve:hush-hush@", ""):
                assert "hush-hush" not in why(camera.url(user, path))
    assert "hush-hush" not in why(camera.url("eve:hush-hush@"))


@pytest.mark.parametrize(
    ("uri", "seen"),
    [
        ("rtsp://eve:pa@ss@cam/1", "rtsp://cam/1"),
        ("http://cam/v?user=eve&pwd=x&res=1", "http://cam/v?user=***&pwd=***&res=1"),
        ("rtsp://cam/user=eve_password=x_channel=1", "rtsp://cam/user=***"),
        ("rtsp://eve:un/encoded@cam/1", "rtsp://cam/1"),
        ("rtspsrc location=rtsp://e:x@cam/1 user-pw=x ! a", "rtspsrc location=rtsp://cam/1 user-pw=*** ! a"),
        ("rtsp://eve:Pass123!@cam/1", "rtsp://cam/1"),
        ("http://cam/v?pwd=a!b&res=1", "http://cam/v?pwd=***&res=1"),
        ("rtspsrc location=rtsp://e:x!y@cam/1!a", "rtspsrc location=rtsp://cam/1!a"),
        ("/var/film.mp4", "/var/film.mp4"),
    ],
)  # fmt: skip
def test_addresses_are_shown_without_secrets(uri: str, seen: str) -> None:
    assert address.shown(uri) == seen


@given(st.text(max_size=60), st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8))
def test_an_address_is_taken_apart_or_rejected(rest: str, secret: str) -> None:
    try:
        found = address.parse(f"rtsp://eve:{secret}@{rest}")
    except Rejected as error:
        told = error.what
        assert secret not in told
        return
    assert 0 <= found.port <= 65535
    assert found.host


# --- what is hostile


def endless_header(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n")
    while True:
        connection.sendall(b"X-More: and more\r\n" * 1000)


def endless_part(connection: socket.socket) -> None:
    connection.sendall(
        b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n--b\r\n\r\n"
    )
    while True:
        connection.sendall(bytes(1 << 16))


def huge_part(connection: socket.socket) -> None:
    connection.sendall(
        b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n"
        b"--b\r\nContent-Length: 999999999\r\n\r\n"
    )


def huge_picture(connection: socket.socket) -> None:
    raw = bytearray(images.encode_jpeg(frame("red")))
    at = raw.index(b"\xff\xc0")
    raw[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    connection.sendall(
        b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n"
        b"--b\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(raw), raw)
    )


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=b\r\n\r\n")
    while True:
        connection.sendall(b"--b\r\nContent-Length: 7\r\n\r\ngarbage\r\n")


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (endless_header, "without end"),
        (endless_part, "without end"),
        (huge_part, "announces a picture of 999999999 bytes"),
        (huge_picture, "a picture of 65535 x 65535"),
        (garbage, "not a JPEG"),
        (lambda c: c.sendall(b"HTTP/1.0 999 ?\r\n\r\n"), "does not answer as HTTP does"),
        (lambda c: c.sendall(b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"), "sends chunks"),
        (lambda c: None, "closed the connection"),
    ],
)
def test_hostile_streams_stay_bounded(
    talk: Callable[[socket.socket], None], reason: str, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mjpeg, "MAX_FRAME_BYTES", 1 << 20)
    with MjpegCamera(pictures) as camera:
        camera.hostile = talk
        assert reason in why(camera.url())


@pytest.mark.parametrize(
    "talk", [endless_header, lambda c: c.sendall(b"RTSP/1.0 401 No\r\nContent-Length: x\r\n\r\n")]
)
def test_hostile_rtsp_servers_too(
    talk: Callable[[socket.socket], None], pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtsp, "OPEN_S", 1)
    with MjpegCamera(pictures) as camera:
        camera.hostile = talk
        assert why(camera.url("eve:x@").replace("http:", "rtsp:"))


@given(st.binary(max_size=200))
def test_headers_of_pictures_are_read_safely(raw: bytes) -> None:
    size = images.jpeg_size(b"\xff\xd8" + raw)
    assert size is None or all(0 <= side < 65536 for side in size)


def test_a_header_that_another_reader_would_not_read_is_none() -> None:
    """FF 01 has no length. Who takes what follows for one finds a small picture inside a comment."""
    large, small = (b"\x08" + struct.pack(">HH", side, side) + b"\x01\x01\x11\x00" for side in (0x7FFF, 8))
    hidden = b"\xff\xc0\x00\x0b" + small
    for marker in (0x00, 0x01, *range(0xD0, 0xDA)):
        raw = b"\xff\xd8\xff%c\x00\x11\xff\xc0\x00\x0b" % marker + large + b"\xff\xfe" + hidden
        assert images.jpeg_size(raw) is None


# --- side by side


def test_a_camera_that_says_nothing_keeps_nobody_waiting(tmp_path: Path) -> None:
    """In a process of its own: OpenCV reads once whether openings exclude one another."""
    script = Path(__file__).with_name("beside_a_dead_camera.py")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["300", "True"]


# --- threads


def test_a_read_that_hangs_for_good_is_left_behind(tmp_path: Path) -> None:
    """A picture that is a pipe nobody writes into: the read never returns by itself."""
    hanging = tmp_path / "p" / "000.jpg"
    hanging.parent.mkdir()
    os.mkfifo(hanging)
    with Running(SourceOptions("hung", str(hanging.parent))) as running:

        def threads() -> int:
            return sum(t.name == "capture-hung" for t in threading.enumerate())

        running.find_stale(31, lambda: threads() == 4)
        for _ in range(100):
            running.capture.check_stale(1e12)
        assert threads() == 4, "three are left behind at most"
        assert running.changes == [("hung", False, "no frame for 5 s")]
        raw = images.encode_jpeg(frame("green"))

        def feed() -> bool:
            """Write a picture for whoever reads; whether the one that counts has got one."""
            with contextlib.suppress(OSError):  # nobody reads just now
                fd = os.open(hanging, os.O_WRONLY | os.O_NONBLOCK)
                os.write(fd, raw)
                os.close(fd)
            return any(up for _, up, _ in running.changes)

        running.find_stale(0, feed)
        assert colour_of(running.take(1)[0].data) == "green"


# --- pipelines


def test_a_pipeline_must_end_in_appsink() -> None:
    with pytest.raises(Rejected, match="does not end in appsink"):
        open_source(SourceOptions("csi", "nvarguscamerasrc ! videoconvert"))


RED = "videotestsrc pattern=red num-buffers=3 ! video/x-raw,width=64,height=48 ! videoconvert"


def test_gstreamer_is_run_where_opencv_has_it_and_missed_where_not() -> None:
    options = SourceOptions("csi", f"{RED} ! video/x-raw,format=BGR ! appsink")
    assert kind_of(options) == "gstreamer"
    assert SOURCES["gstreamer"] is GstreamerSource
    if not images.has_gstreamer():
        # scripts/test-matrix sets it where OpenCV must have been built with GStreamer
        assert os.environ.get("EDGEWARD_GSTREAMER") != "required"
        with pytest.raises(Unavailable, match="built without GStreamer"):
            open_source(options)
        return
    source = open_source(options)
    for _ in range(3):
        assert source.grab()
        picture = source.retrieve(None)
        assert picture.shape == (48, 64, 3)
        blue, green, red = picture.reshape(-1, 3).mean(axis=0)
        assert red > 200
        assert max(blue, green) < 60
    with pytest.raises(Unavailable, match="stopped delivering"):
        source.grab()
    source.close()
    with pytest.raises(Unavailable, match="does not start"):
        open_source(SourceOptions("csi", "nosuchelement ! appsink"))
