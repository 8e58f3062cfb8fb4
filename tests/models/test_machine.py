"""A machine's facts, read from made-up `/proc` and `/sys` trees and once from this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models import machine

X86 = "processor\t: 0\nmodel name\t: Some CPU 9000\nflags\t\t: fpu avx avx2 fma {}\n"


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(("flag", "vnni"), [("", False), ("avx512_vnni", True), ("avx_vnni", True)])
def test_vnni_is_read_from_the_flags(tmp_path: Path, flag: str, vnni: bool) -> None:
    found = machine.facts(put(tmp_path, {"proc/cpuinfo": X86.format(flag)}))
    assert found.cpu == "Some CPU 9000"
    assert found.vnni is vnni
    assert {"avx", "avx2", "fma"} <= set(found.isa)


@pytest.mark.parametrize(
    ("vnni", "arch", "isa", "says"),
    [
        (True, "x86_64", ("avx2", "avx512_vnni"), "VNNI: "),
        (False, "x86_64", ("avx2",), "no VNNI"),
        (False, "aarch64", ("asimd", "asimddp", "i8mm"), "asimddp, i8mm"),
        (False, "aarch64", ("asimd",), "no 8-bit dot products"),
    ],
)
def test_the_capability_is_said(vnni: bool, arch: str, isa: tuple[str, ...], says: str) -> None:
    assert says in machine.Machine("c", arch, 2, isa, vnni, "", None, None, "1", "3").capability


def test_a_jetson_is_read_from_its_files(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\n",
            "var/lib/nvpmodel/status": "pmode:0001\n",
            "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n",
            "sys/class/thermal/thermal_zone0/temp": "47500\n",
            "sys/class/thermal/thermal_zone1/temp": "51250\n",
            "sys/class/thermal/thermal_zone2/temp": "-256000\n",
        },
    )
    found = machine.facts(root)
    assert found.cpu == "NVIDIA Jetson Orin Nano"
    assert found.power_mode == "nvpmodel 7W"
    assert found.temperature_c == 51.25
    assert "asimddp" in found.isa


def test_a_mode_without_a_name_keeps_its_number(tmp_path: Path) -> None:
    assert machine.facts(put(tmp_path, {"var/lib/nvpmodel/status": "pmode:0003"})).power_mode == "nvpmodel 3"


def test_governors_and_processor_sensors_are_read(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
            "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "performance\n",
            "sys/class/hwmon/hwmon0/name": "k10temp\n",
            "sys/class/hwmon/hwmon0/temp1_input": "60125\n",
            "sys/class/hwmon/hwmon1/name": "nvme\n",
            "sys/class/hwmon/hwmon1/temp1_input": "80000\n",
            "proc/loadavg": "1.25 0.5 0.1 1/2 3\n",
        },
    )
    found = machine.facts(root)
    assert found.power_mode == "cpufreq performance/schedutil"
    assert found.temperature_c == 60.125
    assert found.load == 1.25


def test_nothing_known_is_nothing_guessed(tmp_path: Path) -> None:
    found = machine.facts(tmp_path)
    assert (found.isa, found.vnni, found.power_mode, found.temperature_c, found.load) == (
        (),
        False,
        "",
        None,
        None,
    )
    said = dict(machine.lines(found))
    assert said["temperature"] == said["power mode"] == said["load"] == "not known"


@given(st.binary(max_size=400))
def test_no_content_of_a_file_is_too_strange(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in (
        "proc/cpuinfo",
        "proc/loadavg",
        "var/lib/nvpmodel/status",
        "etc/nvpmodel.conf",
        "sys/class/thermal/thermal_zone0/temp",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    machine.lines(machine.facts(root))


def test_this_machine_can_be_told_as_json() -> None:
    found = machine.facts()
    told = json.loads(json.dumps(found.plain()))
    assert told["cpu"] == found.cpu
    assert told["cores"] >= 1
    assert told["capability"]
