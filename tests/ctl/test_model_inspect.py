"""`agent-ctl model inspect` as a process: what people see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
from onnx import TensorProto, helper

AGENT_CTL = Path(sys.executable).parent / "agent-ctl"


def test_a_long_name_leaves_room_before_what_is_said_of_it(tmp_path: Path) -> None:
    names = ("features_of_a_longer_name", "y")
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in names]
    graph = helper.make_graph([helper.make_node("Neg", [names[0]], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(tmp_path / "m.onnx"))
    done = subprocess.run(
        [AGENT_CTL, "model", "inspect", tmp_path / "m.onnx"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = {line.split("float32")[0] for line in done.stderr.splitlines() if "float32 1 × 4" in line}
    assert {line.rstrip() for line in lines} == {f"input {names[0]}", "output y"}
    assert len({len(line) for line in lines}) == 1
    assert all(line.endswith("  ") for line in lines)
