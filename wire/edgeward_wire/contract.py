"""What a model takes and gives: the contract between a file and the pipeline that feeds it.

Each input is bound to the `source`, to a carried `state:NAME`, or to a `const`; each output is the
`result` or the next value of a `state:NAME`. A device never guesses: what the contract does not
declare does not happen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from edgeward_wire.document import Signed
from edgeward_wire.identifiers import Key

Task = Literal["classification", "detection", "segmentation", "audio-classification", "vad", "tensor"]
DType = Literal["float32", "float16", "uint8", "int8", "int32", "int64", "bool"]
Binding = Annotated[str, StringConstraints(pattern=r"^(source|const|result|state:[a-z0-9_]{1,32})$")]
Dimension = Annotated[int, Field(ge=0, le=1 << 24)] | Annotated[str, StringConstraints(max_length=64)]
Triple = tuple[float, ...]

MAX_PORTS = 32


class DimensionRange(Signed):
    """What a named dimension may be; `default` is what the device runs with."""

    min: int = Field(default=1, ge=1, le=1 << 24)
    max: int = Field(default=1, ge=1, le=1 << 24)
    default: int = Field(default=1, ge=1, le=1 << 24)

    @model_validator(mode="after")
    def _ordered(self) -> DimensionRange:
        if not self.min <= self.default <= self.max:
            raise ValueError(f"needs min <= default <= max, not {self.min}, {self.default}, {self.max}")
        return self


class ImageSpec(Signed):
    """How a picture becomes the input: resize, crop, colour, then y = x * scale + bias, x in 0..255."""

    colour: Literal["rgb", "bgr", "gray"] = "rgb"
    width: int = Field(ge=1, le=8192)
    height: int = Field(ge=1, le=8192)
    resize: Literal["stretch", "shorter_side", "letterbox"] = "stretch"
    resize_to: int | None = Field(default=None, ge=1, le=8192)
    """Length of the shorter side after `shorter_side`; the crop then cuts width x height."""
    interpolation: Literal["nearest", "linear", "cubic", "area"] = "linear"
    crop: Literal["none", "center"] = "none"
    pad: int = Field(default=114, ge=0, le=255)
    scale: Triple = (1 / 255, 1 / 255, 1 / 255)
    bias: Triple = (0.0, 0.0, 0.0)
    layout: Literal["nchw", "nhwc"] = "nchw"

    @property
    def channels(self) -> int:
        """1 for gray, else 3."""
        return 1 if self.colour == "gray" else 3

    @model_validator(mode="after")
    def _consistent(self) -> ImageSpec:
        for name in ("scale", "bias"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} needs {self.channels} numbers, one a channel")
        if any(s == 0 for s in self.scale):
            raise ValueError("scale must not be 0: the picture would vanish")
        if self.resize == "shorter_side":
            if self.crop != "center":
                raise ValueError("resize = shorter_side needs crop = center")
            if (self.resize_to or 0) < max(self.width, self.height):
                raise ValueError("resize_to must not be smaller than the crop")
        elif self.resize_to is not None:
            raise ValueError("resize_to belongs to resize = shorter_side")
        return self


class AudioSpec(Signed):
    """How sound becomes the input. Lengths in samples, `rate` in Hz."""

    rate: int = Field(ge=1000, le=384_000)
    window: int = Field(ge=1, le=1 << 22)
    hop: int = Field(ge=1, le=1 << 22)
    context: int = Field(default=0, ge=0, le=1 << 20)


class InputPort(Signed):
    """One input of the graph."""

    name: Key
    dtype: DType
    shape: tuple[Dimension, ...] = Field(max_length=8)
    bind: Binding
    image: ImageSpec | None = None
    audio: AudioSpec | None = None
    const: tuple[float, ...] | None = Field(default=None, max_length=4096)

    @model_validator(mode="after")
    def _bound(self) -> InputPort:
        if self.bind == "result":
            raise ValueError("an input cannot be bound to result")
        if (self.bind == "const") != (self.const is not None):
            raise ValueError("const needs values, and only const has them")
        if self.image is not None and self.audio is not None:
            raise ValueError("an input is a picture or sound, not both")
        return self


class OutputPort(Signed):
    """One output of the graph. `activation` turns the raw result into scores."""

    name: Key
    dtype: DType
    shape: tuple[Dimension, ...] = Field(max_length=8)
    bind: Binding = "result"
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    boxes: Literal["yolov8", "yolov5", "end-to-end"] | None = None
    """How a detector writes its boxes. Only where the shape and the labels leave it open: an agent that does
    not know this field refuses the manifest, where otherwise it waits for an agent that knows the task."""

    @model_validator(mode="after")
    def _bound(self) -> OutputPort:
        if self.bind in ("source", "const"):
            raise ValueError(f"an output cannot be bound to {self.bind}")
        return self


class Contract(Signed):
    """All inputs and outputs of the graph, and the ranges of its named dimensions."""

    task: Task
    inputs: tuple[InputPort, ...] = Field(min_length=1, max_length=MAX_PORTS)
    outputs: tuple[OutputPort, ...] = Field(min_length=1, max_length=MAX_PORTS)
    dimensions: dict[Key, DimensionRange] = Field(default_factory=dict, max_length=MAX_PORTS)

    @model_validator(mode="after")
    def _whole(self) -> Contract:
        names = [p.name for p in self.inputs] + [p.name for p in self.outputs]
        if len(set(names)) != len(names):
            raise ValueError("two ports have the same name")
        read = {p.bind for p in self.inputs if p.bind.startswith("state:")}
        written = {p.bind for p in self.outputs if p.bind.startswith("state:")}
        if read != written:
            raise ValueError(f"states must be both read and written: {sorted(read ^ written)}")
        if not any(p.bind == "source" for p in self.inputs):
            raise ValueError("no input is bound to the source")
        for port in self.inputs:
            for dimension in port.shape:
                if isinstance(dimension, str) and dimension not in self.dimensions:
                    raise ValueError(f"dimension {dimension!r} of {port.name} has no range")
        return self

    @property
    def source(self) -> InputPort:
        """The first input that a source feeds."""
        return next(p for p in self.inputs if p.bind == "source")

    @property
    def results(self) -> tuple[OutputPort, ...]:
        """The outputs that a task reads."""
        return tuple(p for p in self.outputs if p.bind == "result")

    @property
    def scores(self) -> OutputPort | None:
        """The result that a classification reads: the first of floats, else the first."""
        results = self.results
        return next((p for p in results if p.dtype.startswith("float")), results[0] if results else None)

    @property
    def stateful(self) -> bool:
        """Whether state is carried from run to run."""
        return any(p.bind.startswith("state:") for p in self.inputs)
