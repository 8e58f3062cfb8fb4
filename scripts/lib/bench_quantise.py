"""`scripts/bench quantise`: what our quantiser makes of the reference models, and what others would run.

Everything is done as a user does it (`zoo build`, `quantise`), on one thread. Where the processor has VNNI,
the search and the race also run without it (docs/adr/0004): the goals are for such a machine. All that is
compared ran in turn in one process. Files are kept in .bench/, so a second run only measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import without_avx512
from rows import Row, at_least, at_most, told

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".bench"
ZOO = ROOT / "models/zoo"
GOALS = {"resnet50": 1.85, "yolov8s": 1.75, "distilhubert": 1.75}
LITE0 = "efficientnet-lite0"
SQNR_DB = 15  # random weights have no top-1 margins to speak of: the gate is noise
FEEDS = 6
RACE_S = 12
NAME = "quantise"

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Side:
    """One kind of machine to measure on."""

    name: str
    environment: Environment
    has_goals: bool


def quantise(minutes: float) -> Iterator[Row]:
    """INT8 against FP32 and against what a user would run instead: speed, parity, and Lite0's accuracy."""
    WORK.mkdir(exist_ok=True)
    sides = _sides()
    for name, goal in GOALS.items():
        original = _built(name)
        for side in sides:
            out = _searched(original, name, side, minutes)
            yield from _compared(name, original, out, side, goal)
    yield from _lite0(sides)


def _sides() -> list[Side]:
    """The machine as it is, and without AVX-512 where it has that."""
    as_it_is = dict(os.environ)
    if (
        "avx512_vnni" not in Path("/proc/cpuinfo").read_text()
        and "avx_vnni" not in Path("/proc/cpuinfo").read_text()
    ):
        return [Side("as_it_is", as_it_is, has_goals=True)]
    try:
        hidden = without_avx512.environment(Path(sys.executable), WORK)
    except without_avx512.Impossible as reason:
        print(f"# measured with VNNI only: {reason}", file=sys.stderr)
        return [Side("vnni", as_it_is, has_goals=True)]
    return [Side("no_vnni", hidden, has_goals=True), Side("vnni", as_it_is, has_goals=False)]


# --- making the files


def _built(name: str) -> Path:
    """The float file of a zoo recipe."""
    told_by = WORK / name / "built.json"
    if not told_by.exists():
        made = _ctl(os.environ, "model", "zoo", "build", name, "--out", str(WORK / name), "--json")
        told_by.write_text(made)
    return Path(json.loads(told_by.read_text())["model"])


def _searched(original: Path, name: str, side: Side, minutes: float) -> Path:
    """The directory that `quantise` wrote: a killed or repeated run goes on where it was."""
    out = WORK / f"{name}-{side.name}"
    _ctl(
        side.environment, "model", "quantise", str(original), "--out", str(out),
        "--budget", f"{max(1, round(minutes * 60))}s", "--threads", "1", "--min-sqnr", str(SQNR_DB), "--json",
    )  # fmt: skip
    return out


def _alternatives(name: str, original: Path, feeds: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """What the quantiser's own defaults make: static (S8S8) and dynamic."""
    import onnxruntime.quantization as tool

    made = {"s8s8_defaults": WORK / name / "s8s8.onnx", "dynamic": WORK / name / "dynamic.onnx"}

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rest, None)  # type: ignore[return-value]

    if not made["s8s8_defaults"].exists():
        clean = WORK / name / "preprocessed.onnx"
        tool.shape_inference.quant_pre_process(str(original), str(clean), skip_symbolic_shape=True)
        tool.quantize_static(str(clean), str(made["s8s8_defaults"]), Reader())
        tool.quantize_dynamic(str(clean), str(made["dynamic"]))
    return made


def _feeds(original: Path, file: Path) -> list[dict[str, Any]]:
    """Inputs of the model from samples that the search never saw; kept in `file` for the racing process."""
    import numpy as np

    from edgeward_models.inspect import inspect_model
    from edgeward_models.samples import open_samples
    from edgeward_runtime.ports import constants, initial_states

    with tempfile.TemporaryDirectory() as scratch:
        known = inspect_model(original, scratch=Path(scratch)).guess
    fixed = {**constants(known.contract), **initial_states(known.contract)}
    samples = open_samples(known.contract, known.samples).take("test", FEEDS, 7)
    feeds = [{**fixed, **one} for one in samples]
    np.savez(file, **{f"{k}.{key}": value for k, one in enumerate(feeds) for key, value in one.items()})
    return feeds


# --- measuring


def _compared(name: str, original: Path, out: Path, side: Side, goal: float) -> Iterator[Row]:
    """One model on one kind of machine: the chosen file, FP32, and the alternatives."""
    found = json.loads((out / "report.json").read_text())["targets"][0]
    label = f"{name}_{side.name}"
    if found["file"] is None:
        yield at_least(NAME, f"{label}_speedup", 0.0, "x FP32", goal=goal, note=found["conclusion"])
        return
    chosen = out / found["file"]
    feeds = WORK / name / "feeds.npz"
    files = {"fp32": original, "int8": chosen, **_alternatives(name, original, _feeds(original, feeds))}
    contenders = [{"name": k, "file": str(f), "provider": "CPU"} for k, f in files.items()]
    rows = {row["name"]: row for row in _race(Path(sys.executable), side.environment, feeds, contenders)}
    mine = rows["int8"]
    speedup = 1 / mine["ratio"]
    note = f"{mine['p50_ms']:.1f} ms; own exact outputs: cosine {mine['cosine']:.4f}"
    if side.has_goals:
        yield at_least(
            NAME, f"{label}_speedup", speedup if mine["passed"] else 0.0, "x FP32", goal=goal, note=note
        )
    else:
        yield told(NAME, f"{label}_speedup", speedup, "x FP32", note)
    others = {k: row for k, row in rows.items() if k != "int8"}
    yield from (_alternative(f"{label}_{k}", row) for k, row in others.items() if k != "fp32")
    best = min((row["ratio"] for row in others.values() if row["passed"]), default=1.0)
    yield at_most(NAME, f"{label}_to_best_other", mine["ratio"] / best, "x", goal=1.03)
    yield from _openvino(
        label, {"fp32": original, "int8": chosen, "s8s8_defaults": files["s8s8_defaults"]}, feeds, side
    )


def _alternative(metric: str, row: Mapping[str, Any]) -> Row:
    if row["ratio"] is None:
        return told(NAME, metric, 0.0, "x FP32", row["reason"][:80])
    passed = "passes parity" if row["passed"] else "fails parity"
    return told(NAME, metric, 1 / row["ratio"], "x FP32", f"{passed}: cosine {row['cosine']:.4f}")


def _openvino(label: str, files: Mapping[str, Path], feeds: Path, side: Side) -> Iterator[Row]:
    """Where OpenVINO is installed it is a plan: our file on the better of two, and OpenVINO on the others."""
    python = ROOT / ".venv-openvino/bin/python"
    if not python.exists():
        print("# without OpenVINO: scripts/test-matrix openvino makes its environment", file=sys.stderr)
        return
    environment: Environment = os.environ
    if side.name == "no_vnni":
        environment = without_avx512.environment(python, WORK)
    contenders = [{"name": "CPU fp32", "file": str(files["fp32"]), "provider": "CPU"}]
    contenders += [
        {"name": f"OpenVINO {k}", "file": str(f), "provider": "OpenVINO"} for k, f in files.items()
    ]
    contenders.append({"name": "CPU int8", "file": str(files["int8"]), "provider": "CPU"})
    rows = {row["name"]: row for row in _race(python, environment, feeds, contenders) if row["passed"]}
    ours = min((rows[k]["ratio"] for k in ("CPU int8", "OpenVINO int8") if k in rows), default=None)
    others = {k: row["ratio"] for k, row in rows.items() if not k.endswith(" int8")}
    for k, row in rows.items():
        yield told(
            NAME, f"{label}_{k.replace(' ', '_').lower()}", 1 / row["ratio"], "x FP32", "ONNX Runtime 1.24"
        )
    if ours is not None:
        yield at_most(NAME, f"{label}_plan_to_best_openvino", ours / min(others.values()), "x", goal=1.03)


def _race(
    python: Path, environment: Environment, feeds: Path, contenders: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    job = json.dumps({"feeds": str(feeds), "seconds": RACE_S, "contenders": list(contenders)})
    done = subprocess.run(
        [python, Path(__file__).with_name("race_files.py")],
        input=job, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return rows


def _lite0(sides: Sequence[Side]) -> Iterator[Row]:
    """The shipped file: its speed on each machine; agreement and SQNR on crops that nothing else has seen."""
    python = ROOT / ".venv-torch/bin/python"
    original = WORK / LITE0 / f"{LITE0}-fp32.onnx"
    if not original.exists():
        if not python.exists():
            print(
                "# without Lite0: its FP32 original needs PyTorch (scripts/test-matrix torch)",
                file=sys.stderr,
            )
            return
        code = (
            "import sys; from pathlib import Path; sys.path.insert(0, 'models');"
            "from zoo import efficientnet_lite0 as recipe; recipe.export_float(Path(sys.argv[1]))"
        )
        original.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, "-c", code, original], check=True, cwd=ROOT, capture_output=True)
    feeds = WORK / LITE0 / "feeds.npz"
    shipped = ZOO / f"{LITE0}.onnx"
    _feeds(shipped, feeds)
    files = {"fp32": original, "int8": shipped}
    contenders = [{"name": k, "file": str(f), "provider": "CPU"} for k, f in files.items()]
    for side in sides:
        mine = _race(Path(sys.executable), side.environment, feeds, contenders)[1]
        metric, note = f"lite0_{side.name}_speedup", f"{mine['p50_ms']:.2f} ms; cosine {mine['cosine']:.4f}"
        if side.has_goals:
            yield at_least(
                NAME, metric, 1 / mine["ratio"] if mine["passed"] else 0, "x FP32", goal=1.4, note=note
            )
        else:
            yield told(NAME, metric, 1 / mine["ratio"], "x FP32", note)
        report = _ctl(
            side.environment, "model", "evaluate", str(shipped), "--against", str(original),
            "--samples", str(ZOO / "pictures"), "--count", "300", "--json",
        )  # fmt: skip
        yield from _accuracy(f"lite0_{side.name}", json.loads(report))


def _accuracy(label: str, report: Mapping[str, Any]) -> Iterator[Row]:
    agreement, sqnr = (report["figures"][name]["model"] for name in ("agreement", "sqnr"))
    note = f"[{agreement['low']:.3f}, {agreement['high']:.3f}] on {agreement['samples']} crops"
    yield at_least(NAME, f"{label}_agreement", agreement["value"], "of 1", goal=0.90, note=note)
    note = f"[{sqnr['low']:.1f}, {sqnr['high']:.1f}] dB"
    yield at_least(NAME, f"{label}_sqnr", sqnr["value"], "dB", goal=17, note=note)


def _ctl(environment: Environment, *arguments: str) -> str:
    """Run `agent-ctl`; its progress goes to our stderr. Exit code 1 is an answer too (INT8 does not pay)."""
    done = subprocess.run(
        [Path(sys.executable).with_name("agent-ctl"), *arguments],
        env=environment, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"agent-ctl {' '.join(arguments)}: exit code {done.returncode}: {done.stdout[-500:]}"
        )
    return done.stdout
