"""Local serving: a real runner and a real server; plain clients, hostile ones, and tritonclient."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agent.serving import Serving, infer_binary, infer_json, tensor
from edgeward_agent import local_socket
from edgeward_agent.messages import Heartbeat
from edgeward_agent.serving import app, protocol
from edgeward_agent.serving.faults import Fault
from edgeward_agent.serving.link import Link
from edgeward_agent.serving.metrics import Metrics
from edgeward_agent.serving.server import MAX_CONNECTIONS, Query, Server, told
from edgeward_agent.serving.wire import MAX_CHANNELS
from edgeward_runtime import golden
from runtime.builders import listener, listener_sidecar, picture_file, spoken, video_file, wav_file
from runtime.bundles import Bundle, bundle_of, colour_bundle, put

INFER = "/v2/models/colours/infer"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("bundle"), float_too=True)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("serving")
    video = video_file(home / "v.avi", frames_each=10, fps=20)
    stack = Serving(home, bundle, source=str(video), max_body=1 << 20)
    yield stack
    stack.close()


def top(said: dict[str, object]) -> int:
    outputs = said["outputs"]
    assert isinstance(outputs, list)
    return int(np.argmax(outputs[0]["data"]))


def test_what_serves(serving: Serving) -> None:
    assert serving.json("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]
    assert serving.json("GET", "/v2/health/live") == (200, {"live": True})
    assert serving.json("GET", "/v2/health/ready")[0] == 200
    status, said = serving.json("GET", "/v2/models/colours")
    assert (status, said["versions"]) == (200, ["1"])
    assert said["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [1, 3, 32, 32]}]
    assert serving.json("GET", "/v2/models/colours/versions/1/ready")[0] == 200
    assert serving.json("GET", "/v2/models/colours/versions/2/ready")[0] == 404
    assert serving.json("GET", "/v2/models/none")[0] == 404


def test_json_and_binary_say_the_same(serving: Serving) -> None:
    for number, colour in enumerate([(0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9)]):
        array = tensor(colour)
        status, said = serving.json("POST", INFER, infer_json(array))
        assert status == 200, said
        assert (said["model_name"], said["model_version"]) == ("colours", "1")
        assert top(said) == number
        nested = serving.json("POST", INFER, infer_json(array, data=array.tolist()))[1]
        assert nested["outputs"] == said["outputs"]
        body, headers = infer_binary(array)
        status, answered, raw = serving.ask("POST", INFER, body, headers)
        assert status == 200
        length = int(answered["Inference-Header-Content-Length"])
        head = json.loads(raw[:length])
        assert head["id"] == "7"
        assert head["outputs"][0]["parameters"]["binary_data_size"] == len(raw) - length
        logits = np.frombuffer(raw[length:], np.float32)
        np.testing.assert_allclose(logits, said["outputs"][0]["data"], rtol=1e-6)


def test_a_picture_is_answered_as_the_task_answers(serving: Serving, tmp_path: Path) -> None:
    for suffix in ("jpg", "png"):
        raw = picture_file(tmp_path / f"p.{suffix}", "green").read_bytes()
        status, said = serving.json("POST", "/predict", raw)
        assert status == 200, said
        assert (said["top"][0]["label"], said["model"], said["version"]) == ("green", "colours", "1")
    assert serving.json("POST", "/predict?pipeline=other", raw)[0] == 404


def test_health_runs_the_model_at_most_once_a_second(serving: Serving) -> None:
    def asked() -> int:
        assert serving.json("GET", "/health")[0] == 200
        return int(serving.json("GET", "/health")[1]["pipelines"]["main"]["took_ms"] * 1000)

    first = serving.json("GET", "/health")
    assert first[0] == 200
    assert first[1]["pipelines"]["main"]["model"] == "colours"
    assert first[1]["pipelines"]["main"]["cosine"] > 0.99
    began = time.monotonic()
    outcomes = {asked() for _ in range(10)}
    assert len(outcomes) <= time.monotonic() - began + 2


def test_head_is_get_without_a_body(serving: Serving) -> None:
    link = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
    for path, status in (("/health", 200), ("/v2/health/live", 200), ("/nothing", 404), ("/predict", 405)):
        link.request("HEAD", path)
        response = link.getresponse()
        assert (response.status, response.read()) == (status, b"")
        assert int(response.headers["Content-Length"]) > 0
    link.request("GET", "/v2/health/live")
    assert json.loads(link.getresponse().read()) == {"live": True}, "no body stands before this answer"
    link.close()


def test_health_says_when_the_model_is_wrong(bundle: Bundle, tmp_path: Path) -> None:
    variant = bundle.manifest.variants["int8"]
    arrays = golden.read_npz(bundle.blob(variant.golden))
    lie = golden.write_npz({name: -a if name.startswith("out") else a for name, a in arrays.items()})
    variants = {"int8": variant.model_copy(update={"golden": put(bundle.blobs, lie)})}
    stack = Serving(tmp_path, bundle.with_manifest(variants=variants))
    try:
        status, said = stack.json("GET", "/health")
        assert status == 503
        assert "golden outputs" in said["pipelines"]["main"]["detail"]
    finally:
        stack.close()


def test_health_of_a_slow_model_that_is_asked_rarely(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEALTH_S", 0.0)
    monkeypatch.setattr(app, "_STALE_S", 0.01)
    stack = Serving(tmp_path, bundle)
    try:
        health = app.Health(Link(stack.run, "main", 1))
        assert health.look()["ok"]
        time.sleep(0.02)
        stack.runner.process.send_signal(signal.SIGSTOP)
        later = threading.Timer(5 * app.HEALTH_WAIT_S, stack.runner.process.send_signal, [signal.SIGCONT])
        later.start()
        assert health.look()["ok"], "its last outcome is old, so this run is waited for"
        later.join()
        time.sleep(0.02)
        monkeypatch.setattr(app, "_WAIT_S", 0.05)
        stack.runner.process.send_signal(signal.SIGSTOP)
        assert not health.look()["ok"], "this one is late"
        stack.runner.process.send_signal(signal.SIGCONT)
    finally:
        stack.close()


def test_metrics_count(serving: Serving) -> None:
    serving.json("POST", INFER, infer_json(tensor()))
    text = serving.ask("GET", "/metrics")[2].decode()
    assert 'edgeward_serving_requests_total{route="infer",code="200"}' in text
    assert 'edgeward_serving_request_seconds_bucket{route="infer",le="+Inf"}' in text
    assert 'edgeward_live_frames_total{pipeline="main"}' in text


def test_metrics_know_what_serves_though_nobody_else_asks(bundle: Bundle, tmp_path: Path) -> None:
    stack = Serving(tmp_path, bundle)
    try:
        ready = 'edgeward_serving_ready{pipeline="main"} '
        assert f"{ready}1" in stack.ask("GET", "/metrics")[2].decode()
        stack.runner.process.kill()
        stack.runner.process.wait()
        deadline = time.monotonic() + 20
        while f"{ready}0" not in stack.ask("GET", "/metrics")[2].decode():
            assert time.monotonic() < deadline
    finally:
        stack.close()


def test_a_runner_that_hangs_holds_up_nobody_elses_model(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket takes connections and says nothing, for longer than this test waits."""
    monkeypatch.setattr(local_socket, "_CLIENT_S", 120.0)
    monkeypatch.setattr("edgeward_agent.serving.link._PATIENCE_S", 0.1)
    stack = Serving(tmp_path, bundle)
    with socket.socket(socket.AF_UNIX) as hung:
        try:
            hung.bind(str(stack.run / "hangs.sock"))
            hung.listen()
            answers = app.App([Link(stack.run, name, 1) for name in ("hangs", "main")], Metrics())
            got: list[int] = []
            asked = Query("GET", "/v2/models/colours", "", lambda _: None)

            def ask() -> None:
                got.extend(answers(asked).status for _ in range(3))

            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(30)
            assert got == [200, 200, 200]
        finally:
            stack.close()


def test_tritonclient_understands_us(serving: Serving) -> None:
    import tritonclient.http as triton

    client = triton.InferenceServerClient(f"127.0.0.1:{serving.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.get_model_metadata("colours")["name"] == "colours"
    for binary in (False, True):
        given = triton.InferInput("image", [1, 3, 32, 32], "FP32")
        given.set_data_from_numpy(tensor((0.1, 0.9, 0.1)), binary_data=binary)
        wanted = triton.InferRequestedOutput("logits", binary_data=binary)
        for version in ("", "1"):
            found = client.infer("colours", [given], outputs=[wanted], model_version=version)
            assert found.as_numpy("logits").argmax() == 1
    with pytest.raises(triton.InferenceServerException, match="No model"):
        client.infer("other", [given])
    client.close()


# --- hostile


def broken(**more: object) -> bytes:
    return json.dumps(infer_json(tensor(), **more)).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "`inputs`"),
        (b'{"inputs": []}', "missing"),
        (b'{"inputs": [3]}', "no input"),
        (b"[" * 100_000, "not JSON"),
        (broken(name="other"), "no input 'other'"),
        (broken(datatype="INT8"), "not FP32"),
        (broken(shape=[1, 3, 1 << 40, 1 << 40]), "shape"),
        (broken(shape=[-1, 3, 32, 32]), "shape"),
        (broken(shape=[1, 3, 32]), "shape"),
        (broken(shape="x"), "shape"),
        (broken(data=[1.0]), "fewer than 3072"),
        (broken(data=[0.0] * 4000), "more than 3072"),
        (broken(data=["a"] * 3072), "no number"),
        (broken(data=[True] * 3072), "no number"),
        (broken(data=[None] * 3072), "no number"),
        (broken(data=[1e39] * 3072), "not finite"),
        (broken(data=[float("nan")] * 3072), "not JSON"),
        (broken(data=[[1], 2]), "unevenly"),
        (broken(data="@0"), "neither"),
        (broken(parameters={"binary_data_size": 12288}), "both data and binary"),
        (broken(parameters=[]), "object"),
        (broken().replace(b'{"inputs"', b'{"outputs": [{"name": "x"}], "inputs"'), "no output 'x'"),
    ],
)
def test_a_hostile_body_gets_one_clear_error(serving: Serving, body: bytes, says: str) -> None:
    status, said = serving.json("POST", INFER, body)
    assert status == 400, said
    assert says in said["error"]
    assert set(said) == {"error"}


def test_lists_that_are_never_closed_are_read_once(bundle: Bundle) -> None:
    """8 MB of them: to look to the end for each would take longer than a test may."""
    with pytest.raises(Fault, match="not JSON"):
        protocol.read(b'"data":[' * (1 << 20), None, bundle.manifest.contract)
    with pytest.raises(Fault, match="not JSON"):
        protocol.read(b'"data":[' * (1 << 20) + b"]", None, bundle.manifest.contract)


@pytest.mark.parametrize("length", ["0", "-1", "1e3", "99999999", "999999999999999999999", "3"])
def test_a_header_length_that_lies(serving: Serving, length: str) -> None:
    body, _ = infer_binary(tensor())
    status, said = serving.json("POST", INFER, body, {"Inference-Header-Content-Length": length})
    assert (status, set(said)) == (400, {"error"})


def test_binary_tensors_that_lie(serving: Serving) -> None:
    for size in (4, 1 << 60, 12288.0, True, None, "12288"):
        body, headers = infer_binary(tensor(), parameters={"binary_data_size": size})
        assert serving.json("POST", INFER, body, headers)[0] == 400, size
    body, headers = infer_binary(tensor())
    assert "12284 bytes follow" in serving.json("POST", INFER, body[:-4], headers)[1]["error"]
    assert "belong to no input" in serving.json("POST", INFER, body + b"1234", headers)[1]["error"]
    bad = tensor()
    bad[0, 0, 0, 0] = np.nan
    body, headers = infer_binary(bad)
    assert "not finite" in serving.json("POST", INFER, body, headers)[1]["error"]


def test_what_http_itself_refuses(serving: Serving) -> None:
    large = serving.json("POST", INFER, b"x" * ((1 << 20) + 1))
    assert large[0] == 413
    assert serving.json("GET", INFER)[0] == 405
    assert serving.json("POST", "/health", b"{}")[0] == 405
    assert serving.json("GET", "/nothing")[0] == 404
    assert serving.json("GET", "/" + "a/" * 20)[0] == 404
    assert serving.json("POST", INFER, b"{}", {"Content-Encoding": "gzip"})[0] == 415
    assert serving.json("GET", "/v2", headers={"Origin": "https://example.org"})[0] == 403
    for name in (
        "example.org",
        "127.0.0.1.example.org",
        "localhost.example.org:80",
        "[::1].example.org",
        "[::",
    ):
        assert serving.json("GET", "/v2", headers={"Host": name})[0] == 403, name
    for name in ("localhost:8100", "LOCALHOST", "127.0.0.1", "127.8.8.8:80", "[::1]:8100"):
        assert serving.json("GET", "/v2", headers={"Host": name})[0] == 200, name
    assert serving.json("PUT", "/v2", b"{}")[0] == 501
    assert serving.json("POST", "/predict?" + "a=1&" * 5, b"x")[0] == 400
    for text in (b"\0\0\0\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", serving.port), 10) as link:
            link.sendall(text)
            assert b'{"error":' in _all(link)


def _all(link: socket.socket) -> bytes:
    raw = b""
    while part := link.recv(65536):
        raw += part
    return raw


def test_pictures_that_are_none(serving: Serving, tmp_path: Path) -> None:
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + bytes(20)
    whole = picture_file(tmp_path / "p.png", "red").read_bytes()
    sound = b"RIFF\0\0\0\0WAVE"
    for raw, says in ((b"x", "no JPEG"), (bomb, "pixels"), (whole[:40], "picture"), (sound, "a sound")):
        status, said = serving.json("POST", "/predict", raw)
        assert status == 400, said
        assert says in said["error"]
    assert serving.json("POST", "/predict")[0] in (400, 411)


def test_one_who_drips_is_cut() -> None:
    counted: list[int] = []

    def count(_route: str, code: int, _took: float) -> None:
        counted.append(code)

    with Server(("127.0.0.1", 0), lambda _query: told(200, {}), count, max_body=1000, header_s=0.2) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for text in (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx", b"GET / HT"):
            with socket.create_connection(("127.0.0.1", server.server_port), 20) as slow:
                slow.sendall(text)
                assert b" 400 " in _all(slow)
        server.shutdown()
    assert counted == [400, 400]


def test_one_who_asks_first_is_answered_before_it_sends() -> None:
    with Server(("127.0.0.1", 0), lambda query: told(200, {}), lambda *_: None, max_body=1000) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asks = b"POST / HTTP/1.1\r\nHost: %s\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        address = ("127.0.0.1", server.server_port)
        with socket.create_connection(address, 20) as link, link.makefile("rb") as lines:
            for _ in range(2):
                link.sendall(asks % (b"localhost", 3))
                assert lines.readline() == b"HTTP/1.1 100 Continue\r\n"
                assert lines.readline() == b"\r\n"
                link.sendall(b"abc")
                assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
                while lines.readline() != b"\r\n":
                    pass
                assert lines.read(2) == b"{}"
            link.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx")
            assert lines.readline() == b"HTTP/1.1 200 OK\r\n"
        for host, length, status in ((b"localhost", 1001, b"413"), (b"example.org", 3, b"403")):
            with socket.create_connection(address, 20) as link:
                link.sendall(asks % (host, length))
                assert _all(link).startswith(b"HTTP/1.1 " + status), "its body is not asked for"
        server.shutdown()


def test_connections_are_bounded() -> None:
    with Server(("127.0.0.1", 0), lambda _query: told(200, {}), lambda *_: None, max_body=1000) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with contextlib.ExitStack() as held:
            address = ("127.0.0.1", server.server_port)
            for _ in range(MAX_CONNECTIONS):
                held.enter_context(socket.create_connection(address, 20))
            one_more = held.enter_context(socket.create_connection(address, 20))
            answer = _all(one_more)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert answer.endswith(b'{"error": "Too many are connected already."}')
        server.shutdown()


# --- life


def test_frames_go_on_beside_requests(serving: Serving) -> None:
    before = serving.runner.until(Heartbeat).frames
    enough, statuses = threading.Event(), list[int]()

    def ask() -> None:
        while not enough.is_set():
            statuses.append(serving.json("POST", INFER, infer_json(tensor()))[0])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        loaded = serving.runner.until(Heartbeat, lambda _: len(statuses) >= 20)
        last = serving.runner.until(Heartbeat, lambda beat: beat.frames >= loaded.frames + 10)
        assert all(thread.is_alive() for thread in threads), "it is loaded all the while"
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert last.errors == 0
    assert loaded.frames >= before
    assert set(statuses) == {200}


def test_a_runner_that_dies_and_one_that_comes_back(bundle: Bundle, tmp_path: Path) -> None:
    stack = Serving(tmp_path, bundle)
    try:
        assert stack.json("POST", INFER, infer_json(tensor()))[0] == 200
        stack.runner.process.send_signal(signal.SIGSTOP)
        got: list[tuple[int, object]] = []
        threads = [
            threading.Thread(target=lambda: got.append(stack.json("POST", INFER, infer_json(tensor()))))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        busy = f'edgeward_serving_busy{{pipeline="main"}} {MAX_CHANNELS}'
        deadline = time.monotonic() + 20
        while busy not in stack.ask("GET", "/metrics")[2].decode():
            assert time.monotonic() < deadline
        stack.runner.process.kill()
        for thread in threads:
            thread.join(30)
        assert {status for status, _ in got} == {503}
        assert stack.json("GET", "/v2/health/ready")[0] == 400
        assert stack.json("GET", "/health")[0] == 503
        stack.runner.close()
        stack.runner = stack.start_runner()
        assert stack.json("POST", INFER, infer_json(tensor()))[0] == 200
    finally:
        stack.close()


def test_a_queue_that_is_full_says_when_to_come_again(bundle: Bundle, tmp_path: Path) -> None:
    stack = Serving(tmp_path, bundle, queue=1)
    try:
        assert stack.json("GET", "/v2/health/ready")[0] == 200
        stack.runner.process.send_signal(signal.SIGSTOP)
        got: list[tuple[int, dict[str, str]]] = []

        def ask() -> None:
            body, headers = infer_binary(tensor())
            got.append(stack.ask("POST", INFER, body, headers)[:2])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while len(got) < 3:
            assert stack.ask("GET", "/v2/health/live")[0] == 200
            assert time.monotonic() < deadline
        stack.runner.process.send_signal(signal.SIGCONT)
        for thread in threads:
            thread.join(30)
        refused = [headers for status, headers in got if status == 429]
        assert refused
        assert all(headers["Retry-After"] == "1" for headers in refused)
        assert {status for status, _ in got} == {200, 429}
    finally:
        stack.close()


def test_a_model_that_changes_and_one_that_remembers(tmp_path: Path, bundle: Bundle) -> None:
    stack = Serving(tmp_path, bundle)
    try:
        assert stack.json("GET", "/v2/models/colours")[0] == 200
        listener_sidecar(tmp_path / "listener.toml")
        memory = bundle_of(tmp_path, listener(tmp_path / "listener.onnx"), name="listener")
        stack.serve(memory)
        status, said = stack.json("POST", INFER, infer_json(tensor()))
        assert status in (404, 503), said
        name = memory.manifest.name
        deadline = time.monotonic() + 20
        while stack.json("GET", f"/v2/models/{name}")[0] != 200:
            assert time.monotonic() < deadline
        status, said = stack.json("POST", f"/v2/models/{name}/infer", {"inputs": []})
        assert status == 400
        assert "remembers" in said["error"]
        sound = wav_file(tmp_path / "s.wav", spoken(0.5)).read_bytes()
        status, said = stack.json("POST", "/predict", sound)
        assert status == 200, said
        assert said == {**said, "step_s": 0.01}
        assert len(said["windows"]) == 50
        assert said["windows"][10]["at_s"] == pytest.approx(0.1)
        assert said["windows"][0]["speech"]["score"] >= 0
        again = stack.json("POST", "/predict", sound)[1]
        scores = [[one["speech"]["score"] for one in answer["windows"]] for answer in (said, again)]
        assert scores[0] == scores[1], "each request begins anew"
    finally:
        stack.close()


def test_a_token_is_asked_for(tmp_path: Path, bundle: Bundle) -> None:
    stack = Serving(tmp_path, bundle, token="0123456789abcdef")
    try:
        assert stack.json("GET", "/v2")[0] == 401
        assert stack.json("GET", "/v2", headers={"Authorization": "Bearer x"})[0] == 401
        assert stack.json("GET", "/v2", headers={"Authorization": "Bearer 0123456789abcdef"})[0] == 200
    finally:
        stack.close()
