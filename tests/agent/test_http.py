from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

from edgeward_agent.http import Answer, Http, anchored, refusal
from edgeward_wire.ack import Refresh
from edgeward_wire.errors import Rejected, Unavailable
from sim.device import PATIENT
from sim.pki import Authority
from sim.server import Fault, Reply, Request, Server


def test_a_small_answer_comes_whole(server: Server, http: Http) -> None:
    server.files["/a"] = b"hello"
    answer = http.get("/a", limit=5)
    assert (answer.status, answer.body) == (200, b"hello")
    assert server.requests[0].headers["Accept-Encoding"] == "identity"


def test_an_answer_beyond_its_limit_is_refused(server: Server, http: Http) -> None:
    server.files["/a"] = b"hello"
    with pytest.raises(Rejected, match="longer than 4 bytes"):
        http.get("/a", limit=4)
    server.faults["/a"] = Fault(endless=True)
    with pytest.raises(Rejected, match="longer than 100000 bytes"):
        http.get("/a", limit=100_000)


def test_a_document_is_posted_as_json(server: Server, http: Http) -> None:
    server.handlers["POST", "/b"] = lambda request: Reply(201, request.body)
    answer = http.post("/b", Refresh(revision=3), limit=1000)
    assert json.loads(answer.body)["revision"] == 3
    assert server.requests[0].headers["Content-Type"] == "application/json"


def test_a_401_tells_the_servers_time_and_is_tried_once_more(server: Server, http: Http) -> None:
    theirs = time.time() + 1e6

    def guard(request: Request) -> Reply:
        iat = float(request.headers["Authorization"].removeprefix("Bearer "))
        if abs(iat - theirs) > 60:
            return Reply(401, b"", {"Date": formatdate(theirs, usegmt=True)})
        return Reply(200, b"in")

    server.handlers["GET", "/c"] = guard
    assert http.get("/c", limit=10, token=str).body == b"in"
    assert len(server.requests) == 2
    assert http.get("/c", limit=10, token=str).body == b"in"
    assert len(server.requests) == 3, "the server's time is remembered"


def test_a_401_that_stays_is_an_answer(server: Server, http: Http) -> None:
    server.handlers["GET", "/c"] = lambda request: Reply(401, b"no")
    assert http.get("/c", limit=10, token=str).status == 401
    assert len(server.requests) == 2


def test_redirects_are_not_followed(server: Server, http: Http) -> None:
    server.handlers["GET", "/d"] = lambda request: Reply(302, b"", {"Location": "https://example.org/"})
    assert http.get("/d", limit=10).status == 302


@pytest.mark.parametrize("fault", [Fault(drip=True), Fault(drip_headers=True)])
def test_a_server_that_drips_does_not_hold_a_thread(server: Server, hasty: Http, fault: Fault) -> None:
    server.files["/a"] = b"x" * 10_000
    server.faults["/a"] = fault
    with pytest.raises(Unavailable, match="fewer than 64 bytes a second"):
        hasty.get("/a", limit=10_000)


def test_a_stop_ends_a_request_that_waits(server: Server, server_authority: Authority) -> None:
    stop = threading.Event()
    http = Http(server.url, anchored(server_authority.pem), stop=stop)

    def stuck(request: Request) -> Reply:
        stop.set()
        server.closing.wait(30)
        return Reply(200, b"late")

    server.handlers["GET", "/a"] = stuck
    with pytest.raises(Unavailable, match="stopped"):
        http.get("/a", limit=10)
    http.close()


def test_a_damaged_anchor_is_named() -> None:
    for text in ("junk", ""):
        with pytest.raises(Rejected, match="server's CA is damaged"):
            anchored(text)


def test_a_server_of_another_ca_is_not_trusted(server: Server) -> None:
    http = Http(server.url, anchored(Authority.make("Someone else").pem), patience=PATIENT)
    with pytest.raises(Unavailable, match="does not trust") as caught:
        http.get("/a", limit=10)
    assert "clock" in caught.value.next_step
    http.close()


def test_a_server_under_another_name_is_not_trusted(server: Server, server_authority: Authority) -> None:
    url = server.url.replace("127.0.0.1", "127.0.0.2")
    http = Http(url, anchored(server_authority.pem), patience=PATIENT)
    with pytest.raises(Unavailable):
        http.get("/a", limit=10)
    http.close()


def test_a_cloud_that_is_away(server_authority: Authority) -> None:
    http = Http("https://127.0.0.1:1", anchored(server_authority.pem), patience=PATIENT)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1 cannot be reached") as caught:
        http.get("/a", limit=10)
    assert "Check the network" in caught.value.next_step
    http.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Rejected),
        (403, Rejected),
        (409, Rejected),
        (408, Unavailable),
        (429, Unavailable),
        (503, Unavailable),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(status: int, kind: type[Exception]) -> None:
    problem = {"title": "Used", "status": status, "detail": "The token is used.", "next_step": "Get another."}
    error = refusal(Answer(status, {}, json.dumps(problem).encode()), "Enrolment is refused")
    assert type(error) is kind
    assert error.what == "Enrolment is refused: The token is used."
    assert error.next_step == "Get another."
    assert str(status) in refusal(Answer(status, {}, b"<html>"), "x").what


def test_the_link_loads_nothing_that_it_does_not_use() -> None:
    """A command line, an event loop and a second HTTP library would cost 9 MB of the daemon's 50."""
    heavy = "('rich', 'click', 'pygments', 'asyncio', 'urllib3', 'requests')"
    modules = ", ".join(f"edgeward_agent.{name}" for name in ("http", "trust", "enrol", "mqtt", "blobs"))
    script = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_proxy_of_the_environment_is_used_but_not_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeward_agent.http import _proxy

    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert _proxy("https://cloud.example:8443") == "http://proxy.example:3128"
    assert _proxy("https://inside.example") is None
    assert _proxy("https://127.0.0.1:8443") is None
