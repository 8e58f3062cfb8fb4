"""What people write about inputs, names, states; noise; rows of an .npz; and what a file is."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.export import archives
from edgeward_models.export.archives import kind_of, refuse_untrusted
from edgeward_models.export.dispatch import export_source
from edgeward_models.export.inputs import (
    DTYPES,
    MAX_ELEMENTS,
    InputSpec,
    join,
    like,
    noise,
    one_of,
    parse_input,
    read_samples,
)
from edgeward_models.export.naming import output_names, states_of
from edgeward_models.export.report import ExportOptions, parse_states, parse_task
from edgeward_models.export.trials import taken_of
from edgeward_wire.errors import EdgewardError, Rejected

NAMES = st.text("abcxyz_.0", min_size=1, max_size=12)
SHAPES = st.lists(st.integers(1, 64), max_size=4).flatmap(
    lambda shape: st.just(tuple(shape)) | st.just((None, *shape))
)
X = InputSpec("x", (None, 3, 4))


# --- shapes


@given(st.builds(InputSpec, NAMES, SHAPES, st.sampled_from(DTYPES)))
def test_what_is_written_of_an_input_is_read_back(spec: InputSpec) -> None:
    assert parse_input(str(spec)) == spec


@given(st.text(max_size=40) | st.from_regex(r"[a-z]{0,3}=?[0-9xN:fl ]{0,20}"))
def test_whatever_is_written_is_an_input_or_refused(text: str) -> None:
    with contextlib.suppress(Rejected):
        spec = parse_input(text)
        assert spec.shape.count(None) <= 1
        assert np.prod(spec.sized(1), dtype=np.int64) <= MAX_ELEMENTS


def test_float32_is_usual_and_n_is_the_batch() -> None:
    assert parse_input("image=1x3x8x8") == InputSpec("image", (1, 3, 8, 8), "float32")
    assert parse_input("h=1xNx8:float16") == InputSpec("h", (1, None, 8), "float16")
    assert parse_input("sr=scalar:int64") == InputSpec("sr", (), "int64")
    assert parse_input("h=1xNx8").sized(3) == (1, 3, 8)
    assert parse_input("x=2x8").opened() == InputSpec("x", (None, 8))
    assert parse_input("h=1xNx8").opened() == parse_input("h=1xNx8")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image", "does not say"),
        ("=1x3", "does not say"),
        ("x=", "does not say"),
        ("x=1x3:", "does not say"),
        ("x=0x3", "is not a shape"),
        ("x=1x-3", "is not a shape"),
        ("x=1,3", "is not a shape"),
        ("x=1x3:float64", "has the type"),
        ("x=NxN", "batch twice"),
        ("x=1x1x1x1x1x1x1x1x1", "9 dimensions"),
        ("x=99999x99999", "too large"),
        ("x" * 65 + "=1", "does not say"),
    ],
)
def test_what_is_no_shape_is_refused(text: str, told: str) -> None:
    with pytest.raises(Rejected, match=told):
        parse_input(text)


# --- noise


@given(st.builds(InputSpec, NAMES, SHAPES, st.sampled_from(DTYPES)), st.integers(1, 3))
def test_noise_has_the_shape_and_type_and_is_the_same_for_a_seed(spec: InputSpec, batch: int) -> None:
    if np.prod(spec.sized(batch), dtype=np.int64) > 1 << 16:
        return
    first, again = (noise(spec, batch, np.random.default_rng(7)) for _ in range(2))
    assert (first.shape, str(first.dtype)) == (spec.sized(batch), spec.dtype)
    assert np.array_equal(first, again)


def test_noise_is_spread_as_the_example_is() -> None:
    rng = np.random.default_rng(0)
    ids = noise(InputSpec("ids", (1, 500), "int64"), 1, rng, np.array([[3, 9]]))
    assert (ids.min(), ids.max()) == (3, 9)
    wide = noise(InputSpec("x", (1, 5000)), 1, rng, np.array([[100.0, 300.0]], np.float32))
    assert wide.mean() == pytest.approx(200, abs=10)
    assert wide.std() == pytest.approx(100, rel=0.1)
    constant = noise(InputSpec("h", (1, 5000)), 1, rng, np.zeros((1, 4), np.float32))
    assert constant.std() == pytest.approx(1, rel=0.1)


def test_batches_are_cut_and_joined_where_the_batch_is() -> None:
    spec = InputSpec("h", (2, None, 3))
    example = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    one = one_of(spec, example)
    assert one.shape == (2, 1, 3)
    assert join(spec, [one, one, one]).shape == (2, 3, 3)
    fixed = like("x", example)
    assert one_of(fixed, example) is example
    assert join(fixed, [example, example]) is example


def test_examples_that_do_not_fit_what_is_written_give_way_to_noise() -> None:
    options = ExportOptions(inputs=(parse_input("x=1x3x8x8"),))
    taken = taken_of({"x": np.zeros((1, 3, 4, 4), np.float32)}, ["x"], options)
    assert taken.examples["x"].shape == (1, 3, 8, 8)
    fitting = np.full((2, 3), 7, np.float32)
    batched = taken_of({"x": fitting}, ["x"], ExportOptions(dynamic_batch=True))
    assert np.array_equal(batched.examples["x"], fitting[:1])
    assert batched.specs == (InputSpec("x", (None, 3)),)
    named = taken_of({}, ["b", "a"], ExportOptions(inputs=(parse_input("a=1"), parse_input("b=2"))))
    assert [spec.name for spec in named.specs] == ["b", "a"]
    with pytest.raises(Rejected, match="Nothing says what goes into"):
        taken_of({}, ["image"], ExportOptions())


# --- samples


def saved(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_come_with_and_without_their_own_batch(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.float64).reshape(5, 3, 4)
    for array in (rows, rows[:, None]):
        read = read_samples(saved(tmp_path / "s.npz", x=array), [X], 3)
        assert len(read) == 3
        assert read[2]["x"].dtype == np.float32
        assert np.array_equal(read[2]["x"], rows[2][None])


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"y": np.zeros((5, 3, 4))}, "no array for input x; it has y"),
        ({"x": np.zeros((5, 3, 5))}, r"has the shape \(5, 3, 5\), but the input is \(1, 3, 4\)"),
        ({"x": np.zeros((5, 3, 4), int)}, "is int64, but the input is float32"),
        ({"x": np.zeros((0, 3, 4))}, "has no rows"),
        ({"x": np.full((5, 3, 4), np.nan)}, "not finite"),
        ({"x": np.array([None])}, "not an .npz of plain numbers"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict, told: str) -> None:
    with pytest.raises(Rejected, match=told):
        read_samples(saved(tmp_path / "s.npz", **arrays), [X], 4)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    with pytest.raises(Rejected, match="no file"):
        read_samples(path, [X], 4)
    for raw in (b"", b"PK\x03\x04 cut", b"text"):
        path.write_bytes(raw)
        with pytest.raises(Rejected, match=r"not an \.npz"):
            read_samples(path, [X], 4)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(Rejected, match="is one array"):
        read_samples(path, [X], 4)


# --- names, states, tasks


@given(
    st.lists(st.sampled_from(["", "logits", "output", "output_1", "x"]), min_size=1, max_size=6),
    st.lists(st.sampled_from(["x", "output", "output_0", "output_out"]), max_size=3, unique=True),
)
def test_outputs_have_names_of_their_own(own: list[str], taken: list[str]) -> None:
    names = output_names(own, taken)
    assert len({*names, *taken}) == len(own) + len(taken)
    kept = [name for name, mine in zip(names, own, strict=True) if mine and mine == name]
    assert all(own.count(name) >= 1 for name in kept)


def test_names_that_are_wished_for_must_fit() -> None:
    assert output_names(["", ""], ["x"], ["a", "b"]) == ("a", "b")
    with pytest.raises(Rejected, match="2 outputs, but 1 names"):
        output_names(["", ""], ["x"], ["a"])
    with pytest.raises(Rejected, match="called x"):
        output_names([""], ["x"], ["x"])


def test_states_stand_in_the_shape_of_a_sidecar() -> None:
    states = parse_states(["H0=hn", "c=cn"])
    assert states_of(ExportOptions(states=states)) == {
        "inputs": {"H0": {"bind": "state:h0"}, "c": {"bind": "state:c"}},
        "outputs": {"hn": {"bind": "state:h0"}, "cn": {"bind": "state:c"}},
    }
    for wrong in (["h"], ["h="], ["=h"], ["h=a", "h=b"], ["h=a", "c=a"]):
        with pytest.raises(Rejected, match="what a state is"):
            parse_states(wrong)


def test_a_task_is_one_of_those_that_are_known() -> None:
    assert parse_task(None) is None
    assert parse_task("detection") == "detection"
    with pytest.raises(Rejected, match="'cooking' is not known"):
        parse_task("cooking")


# --- what a file is


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, raw in members.items():
            out.writestr(name, raw)
    return path


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        ({"m/code/__torch__.py": b"", "m/constants.pkl": b"", "m/data.pkl": b""}, archives.TORCHSCRIPT),
        ({"m/models/model.json": b"", "m/archive_format": b"pt2"}, archives.PROGRAM),
        ({"serialized_exported_program.json": b"{}"}, archives.PROGRAM),
        ({"m/data.pkl": b"\x80\x02ctorch.nn\n"}, archives.TORCH_PICKLE),
        ({"m/data.pkl": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n"}, archives.ULTRALYTICS),
    ],
)
def test_archives_are_told_apart_without_reading_them(tmp_path: Path, members: dict, kind: object) -> None:
    assert kind_of(archive(tmp_path / "m.pt", **members)) is kind


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("m.pt", b"", "is empty"),
        ("m.onnx", b"\x08\x08", "ONNX already"),
        ("m.safetensors", b"{}", "weights only"),
        ("m.h5", b"\x89HDF\r\n", "TensorFlow or Keras"),
        ("m.pt", b"hello", "nothing that can be exported"),
    ],
)
def test_files_that_cannot_be_exported_say_what_they_are(
    tmp_path: Path, name: str, raw: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(Rejected, match=told):
        kind_of(tmp_path / name)


def test_an_archive_of_something_else_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="without a PyTorch model"):
        kind_of(archive(tmp_path / "m.pt", **{"word/document.xml": b""}))
    with pytest.raises(Rejected, match="is a directory"):
        kind_of(tmp_path)
    with pytest.raises(Rejected, match="no file"):
        kind_of(tmp_path / "none.pt")


@given(st.binary(max_size=200))
def test_whatever_the_bytes_are_no_other_error_comes(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "m.pt"
    for content in (raw, b"PK\x03\x04" + raw, b"\x80\x02" + raw):
        path.write_bytes(content)
        with contextlib.suppress(EdgewardError):
            kind_of(path)


@pytest.mark.skipif(bool(find_spec("torch")), reason="PyTorch is installed here")
def test_a_library_that_is_not_installed_is_named_with_its_extra(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", **{"m/code/__torch__.py": b"", "m/constants.pkl": b""})
    with pytest.raises(Rejected, match="not installed: torch") as told:
        export_source(str(path), tmp_path / "m.onnx")
    assert "[ctl,models,torch]" in told.value.next_step


@pytest.mark.skipif(bool(find_spec("ultralytics")), reason="Ultralytics is installed here")
def test_a_checkpoint_without_its_package_says_how_to_get_on(tmp_path: Path) -> None:
    path = archive(tmp_path / "yolo.pt", **{"m/data.pkl": b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n"})
    with pytest.raises(Rejected, match="runs whatever code"):
        export_source(str(path), tmp_path / "m.onnx")
    with pytest.raises(Rejected, match=r"ultralytics is not installed\. .* AGPL") as told:
        export_source(str(path), tmp_path / "m.onnx", trust=True)
    assert "yolo export model=yolo.pt format=onnx" in told.value.next_step


def test_what_runs_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    kind = kind_of(path)
    assert kind is archives.PICKLE
    with pytest.raises(Rejected, match="runs whatever code") as told:
        refuse_untrusted(path, kind, trust=False)
    assert "--trust" in told.value.next_step
    refuse_untrusted(path, kind, trust=True)
    refuse_untrusted(path, archives.TORCHSCRIPT, trust=False)
