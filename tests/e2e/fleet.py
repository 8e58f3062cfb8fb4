"""A running fleet, and what the end-to-end tests do with it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from stack import Stack

from runtime import builders

FLEET = "edge-01"
DEVICES = ("e2e-a", "e2e-b")
PATIENCE_S = 90.0


@dataclass
class Fleet:
    """A running fleet, and what tests do with it."""

    stack: Stack
    media: Path
    made: int = 0

    def model(self, **changes: Any) -> Path:
        """A new tiny INT8 model with its sidecar, labels and samples; never the same twice."""
        self.made += 1
        home = self.stack.directory / "models" / str(self.made)
        home.mkdir(parents=True)
        builders.labels_file(home / "labels.txt")
        builders.picture_directory(home / "samples")
        builders.sidecar_file(home / "colours.toml", samples="samples")
        return builders.int8_classifier(home / "colours.onnx", salt=self.made, **changes)

    def deploy(self, model: Path, *extra: str, fleet: str = FLEET) -> CompletedProcess[str]:
        return self.stack.ctl(
            "deploy", str(model), "--fleet", fleet, "--probation", "1", "--timeout", "120", "--json", *extra
        )

    def deployed(self, model: Path, *extra: str, fleet: str = FLEET) -> str:
        """Deploy; its path, once every device that succeeded has reported to serve it."""
        done = self.deploy(model, *extra, fleet=fleet)
        assert done.returncode == 0, done.stderr + done.stdout
        ended = json.loads(done.stdout)
        path = str(ended["rollout"]["model"]["path"])
        for device in ended["succeeded"]:  # the rollout may know it from an event that overtook the report
            self.serving(device, path)
        return path

    def device(self, name: str) -> dict[str, Any]:
        """The device as the cloud knows it."""
        return next(d for d in self.stack.devices() if d["id"] == name)

    def pipeline(self, name: str) -> dict[str, Any]:
        """What the device last reported of its one pipeline."""
        reported = self.device(name).get("reported") or {}
        return (reported.get("pipelines") or {}).get("main") or {}

    def committed(self, name: str) -> str | None:
        """Path of the committed model that the device reports to serve at this moment."""
        serving = self.pipeline(name).get("serving")
        return serving["model"]["path"] if serving and serving["committed"] else None

    def serving(self, name: str, path: str | None = None) -> str:
        """Path of the committed model that the device serves, once it reports this one, or any."""
        found: list[str] = []

        def reports() -> bool:
            now = self.committed(name)
            found[:] = [now] if now is not None and path in (None, now) else []
            return bool(found)

        self.wait(reports, f"{name} to serve {path or 'a committed model'}")
        return found[0]

    def frames(self, name: str) -> int:
        """Frames of this device that the cloud has stored."""
        return sum(row["frames"] for row in self.stack.telemetry(device=name))

    def wait(self, condition: Any, what: str, seconds: float = PATIENCE_S) -> None:
        self.stack.wait_for(condition, what, seconds=seconds)

    def goes_on_serving(self, name: str) -> None:
        """Frames that it takes from now on come to be stored: none that waited somewhere on their way."""
        began = time.time()  # one machine, one clock

        def stored() -> bool:
            rows = self._windows(name, "frames, ended_at - duration_s")
            return any(frames and start >= began for frames, start in rows)

        self.wait(stored, f"{name} to go on serving")

    def camera(self) -> str:
        return f'uri = "{self.media}"\nslot = "latest"\nrealtime = true\nloop = true'

    def gaps(self, name: str) -> int:
        """Sequence numbers of the device's telemetry that no stored window stands for, over all its boots."""
        rows = self._windows(name, "boot_id, first_seq, seq")
        missing, last = 0, {boot: None for boot, _, _ in rows}
        for boot, first, seq in rows:
            before = last[boot]
            missing += 0 if before is None else first - before - 1
            last[boot] = seq
        return missing

    def _windows(self, name: str, columns: str) -> list[Any]:
        """The device's stored windows, in the order in which it made them within a boot."""
        asked = f"SELECT {columns} FROM windows WHERE device = ? ORDER BY boot_id, seq"
        with contextlib.closing(sqlite3.connect(self.stack.cloud_dir / "edgeward.db")) as database:
            return database.execute(asked, (name,)).fetchall()
