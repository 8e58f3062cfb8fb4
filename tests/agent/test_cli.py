"""The command line as a person uses it: in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.test_status import MAIN, status, write
from edgeward_agent import cli
from edgeward_wire.enrolment import EnrolmentString
from edgeward_wire.errors import Rejected

HEAVY = ("numpy", "cv2", "onnxruntime", "edgeward_runtime", "fastapi")
PROVE = f"""
import sys
heavy = [name for name in sys.modules if name.split(".")[0] in {HEAVY}]
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""


def agent(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeward_agent.cli", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "code",
    [
        "import edgeward_agent.daemon",
        "from edgeward_agent.cli import main\nmain(['status', '--state', sys.argv[1]])",
        "from edgeward_agent.cli import main\nmain(['run', '--state', sys.argv[1]])",
        "from edgeward_agent.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
    ids=["daemon", "status", "run", "help"],
)
def test_the_daemon_loads_nothing_that_a_model_can_crash(code: str, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{PROVE}", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("words", [(), ("fly",), ("enroll",), ("status", "--colour"), ("probe",)])
def test_wrong_usage_is_2(words: tuple[str, ...]) -> None:
    found = agent(*words)
    assert found.returncode == 2
    assert "usage:" in found.stderr


def test_status(tmp_path: Path) -> None:
    write(tmp_path, status(main=MAIN))
    found = agent("status", "--state", str(tmp_path))
    assert found.returncode == 1, "it does not run"
    assert "device edge-01a" in found.stdout
    plain = agent("status", "--json", STATE_DIRECTORY=str(tmp_path))
    assert json.loads(plain.stdout)["reported"]["revision"] == 7


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("status",), "No edgeward-agent has run on"),
        (("run",), "not enrolled"),
        (("enroll", "edgeward1.abc", "--device", "edge-01a"), "enrolment string"),
        (("enroll", "edgeward1.abc"), "enrolment string"),  # the host name is its id
    ],
)
def test_errors_are_two_lines_and_no_traceback(tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    found = agent(*words, "--state", str(tmp_path / "state"), "--config", str(tmp_path / "agent.toml"))
    assert found.returncode == 1
    first, second, *rest = found.stderr.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("next: ")
    assert rest == []
    assert found.stdout == ""


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    long = "x" * 300
    found = agent("snapshot", "door", "--out", f"{long}.jpg", "--config", str(tmp_path / "agent.toml"))
    assert found.returncode == 1
    assert found.stderr == (
        f"error: {long}.jpg cannot be looked at: File name too long.\nnext: Name another one.\n"
    )
    string = EnrolmentString(url="https://h", ca_sha256="0" * 64, root_sha256="0" * 64, token="t").encode()
    found = agent("enroll", string, "--device", "edge-01a", "--state", str(tmp_path / long))
    assert found.returncode == 1
    assert "cannot be looked at: File name too long." in found.stderr
    assert "Traceback" not in found.stderr


def test_a_misspelt_setting_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text("[telemetry]\nwindow = 3\n")
    found = agent("run", "--config", str(tmp_path / "agent.toml"), "--state", str(tmp_path))
    assert found.returncode == 1
    assert "unknown key telemetry.window" in found.stderr


def test_run_has_two_faces() -> None:
    assert "--state" in agent("run", "--help").stdout
    assert "--source" in agent("run", "--model", "m.onnx", "--help").stdout


def test_version() -> None:
    assert agent("--version").stdout.startswith("edgeward-agent 0.")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    write(tmp_path, status(main=MAIN))
    command = f"{sys.executable} -m edgeward_agent.cli status --state {tmp_path} | true"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr == ""


@pytest.mark.parametrize(
    ("host", "device"),
    [
        ("door-7", "door-7"),
        ("Door_7.plant.example", "door-7"),
        ("--x--", "x"),
        ("a" * 80, "a" * 63),
        ("a" * 62 + "-b", "a" * 62),
    ],
)
def test_a_device_is_called_as_its_host(host: str, device: str) -> None:
    assert cli._own_name(host) == device


def test_root_becomes_the_owner_of_the_state_directory(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become someone else")
    os.chown(tmp_path, 65534, 65533)
    code = "import os, sys; from pathlib import Path; from edgeward_agent.cli import _become_owner\n"
    code += "_become_owner(Path(sys.argv[1])); print(os.getuid(), os.getgid(), os.getgroups())"
    for directory, expected in ((tmp_path, "65534 65533 []"), (tmp_path / "none", "0 0 ")):
        command = [sys.executable, "-c", code, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.startswith(expected), done.stderr


@pytest.mark.parametrize("host", ["localhost", "localhost.localdomain", "", "___", "\u00fc"])
def test_a_host_name_that_is_no_id_is_said(host: str) -> None:
    with pytest.raises(Rejected, match="makes no device id") as caught:
        cli._own_name(host)
    assert "--device" in caught.value.next_step
