"""The units are valid for systemd itself, and their exposure is at most 2.0."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import missing

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))


@pytest.fixture(params=UNITS, ids=lambda unit: unit.stem)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy whose program exists, since `verify` looks for it; nothing else differs."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    text = request.param.read_text()
    copy = tmp_path / request.param.name
    copy.write_text(re.sub(r"^ExecStart=/opt/edgeward/bin/\S+", "ExecStart=/bin/true", text, flags=re.M))
    assert "/bin/true" in copy.read_text()
    return copy


def analyse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_is_valid(unit: Path) -> None:
    done = analyse("verify", "--man=no", "--recursive-errors=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


def test_its_exposure_is_at_most_2_0(unit: Path) -> None:
    done = analyse("security", "--offline=true", "--threshold=20", str(unit))
    overall = next((line for line in done.stdout.splitlines() if "Overall exposure" in line), done.stderr)
    assert done.returncode == 0, overall


def test_the_exposure_test_can_fail(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyse("security", "--offline=true", "--threshold=20", str(bare)).returncode != 0
