"""`agent-ctl model export` as a process: what people see, exit codes, and what bad input gets."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import need
from ctl.conftest import AGENT_CTL, Done, finish
from edgeward_ctl import cli


@pytest.fixture(autouse=True)
def packages() -> None:
    need("sklearn", "skl2onnx")


CODE = """
import sys
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

print("fitting")
rows, kinds = load_iris(return_X_y=True)
names = load_iris().target_names[kinds]


def build():
    return LogisticRegression(max_iter=1000).fit(rows, names)


def wrong():
    encoder = OneHotEncoder(handle_unknown="ignore")
    return make_pipeline(encoder, LogisticRegression(max_iter=1000)).fit(rows.round(), kinds)


def broken():
    return open("no such file")


def leaving():
    sys.exit(0)


def nothing():
    return 17


constant = 17
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    (directory / "my_models.py").write_text(CODE)
    (directory / "syntax.py").write_text("def build(:\n")
    (directory / "needs.py").write_text("import a_library_that_nobody_has\n")
    (directory / "model.pkl").write_bytes(pickle.dumps({"a": 1}))
    return directory


def export(home: Path, *arguments: str) -> Done:
    process = subprocess.Popen(
        [str(AGENT_CTL), "model", "export", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=home,
        env={**os.environ, "COLUMNS": "200"},
    )
    return finish(process)


Here = Callable[..., Done]


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The same within this process, which need not import everything again."""

    def run(*arguments: str) -> Done:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["agent-ctl", "model", "export", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        assert "Traceback" not in told.out + told.err
        return Done(int(left.value.code or 0), told.out, told.err)

    return run


def test_an_estimator_becomes_a_file_and_its_labels(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    np.savez(rows, features=np.random.default_rng(0).uniform(0, 8, (20, 4)))
    done = export(home, "my_models:build", "--out", str(tmp_path / "iris.onnx"), "--samples", str(rows))
    assert done.code == 0, done.err
    assert "fitting" not in done.out
    told = {line[:22].strip(): line[22:].strip() for line in done.out.splitlines()}
    assert told["exporter"].startswith("skl2onnx, opset ")
    assert told["input features"] == "float32 batch × 4"
    assert told["verified"] == "yes: 5 trials of rows.npz, batch 1 and 20, rtol 0.001, atol 0.0001"
    assert told["worst element"].startswith("probabilities[")
    assert told["same label"] == "24 of 24 rows"
    assert (tmp_path / "iris-labels.txt").read_text() == "setosa\nversicolor\nvirginica\n"


def test_the_same_as_json(here: Here, tmp_path: Path) -> None:
    done = here("my_models:build", "--out", str(tmp_path / "iris.onnx"), "--json")
    assert done.code == 0, done.err
    assert done.json["passed"] is True
    assert done.json["verification"]["worst"]["excess"] < 1
    assert done.json["outputs"] == [{"name": "probabilities", "dtype": "float32", "shape": ["batch", 3]}]
    assert set(done.json["versions"]) == {"scikit-learn", "skl2onnx"}


def test_a_file_that_differs_is_exit_code_1_and_no_file(here: Here, tmp_path: Path) -> None:
    done = here("my_models:wrong", "--out", str(tmp_path / "m.onnx"))
    assert done.code == 1
    assert "none: the outputs differ" in done.out
    assert "failed: Outputs differ: probabilities[" in done.err
    assert "next: " in done.err
    assert not list(tmp_path.iterdir())
    plain = here("my_models:wrong", "--out", str(tmp_path / "m.onnx"), "--json")
    assert (plain.code, plain.json["passed"], plain.json["out"]) == (1, False, None)


REFUSED = {
    "no module": (["nowhere.at_all:build"], "There is no module nowhere here."),
    "no name": (["my_models:nix"], "my_models has no nix."),
    "no model": (["my_models:nothing"], "my_models:nothing gives int, and no model"),
    "not callable": (["my_models:constant"], "my_models:constant is neither a model nor callable, but int."),
    "raises": (["my_models:broken"], "my_models:broken failed: FileNotFoundError: "),
    "leaves": (["my_models:leaving"], "my_models:leaving failed: SystemExit"),
    "syntax": (["syntax:build"], "syntax cannot be imported: SyntaxError: "),
    "library": (["needs:build"], "a library that is not installed: a_library_that_nobody_has"),
    "no file": (["model.joblib"], "There is no file model.joblib."),
    "untrusted": (["model.pkl"], "reading it runs whatever code"),
    "trusted, and no model": (["model.pkl", "--trust"], "model.pkl gives dict, and no model"),
    "input": (["my_models:build", "--input", "x=1x"], "'1x' is not a shape of input x."),
    "state": (["my_models:build", "--state", "h"], "'h' does not say what a state is."),
    "task": (["my_models:build", "--task", "cooking"], "The task 'cooking' is not known."),
    "opset": (["my_models:build", "--opset", "99"], "Opset 99 is not supported."),
    "tolerance": (["my_models:build", "--rtol", "-1"], "rtol -1 and atol 0.0001 are no tolerance."),
    "samples": (["my_models:build", "--samples", "my_models.py"], "my_models.py is not an .npz"),
    "labels": (["my_models:build", "--labels", "none.txt"], "There is no file none.txt."),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_says_so_in_a_line(
    here: Here, tmp_path: Path, arguments: list[str], told: str
) -> None:
    done = here(*arguments, "--out", str(tmp_path / "m.onnx"), "--json")
    assert done.code == 2, done.err
    assert told in done.err
    assert told in json.loads(done.out)["error"]
    assert not list(tmp_path.iterdir())


def test_the_file_must_be_named_onnx(here: Here, tmp_path: Path) -> None:
    done = here("my_models:build", "--out", str(tmp_path / "m.pt"))
    assert done.code == 2
    assert "next: Name a file that ends in .onnx." in done.err
    assert "fitting" not in done.err  # told before the model is built


def test_a_place_that_cannot_be_written_is_unavailable(here: Here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = here("my_models:build", "--out", str(tmp_path / "file" / "m.onnx"))
    assert done.code == 69
    assert "cannot be written" in done.err
