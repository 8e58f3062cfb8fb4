"""The daemon's side of local serving: the process, its settings and its token."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from ports import free_port

from edgeward_agent.backoff import Backoff
from edgeward_agent.config import ServeSettings, load_config
from edgeward_agent.lifetime import Pulse
from edgeward_agent.serving.supervising import LEAST_TOKEN, Serving, order, read_token
from edgeward_agent.serving.wire import Start
from edgeward_wire.errors import Rejected


def start(tmp_path: Path, port: int = 0) -> Start:
    return order(ServeSettings(port=port), ("main",), tmp_path)


class Kept:
    """A `Serving` on its thread."""

    def __init__(self, start: Start) -> None:
        self.ports: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.serving = Serving(start, listening=self.ports.put, backoff=Backoff(0.01, 0.05))
        self.thread = threading.Thread(target=self.serving.run, args=(Pulse("serving", 30),))
        self.thread.start()

    def stop(self) -> None:
        self.serving.stop(True)
        self.thread.join(60)
        assert not self.thread.is_alive()


def listeners(port: int) -> set[int]:
    """Processes of ours that have this port open for listening."""
    wanted = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and int(line.split()[1].split(":")[1], 16) == port
    }
    found: set[int] = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # threads end
            pids = [int(pid) for pid in (task / "children").read_text().split()]
            found.update(pid for pid in pids if any(f"socket:[{inode}]" in files(pid) for inode in wanted))
    return found


def files(pid: int) -> set[str]:
    """What a process has open."""
    found = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # files are closed
            found.add(os.readlink(one))
    return found


def test_a_process_that_dies_comes_back(tmp_path: Path) -> None:
    kept = Kept(start(tmp_path))
    try:
        port = kept.ports.get(timeout=60)
        (pid,) = listeners(port)
        os.kill(pid, signal.SIGKILL)
        again = kept.ports.get(timeout=60)
        assert listeners(again)
    finally:
        kept.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", again), 5).close()


def test_a_port_that_is_taken_is_said_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()  # no outgoing connection gets it when it is free again
    with socket.create_server(("127.0.0.1", port)) as other:
        kept = Kept(start(tmp_path, port))
        try:
            while not any("in use" in record.message for record in caplog.records):
                kept.thread.join(0.05)
                assert kept.thread.is_alive()
            other.close()
            assert kept.ports.get(timeout=60) == port
        finally:
            kept.stop()


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('[serve]\nport = 8100\nhost = "::1"\n')
    assert load_config(file).serve.port == 8100
    for host in ("0.0.0.0", "192.168.1.2", "::"):
        file.write_text(f'[serve]\nport = 8100\nhost = "{host}"\n')
        with pytest.raises(Rejected, match="token_file"):
            load_config(file)
        file.write_text(f'[serve]\nport = 8100\nhost = "{host}"\ntoken_file = "token"\n')
        assert load_config(file).serve.token_file == str(tmp_path / "token")
    file.write_text('[serve]\nport = 8100\nhost = "example.org"\n')
    with pytest.raises(Rejected, match="IP address"):
        load_config(file)
    file.write_text("")
    assert load_config(file).serve.port is None


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    with pytest.raises(Rejected, match="cannot be read"):
        read_token(file)
    file.write_text("x" * LEAST_TOKEN + "\n")
    file.chmod(0o644)
    with pytest.raises(Rejected, match="everybody"):
        read_token(file)
    file.chmod(0o640)
    assert read_token(file) == "x" * LEAST_TOKEN
    file.write_text("short\n")
    with pytest.raises(Rejected, match="fewer"):
        read_token(file)
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(Rejected, match="ASCII"):
        read_token(file)
