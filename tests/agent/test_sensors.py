"""What the sensors say of trees of files as kernels show them, changed on disk as hardware would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.models import manifest, row
from edgeward_agent.config import load_config
from edgeward_agent.cooling import Cooling
from edgeward_agent.qualifying import qualify_order
from edgeward_agent.sensors import CALM_S, Sensors, Throttling, power_mode, temperature_c
from edgeward_agent.sysinfo import this_machine
from edgeward_wire.errors import Rejected
from edgeward_wire.vitals import Vitals

TREES = Path(__file__).parent
FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


def put(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TREES / "jetson_orin", tmp_path / "orin"))


@pytest.fixture
def raspberry(tmp_path: Path) -> Path:
    root = Path(shutil.copytree(TREES / "raspberry_pi", tmp_path / "pi"))
    put(root, FIRMWARE, "0")
    return root


# --- a Jetson


def test_an_orin() -> None:
    vitals = Sensors(TREES / "jetson_orin").read()
    assert vitals.temperatures_c == {
        "cpu": 52.343,
        "gpu": 50.125,
        "soc0": 51.062,
        "soc1": 51.437,
        "soc2": 50.781,
        "tj": 52.406,
    }, "units that are off have no temperature"
    assert vitals.temperature_c == 52.406
    assert vitals.power_mw == {"vdd_in": 7336.4, "vdd_cpu_gpu_cv": 1953.7, "vdd_soc": 1791.4}
    assert vitals.board_mw == 7336.4
    assert vitals.gpu_load == 0.37
    assert vitals.throttled is False, "a fan that runs slows nothing"
    assert vitals.cpu_load is None, "one look says nothing of load"
    assert (vitals.memory_total_mb, vitals.memory_available_mb) == (7620.0, 4096.0)
    assert power_mode(TREES / "jetson_orin") == "nvpmodel 7W"


def test_an_orin_that_is_throttled(orin: Path) -> None:
    sensors = Sensors(orin)
    put(orin, "sys/class/thermal/cooling_device5/cur_state", 1)
    put(orin, "sys/class/thermal/cooling_device2/cur_state", 3)
    hot = sensors.read()
    assert hot.throttled is True
    assert hot.throttled_by == ("cpufreq-cpu4", "gpu-throttle-alert")
    assert hot.title == "52 °C, throttled (cpufreq-cpu4, gpu-throttle-alert), 7.3 W"
    put(orin, "sys/class/thermal/cooling_device5/cur_state", 0)
    put(orin, "sys/class/thermal/cooling_device2/cur_state", 0)
    put(orin, "sys/class/thermal/cooling_device7/cur_state", 1)
    assert sensors.read().throttled is False, "a hot surface is an alert, not a brake"


def test_load_is_of_the_time_between_two_looks(orin: Path) -> None:
    sensors = Sensors(orin)
    sensors.read()
    put(orin, "proc/stat", "cpu  10300 200 3000 80600 900 0 100 0 0 0")
    assert sensors.read().cpu_load == 0.3
    assert sensors.read().cpu_load is None, "no time has passed"
    put(orin, "proc/stat", "cpu  nonsense")
    assert sensors.read().cpu_load is None


@pytest.mark.parametrize(
    "place",
    ["sys/devices/platform/bus@0/17000000.gpu/load", "sys/devices/platform/17000000.ga10b/load"],
)
def test_the_gpu_has_had_several_places(orin: Path, place: str) -> None:
    shutil.rmtree(orin / "sys/devices/platform/gpu.0")
    assert Sensors(orin).read().gpu_load is None
    put(orin, place, 999)
    assert Sensors(orin).read().gpu_load == 0.999
    put(orin, place, "1001")
    assert Sensors(orin).read().gpu_load is None


def test_nonsense_is_left_out(orin: Path) -> None:
    put(orin, "sys/class/thermal/thermal_zone0/temp", "-256000")
    put(orin, "sys/class/thermal/thermal_zone1/temp", "nan")
    put(orin, "sys/class/thermal/thermal_zone8/type", "PMIC-Die")
    put(orin, "sys/class/thermal/thermal_zone8/temp", "100000")
    put(orin, "sys/class/hwmon/hwmon1/curr1_input", "")
    put(orin, "sys/class/hwmon/hwmon1/in3_label", "NC")
    vitals = Sensors(orin).read()
    assert set(vitals.temperatures_c) == {"soc0", "soc1", "soc2"}
    assert set(vitals.power_mw) == {"vdd_cpu_gpu_cv"}
    assert vitals.board_mw is None
    assert temperature_c(orin) == 51.437


# --- others


def test_a_raspberry_pi(raspberry: Path) -> None:
    sensors = Sensors(raspberry)
    vitals = sensors.read()
    assert vitals.temperatures_c == {"cpu": 61.9}, "the same sensor by two names is one zone"
    assert vitals.throttled is False
    assert power_mode(raspberry) == "cpufreq ondemand"
    put(raspberry, FIRMWARE, "e0008")
    assert sensors.read().throttled_by == ("firmware: soft temperature limit",)
    put(raspberry, FIRMWARE, "f0001")
    assert sensors.read().throttled is False, "what has been, and voltage alone, slow nothing now"


def test_a_machine_without_sensors() -> None:
    vitals = Sensors(TREES / "virtual_machine").read()
    assert vitals == Vitals(memory_total_mb=24105.6, memory_available_mb=21767.6)
    assert vitals.title == ""
    assert power_mode(TREES / "virtual_machine") == ""
    assert Sensors(TREES / "no-such-directory").read() == Vitals()


def test_an_x86_counts_its_throttling(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    for core in (0, 1):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count", 5)
    assert sensors.read().throttled is False, "that was before"
    assert sensors.counted
    put(tmp_path, "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count", 6)
    assert sensors.read().throttled_by == ("cores throttled",)
    assert sensors.read().throttled is False


def test_a_processor_s_own_sensors_where_no_zone_is(tmp_path: Path) -> None:
    put(tmp_path, "sys/class/hwmon/hwmon2/name", "k10temp")
    put(tmp_path, "sys/class/hwmon/hwmon2/temp1_input", 48000)
    put(tmp_path, "sys/class/hwmon/hwmon2/temp3_input", 55500)
    put(tmp_path, "sys/class/hwmon/hwmon3/name", "nvme")
    put(tmp_path, "sys/class/hwmon/hwmon3/temp1_input", 70000)
    for k in (0, 1):
        put(tmp_path, f"sys/class/thermal/thermal_zone{k}/type", "acpitz")
        put(tmp_path, f"sys/class/thermal/thermal_zone{k}/temp", 27800 + k)
    found = {"acpitz": 27.8, "acpitz_2": 27.801, "k10temp": 55.5}
    assert Sensors(tmp_path).read().temperatures_c == found


def test_energy_becomes_power(tmp_path: Path) -> None:
    at = [0.0]
    sensors = Sensors(tmp_path, clock=lambda: at[0])
    zone = "sys/class/powercap/intel-rapl:0"
    put(tmp_path, f"{zone}/name", "package-0")
    put(tmp_path, f"{zone}/energy_uj", 9_000_000)
    put(tmp_path, f"{zone}/max_energy_range_uj", 10_000_000)
    put(tmp_path, "sys/class/powercap/intel-rapl:0:0/name", "core")
    put(tmp_path, "sys/class/powercap/intel-rapl:0:0/energy_uj", 1)
    assert sensors.read().power_mw == {}
    at[0] = 2.0
    put(tmp_path, f"{zone}/energy_uj", 1_000_000)  # it has come round
    vitals = sensors.read()
    assert vitals.power_mw == {"package_0": 1000.0}
    assert vitals.board_mw is None, "a processor is not the whole machine"


@given(
    stat=st.text(max_size=200),
    number=st.one_of(st.integers(-(10**40), 10**40).map(str), st.text(max_size=40)),
    kind=st.text(max_size=80),
)
def test_whatever_stands_in_the_files(
    tmp_path_factory: pytest.TempPathFactory, stat: str, number: str, kind: str
) -> None:
    root = tmp_path_factory.mktemp("any")
    for name, text in {
        "proc/stat": stat,
        "proc/meminfo": f"MemTotal: {number} kB\nMemAvailable: {stat}",
        "sys/class/thermal/thermal_zone0/type": kind,
        "sys/class/thermal/thermal_zone0/temp": number,
        "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
        "sys/class/thermal/cooling_device0/cur_state": number,
        "sys/class/hwmon/hwmon0/name": "ina3221",
        "sys/class/hwmon/hwmon0/in1_label": kind,
        "sys/class/hwmon/hwmon0/in1_input": number,
        "sys/class/hwmon/hwmon0/curr1_input": number,
        "sys/devices/platform/gpu.0/load": number,
        "sys/devices/platform/soc/soc:firmware/get_throttled": number,
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": number,
        "var/lib/nvpmodel/status": stat,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    sensors = Sensors(root)
    for _ in range(2):
        sensors.read().to_bytes()
    power_mode(root)


# --- a fault that begins and ends once


def test_throttling_is_one_fault_however_it_flickers() -> None:
    throttling = Throttling()
    calm = Vitals(throttled=False, temperatures_c={"cpu": 60})
    hot = Vitals(throttled=True, throttled_by=("cpufreq-cpu0",), temperatures_c={"cpu": 91})
    assert throttling.look(calm, 0) == ""
    text = throttling.look(hot, 5)
    assert text == "The device is slowed down: 91 °C, throttled (cpufreq-cpu0)."
    assert throttling.look(calm, 10) == text
    assert throttling.look(hot, 20) == text
    assert throttling.look(calm, 20 + CALM_S - 1) == text
    assert throttling.look(calm, 20 + CALM_S) == ""
    assert throttling.look(Vitals(), 1000) == "", "who cannot know does not complain"


# --- waiting for the device to cool


def cooling(root: Path, said: list[str], *, limit: float | None = None, patience_s: float = 60) -> Cooling:
    return Cooling(Sensors(root), max_temp_c=limit, patience_s=patience_s, waiting=said.append)


def test_a_cool_device_does_not_wait(orin: Path) -> None:
    said: list[str] = []
    cool = cooling(orin, said, limit=60)
    assert cool.wait() == 0
    assert not cool.disturbed()
    assert said == []


def test_patience_is_for_all_waits_together(orin: Path) -> None:
    put(orin, "sys/class/thermal/thermal_zone0/temp", 80000)
    said: list[str] = []
    cool = cooling(orin, said, limit=60, patience_s=0.2)
    assert cool.wait() > 0
    assert cool.disturbed()
    assert said == ["The device is at 80 °C; max_temp_c is 60. It waits at most 0 s for the device to cool."]
    assert [cool.wait() for _ in range(20)] == [0.0] * 20, "it has given up for good"


def test_what_was_throttled_while_it_was_measured_is_known(orin: Path) -> None:
    cool = cooling(orin, [], patience_s=0)
    assert cool.wait() == 0
    put(orin, "sys/class/thermal/cooling_device1/cur_state", 1)
    assert cool.disturbed()


def test_agent_toml_says_how_hot_is_too_hot(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[qualify]\nmax_temp_c = 75\ncool_s = 120\n")
    config, contents = load_config(path), manifest()
    order = qualify_order(
        row(contents).model, contents, config=config, hardware=this_machine(), state=tmp_path, budget_s=60
    )
    assert (order.max_temp_c, order.cool_s, order.root) == (75, 60, "/"), "not longer than there is time"
    path.write_text("[qualify]\nmax_temp_c = 750\n")
    with pytest.raises(Rejected, match="max_temp_c"):
        load_config(path)
