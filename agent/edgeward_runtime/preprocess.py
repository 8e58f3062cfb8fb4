"""A frame becomes the model's input: resize, crop or pad, colour, then y = x * scale + bias.

Every buffer is made once for a size of frame and used again: the tensor that a call returns is
overwritten by the next one. Held against a plain float computation of the same contract: mean
difference at most 0.5 / 255 of the range, largest 4 / 255 (tests/runtime/test_preprocess.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime import images
from edgeward_runtime.images import F32, U8
from edgeward_wire.contract import Contract, ImageSpec, InputPort
from edgeward_wire.errors import Rejected

Tensor = npt.NDArray[Any]
MAX_RESIZED_PIXELS = 1 << 26
_DTYPES = {"float32": np.float32, "float16": np.float16, "uint8": np.uint8}


@dataclass(frozen=True)
class Geometry:
    """Where a frame goes: resized to (width, height); then cut at, or laid at, (left, top)."""

    width: int
    height: int
    left: int = 0
    top: int = 0


def geometry(spec: ImageSpec, width: int, height: int) -> Geometry:
    """How a frame of width x height is resized, and the corner of its crop or of its place in the pad."""
    if spec.resize == "shorter_side":
        ratio = (spec.resize_to or 0) / min(width, height)
        w, h = max(round(width * ratio), spec.width), max(round(height * ratio), spec.height)
        return Geometry(w, h, (w - spec.width) // 2, (h - spec.height) // 2)
    if spec.resize == "letterbox":
        ratio = min(spec.width / width, spec.height / height)
        w, h = (
            max(1, min(round(side * ratio), most))
            for side, most in ((width, spec.width), (height, spec.height))
        )
        return Geometry(w, h, (spec.width - w) // 2, (spec.height - h) // 2)
    return Geometry(spec.width, spec.height)


def _window(top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
    return slice(top, top + height), slice(left, left + width)


class Preprocess:
    """One input's preparation. Not for several threads: it owns its buffers."""

    def __init__(self, port: InputPort) -> None:
        """Raises Rejected when the input is not a picture of a type that we fill."""
        if port.image is None or port.dtype not in _DTYPES:
            raise Rejected(f"Input {port.name} is not a picture of float32, float16 or uint8.")
        spec = self.spec = port.image
        self.name = port.name
        size = (spec.height, spec.width)
        planes = spec.channels
        shape = (1, planes, *size) if spec.layout == "nchw" else (1, *size, planes)
        self._float: F32 = np.empty(shape, np.float32)
        self._tensor: Tensor = self._float
        if port.dtype != "float32":
            self._tensor = np.empty(shape, _DTYPES[port.dtype])
        self._scale = [np.float32(s) for s in spec.scale]
        self._bias = [np.float32(b) for b in spec.bias]
        steps = np.arange(256, dtype=np.float32)
        columns = [steps * s + b for s, b in zip(self._scale, self._bias, strict=True)]
        self._table: F32 = np.ascontiguousarray(np.stack(columns, axis=-1)[None])
        self._frame_shape: tuple[int, ...] = ()

    def __call__(self, frame: U8) -> Tensor:
        """(height, width, 3) uint8 BGR -> the tensor, valid until the next call."""
        if frame.shape != self._frame_shape:
            self._fit(frame.shape)
        picture = frame
        if self._resized.shape[:2] != frame.shape[:2]:
            height, width = self._resized.shape[:2]
            picture = images.resize(frame, width, height, self.spec.interpolation, self._resized)
        self._fill(picture[self._cut])
        if self._tensor is not self._float:
            # uint8 takes the nearest whole number; float16 rounds by itself.
            source = np.rint(self._float, out=self._float) if self._tensor.dtype == np.uint8 else self._float
            np.copyto(self._tensor, source, casting="unsafe")
        return self._tensor

    def _fit(self, shape: tuple[int, ...]) -> None:
        """Lay out the buffers for frames of this shape; what is padding is written here, once."""
        if len(shape) != 3 or shape[2] != 3 or not min(shape):
            raise Rejected(f"A frame has the shape {shape}, not (height, width, 3).")
        spec = self.spec
        place = geometry(spec, shape[1], shape[0])
        if place.width * place.height > MAX_RESIZED_PIXELS:
            raise Rejected(f"A frame of {shape[1]} x {shape[0]} is too narrow to be resized for this model.")
        planar = spec.layout == "nchw" and spec.colour != "gray"
        picked = images.whole_odd_ratio(shape, place.width, place.height, spec.interpolation)
        depth = 4 if planar and picked else 3  # bytes a pixel: see `images.resize`
        self._resized: U8 = np.empty((place.height, place.width, depth), np.uint8)
        whole = (slice(None), slice(None))
        if spec.resize == "letterbox":
            self._cut, window = whole, _window(place.top, place.left, place.height, place.width)
        else:
            self._cut, window = _window(place.top, place.left, spec.height, spec.width), whole
        pixels = self._float[0] if spec.layout == "nhwc" else self._float[0].transpose(1, 2, 0)
        pixels[...] = self._table[0, spec.pad]
        self._pixels: F32 = pixels[window]
        size = self._pixels.shape[:2]
        self._planes: list[U8] = [np.empty(size, np.uint8) for _ in range(depth if planar else spec.channels)]
        self._colour: U8 = np.empty((*size, 3), np.uint8)
        self._frame_shape = shape

    def _fill(self, picture: U8) -> None:
        """Colour and scale of a picture that has its final size, into its place in the tensor."""
        colour = self.spec.colour
        if self.spec.layout == "nhwc" and colour != "gray":
            picture = images.to_rgb(picture, self._colour) if colour == "rgb" else picture
            images.look_up(picture, self._table, self._pixels)
            return
        if colour == "gray":
            images.to_gray(picture, self._planes[0])
        else:
            images.split(picture, self._planes)
        # The order of the colours is the order of the planes.
        planes = self._planes[: self.spec.channels]
        for k, plane in enumerate(planes[::-1] if colour == "rgb" else planes):
            out = self._pixels[..., k]
            images.scale(plane, float(self._scale[k]), out)
            if self._bias[k]:
                np.add(out, self._bias[k], out=out)


def image_input(contract: Contract) -> InputPort:
    """The one picture that this contract takes. Raises Rejected when it takes something else."""
    sources = [port for port in contract.inputs if port.bind == "source"]
    if len(sources) != 1 or sources[0].image is None:
        raise Rejected(
            f"The model does not take exactly one picture (task {contract.task}).",
            "This release runs models of one picture.",
        )
    return sources[0]
