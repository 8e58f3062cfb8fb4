"""Samples: two splits that share nothing, the same arrays each time, and faults that say what to do."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_models import samples
from edgeward_models.samples import Split, crop, halves, open_samples
from edgeward_runtime.contract_guess import guess
from edgeward_wire.contract import Contract, ImageSpec, InputPort, OutputPort
from edgeward_wire.errors import Rejected
from runtime import builders
from runtime.test_sounds import wav

ZOO = Path(__file__).resolve().parents[2] / "models" / "zoo"


def pictured(size: int = 8) -> Contract:
    """One picture, size x size, unscaled."""
    image = ImageSpec(width=size, height=size, scale=(1.0, 1.0, 1.0))
    port = InputPort(name="image", dtype="float32", shape=(1, 3, size, size), bind="source", image=image)
    return Contract(
        task="tensor", inputs=(port,), outputs=(OutputPort(name="y", dtype="float32", shape=(1,)),)
    )


def tabular(*, dtype: str = "float32", state: bool = False, shape: tuple[int, ...] = (1, 4)) -> Contract:
    inputs: list[Any] = [{"name": "x", "dtype": dtype, "shape": shape, "bind": "source"}]
    outputs: list[Any] = [{"name": "y", "dtype": "float32", "shape": (1,)}]
    if state:
        inputs.append({"name": "h", "dtype": "float32", "shape": (1, 2), "bind": "state:h"})
        outputs.append({"name": "hn", "dtype": "float32", "shape": (1, 2), "bind": "state:h"})
    return Contract.model_validate({"task": "tensor", "inputs": inputs, "outputs": outputs})


def two_tone(path: Path, count: int, width: int = 40, height: int = 30) -> Path:
    """Pictures whose first half is dark and whose second half is light; each has its own red."""
    path.mkdir(exist_ok=True)
    for k in range(count):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[:, width // 2 :] = 200
        picture[:, :, 2] += np.uint8(k % 50)
        picture[0, 0, 0] = k // 50
        assert cv2.imwrite(str(path / f"{k:04d}.png"), picture)
    return path


def test_few_pictures_become_crops_of_halves(tmp_path: Path) -> None:
    found = open_samples(pictured(), two_tone(tmp_path / "p", 3))
    assert (found.origin, found.evidence) == ("3 pictures in p", "strong")
    fit, test = found.take("fit", 20), found.take("test", 20)
    assert all(f["image"].shape == (1, 3, 8, 8) and f["image"].dtype == np.float32 for f in fit)
    assert max(f["image"].max() for f in fit) < 60  # only dark halves
    assert min(f["image"].min() for f in test) >= 200  # only light ones


def test_many_pictures_are_taken_whole_and_never_shared(tmp_path: Path) -> None:
    found = open_samples(pictured(), two_tone(tmp_path / "p", samples.MANY + 6))
    reds: dict[Split, set[float]] = {}
    for split in ("fit", "test"):
        for count in (5, 35, 60):
            taken = found.take(split, count, seed=count)
            reds.setdefault(split, set()).update(round(float(f["image"][0, 0].min())) for f in taken)
    whole = found.take("fit", 35)
    assert all(f["image"].min() < 60 and f["image"].max() >= 200 for f in whole)
    # Red tells k mod 50; the numbers of the pictures of a split are all even, or all odd.
    assert {int(r) % 2 for r in reds["fit"] if r < 60} == {0}
    assert {int(r) % 2 for r in reds["test"] if r < 60} == {1}


def test_the_same_seed_gives_the_same_arrays_and_they_are_ones_own(tmp_path: Path) -> None:
    source = builders.picture_directory(tmp_path / "p")
    found = open_samples(pictured(), source)
    one, two = found.take("fit", 4, 7), open_samples(pictured(), source).take("fit", 4, 7)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
    one[0]["image"][:] = -1
    np.testing.assert_array_equal(found.take("fit", 4, 7)[0]["image"], two[0]["image"])
    other = found.take("fit", 4, 8)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(two, other, strict=True))
    assert not np.shares_memory(other[0]["image"], other[1]["image"])


def test_copies_of_a_picture_count_once(tmp_path: Path) -> None:
    source = two_tone(tmp_path / "p", 2)
    before = open_samples(pictured(), source)
    shutil.copy(source / "0000.png", source / "9999.png")
    after = open_samples(pictured(), source)
    assert after.origin == "2 pictures in p"
    assert after.digest == before.digest
    (source / "0000.png").unlink()
    (source / "9999.png").unlink()
    assert open_samples(pictured(), source).digest != before.digest


def reference_crops(paths: list[Path], side: int, count: int, seed: int) -> list[np.ndarray]:
    """The crops that the shipped model's figures were measured on, written down a second time."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        picture = cv2.cvtColor(cv2.imread(str(paths[k % len(paths)])), cv2.COLOR_BGR2RGB)
        height, width = picture.shape[:2]
        cut = picture[:, : width // 2], picture[:, width // 2 :]
        region = (cut if width >= height else (picture[: height // 2], picture[height // 2 :]))[side]
        height, width = (int(length * rng.uniform(0.55, 1.0)) for length in region.shape[:2])
        top = int(rng.integers(0, region.shape[0] - height + 1))
        left = int(rng.integers(0, region.shape[1] - width + 1))
        crop = region[top : top + height, left : left + width]
        crop = np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)
        factor = 256 / min(crop.shape[:2])
        size = (round(crop.shape[1] * factor), round(crop.shape[0] * factor))
        resized = cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)
        top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
        centre = resized[top : top + 224, left : left + 224].astype(np.float32)
        made.append(((centre - 127) / 128).transpose(2, 0, 1)[None])
    return made


def test_the_zoos_crops_are_these() -> None:
    known = guess(ZOO / "efficientnet-lite0.onnx")
    found = open_samples(known.contract, known.samples)
    paths = sorted((ZOO / "pictures").glob("*.jpg"))
    splits: tuple[Split, ...] = ("fit", "test")
    for side, split in enumerate(splits):
        theirs = reference_crops(paths, side, 12, 3)
        for mine, other in zip(found.take(split, 12, 3), theirs, strict=True):
            np.testing.assert_array_equal(mine["image"], other)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**32))
def test_any_picture_can_be_halved_and_cropped(width: int, height: int, seed: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    first, second = halves(picture)
    assert first.size + second.size == picture.size
    for half in (first, second):
        cut = crop(half, np.random.default_rng(seed))
        assert all(1 <= a <= b for a, b in zip(cut.shape, half.shape, strict=True))


# --- rows


def rows_file(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_alternate_and_never_meet(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float64).reshape(10, 4)  # float64, as NumPy makes it
    found = open_samples(tabular(), rows_file(tmp_path / "rows.npz", x=values))
    assert found.origin == "10 rows in rows.npz"
    assert (found.limit("fit"), found.limit("test")) == (5, 5)
    fit = {float(f["x"][0, 0]) for seed in range(4) for f in found.take("fit", 3, seed)}
    test = {float(f["x"][0, 0]) for seed in range(4) for f in found.take("test", 3, seed)}
    assert not fit & test
    assert found.take("fit", 1)[0]["x"].dtype == np.float32
    assert found.take("fit", 1)[0]["x"].shape == (1, 4)


def test_rows_of_a_model_with_state_keep_their_order(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(10, 1, 4)
    found = open_samples(tabular(state=True), rows_file(tmp_path / "rows.npz", x=values))
    assert [f["x"][0, 0] for f in found.take("fit", 5, seed=9)] == [0, 4, 8, 12, 16]
    assert [f["x"][0, 0] for f in found.take("test", 2, seed=9)] == [20, 24]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((4, 4), np.float32)}, r"one array for each input \(x\); it holds: y"),
        ({"x": np.zeros((4, 5), np.float32)}, r"x has the shape \(4, 5\); expected is \(N, 4\)"),
        ({"x": np.zeros((), np.float32)}, "expected is"),
        ({"x": np.zeros((4, 4), np.uint8)}, "x is uint8; the input takes float32"),
        ({"x": np.full((4, 4), np.nan, np.float32)}, "not finite in row 0"),
        ({"x": np.zeros((1, 4), np.float32)}, "too few rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(Rejected, match=says):
        open_samples(tabular(), rows_file(tmp_path / "rows.npz", **arrays))


def test_whole_numbers_must_be_in_range(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.npz", x=np.full((4, 4), 300))
    with pytest.raises(Rejected, match=r"range of uint8, 0\.\.255"):
        open_samples(tabular(dtype="uint8"), path)
    assert open_samples(tabular(dtype="int64"), path).take("test", 2)[0]["x"].dtype == np.int64


def test_more_than_there_is_cannot_be_taken(tmp_path: Path) -> None:
    found = open_samples(tabular(), rows_file(tmp_path / "rows.npz", x=np.zeros((9, 4), np.float32)))
    assert len(found.take("fit", 5)) == 5
    with pytest.raises(Rejected, match=r"5 samples to test with were asked for, but 9 rows .* has only 4"):
        found.take("test", 5)
    for count in (0, samples.MAX_COUNT + 1):
        with pytest.raises(Rejected, match="can be taken"):
            found.take("fit", count)
    large = open_samples(tabular(shape=(1, 1 << 24)), None)
    with pytest.raises(Rejected, match="GB of memory"):
        large.take("fit", 1000)


# --- sounds


def heard(*, window: int = 100, hop: int = 50, context: int = 10, state: bool = False) -> Contract:
    audio = {"rate": 1000, "window": window, "hop": hop, "context": context}
    inputs: list[Any] = [
        {"name": "x", "dtype": "float32", "shape": (1, window + context), "bind": "source", "audio": audio}
    ]
    outputs: list[Any] = [{"name": "y", "dtype": "float32", "shape": (1,)}]
    if state:
        inputs.append({"name": "h", "dtype": "float32", "shape": (1,), "bind": "state:h"})
        outputs.append({"name": "hn", "dtype": "float32", "shape": (1,), "bind": "state:h"})
    return Contract.model_validate({"task": "tensor", "inputs": inputs, "outputs": outputs})


def sound_files(path: Path, count: int, length: int = 1000) -> Path:
    """Files whose first half is positive and whose second half is negative, each of its own loudness."""
    path.mkdir(exist_ok=True)
    for k in range(count):
        values = np.full(length, (k + 1) / (count + 1))
        values[length // 2 :] *= -1
        (path / f"{k:03d}.wav").write_bytes(wav(values, 1000))
    return path


def test_few_sounds_are_halved_before_they_are_windowed(tmp_path: Path) -> None:
    found = open_samples(heard(), sound_files(tmp_path / "s", 2))
    assert (found.origin, found.evidence, found.limit("fit")) == ("2 sounds in s", "strong", None)
    for count in (5, 18, 60):  # there are 9 windows in each half
        fit, test = found.take("fit", count), found.take("test", count)
        assert {f["x"].shape for f in fit} == {(1, 110)}
        assert min(f["x"].min() for f in fit) >= 0
        assert max(f["x"].max() for f in test) <= 0
        assert min(np.abs(f["x"][0, 10:]).min() for f in fit + test) > 0.1
    np.testing.assert_array_equal(found.take("fit", 30, 4)[29]["x"], found.take("fit", 30, 4)[29]["x"])


def test_many_sounds_are_taken_whole_and_never_shared(tmp_path: Path) -> None:
    found = open_samples(heard(), sound_files(tmp_path / "s", samples.MANY, 200))
    loud = {s: {round(float(np.abs(f["x"]).max()) * 65) for f in found.take(s, 96)} for s in ("fit", "test")}  # type: ignore[arg-type]
    assert loud["fit"] == set(range(1, 65, 2))
    assert loud["test"] == set(range(2, 65, 2))


def test_windows_of_a_model_with_state_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "ramp.wav"
    path.write_bytes(wav(np.arange(1000) / 2000, 1000))
    found = open_samples(heard(state=True), path)
    assert (found.limit("fit"), found.limit("test")) == (9, 9)
    firsts = [float(f["x"][0, 10]) for f in found.take("test", 9, seed=5)]
    np.testing.assert_allclose(firsts, [(500 + 50 * k) / 2000 for k in range(9)], atol=1e-4)
    with pytest.raises(Rejected, match="has only 9"):
        found.take("test", 10)


def test_a_sound_that_is_short_is_filled_up_with_silence(tmp_path: Path) -> None:
    found = open_samples(heard(), sound_files(tmp_path / "s", 1, 60))
    (one,) = found.take("fit", 1)
    assert (np.count_nonzero(one["x"]), one["x"].size) == (30, 110)


def test_sounds_of_another_rate_are_converted(tmp_path: Path) -> None:
    (tmp_path / "s.wav").write_bytes(wav(np.sin(np.arange(48_000) / 960 * 2 * np.pi), 48_000))  # 50 Hz
    (one,) = open_samples(heard(context=0), tmp_path / "s.wav").take("test", 1)
    spectrum = np.abs(np.fft.rfft(one["x"][0]))
    assert spectrum.argmax() == 5  # 50 Hz in a window of 100 ms


def test_what_is_no_sound_says_so(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="holds no sounds"):
        open_samples(heard(), tmp_path)
    (tmp_path / "a.wav").write_bytes(b"none")
    with pytest.raises(Rejected, match=r"a\.wav is not a WAV file"):
        open_samples(heard(), tmp_path)


def test_noise_for_ears_is_one_stream() -> None:
    taken = open_samples(heard(), None).take("fit", 4)
    assert max(np.abs(f["x"]).max() for f in taken) <= 1
    for one, two in pairwise(taken):
        np.testing.assert_array_equal(one["x"][0, 50:], two["x"][0, :60])


# --- noise, and what is no sample


def test_noise_is_weak_and_its_splits_differ() -> None:
    found = open_samples(pictured(), None, seed=3)
    assert found.evidence == "weak"
    one, same = found.take("fit", 2), open_samples(pictured(), None, seed=3).take("fit", 2)
    np.testing.assert_array_equal(one[0]["image"], same[0]["image"])
    assert not np.array_equal(one[0]["image"], found.take("test", 1)[0]["image"])
    assert not np.array_equal(
        one[0]["image"], open_samples(pictured(), None, seed=4).take("fit", 1)[0]["image"]
    )


def test_what_is_no_sample_says_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Rejected, match="holds no pictures"):
        open_samples(pictured(), empty)
    with pytest.raises(Rejected, match="no samples at"):
        open_samples(pictured(), tmp_path / "gone")
    with pytest.raises(Rejected, match="neither a picture nor sound"):
        open_samples(tabular(), empty)
    (empty / "a.png").write_bytes(b"no picture")
    with pytest.raises(Rejected, match=r"a\.png is not a picture"):
        open_samples(pictured(), empty).take("fit", 1)
    (empty / "a.npz").write_bytes(b"no archive")
    with pytest.raises(Rejected, match=r"samples a\.npz are not a readable"):
        open_samples(pictured(), empty / "a.npz")
    port = tabular().inputs[0]
    both = tabular().model_copy(update={"inputs": (port, port.model_copy(update={"name": "z"}))})
    with pytest.raises(Rejected, match="can feed only one"):
        open_samples(both, empty)
