"""The local page as a child process, over HTTP, with a runner behind it; and who may look."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from agent.test_local_socket import watched
from agent.test_runner import Child, serve
from agent.test_status import MAIN, status, write
from edgeward_agent.backoff import Backoff
from edgeward_agent.config import PageSettings, load_config
from edgeward_agent.hosts import known_host
from edgeward_agent.lifetime import Pulse
from edgeward_agent.local_socket import RUN
from edgeward_agent.messages import ServingNow
from edgeward_agent.page import MAX_CLIENTS, own_names
from edgeward_agent.page_keeper import PageKeeper
from edgeward_runtime import images
from edgeward_wire.errors import Rejected
from runtime.builders import picture_directory
from runtime.bundles import Bundle, colour_bundle
from sim.broker import eventually

TOKEN = "a-token-of-some-length"


class Page:
    """A page's process, and requests to it."""

    def __init__(self, state: Path, host: str = "127.0.0.1", token: str | None = None) -> None:
        self._link, theirs = socket.socketpair()
        self._link.settimeout(60)
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "edgeward_agent.page",
            "--fd",
            str(theirs.fileno()),
        ]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        said = {"state": str(state), "host": host, "port": 0, "token": token, "window_s": 10.0}
        self._link.sendall(json.dumps(said).encode() + b"\n")
        with self._link.makefile("rb") as stream:
            self.port = json.loads(stream.readline())["port"]

    def get(self, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body

    def end(self) -> str:
        """Hang up; what it said on stderr."""
        self._link.close()
        return self.process.communicate(timeout=60)[1].decode()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    one = Page(tmp_path)
    yield one
    one.end()


def frame(page: Page, **query: str) -> tuple[int, dict[str, Any]]:
    words = "&".join(f"{key}={value}" for key, value in query.items())
    answer, body = page.get(f"/frame.json?{words}")
    return answer.status, json.loads(body)


def test_the_state_is_what_the_daemon_wrote(page: Page, tmp_path: Path) -> None:
    answer, body = page.get("/state.json")
    assert answer.status == 503
    assert "has not written its status" in json.loads(body)["error"]
    write(tmp_path, status(main=MAIN))
    answer, body = page.get("/state.json")
    assert answer.status == 200
    assert json.loads(body)["status"]["reported"]["pipelines"]["main"]["update"]["reason"] == "p99 was 80 ms"


def test_how_old_the_state_is_stands_beside_it(page: Page, tmp_path: Path) -> None:
    """As when the disk is full, and the daemon cannot write a newer one."""
    write(tmp_path, status(main=MAIN))
    os.utime(tmp_path / "status.json", (1_000_000, 1_000_000))
    said = json.loads(page.get("/state.json")[1])
    assert (said["written"], said["window_s"]) == (1_000_000, 10.0)
    assert said["now"] > said["written"] + 2 * said["window_s"]
    assert "2 * window_s" in page.get("/")[1].decode(), "the page shows it then"


def test_a_frame_with_its_result(page: Page, tmp_path: Path) -> None:
    code, said = frame(page, pipeline="main", source="cam")
    assert (code, said["error"]) == (503, "Nothing serves pipeline main here.")
    code, said = frame(page, pipeline="../main", source="cam")
    assert (code, said["error"]) == (503, "That is not the name of a pipeline and a source.")
    bundle: Bundle = colour_bundle(tmp_path / "bundle")
    runner = Child()
    runner.send(watched(tmp_path / RUN, picture_directory(tmp_path / "p", ["green"])))
    runner.send(serve(bundle))
    runner.until(ServingNow)
    code, said = frame(page, pipeline="main", source="cam")
    assert code == 200
    picture = images.decode(base64.b64decode(said["jpeg"]))
    assert picture.shape[:2] == (said["height"], said["width"])
    assert said["result"]["top"][0]["label"] == "green"
    runner.close()


def test_the_page_needs_nothing_from_elsewhere_and_nothing_else_may_run_in_it(page: Page) -> None:
    answer, body = page.get("/")
    text = body.decode()
    assert answer.status == 200
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)
    assert nonce is not None
    assert text.count(f'nonce="{nonce[1]}"') == 2
    assert "{{" not in text
    assert not re.search(r"""(src|href)=|https?://|innerHTML|@import|url\(""", text.replace(".src =", ""))
    assert "prefers-color-scheme" in text or "light-dark(" in text
    assert page.get("/")[0].headers["Content-Security-Policy"] != policy
    assert page.get("/etc/passwd")[0].status == 404
    assert page.get("/?" + "a=1&" * 9)[0].status == 400
    assert page.get("/?" + "a" * 2000)[0].status == 400


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost:80", 404),
        ("127.0.0.1", 404),
        ("[::1]:8088", 404),
        ("10.0.0.7:8088", 404),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8088", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("[::1", 403),
    ],
)
def test_a_name_that_others_point_here_is_refused(page: Page, host: str, code: int) -> None:
    assert page.get("/nothing", Host=host)[0].status == code


def test_names() -> None:
    names = own_names("0.0.0.0")
    here = socket.gethostname().lower().partition(".")[0]
    assert known_host(f"{here}.local:8088", names)
    assert not known_host(f"{here}.local:8088", own_names("127.0.0.1"))
    assert not known_host(None, names)
    assert not known_host("x" * 400, names)


def test_a_token_is_asked_for_and_kept_out_of_the_address(tmp_path: Path) -> None:
    write(tmp_path, status())
    page = Page(tmp_path, token=TOKEN)
    assert page.get("/")[0].status == 401
    assert page.get("/state.json?token=wrong")[0].status == 401
    assert page.get("/state.json", Authorization=f"Bearer {TOKEN}")[0].status == 200
    answer, _ = page.get(f"/?token={TOKEN}")
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly; SameSite=Strict" in cookie
    assert page.get("/state.json", Cookie=cookie.partition(";")[0])[0].status == 200
    assert page.get("/state.json", Cookie="edgeward=\xe9; x")[0].status == 401
    assert TOKEN not in Path(f"/proc/{page.process.pid}/cmdline").read_text()
    page.end()


def test_it_stays_light_and_ends_with_the_daemon(tmp_path: Path) -> None:
    page = Page(tmp_path)
    page.get("/")
    loaded = page.end()
    assert page.process.returncode == 0
    assert "local_socket" in loaded
    for heavy in ("numpy", "cv2", "onnxruntime", "pydantic", "httpx"):
        assert not re.search(rf"\| +{heavy}\b", loaded)


def test_seats_are_bounded_and_given_back(page: Page) -> None:
    silent = [socket.create_connection(("127.0.0.1", page.port), timeout=60) for _ in range(MAX_CLIENTS)]
    with socket.create_connection(("127.0.0.1", page.port), timeout=60) as one_too_many:
        assert one_too_many.recv(1) == b""
    for link in silent:
        link.close()

    def given_back() -> bool:
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
            return page.get("/")[0].status == 200
        return False

    eventually(given_back)  # each by a thread of its own


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('port = 8088\nhost = "0.0.0.0"', "needs a token"),
        ('port = 8088\nhost = "0.0.0.0"\ntoken = "short"', "token"),
        ("port = 99999", "port"),
        ('port = 8088\ntoken = "sixteen letters and blanks"', "token"),
        ("prot = 8088", "unknown key page.prot"),
    ],
)
def test_settings_that_would_let_anybody_in_are_refused(tmp_path: Path, lines: str, why: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f"[page]\n{lines}\n")
    with pytest.raises(Rejected, match=why):
        load_config(file)


class _Pulse(Pulse):
    """Stops the keeper when the page answers, or once it has been told that it cannot."""

    def __init__(self, keeper: PageKeeper, done: Any) -> None:
        super().__init__("page", 30.0)
        self._keeper, self._done, self.beats = keeper, done, 0

    def beat(self) -> None:
        self.beats += 1
        if self._done() or self.beats > 60:
            self._keeper.stop()


def test_the_daemon_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = PageSettings(port=free_port(), token=TOKEN)
    keeper = PageKeeper(settings, tmp_path)
    pulse = _Pulse(keeper, lambda: "The local page is at" in caplog.text)
    with caplog.at_level("INFO"):
        keeper.run(pulse)
    assert f"http://127.0.0.1:{settings.port}/ (with its token)" in caplog.text
    assert TOKEN not in caplog.text
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", settings.port), timeout=5)


def test_a_port_that_is_taken_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, caplog.at_level("INFO"):
        backoff = Backoff(0.01, 0.01)
        keeper = PageKeeper(PageSettings(port=taken.getsockname()[1]), tmp_path, backoff=backoff)
        keeper.run(_Pulse(keeper, lambda: backoff.failures >= 3))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "cannot listen on 127.0.0.1" in warnings[0]
