"""agent.toml: defaults, names of what is wrong, and where relative uris point."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_agent.config import EXAMPLE, Config, load_config
from edgeward_wire.errors import Rejected


def load(directory: Path, text: str) -> Config:
    path = directory / "agent.toml"
    path.write_text(text)
    return load_config(path)


def test_no_file_means_defaults(tmp_path: Path) -> None:
    config = load_config(tmp_path / "agent.toml")
    assert config.pipelines == {}
    assert config.telemetry.window_s == 30
    assert config.registry.poll_interval_s == 60


def test_the_example_is_valid(tmp_path: Path) -> None:
    assert load(tmp_path, EXAMPLE).pipelines["main"].sources[0].uri == "/dev/video0"


def test_everything_can_be_set(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        device = "edge-01a"
        [registry]
        poll_interval_s = 5
        [telemetry]
        window_s = 5
        spool_bytes = 1000000
        [qualify]
        lock = "/tmp/lock"
        providers = ["CPU"]
        threads = 3
        [[pipelines.main.sources]]
        name = "a"
        uri = "film.avi"
        loop = true
        realtime = true
        width = 640
        [[pipelines.main.sources]]
        name = "b"
        uri = "0"
        """,
    )
    a, b = config.pipelines["main"].sources
    assert a.uri == str(tmp_path / "film.avi"), "next to agent.toml"
    assert b.uri == "0"
    assert config.thread_budget(8) == 3


@pytest.mark.parametrize("uri", ["0", "/dev/video0", "rtsp://camera/1", "videotestsrc ! appsink"])
def test_other_uris_stay_as_they_are(tmp_path: Path, uri: str) -> None:
    config = load(tmp_path, f'[[pipelines.main.sources]]\nname = "a"\nuri = "{uri}"')
    assert config.pipelines["main"].sources[0].uri == uri


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("devise = 'a'", "unknown key devise"),
        ("[telemetry]\nwindows_s = 3", "unknown key telemetry.windows_s"),
        ("[[pipelines.main.sources]]\nname='a'\nuri='0'\nsolt='latest'", "pipelines.main.sources.0.solt"),
        ("[telemetry]\nwindow_s = 0", "telemetry.window_s"),
        ("[pipelines.Main]", "pipelines.Main"),
        ("[[pipelines.main.sources]]\nname='a'\nuri='0'\n" * 2, "same name"),
        (
            "[[pipelines.main.sources]]\nname='a'\nuri=''",
            "sources.0.uri: String should have at least 1 character",
        ),
        ("[[pipelines.main.sources]]\nname='a'\nuri='0'\nformat='MJPEG'", "sources.0.format"),
        ("[[", "not valid TOML"),
        ("x = '" + "y" * 300_000 + "'", "longer than"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(Rejected, match=named.replace("[", r"\[")):
        load(tmp_path, text)


def test_a_directory_or_other_bytes(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "agent.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(Rejected, match="UTF-8"):
        load_config(tmp_path / "agent.toml")


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "agent.toml"
        path.write_bytes(raw)
        with contextlib.suppress(Rejected):
            load_config(path)


def test_the_thread_budget_is_shared(tmp_path: Path) -> None:
    config = load(tmp_path, "[pipelines.a]\n[pipelines.b]\n[pipelines.c]")
    assert config.thread_budget(8) == 2
    assert config.thread_budget(1) == 1


def test_the_lock_falls_back_only_from_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, f"[qualify]\nlock = '{tmp_path}/no/lock'").lock_path() == tmp_path / "no/lock"
    assert Config().lock_path().name == "edgeward-qualify.lock"


def test_samples_are_kept_only_if_asked_for_and_for_a_reason(tmp_path: Path) -> None:
    source = "[[pipelines.main.sources]]\nname='a'\nuri='0'\n"
    assert load(tmp_path, source).pipelines["main"].samples is None
    wanted = load(tmp_path, source + "[pipelines.main.samples]\nbelow = 0.5\ndirectory = 'kept'")
    samples = wanted.pipelines["main"].samples
    assert samples is not None
    assert (samples.below, samples.every, samples.directory) == (0.5, None, str(tmp_path / "kept"))
    for text, named in (("most_files = 3", "set below, every or drift"), ("belov = 1", "samples.belov")):
        with pytest.raises(Rejected, match=named):
            load(tmp_path, f"{source}[pipelines.main.samples]\n{text}")
