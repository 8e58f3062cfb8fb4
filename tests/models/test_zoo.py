"""The zoo's register, its command, its state dicts and what it ships."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models import zoo
from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_models.labelled import open_labelled
from edgeward_models.samples import open_samples
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.ports import initial_states, next_states
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected, Unavailable

HERE = zoo.directory()
LICENCES = (HERE / "LICENSES.md").read_text(encoding="utf-8")
states: ModuleType = zoo.recipe("states")
silero: ModuleType = zoo.recipe("silero_vad")


def ctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from edgeward_ctl.cli import main; main()", "model", "zoo", *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)


# --- the register


def test_every_recipe_is_there_and_every_recipe_file_is_registered() -> None:
    shared = {"forward", "graphs", "sidecars", "states"}
    files = {path.stem for path in HERE.glob("*.py")} - shared
    assert {entry.recipe for entry in zoo.RECIPES.values()} == files
    for name, entry in zoo.RECIPES.items():
        assert entry.name == name
        assert callable(zoo.recipe(entry.recipe).build)


def test_what_has_random_weights_says_so() -> None:
    randoms = {name for name, entry in zoo.RECIPES.items() if entry.weights == "random"}
    assert randoms == {"resnet50", "yolov8s", "distilhubert"}


def test_a_name_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no model 'resnet'") as caught:
        zoo.build("resnet", tmp_path)
    assert "resnet50" in caught.value.next_step


def test_a_directory_that_cannot_be_made_is_the_worlds_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be read or written"):
        zoo.build("silero-vad", tmp_path / "file" / "out")


# --- the command


def test_list_names_all_with_licence_and_weights() -> None:
    done = ctl("list", "--json")
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert listed.keys() == zoo.RECIPES.keys()
    assert listed["resnet50"]["weights"] == "random"
    assert listed["silero-vad"]["licence"] == "MIT"


def test_build_prints_the_file_alone_on_stdout(tmp_path: Path) -> None:
    done = ctl("build", "silero-vad", "--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'silero-vad.onnx'}\n")
    assert "build" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nothing-like-it"], 2, "It has: "),
        (["resnet50", "--weights", "/nowhere/w.npz"], 69, "cannot be read"),
        (["resnet50", "--weights", __file__], 2, "neither .safetensors nor .npz"),
    ],
)
def test_bad_input_ends_in_two_lines(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = ctl("build", *arguments, "--out", str(tmp_path))
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


# --- state dicts


def safetensors(tensors: dict[str, np.ndarray[Any, Any]], names: dict[str, str]) -> bytes:
    """As the format says: length, JSON header, tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        header[name] = {
            "dtype": names.get(name, "F32"),
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_both_formats_give_the_same_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain = {
        "a.weight": rng.random((2, 3), np.float32),
        "b": np.arange(4, dtype=np.int64),
        "c": np.float16([[1]]),
    }
    np.savez(tmp_path / "w.npz", **plain)
    (tmp_path / "w.safetensors").write_bytes(safetensors(plain, {"b": "I64", "c": "F16"}))
    for name in ("w.npz", "w.safetensors"):
        found = states.read(tmp_path / name)
        assert found.keys() == plain.keys()
        for key, value in plain.items():
            np.testing.assert_array_equal(found[key], value)


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.float32([1.0, -2.5, 0.0, 1e20])
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "w.safetensors").write_bytes(safetensors({"x": halves}, {"x": "BF16"}))
    np.testing.assert_allclose(states.read(tmp_path / "w.safetensors")["x"], values, rtol=2**-7)


@given(raw=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 120))
def test_whatever_the_bytes_safetensors_are_read_or_rejected(
    raw: bytes, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", length) + raw)
    with contextlib.suppress(Rejected):
        assert all(tensor.size < 300 for tensor in states.read(path).values())


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "X9", 3]),
        "shape": st.lists(st.integers(-2, 5), max_size=3) | st.just("wide"),
        "data_offsets": st.lists(st.integers(-4, 80), min_size=1, max_size=3),
    }
)


@given(header=st.dictionaries(st.text(max_size=5), entries | st.none() | st.integers(), max_size=3))
def test_whatever_the_header_says_tensors_stay_within_the_file(header: Any) -> None:
    text = json.dumps(header).encode()
    raw = struct.pack("<Q", len(text)) + text + bytes(64)
    try:
        found = dict(states._safetensors(raw, "w.safetensors"))
    except Rejected:
        return
    assert sum(tensor.size for tensor in found.values()) <= 64 * len(found)


def test_an_npz_that_is_none_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY nonsense")
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    for name in ("text", "foreign", "object"):
        with pytest.raises(Rejected, match=r"not an \.npz file of plain arrays"):
            states.read(tmp_path / f"{name}.npz")


def test_what_does_not_fit_is_named_all_at_once() -> None:
    loaded = states.Loaded(
        {
            "good": np.ones(3, np.float32),
            "wide": np.ones((2, 2), np.float32),
            "hole": np.array([np.nan], np.float32),
            "spare": np.ones(1, np.float32),
            "bn.num_batches_tracked": np.int64(7),
        },
        "w.npz",
    )
    for name, shape in (("good", (3,)), ("wide", (4,)), ("hole", (1,)), ("lost", (2,))):
        assert loaded.get(name, shape, lambda rng: rng.random(1)).shape == shape
    with pytest.raises(Rejected) as caught:
        loaded.finish()
    assert "1 missing: lost" in caught.value.what
    assert "2 wrong: wide is (2, 2), not (4,), hole holds values that are not finite" in caught.value.what
    assert "1 unexpected: spare" in caught.value.what


# --- Silero VAD


def test_silero_hears_with_its_state_carried_on(tmp_path: Path) -> None:
    model = zoo.build("silero-vad", tmp_path)
    known = guess(model).complete()
    contract = known.contract
    assert (contract.task, contract.stateful) == ("vad", True)
    audio = contract.source.audio
    assert audio is not None
    assert (audio.rate, audio.window, audio.context) == (16_000, 512, 64)
    session = open_exact(model)
    carried, first = initial_states(contract), None
    for _ in range(8):
        feeds = {"input": np.zeros((1, 576), np.float32), "sr": np.array(16_000, np.int64), **carried}
        found = dict(zip([port.name for port in session.outputs], session.run(feeds), strict=True))
        carried = next_states(contract, found)
        first = carried["state"].copy() if first is None else first
    session.close()
    assert 0 <= float(found["output"][0, 0]) < 0.1, "silence is no speech"
    assert not np.array_equal(first, carried["state"])


def test_silero_becomes_a_bundle_with_its_licence(tmp_path: Path) -> None:
    model = zoo.build("silero-vad", tmp_path)
    manifest = make_bundle(BundleRequest(model), tmp_path / "bundle").manifest
    assert manifest.float_reason == silero.FLOAT
    assert manifest.annotations["licence"] == "MIT"


def test_a_wheel_gives_the_same_file_as_the_shipped_one(tmp_path: Path) -> None:
    """The shapes are fixed already, so fixing them again changes nothing."""
    wheel = tmp_path / "silero_vad-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(silero.SHIPPED, f"silero_vad/data/{silero.FILE}")
    built = zoo.build("silero-vad", tmp_path / "out", weights=wheel)
    assert built.read_bytes() == silero.SHIPPED.read_bytes()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / silero.FILE).write_bytes(silero.SHIPPED.read_bytes())
    assert zoo.build("silero-vad", tmp_path / "out", weights=tmp_path / "tree").is_file()


@pytest.mark.parametrize("content", [b"", b"no wheel", b"PK\x05\x06" + bytes(18)])
@pytest.mark.parametrize("suffix", [".whl", ".onnx"])
def test_what_is_not_silero_is_rejected(tmp_path: Path, content: bytes, suffix: str) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(Rejected) as caught:
        zoo.build("silero-vad", tmp_path, weights=tmp_path / f"x{suffix}")
    assert "pip download --no-deps silero-vad" in caught.value.next_step


# --- the forest


@pytest.fixture(scope="session")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("sklearn", "skl2onnx"):
        pytest.importorskip(library)
    return zoo.build("digits-forest", tmp_path_factory.mktemp("forest"))


def test_the_forest_reads_digits_of_people_it_never_saw(forest: Path) -> None:
    known = guess(forest).complete()
    with np.load(forest.parent / "digits.npz") as rows:
        features, labels = rows["features"], rows["labels"]
    session = open_exact(forest)
    [scores] = session.run({"features": features})
    session.close()
    right = float((scores.argmax(axis=1) == labels).mean())
    assert len(labels) == known.accuracy["rows"]
    assert right == pytest.approx(known.accuracy["top1"], abs=1e-4)
    assert right > 0.9
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)


def test_the_forest_is_the_same_each_time_and_says_why_it_stays_float(forest: Path, tmp_path: Path) -> None:
    again = zoo.build_files("digits-forest", tmp_path)
    assert again.model.read_bytes() == forest.read_bytes()
    assert {file.name for file in again.files} == {file.name for file in forest.parent.iterdir()}
    known = guess(forest)
    assert "not multiply" in (known.float_reason or "")
    assert known.contract.task == "classification"
    assert known.labels is not None
    assert known.labels.read_text().split() == list("0123456789")


def test_held_out_digits_are_samples_and_labelled_data(forest: Path) -> None:
    known = guess(forest).complete()
    contract = known.contract
    assert open_samples(contract, known.samples).evidence == "strong"
    labelled = open_labelled(forest.parent / "digits.npz", contract, list("0123456789"), 10)
    assert len(labelled.items) == 540


def test_weights_are_refused_where_none_are_taken(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="takes no weights"):
        zoo.build("digits-forest", tmp_path, weights=tmp_path / "w.npz")


# --- what is shipped


def test_whatever_is_shipped_has_its_licence_beside_it() -> None:
    for model in HERE.glob("*.onnx"):
        assert f"## {model.name}" in LICENCES
    for labels in HERE.glob("*-labels.txt"):
        assert f"## {labels.name}" in LICENCES
    assert "Copyright (c) 2020-present Silero Team" in LICENCES


def test_the_shipped_silero_is_what_was_taken_from_the_package() -> None:
    digest = hashlib.sha256(silero.SHIPPED.read_bytes()).hexdigest()
    assert digest in (HERE / "README.md").read_text(encoding="utf-8")


def test_the_shipped_silero_is_known_by_the_sidecar_that_the_recipe_writes(tmp_path: Path) -> None:
    built = zoo.build("silero-vad", tmp_path)
    beside = silero.SHIPPED.with_suffix(".toml")
    assert beside.read_text(encoding="utf-8") == built.with_suffix(".toml").read_text(encoding="utf-8")
    assert guess(silero.SHIPPED).complete().contract.stateful
