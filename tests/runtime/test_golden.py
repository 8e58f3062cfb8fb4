"""Golden arrays: the same bytes each time, nothing unbounded when read."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from edgeward_runtime import golden
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.golden import (
    cuts,
    find_pictures,
    first_vector,
    make_golden,
    make_preprocess_golden,
    picture_pairs,
    read_npz,
    vectors,
    write_npz,
)
from edgeward_runtime.parity import LEANING, Leaning, check_preprocess, cosine, gate, hold, worst_cosine
from edgeward_runtime.sessions import open_exact, open_session
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Plan
from runtime.builders import int8_classifier, picture_directory, sidecar_file

dtypes = st.sampled_from([np.float32, np.float16, np.uint8, np.int64, np.bool_])
arrays = dtypes.flatmap(
    lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(st.dictionaries(st.from_regex(r"\A(in|out)\.[0-9]{1,2}\.[a-z]{1,8}\Z"), arrays, max_size=5))
def test_what_is_written_is_read_and_the_bytes_are_the_same(kept: dict[str, np.ndarray]) -> None:
    raw = write_npz(kept)
    assert raw == write_npz(dict(reversed(list(kept.items()))))
    back = read_npz(raw)
    assert set(back) == set(kept)
    for name, value in kept.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value)
    with np.load(io.BytesIO(raw), allow_pickle=False) as numpys:
        assert set(numpys) == set(kept)


def pack(**members: bytes) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return raw.getvalue()


def npy(value: np.ndarray, *, pickle: bool = False) -> bytes:
    raw = io.BytesIO()
    np.save(raw, value, allow_pickle=pickle)
    return raw.getvalue()


def test_pickles_bombs_and_lies_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Rejected, match="not a readable"):
        read_npz(pack(a=npy(np.array([{}], dtype=object), pickle=True)))
    lie = npy(np.zeros(4, np.float32)).replace(b"(4,)", b"(9,)")
    with pytest.raises(Rejected, match="header does not fit"):
        read_npz(pack(a=lie))
    huge = npy(np.zeros(4, np.float32)).replace(b"(4,), }      ", b"(1 << 60,), }")
    with pytest.raises(Rejected):
        read_npz(pack(a=huge))
    with pytest.raises(Rejected, match="not a readable"):
        read_npz(b"PK\x03\x04 and nothing")
    monkeypatch.setattr(golden, "MAX_UNPACKED_BYTES", 1000)
    with pytest.raises(Rejected, match="unpack to more"):
        read_npz(pack(a=npy(np.zeros(10_000, np.uint8))))
    with pytest.raises(Unavailable, match="not there"):
        read_npz(Path("/nowhere/golden.npz"))


@given(st.binary(max_size=300))
def test_any_bytes_are_arrays_or_rejected(raw: bytes) -> None:
    for attempt in (raw, pack(a=raw), pack(a=npy(np.zeros(3)) + raw)):
        with contextlib.suppress(Rejected):
            read_npz(attempt)


def test_names_must_follow_the_format() -> None:
    one = np.zeros(1, np.float32)
    assert len(vectors({"in.0.x": one, "out.0.y": one, "in.10.x": one, "out.10.y": one})) == 2
    for bad in ({"x": one}, {"in.0.x": one}, {}, {"picture.0": one}):
        with pytest.raises(Rejected):
            vectors(bad)
    with pytest.raises(Rejected, match=r"lack tensor\.0"):
        picture_pairs({"picture.0": one})
    with pytest.raises(Rejected, match="empty"):
        picture_pairs({})


def test_golden_outputs_are_the_files_own(tmp_path: Path) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    known = guess(path, sidecar_file(tmp_path / "m.toml", labels=str(Path(__file__))))
    pictures = find_pictures(picture_directory(tmp_path / "pictures"))
    contract = known.contract
    raw = make_golden(path, contract, pictures)
    assert raw == make_golden(path, known.contract, pictures)
    pairs = vectors(read_npz(raw))
    assert len(pairs) == 3
    for mine, expected in zip(first_vector(raw), pairs[0], strict=True):
        assert set(mine) == set(expected)
        assert all(np.array_equal(mine[name], expected[name]) for name in mine)
    assert [int(out["logits"].argmax()) for _, out in pairs] == [0, 1, 2]
    assert worst_cosine(open_exact(path), pairs, contract) == pytest.approx(1.0, abs=1e-12)
    fast = open_session(path, Plan(provider="CPUExecutionProvider", variant="int8"))
    assert worst_cosine(fast, pairs, contract) > 0.999


def counter(path: Path) -> Path:
    """y = x + h, and h becomes y: what a step gives depends on all steps before it."""
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "h", "y", "hn")]
    nodes = [helper.make_node("Add", ["x", "h"], ["y"]), helper.make_node("Identity", ["y"], ["hn"])]
    graph = helper.make_graph(nodes, "g", ports[:2], ports[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def test_states_are_carried_from_vector_to_vector(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx")
    contract = guess(path, flags={"task": "tensor"}).contract
    assert contract.stateful
    raw = make_golden(path, contract, seed=3)
    assert raw == make_golden(path, contract, seed=3)
    pairs = vectors(read_npz(raw))
    assert len(pairs) >= 8
    assert [set(inputs) for inputs, _ in pairs] == [{"x"}] * len(pairs)
    assert set(pairs[0][1]) == {"y", "hn"}
    total = np.cumsum([inputs["x"] for inputs, _ in pairs], axis=0, dtype=np.float32)
    np.testing.assert_allclose([outputs["y"] for _, outputs in pairs], total, rtol=1e-6)
    assert worst_cosine(open_exact(path), pairs, contract) == pytest.approx(1.0, abs=1e-12)
    # A run that forgets its state is found out at the second step.
    swapped = [pairs[0], *reversed(pairs[1:])]
    assert worst_cosine(open_exact(path), swapped, contract) < 0.99
    mine = [{"x": np.full((1, 4), k, np.float32)} for k in range(3)]
    assert len(vectors(read_npz(make_golden(path, contract, feeds=mine)))) == 3


def test_what_saturating_sums_would_give_stands_beside_the_outputs(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx")
    contract = guess(path, flags={"task": "tensor"}).contract
    feeds = [{"x": np.full((1, 4), k, np.float32)} for k in range(3)]
    cut = [{"y": np.full((1, 4), -k, np.float32)} for k in range(3)]
    raw = make_golden(path, contract, feeds=feeds, cuts=cut)
    arrays = read_npz(raw)
    assert [one["y"].tolist() for one in cuts(arrays)] == [one["y"].tolist() for one in cut]
    assert [set(outputs) for _, outputs in vectors(arrays)] == [{"y", "hn"}] * 3
    assert set(first_vector(raw)[1]) == {"y", "hn"}
    assert cuts(read_npz(make_golden(path, contract, feeds=feeds))) == [{}, {}, {}]
    del arrays["cut.0.y"]  # the first input does not saturate
    assert [set(one) for one in cuts(arrays)] == [set(), {"y"}, {"y"}]
    held = hold(open_exact(path), vectors(arrays), contract, cuts(arrays))
    assert (held.cosine, held.leaning) == (pytest.approx(1.0), 0.0)
    for name, value in (
        ("cut.1.z", np.zeros((1, 4))),
        ("cut.7.y", np.zeros((1, 4))),
        ("cut.1.y", np.zeros((1, 5))),
        ("cut.1.y", np.full((1, 4), np.nan)),
    ):
        with pytest.raises(Rejected, match=name.replace(".", r"\.")):
            cuts({**arrays, name: value})


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx")
    contract = guess(path, flags={"task": "tensor"}).contract
    with pytest.raises(Rejected, match=r"m\.onnx does not run on golden input 0"):
        make_golden(path, contract, feeds=[{"x": np.zeros((1, 9), np.float32)}])
    with pytest.raises(Rejected, match="1 to 256"):
        make_golden(path, contract, feeds=[])


def test_without_pictures_there_is_seeded_noise(tmp_path: Path) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    contract = guess(path).contract
    first = make_golden(path, contract, count=4, seed=1)
    assert first == make_golden(path, contract, count=4, seed=1)
    assert first != make_golden(path, contract, count=4, seed=2)
    assert len(vectors(read_npz(first))) == 4
    assert len(picture_pairs(read_npz(make_preprocess_golden(contract)))) == 1


def test_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    bad = tmp_path / "a.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(Rejected, match=r"a\.png is not a picture"):
        make_golden(path, guess(path).contract, [bad])
    with pytest.raises(Rejected, match="holds no pictures"):
        find_pictures(Path(__file__).parent)


def test_another_models_vectors_are_caught(tmp_path: Path) -> None:
    path, other = int8_classifier(tmp_path / "m.onnx"), int8_classifier(tmp_path / "o.onnx", classes=5)
    contract = guess(path).contract
    pairs = vectors(read_npz(make_golden(other, guess(other).contract)))
    assert worst_cosine(open_exact(path), pairs, contract) == -1.0
    renamed = [({"photo": inputs["image"]}, outputs) for inputs, outputs in pairs]
    with pytest.raises(Rejected, match="another model"):
        worst_cosine(open_exact(path), renamed, contract)


def test_cosine_and_its_gate() -> None:
    a = np.array([1.0, 2.0, 3.0])
    assert cosine(a, 2 * a) == pytest.approx(1)
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == -1
    assert cosine(np.array([1.0, 2.0]), np.array([1.0, np.nan])) == -1
    assert cosine(a, np.full(3, np.inf)) == -1
    assert cosine(np.zeros(3), np.zeros(3)) == 1
    assert cosine(np.zeros(3), a) == 0
    assert cosine(np.zeros(2), a) == -1
    assert gate(0.99, "int8", "CPUExecutionProvider") == 0.99
    assert gate(0.99, "fp16", "CUDAExecutionProvider") == 0.98
    assert gate(0.99, "int8", "TensorrtExecutionProvider") == 0.98
    assert gate(0.9, "fp16", "CUDAExecutionProvider") == 0.9


def test_preprocessing_that_differs_is_rejected(tmp_path: Path) -> None:
    contract = guess(int8_classifier(tmp_path / "m.onnx")).contract
    pictures = find_pictures(picture_directory(tmp_path / "pictures"))
    pairs = picture_pairs(read_npz(make_preprocess_golden(contract, pictures)))
    check_preprocess(contract, pairs)
    (raw, tensor), *_ = pairs
    check_preprocess(contract, [(raw, tensor + 0.4 / 255)])
    with pytest.raises(Rejected, match=r"1\.00 of 255 on average"):
        check_preprocess(contract, [(raw, tensor + 1 / 255)])
    off = tensor.copy()
    off[0, 0, 0, 0] += 5 / 255
    with pytest.raises(Rejected, match=r"5\.0 at most"):
        check_preprocess(contract, [(raw, off)])
    with pytest.raises(Rejected, match="shape"):
        check_preprocess(contract, [(raw, tensor[:, :1])])


def leaning(*runs: tuple[str, np.ndarray, np.ndarray, np.ndarray]) -> float | None:
    """Of (output, mine, exact, cut) each."""
    found = Leaning()
    for run in runs:
        found.add(*run)
    return found.value


def test_leaning_sees_what_large_numbers_hide_from_a_cosine() -> None:
    """Boxes of hundreds, scores below one, as a detector gives them together."""
    rng = np.random.default_rng(3)
    exact = np.concatenate([rng.uniform(0, 640, 400), rng.uniform(0, 1, 8000)])
    noise, way = (rng.normal(0, 0.02, exact.size) * (exact + 0.5) for _ in range(2))
    cut = exact + way
    correct, saturating = exact + noise, exact + 0.9 * way + noise / 2
    assert min(cosine(correct, exact), cosine(saturating, exact)) > 0.999
    right, wrong = leaning(("y", correct, exact, cut)), leaning(("y", saturating, exact, cut))
    assert right is not None
    assert wrong is not None
    assert abs(right) < 0.2
    assert wrong > 0.8
    assert right < LEANING < wrong


def test_leaning_has_its_bounds() -> None:
    exact, cut = np.zeros(4), np.array([1.0, 0, 0, 0])
    assert leaning() is None
    assert leaning(("y", exact, exact, exact)) is None  # nothing would saturate
    assert leaning(("y", exact, exact, cut)) == 0
    assert leaning(("y", cut, exact, cut)) == pytest.approx(1)
    # Noise that dwarfs what saturation would do points anywhere: it is no sign of it.
    assert leaning(("y", np.array([9.0, 99, 0, 0]), exact, cut)) == pytest.approx(1 / 11, rel=0.02)
    assert leaning(("y", np.array([np.nan, 0, 0, 0]), exact, cut)) is None
    # An output of large numbers does not outvote another that saturation turns.
    small = ("small", np.array([0.9, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0]))
    large = ("large", np.array([1e6, 0.0]), np.array([1e6, 0.0]), np.array([1e6, 9.0]))
    assert leaning(small, large) == pytest.approx(0.9, abs=0.01)
