"""No file of ONNX Runtime's telemetry appears, in an empty home and outside of CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runtime import builders

RUN = """
import sys
{first}
import onnxruntime as ort
options = ort.SessionOptions()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(ort.__version__)
"""


def files_after(home: Path, model: Path, first: str) -> tuple[list[str], tuple[int, ...]]:
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")}  # no CI, no opt-out of anybody
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(first=first), str(model)],
        env={**kept, "HOME": str(home), "TMPDIR": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    version = tuple(int(part) for part in done.stdout.split(".")[:2])
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()), version


def test_nothing_is_kept_and_the_test_would_see_it(tmp_path: Path) -> None:
    model = builders.int8_classifier(tmp_path / "m.onnx")
    ours, version = files_after(tmp_path / "ours", model, "import edgeward_runtime")
    assert ours == []
    theirs, _ = files_after(tmp_path / "theirs", model, "")
    assert bool(theirs) == (version >= (1, 29)), theirs
