"""The units are valid for systemd itself and little exposed; the documented install finds its directories."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import missing

SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"
UNITS = sorted(SYSTEMD.glob("*.service"))
AGENT = SYSTEMD / "edgeward-agent.service"
DROP_INS = sorted((SYSTEMD / "edgeward-agent.service.d").glob("*.conf"))


@pytest.fixture(params=UNITS, ids=lambda unit: unit.stem)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy whose program exists."""
    return copied(request.param, tmp_path)


def copied(unit: Path, directory: Path) -> Path:
    """With a program that exists, since `verify` looks for it; nothing else differs."""
    if shutil.which("systemd-analyze") is None:
        missing("systemd-analyze")
    text = unit.read_text()
    copy = directory / unit.name
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


# --- the agent's drop-ins


@pytest.mark.parametrize("drop_in", DROP_INS, ids=lambda path: path.stem)
def test_the_unit_is_valid_with_a_drop_in(drop_in: Path, tmp_path: Path) -> None:
    unit = copied(AGENT, tmp_path)
    place = tmp_path / "edgeward-agent.service.d"
    place.mkdir()
    shutil.copy(drop_in, place)
    done = analyse("verify", "--man=no", "--recursive-errors=no", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


def merged(*names: str) -> dict[str, list[str]]:
    """Each setting's values with these drop-ins, as systemd reads lists: an empty value begins anew."""
    chosen = [path for path in DROP_INS if path.stem in names]
    assert len(chosen) == len(names)
    found: dict[str, list[str]] = {}
    for line in "\n".join(path.read_text() for path in (AGENT, *chosen)).splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key] = [*found.get(key, []), value] if value else []
    return found


def test_only_cameras_are_open_unless_a_drop_in_says_so() -> None:
    bare = merged()
    assert bare["DevicePolicy"] == ["closed"]
    assert bare["DeviceAllow"] == ["char-video4linux rw"]
    assert bare["SupplementaryGroups"] == ["video"]


def test_the_gpu_drop_in_opens_the_driver_devices() -> None:
    """systemd.resource-control(5): `auto` allows all devices if no explicit DeviceAllow= is present."""
    settings = merged("gpu")
    assert settings["DevicePolicy"][-1] == "auto"
    assert settings["DeviceAllow"] == []
    assert settings["SupplementaryGroups"] == ["video", "render"]


def test_the_audio_drop_in_lets_sound_cards_through_and_nothing_else() -> None:
    settings = merged("audio")
    assert settings["DevicePolicy"] == ["closed"]
    assert settings["DeviceAllow"] == ["char-video4linux rw", "char-alsa rw"]
    assert settings["SupplementaryGroups"] == ["video", "audio"]


def test_a_device_may_have_a_gpu_and_a_microphone() -> None:
    """systemd reads drop-ins in the order of their names: what `audio` lists must not close the GPU."""
    settings = merged("audio", "gpu")
    assert (settings["DevicePolicy"][-1], settings["DeviceAllow"]) == ("auto", [])
    assert settings["SupplementaryGroups"] == ["video", "audio", "render"]


# --- the install that docs/operations.md describes

STATES = {"edgeward": "var/lib/edgeward", "edgeward-cloud": "var/lib/edgeward-cloud"}


def test_the_users_find_the_directories_that_they_write_to(tmp_path: Path) -> None:
    """`init` and `enroll` run as these users, before any unit has made its StateDirectory."""
    for program in ("systemd-sysusers", "systemd-tmpfiles"):
        if shutil.which(program) is None:
            missing(program)
    if os.geteuid() != 0:
        pytest.skip("only root can give directories away")
    for folder, file in (("sysusers.d", "edgeward.sysusers"), ("tmpfiles.d", "edgeward.tmpfiles")):
        place = tmp_path / "usr/lib" / folder / "edgeward.conf"
        place.parent.mkdir(parents=True)
        shutil.copy(SYSTEMD / file, place)
    (tmp_path / "etc").mkdir()
    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create", "edgeward.conf"]):
        done = subprocess.run(
            [command[0], f"--root={tmp_path}", *command[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    users = dict(line.split(":")[:3:2] for line in (tmp_path / "etc/passwd").read_text().splitlines())
    for user, directory in STATES.items():
        found = (tmp_path / directory).stat()
        assert (str(found.st_uid), found.st_mode & 0o777) == (users[user], 0o700), directory
    assert (tmp_path / "etc/edgeward").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(("section", "user"), [("cloud", "edgeward-cloud"), ("device", "edgeward")])
def test_each_section_makes_the_directories_before_it_writes_there(section: str, user: str) -> None:
    text = (SYSTEMD.parent / "docs/operations.md").read_text()
    part = re.split(r"^## ", text, flags=re.M)[1 if section == "cloud" else 2]
    assert section in part.splitlines()[0]
    made = part.index("systemd-tmpfiles --create edgeward.conf")
    assert part.index("systemd-sysusers") < made < part.index(f"runuser -u {user} --")
