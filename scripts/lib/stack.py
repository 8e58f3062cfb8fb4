"""A whole Edgeward on one machine: the cloud and some devices, as the processes that people run.

Used by the demo, the benches and the end-to-end tests. It only starts the real commands; nothing here
knows how they work. Invariant: whatever was started is stopped by `close`, also after a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ending import held
from ports import free_ports

from edgeward_ctl.client import Client
from edgeward_ctl.profile import load_profile
from edgeward_wire.errors import Unavailable

READY_S = 60.0
STOP_S = 20.0


class StackError(Exception):
    """A part did not do what the whole needs; the message names it and shows its last words."""


@dataclass
class Process:
    """A child in a session of its own, so that Ctrl-C reaches us alone and we decide the order of the end."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def last_words(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> int:
        """Send `sig` to the process, wait, and end its whole group if it will not go."""
        if self.running:
            self.popen.send_signal(sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # children that outlived it, if any
            os.killpg(self.popen.pid, signal.SIGKILL)
        return self.popen.wait(STOP_S)


@dataclass
class Stack:
    """One cloud, and devices by name, below one directory."""

    directory: Path
    window_s: float = 5.0
    poll_interval_s: float = 60.0
    bin: Path = field(default_factory=lambda: Path(sys.executable).parent)
    processes: dict[str, Process] = field(default_factory=dict)
    port: int = 0
    broker_port: int = 0
    _api: Client | None = None

    # --- the cloud

    @property
    def cloud_dir(self) -> Path:
        return self.directory / "cloud"

    @property
    def profile(self) -> Path:
        return self.cloud_dir / "operators" / "demo"

    def init_cloud(self, operators: Sequence[str] = ("demo",)) -> None:
        """The ceremony, on free ports of loopback."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port, self.broker_port = free_ports(2)
        names = [argument for name in operators for argument in ("--operator", name)]
        ports = ["--port", str(self.port), "--broker-port", str(self.broker_port)]
        done = self.run("edgeward-cloud", "init", "--dir", str(self.cloud_dir), *names, *ports)
        if done.returncode:
            raise StackError(f"edgeward-cloud init failed:\n{done.stderr}{done.stdout}")

    def start_cloud(self) -> Process:
        """Start the cloud and wait until it answers."""
        cloud = self.spawn("cloud", "edgeward-cloud", "up", "--dir", str(self.cloud_dir))
        self.wait_for(self._answers, "the cloud to answer", cloud)
        return cloud

    def _answers(self) -> bool:
        try:
            self.api.whoami()
        except Unavailable:
            return False
        return True

    def ctl(self, *arguments: str, profile: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run `agent-ctl` as an operator would."""
        return self.run("agent-ctl", "--profile", str(profile or self.profile), *arguments)

    def ctl_json(self, *arguments: str) -> Any:
        """Run `agent-ctl ... --json` and read what it prints."""
        done = self.ctl(*arguments, "--json")
        if done.returncode:
            raise StackError(f"agent-ctl {' '.join(arguments)} failed:\n{done.stderr}{done.stdout}")
        return json.loads(done.stdout)

    @property
    def api(self) -> Client:
        """The operator's API, for questions that are asked again and again."""
        if self._api is None:
            self._api = Client(load_profile(self.profile))
        return self._api

    def devices(self) -> list[Any]:
        """The cloud's devices, as plain JSON."""
        return [device.model_dump(mode="json") for device in self.api.devices()]

    def online(self) -> int:
        return sum(device.online for device in self.api.devices())

    def telemetry(self, *, fleet: str | None = None, device: str | None = None) -> list[Any]:
        """A row a device and series, of the last two hours, as plain JSON."""
        found = self.api.telemetry(fleet=fleet, device=device, since=time.time() - 7200)
        return [row.model_dump(mode="json") for row in found.rows if row.device]

    # --- devices

    def device_dir(self, device: str) -> Path:
        return self.directory / "devices" / device

    def add_device(self, device: str, enrolment: str, sources: Mapping[str, str], extra: str = "") -> None:
        """Write agent.toml and enrol. `sources`: name -> TOML lines of the source."""
        home = self.device_dir(device)
        home.mkdir(parents=True, exist_ok=True)
        rows = "".join(
            f'\n[[pipelines.main.sources]]\nname = "{name}"\n{lines}\n' for name, lines in sources.items()
        )
        (home / "agent.toml").write_text(
            f"[registry]\npoll_interval_s = {self.poll_interval_s}\n\n"
            f"[telemetry]\nwindow_s = {self.window_s}\n\n"
            f'[qualify]\nlock = "{self.directory / "qualify.lock"}"\n{extra}\n'
            f"[pipelines.main]\n{rows}"
        )
        done = self.run("edgeward-agent", "enroll", enrolment, "--device", device, *self.agent_paths(device))
        if done.returncode:
            raise StackError(f"edgeward-agent enroll failed for {device}:\n{done.stderr}{done.stdout}")

    def agent_paths(self, device: str) -> list[str]:
        home = self.device_dir(device)
        return ["--config", str(home / "agent.toml"), "--state", str(home / "state")]

    def start_agent(self, device: str) -> Process:
        return self.spawn(device, "edgeward-agent", "run", *self.agent_paths(device))

    def agent_status(self, device: str) -> Any:
        done = self.run("edgeward-agent", "status", "--json", *self.agent_paths(device))
        return json.loads(done.stdout) if done.returncode == 0 else None

    # --- processes

    def run(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / command), *arguments],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def spawn(self, name: str, command: str, *arguments: str) -> Process:
        logs = self.directory / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name}.log"
        out: IO[bytes]
        with log.open("ab") as out, held():
            popen = subprocess.Popen(
                [str(self.bin / command), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes[name] = Process(name, popen, log)
        return self.processes[name]

    def stop(self, name: str, sig: signal.Signals = signal.SIGTERM) -> int:
        return self.processes.pop(name).stop(sig)

    def wait_for(self, condition: Any, what: str, *needs: Process, seconds: float = READY_S) -> None:
        """Ask `condition` again and again; fail when time is up or a process that it needs has ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process in needs:
                if not process.running:
                    raise StackError(
                        f"{process.name} ended while waiting for {what}:\n{process.last_words()}"
                    )
            if time.monotonic() > deadline:
                words = "\n".join(f"--- {p.name}\n{p.last_words()}" for p in self.processes.values())
                raise StackError(f"waited {seconds:.0f} s in vain for {what}\n{words}")
            time.sleep(0.2)

    def close(self) -> None:
        """Devices first, so that they say goodbye to a broker that still listens; then the cloud."""
        if self._api is not None:
            self._api.__exit__(None, None, None)
        names = sorted(self.processes, key=lambda name: name == "cloud")
        for name in names:
            self.stop(name)

    def __enter__(self) -> Stack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with held():  # what ends us now is no reason to stay half way
            self.close()
