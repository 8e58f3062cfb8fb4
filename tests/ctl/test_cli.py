"""agent-ctl as a process against a real cloud: what people see, and what bad input gets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud.test_store import window
from ctl.conftest import AGENT_CTL, EMPTY, FLEET, Office, finish
from edgeward_cloud.cli import _parser
from edgeward_cloud.ingest import window_row
from edgeward_cloud.settings import Settings
from edgeward_cloud.store import streams
from edgeward_cloud.store.database import open_store
from edgeward_cloud.store.models import CertificateRow
from edgeward_cloud.telemetry import MAX_WINDOWS
from edgeward_ctl import screen
from edgeward_ctl.client import Client
from edgeward_ctl.profile import load_profile
from edgeward_wire import __version__


def told(err: str) -> tuple[str, str]:
    """The error and the next step."""
    lines = {line.partition(": ")[0]: line.partition(": ")[2] for line in err.splitlines()}
    return lines["error"], lines.get("next", "")


# --- deploy


def test_a_deploy_with_nobody_online_says_what_that_means(office: Office) -> None:
    done = office.ctl("deploy", str(office.model("quiet", 0)), "--fleet", FLEET)
    assert done.code == 3, done.err
    assert "bundle: quiet: int8" in done.err
    assert "sign: released quiet 1" in done.err
    assert "No device of this rollout is online" in done.err
    assert "agent-ctl watch --fleet edge-01" in done.err
    head, *rows = done.out.splitlines()
    assert head.split()[:4] == ["device", "result", "variant", "provider"]
    assert [row.split()[0] for row in rows] == ["cam-1", "cam-2"]
    assert all("offline, pending" in row for row in rows)


def test_the_same_file_is_not_released_twice_and_another_is_the_next(office: Office) -> None:
    path = office.model("twice", 0)
    versions = []
    for salt in (0, 0, 50, 0):
        office.model("twice", salt)
        done = office.ctl("deploy", str(path), "--fleet", FLEET, "--detach", "--json")
        assert done.code == 0, done.err
        versions.append(done.json["rollout"]["model"]["path"])
    one, two = "models/twice/1.json", "models/twice/2.json"
    assert versions == [one, one, two, one]
    listed = {m["version"] for m in office.ctl("models", "--json").json if m["name"] == "twice"}
    assert listed == {"1", "2"}


def test_a_dry_run_changes_nothing(office: Office) -> None:
    path = office.model("dry", 0)
    done = office.ctl("deploy", str(path), "--fleet", FLEET, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert (done.json["version"], done.json["released_before"]) == ("1", False)
    assert done.json["manifest"]["variants"]["int8"]["evidence"] == "strong"
    shown = office.ctl("deploy", str(path), "--fleet", FLEET, "--dry-run")
    assert "Nothing was changed" in shown.out
    assert "dry" not in {m["name"] for m in office.ctl("models", "--json").json}


def test_a_version_of_ones_own_is_kept_and_never_changes(office: Office) -> None:
    path = office.model("own", 0)
    arguments = ("deploy", str(path), "--fleet", FLEET, "--detach", "--version", "2026.1")
    assert office.ctl(*arguments).code == 0
    assert office.ctl(*arguments).code == 0
    office.model("own", 70)
    done = office.ctl(*arguments)
    assert done.code == 2
    assert "taken" in told(done.err)[0]


def test_weak_evidence_is_said_aloud(office: Office) -> None:
    path = office.model("noise", 0)
    shutil.rmtree(path.parent / "pictures")
    sidecar = path.with_suffix(".toml")
    sidecar.write_text(sidecar.read_text().replace('samples = "pictures"\n', ""))
    done = office.ctl("deploy", str(path), "--fleet", FLEET, "--dry-run")
    assert "evidence: weak" in done.err


def test_settings_win_over_the_sidecar(office: Office) -> None:
    path = office.model("set", 0)
    done = office.ctl(
        "deploy", str(path), "--device", "cam-1", "--dry-run", "--json", "--set", "inputs.image.colour=bgr"
    )
    assert done.json["manifest"]["contract"]["inputs"][0]["image"]["colour"] == "bgr"


def test_two_operators_at_the_same_moment_both_land(office: Office) -> None:
    names = [f"race-{k}" for k in range(6)]
    paths = [office.model(name, 10 * k) for k, name in enumerate(names)]
    running = [
        office.start("deploy", str(path), "--device", "cam-2", "--detach", operator=("amy", "bob")[k % 2])
        for k, path in enumerate(paths)
    ]
    done = [finish(process) for process in running]
    assert [d.code for d in done] == [0] * 6, [d.err for d in done]
    assert set(names) <= {m["name"] for m in office.ctl("models", "--json").json}


def test_two_operators_with_the_same_new_version_get_one_each(office: Office, tmp_path: Path) -> None:
    desks = {who: shutil.copytree(office.profile(who), tmp_path / who) for who in ("amy", "bob")}
    models = {}
    for who, salt in (("amy", 100), ("bob", 200)):
        path = office.model("shared", salt)
        models[who] = Path(shutil.copytree(path.parent, tmp_path / f"{who}-model")) / path.name
    running = [
        office.start("deploy", str(models[who]), "--device", "cam-2", "--detach", "--json", profile=desk)
        for who, desk in desks.items()
    ]
    done = [finish(process) for process in running]
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    assert sorted(d.json["rollout"]["model"]["path"] for d in done) == [
        "models/shared/1.json",
        "models/shared/2.json",
    ]


def test_watch_ends_with_ctrl_c_and_is_no_error(office: Office) -> None:
    process = office.start("watch")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 0


def test_ctrl_c_before_anything_was_assigned_says_so(office: Office, tmp_path: Path) -> None:
    desk = Path(shutil.copytree(office.profile(), tmp_path / "desk"))
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(60)
        url = f"https://127.0.0.1:{mute.getsockname()[1]}"
        text = (desk / "profile.toml").read_text()
        (desk / "profile.toml").write_text(re.sub(r'url = ".*"', f'url = "{url}"', text))
        process = office.start("deploy", str(office.model("one", 0)), "--fleet", FLEET, profile=desk)
        with mute.accept()[0]:
            process.send_signal(signal.SIGINT)
            done = finish(process)
    assert done.code == 130
    assert "nothing was assigned" in done.err


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "step"),
    [
        (["deploy", "{model}", "--fleet", "nope"], "no fleet 'nope'", "agent-ctl fleets create nope"),
        (["deploy", "{model}", "--fleet", EMPTY], "no accepted device", "enroll-token --fleet empty"),
        (["deploy", "{model}", "--device", "nope"], "no device nope", "agent-ctl devices"),
        (["deploy", "{model}"], "--fleet NAME or --device NAME", ""),
        (["deploy", "{model}", "--fleet", FLEET, "--device", "cam-1"], "one of the two", ""),
        (["deploy", "{model}", "--fleet", "No Such"], "cannot be the name of a fleet", "a-z"),
        (["deploy", "{model}.gone", "--fleet", FLEET], "There is no file", "path"),
        (["deploy", "{junk}", "--fleet", FLEET], "not an ONNX file", "Export"),
        (["deploy", "{bare}", "--fleet", FLEET], "needs labels", "--labels"),
        (["deploy", "{model}", "--fleet", FLEET, "--probation", "soon"], "no length of time", "90s"),
        (["deploy", "{model}", "--fleet", FLEET, "--probation", "2d"], "probation_s.*86400", "--help"),
        (["deploy", "{model}", "--fleet", FLEET, "--set", "x"], "--set", "for example"),
        (
            ["deploy", "{model}", "--fleet", FLEET, "--labels", "/nope"],
            "labels file /nope",
            "one label a line",
        ),
        (["deploy", "--nonsense"], "--nonsense", "agent-ctl deploy --help"),
        (["enroll-token", "--fleet", "nope"], "no fleet 'nope'", "fleets create nope"),
        (["status", "--fleet", "nope"], "no fleet 'nope'", "fleets create"),
        (["log", "nope"], "no device nope", "agent-ctl devices"),
        (["accept", "nope"], "no device nope", "agent-ctl devices"),
        (["rollback", "--fleet", EMPTY], "deployed", ""),
        (["fleets", "create", FLEET], "already|there is", ""),
        (["model", "inspect", "{junk}"], "not an ONNX file", ""),
    ],
)
def test_bad_input_gets_an_error_that_names_the_thing_and_a_next_step(
    office: Office, tmp_path: Path, arguments: list[str], error: str, step: str
) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_text("hello")
    bare = office.model("bare", 0)
    bare = Path(shutil.copy(bare, tmp_path / "bare.onnx"))
    names = {"model": office.model("good", 0), "junk": junk, "bare": bare}
    done = office.ctl(*(argument.format(**names) for argument in arguments))
    assert done.code == 2, done.err
    what, next_step = told(done.err)
    assert re.search(error, what, re.IGNORECASE), what
    assert re.search(step, next_step, re.IGNORECASE), next_step


def test_a_bad_probation_releases_nothing(office: Office) -> None:
    path = office.model("hasty", 0)
    assert office.ctl("deploy", str(path), "--fleet", FLEET, "--probation", "2d").code == 2
    assert "hasty" not in {m["name"] for m in office.ctl("models", "--json").json}


def test_errors_are_json_too(office: Office) -> None:
    done = office.ctl("log", "nope", "--json")
    assert done.json["exit"] == done.code == 2
    assert "nope" in done.json["error"]


def test_a_cloud_that_is_away_says_so(office: Office, desk: Path) -> None:
    file = desk / "profile.toml"
    file.write_text(file.read_text().replace(f":{office.stack.port}", ":1"))
    done = office.ctl("status", profile=desk)
    assert done.code == 69
    what, step = told(done.err)
    assert "Nothing answers" in what
    assert "edgeward-cloud up" in step


def test_another_clouds_certificate_is_refused(office: Office, desk: Path, elsewhere: Path) -> None:
    shutil.copy(elsewhere / "server-ca.pem", desk / "server-ca.pem")
    done = office.ctl("status", profile=desk)
    assert done.code == 2
    assert "certificate" in told(done.err)[0]
    assert "server-ca.pem" in told(done.err)[1]


def test_a_token_that_does_not_count_says_how_to_get_one(office: Office, desk: Path) -> None:
    file = desk / "profile.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("token")]
    file.write_text("\n".join([*lines, 'token = "old"']))
    done = office.ctl("status", profile=desk)
    assert done.code == 2
    assert "token" in told(done.err)[0]


def test_no_profile_says_where_they_come_from(office: Office, tmp_path: Path) -> None:
    done = office.ctl("status", profile=tmp_path / "none")
    assert done.code == 2
    assert "edgeward-cloud init" in told(done.err)[1]


# --- looking and managing


def test_lists_are_tables_and_json(office: Office) -> None:
    assert {d["id"] for d in office.ctl("devices", "--json").json} >= {"cam-1", "cam-2"}
    shown = office.ctl("devices", "--fleet", FLEET).out
    assert "cam-1" in shown
    assert "accepted" in shown
    assert EMPTY in {f["name"] for f in office.ctl("fleets", "--json").json}
    rows = office.ctl("status", "--json").json
    assert {r["device"] for r in rows} >= {"cam-1"}
    assert all(not r["online"] for r in rows)
    assert office.ctl("telemetry", "--json", "--since", "1h").json == []
    assert office.ctl("log", "cam-1", "--json").json == []


async def _store_windows(office: Office, rows: list[dict[str, Any]]) -> None:
    async with (
        open_store(Settings.load(office.stack.cloud_dir).database_url) as store,
        store.write() as session,
    ):
        await streams.add_windows(session, rows)


def test_telemetry_says_since_when_it_is_complete(office: Office) -> None:
    now, n = time.time(), MAX_WINDOWS + 1
    began = now - 2 * 86_400  # where no other test looks
    boot = "c" * 32
    rows = [window_row("cam-2", window(k, boot_id=boot, start=began + k * 0.05), now) for k in range(n)]
    asyncio.run(_store_windows(office, rows))
    complete = time.strftime("%Y-%m-%d %H:%M", time.localtime(rows[1]["ended_at"]))
    asked = ("telemetry", "--device", "cam-2", "--since")
    table, listed = office.ctl(*asked, "3d"), office.ctl(*asked, "3d", "--json")
    assert listed.json[0]["windows"] == MAX_WINDOWS
    assert "cam-2" in table.out
    for done in (table, listed):
        assert f"Complete only since {complete}" in done.err
    whole = office.ctl(*asked, str(rows[-10]["ended_at"]), "--json")
    assert whole.json[0]["windows"] == 9
    assert whole.err == ""


def test_a_moment_of_another_day_has_its_date() -> None:
    noon = time.mktime((2026, 5, 4, 12, 30, 0, 0, 0, -1))
    assert screen.short_clock(noon, noon + 3600) == "12:30"
    assert screen.short_clock(noon, noon + 86_400) == "2026-05-04 12:30"


def test_an_enrolment_string_is_shown_with_what_to_type(office: Office) -> None:
    done = office.ctl("enroll-token", "--fleet", EMPTY, "--ttl", "30m", "--uses", "3")
    assert done.out.startswith("sudo edgeward-agent enroll edgeward1.")
    assert len(done.out.split()) == 4
    assert "3 devices" in done.err
    assert "30 min" in done.err


def test_a_pending_device_waits_for_accept(office: Office) -> None:
    token = office.ctl("enroll-token", "--fleet", EMPTY, "--pending", "--json").json
    waited: list[float] = []

    class GaveUp(Exception):
        """As when the person at the device presses Ctrl-C."""

    def wait(seconds: float) -> None:
        waited.append(seconds)
        raise GaveUp

    from edgeward_agent.enrol import enrol

    state = office.stack.device_dir("late")
    with pytest.raises(GaveUp):
        enrol(token["enrolment"], "late", state, wait=wait, say=lambda _: None)
    assert office.ctl("status", "--fleet", EMPTY, "--json").json[0]["state"] == "pending"
    assert office.ctl("accept", "late").code == 0
    assert enrol(token["enrolment"], "late", state, wait=wait, say=lambda _: None).device == "late"
    assert office.ctl("reject", "late").code == 0
    again = office.ctl("accept", "late")
    assert "certificate was revoked" in again.err
    assert "agent-ctl enroll-token --fleet empty" in again.err


def test_a_viewers_certificate_is_made_and_not_overwritten(office: Office, tmp_path: Path) -> None:
    out = tmp_path / "grafana"
    done = office.ctl("mqtt", "cert", "grafana", "--out", str(out), "--json")
    assert done.code == 0, done.err
    assert done.json["username"] == "_viewer-grafana"
    assert (out / "key.pem").stat().st_mode & 0o777 == 0o600
    assert "BEGIN CERTIFICATE" in (out / "certificate.pem").read_text()
    again = office.ctl("mqtt", "cert", "grafana", "--out", str(out))
    assert again.code == 2
    assert "there already" in told(again.err)[0]


def test_inspect_prints_a_sidecar_that_can_be_used(office: Office, tmp_path: Path) -> None:
    path = office.model("seen", 0)
    done = office.ctl("model", "inspect", str(path))
    assert "precision" in done.err
    sidecar = path.with_suffix(".toml")
    sidecar.write_text(done.out)
    assert office.ctl("deploy", str(path), "--fleet", FLEET, "--dry-run").code == 0


def test_help_is_there_without_a_profile_and_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['agent-ctl', '--help']\n"
    code += "try:\n    from edgeward_ctl.cli import main; main()\nexcept SystemExit: pass\n"
    code += "heavy = {'onnx', 'onnxruntime', 'numpy', 'tuf', 'httpx', 'pydantic', 'cv2'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    done = subprocess.run(
        [str(AGENT_CTL.parent / "python"), "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deploy" in done.stdout


def test_a_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None\nfrom edgeward_ctl.__main__ import main; main()"
    done = subprocess.run(
        [str(AGENT_CTL.parent / "python"), "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert told(done.stderr) == (
        "agent-ctl needs a library that is not installed: typer.",
        "pip install 'edgeward[ctl]'",
    )


def test_without_a_command_there_is_help_and_no_error() -> None:
    for words in ((), ("mqtt",)):
        done = subprocess.run([str(AGENT_CTL), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Usage: agent-ctl" in done.stdout + done.stderr
        assert "error:" not in done.stderr


def test_version() -> None:
    done = subprocess.run([str(AGENT_CTL), "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"agent-ctl {__version__}\n")


def test_json_is_asked_for_before_or_after_the_command(office: Office) -> None:
    assert office.ctl("fleets", "--json", "create", "before").json["name"] == "before"
    assert office.ctl("fleets", "create", "after", "--json").json["name"] == "after"


def test_a_fault_of_a_local_file_is_not_the_clouds(office: Office) -> None:
    missing_file = office.ctl("deploy", str(office.model("local", 0)), "--fleet", FLEET, "--sidecar", "/nope")
    assert missing_file.code == 2, missing_file.err
    assert "/nope" in told(missing_file.err)[0]


def test_a_place_that_cannot_be_written_costs_no_certificate(office: Office) -> None:
    before = certificates(office)
    done = office.ctl("mqtt", "cert", "nobody", "--out", "/proc/x")
    assert done.code == 2, done.err
    assert "/proc/x" in told(done.err)[0]
    assert certificates(office) == before


def certificates(office: Office) -> int:
    database = office.stack.cloud_dir / "edgeward.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as found:
        return int(found.execute(f"select count(*) from {CertificateRow.__tablename__}").fetchone()[0])


def test_the_way_to_a_new_token_is_one_that_exists(office: Office) -> None:
    with Client(load_profile(office.profile())) as client:
        error = client._problem("GET", "/", httpx.Response(401))
    command = re.search(r"`edgeward-cloud (.+?)`", error.next_step)
    assert command is not None
    assert _parser().parse_args(command[1].split()).name == "amy"


def test_a_reader_that_goes_away_is_no_error_of_ours(office: Office) -> None:
    process = office.start("model", "inspect", str(office.model("pipe", 0)))
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert "Traceback" not in err
    assert os.WIFEXITED(process.returncode) or process.returncode in (0, 1)
