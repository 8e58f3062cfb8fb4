"""The demo leaves nothing behind, however it ends, and does not touch another one's state."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import demo
import pytest

from edgeward_wire.errors import Rejected

LIB = Path(demo.__file__).parent
WATCHING = """
import sys
from functools import partial
from pathlib import Path
import demo
from stack import Stack

demo.start = lambda *_: None
demo.deploy = lambda *_: 1.0
demo.make_cameras = dict
demo.HOME = Path(sys.argv[1])
demo.Stack = partial(Stack, bin=demo.HOME / "bin")
sys.argv = ["demo"]
sys.exit(demo.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_it_watches_with_ends_with_it(tmp_path: Path, number: signal.Signals) -> None:
    ctl = tmp_path / "bin/agent-ctl"
    ctl.parent.mkdir()
    ctl.write_text("#!/bin/sh\necho $$\nexec sleep 60\n")
    ctl.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHING, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(LIB)},
    )
    assert process.stdout is not None
    watcher = int(process.stdout.readline())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Stopped." in err
    with pytest.raises(ProcessLookupError):
        os.kill(watcher, 0)


def test_a_child_that_is_just_started_is_known_before_the_end() -> None:
    """The signal came while `Popen` had not returned, and nobody knew the child."""
    code = (
        "import os, signal; from ending import end_in_order, held; end_in_order(); known = False\n"
        "try:\n"
        "    with held():\n"
        "        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGHUP); known = True\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)  # not heard again\n"
        "    print(known)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(LIB)},
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_a_second_demo_leaves_the_first_ones_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "HOME", tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path.parent)
    monkeypatch.setattr(sys, "argv", ["demo", "--once"])
    monkeypatch.setattr(demo, "end_in_order", lambda: None)
    (tmp_path / "cloud").mkdir()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert demo.main() == 1
    assert (tmp_path / "cloud").is_dir()
    assert "another demo runs" in capsys.readouterr().err


def test_what_the_cloud_answers_is_an_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise Rejected("The token is not known.", "Make a new one.")

    monkeypatch.setattr(demo, "HOME", tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path.parent)
    monkeypatch.setattr(demo, "start", refused)
    monkeypatch.setattr(demo, "make_cameras", dict)
    monkeypatch.setattr(demo, "end_in_order", lambda: None)
    monkeypatch.setattr(sys, "argv", ["demo", "--once"])
    assert demo.main() == 1
    captured = capsys.readouterr()
    assert "error: The token is not known." in captured.err
    assert '"ok": false' in captured.out
