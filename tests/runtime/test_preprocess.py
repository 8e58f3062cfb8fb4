"""Preprocessing against a plain float computation of the same contract."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_runtime import images
from edgeward_runtime.preprocess import Preprocess, geometry
from edgeward_wire.contract import ImageSpec, InputPort
from edgeward_wire.errors import Rejected

METHODS = {
    "nearest": cv2.INTER_NEAREST,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}


def port(dtype: str = "float32", **spec: object) -> InputPort:
    return InputPort(
        name="x", dtype=dtype, shape=(1, 3, 2, 2), bind="source", image=ImageSpec.model_validate(spec)
    )


def picture(width: int, height: int) -> np.ndarray:
    """Something with edges, gradients and grain."""
    generator = np.random.default_rng(width * 10_000 + height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    smooth = np.stack([128 + 100 * np.sin(x / 17), 255 * y / height, 255 * x / width], axis=-1)
    smooth[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    return np.clip(smooth + generator.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def plainly(frame: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """The contract in floats, one step after the other, in the order in which it is written."""
    f = frame.astype(np.float32)
    method = METHODS[spec.interpolation]
    height, width = f.shape[:2]
    if spec.resize == "stretch":
        f = cv2.resize(f, (spec.width, spec.height), interpolation=method)
    elif spec.resize == "shorter_side":
        ratio = spec.resize_to / min(width, height)
        f = cv2.resize(f, (round(width * ratio), round(height * ratio)), interpolation=method)
        top, left = (f.shape[0] - spec.height) // 2, (f.shape[1] - spec.width) // 2
        f = f[top : top + spec.height, left : left + spec.width]
    else:
        ratio = min(spec.width / width, spec.height / height)
        w, h = round(width * ratio), round(height * ratio)
        padded = np.full((spec.height, spec.width, 3), spec.pad, np.float32)
        top, left = (spec.height - h) // 2, (spec.width - w) // 2
        padded[top : top + h, left : left + w] = cv2.resize(f, (w, h), interpolation=method)
        f = padded
    f = np.clip(f, 0, 255)  # a picture has no colour outside: cubic overshoots
    if spec.colour == "gray":
        f = (0.114 * f[..., 0] + 0.587 * f[..., 1] + 0.299 * f[..., 2])[..., None]
    elif spec.colour == "rgb":
        f = f[..., ::-1]
    f = f * np.asarray(spec.scale) + np.asarray(spec.bias)
    return f.transpose(2, 0, 1)[None] if spec.layout == "nchw" else f[None]


NORMALISED = {"scale": (1 / 58.4, 1 / 57.1, 1 / 57.4), "bias": (-2.1, -2.0, -1.8)}
SPECS = [
    {"width": 224, "height": 224},
    {"width": 96, "height": 64, "colour": "bgr", "interpolation": "area"},
    {"width": 100, "height": 80, "interpolation": "nearest", "layout": "nhwc"},
    {"width": 64, "height": 64, "colour": "gray", "scale": (1 / 255,), "bias": (0.1,)},
    {"width": 64, "height": 48, "colour": "gray", "scale": (1 / 128,), "bias": (-1.0,), "layout": "nhwc"},
    {"width": 224, "height": 224, "resize": "shorter_side", "resize_to": 256, "crop": "center",
     "interpolation": "cubic", **NORMALISED},
    {"width": 200, "height": 224, "resize": "shorter_side", "resize_to": 224, "crop": "center",
     "layout": "nhwc", "colour": "bgr", **NORMALISED},
    {"width": 320, "height": 320, "resize": "letterbox"},
    {"width": 160, "height": 320, "resize": "letterbox", "pad": 0, "interpolation": "area", "layout": "nhwc"},
]  # fmt: skip


@pytest.mark.parametrize("size", [(640, 480), (333, 517), (1280, 720), (64, 64), (960, 480)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(str(v) for v in s.values())[:60])
def test_it_agrees_with_a_plain_float_computation(spec: dict, size: tuple[int, int]) -> None:
    contract = port(**spec)
    assert contract.image is not None
    frame = picture(*size)
    mine = Preprocess(contract)(frame)
    expected = plainly(frame, contract.image)
    assert mine.shape == expected.shape
    assert mine.dtype == np.float32
    channels = (1, -1, 1, 1) if contract.image.layout == "nchw" else (1, 1, 1, -1)
    steps = np.abs(mine - expected) / np.abs(np.asarray(contract.image.scale)).reshape(channels)
    assert steps.mean() <= 0.5
    assert steps.max() <= 4


@pytest.mark.parametrize("ratio", [3, 5, 7])
@given(width=st.integers(1, 96), height=st.integers(1, 96))
def test_a_whole_odd_ratio_is_linear_to_the_bit(ratio: int, width: int, height: int) -> None:
    frame = np.random.default_rng(width).integers(0, 256, (ratio * height, ratio * width, 3), np.uint8)
    mine = images.resize(frame, width, height, "linear", np.empty((height, width, 3), np.uint8))
    exact = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(mine, exact)
    four = images.resize(frame, width, height, "linear", np.empty((height, width, 4), np.uint8))
    np.testing.assert_array_equal(four[..., :3], exact)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("colour", ["rgb", "bgr", "gray"])
def test_a_frame_that_is_part_of_a_larger_one(layout: str, colour: str) -> None:
    """A source that crops hands on a view with gaps between its rows; a mirror image runs backwards."""
    spec: dict[str, Any] = {"width": 64, "height": 64, "resize": "letterbox", "layout": layout}
    spec |= {"colour": colour, **({"scale": [1.0], "bias": [0.0]} if colour == "gray" else {})}
    whole = picture(256, 160)
    part = whole[5 : 5 + 3 * 36, 7 : 7 + 3 * 64]
    assert not part.flags.c_contiguous
    before = whole.copy()
    mine = Preprocess(port(**spec))(part)
    np.testing.assert_array_equal(mine, Preprocess(port(**spec))(part.copy()))
    mirrored = part[:, ::-1]
    np.testing.assert_array_equal(
        Preprocess(port(**spec))(mirrored), Preprocess(port(**spec))(mirrored.copy())
    )
    np.testing.assert_array_equal(whole, before)


@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 40),
    width=st.integers(1, 70),
    factor=st.floats(-3, 3, width=32, allow_subnormal=False),
    brightest=st.integers(0, 255),
)
def test_a_plane_is_scaled_and_left_alone(
    seed: int, height: int, width: int, factor: float, brightest: int
) -> None:
    plane = np.random.default_rng(seed).integers(0, brightest + 1, (height, width), np.uint8)
    before, wide = plane.copy(), np.full((height, width + 3), 7.0, np.float32)
    images.scale(plane, factor, wide[:, 1:-2])
    np.testing.assert_allclose(wide[:, 1:-2], before * np.float32(factor), rtol=1e-6)
    np.testing.assert_array_equal(plane, before)
    assert (wide[:, [0, -2, -1]] == 7).all(), "what lies beside it is not touched"


def test_frames_of_changing_size_do_not_disturb_each_other() -> None:
    spec = {"width": 96, "height": 96, "resize": "letterbox", "pad": 7}
    used = Preprocess(port(**spec))
    for size in [(320, 240), (240, 320), (320, 240), (96, 96)]:
        frame = picture(*size)
        np.testing.assert_array_equal(used(frame), Preprocess(port(**spec))(frame))


def test_the_frame_is_left_alone_and_the_tensor_is_used_again() -> None:
    prepare = Preprocess(port(width=64, height=64))
    frame = picture(64, 64)
    before = frame.copy()
    first = prepare(frame)
    np.testing.assert_array_equal(frame, before)
    assert prepare(picture(80, 60)) is first


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_other_types_of_tensor(dtype: str) -> None:
    frame = picture(120, 90)
    as_float = Preprocess(port(width=32, height=32, scale=(1, 1, 1)))(frame)
    as_other = Preprocess(port(dtype, width=32, height=32, scale=(1, 1, 1)))(frame)
    assert as_other.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(as_other.astype(np.float32), as_float)


def test_what_is_not_a_picture_is_rejected() -> None:
    with pytest.raises(Rejected, match="not a picture"):
        Preprocess(InputPort(name="x", dtype="float32", shape=(1,), bind="source"))
    with pytest.raises(Rejected, match="not a picture"):
        Preprocess(port("int64", width=8, height=8))
    with pytest.raises(Rejected, match="shape"):
        Preprocess(port(width=8, height=8))(np.zeros((4, 4), np.uint8))
    cropped = port(width=224, height=224, resize="shorter_side", resize_to=256, crop="center")
    with pytest.raises(Rejected, match="too narrow"):
        Preprocess(cropped)(np.zeros((1, 16384, 3), np.uint8))


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    wide=st.integers(1, 1024),
    high=st.integers(1, 1024),
    more=st.integers(0, 512),
)
def test_geometry_stays_inside(width: int, height: int, wide: int, high: int, more: int) -> None:
    box = ImageSpec(width=wide, height=high, resize="letterbox")
    place = geometry(box, width, height)
    assert 1 <= place.width <= wide
    assert 1 <= place.height <= high
    assert 0 <= place.left <= wide - place.width
    assert 0 <= place.top <= high - place.height
    to = max(wide, high) + more
    crop = ImageSpec(width=wide, height=high, resize="shorter_side", resize_to=to, crop="center")
    cut = geometry(crop, width, height)
    assert cut.left >= 0
    assert cut.left + wide <= cut.width
    assert cut.top >= 0
    assert cut.top + high <= cut.height
