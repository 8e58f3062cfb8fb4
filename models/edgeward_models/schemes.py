"""Ways to quantise, and the targets that they are for. Pure: nothing is read or measured here.

A scheme is data: two equal schemes give the same bytes of the same file and ranges. A target lists the
schemes worth trying, the base first; whether one of them pays is for a measurement to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgeward_wire.manifest import TargetHints

Method = Literal["static", "dynamic", "fp16"]
Calibration = Literal["minmax", "percentile", "entropy"]
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")


@dataclass(frozen=True)
class Scheme:
    """How a prepared float file becomes a smaller one."""

    method: Method
    activations: Literal["u8", "s8"] = "u8"
    weights: Literal["s8", "s7", "pair"] = "pair"
    """s8: 8 bits. s7: 7 bits (ONNX Runtime's reduce_range). pair: 8 bits, the scale of each channel as fine
    as it can be without two neighbours that an x86 kernel adds in 16 bits saturating (pairsafe.py); dynamic
    schemes have s7 instead."""
    calibration: Calibration = "minmax"
    per_channel: bool = True
    symmetric_activations: bool = False
    """Zero point 0 (TensorRT)."""
    outputs: bool = True
    """Whether what a product gives has codes as well, as an integer kernel of the CPU provider writes them.
    Without (TensorRT), only what enters a product or the shortcut of a residual addition has codes."""
    keep_float: tuple[str, ...] = ()
    """Names of the nodes that stay in float."""
    operators: tuple[str, ...] = ()
    """Operators to quantise; empty: what suits the graph (regions.operators_for)."""

    @property
    def title(self) -> str:
        """One line for people: `u8 x pair, minmax, 6 layers float`."""
        if self.method == "fp16":
            parts = ["fp16"]
        elif self.method == "dynamic":
            parts = [f"dynamic x {'s8' if self.weights == 's8' else 's7'}"]
        else:
            parts = [f"{self.activations} x {self.weights}", self.calibration]
        if self.symmetric_activations:
            parts.append("symmetric")
        if not self.outputs:
            parts.append("float outputs")
        if not self.per_channel and self.method != "fp16":
            parts.append("per tensor")
        if self.operators:
            parts.append("+".join(self.operators))
        if self.keep_float:
            count = len(self.keep_float)
            parts.append(f"{count} layer{'s' if count > 1 else ''} float")
        return ", ".join(parts)

    def key(self) -> dict[str, Any]:
        """All of it as JSON knows it, for a Workspace's key."""
        plain = asdict(self)
        return {**plain, "keep_float": sorted(self.keep_float), "operators": sorted(self.operators)}

    def keeping(self, *names: str) -> Scheme:
        """The same with these nodes in float, instead of those that were."""
        return replace(self, keep_float=tuple(names))


@dataclass(frozen=True)
class Target:
    """What a variant is made for."""

    name: str
    arch: str
    """As `platform.machine()` prints it; empty: any."""
    provider: str
    """ONNX Runtime's name of the provider that must be there to measure it."""
    hints: TargetHints
    schemes: tuple[Scheme, ...]
    """Worth trying, the base first."""
    integer: frozenset[str]
    """Operators that run on integers here."""

    def measurable(self, machine: str, providers: Sequence[str]) -> bool:
        """Whether this machine (platform.machine()) with these providers can tell how fast it is."""
        return (not self.arch or machine == self.arch) and self.provider in providers


# What moves, selects or describes data costs no precision and runs on 8 bits wherever it stands.
_NEUTRAL = frozenset(
    [
        "Cast",
        "CastLike",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DepthToSpace",
        "DequantizeLinear",
        "Dropout",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Range",
        "Reshape",
        "Resize",
        "Shape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
        "Upsample",
    ]
)
# The CPU provider's integer kernels (QLinear*), and what ONNX Runtime folds into them.
_CPU = frozenset(
    [
        "Conv",
        "MatMul",
        "Gemm",
        "Add",
        "Mul",
        "Relu",
        "Clip",
        "Sigmoid",
        "LeakyRelu",
        "GlobalAveragePool",
        "AveragePool",
        "MaxPool",
        "Softmax",
        "ArgMax",
        "Where",
        "BatchNormalization",
    ]
)
# Layers of TensorRT that take INT8 inputs when precision stands in the graph; all else runs in FP16 or FP32.
_TENSORRT = frozenset(
    [
        "Conv",
        "ConvTranspose",
        "MatMul",
        "Gemm",
        "Add",
        "Sub",
        "Mul",
        "Max",
        "Min",
        "Relu",
        "Clip",
        "Sigmoid",
        "Tanh",
        "LeakyRelu",
        "Elu",
        "HardSigmoid",
        "GlobalAveragePool",
        "AveragePool",
        "MaxPool",
        "BatchNormalization",
    ]
)

_STATIC = Scheme("static")
_TENSORRT_INT8 = Scheme("static", activations="s8", weights="s8", symmetric_activations=True, outputs=False)
_HALF = Scheme("fp16")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "x86-64",
            "x86_64",
            "CPUExecutionProvider",
            TargetHints(arch=("x86_64",), providers=("CPU", "OpenVINO")),
            (
                _STATIC,
                replace(_STATIC, weights="s8"),
                replace(_STATIC, weights="s7"),
                Scheme("dynamic", weights="s7"),
            ),
            _CPU,
        ),
        Target(
            "arm64",
            "aarch64",
            "CPUExecutionProvider",
            TargetHints(arch=("aarch64",), providers=("CPU",)),
            (
                Scheme("static", activations="s8", weights="s8"),
                Scheme("dynamic", weights="s8"),
            ),
            _CPU,
        ),
        Target(
            "tensorrt",
            "",
            "TensorrtExecutionProvider",
            TargetHints(providers=("Tensorrt",)),
            (_TENSORRT_INT8, _HALF),
            _TENSORRT,
        ),
        Target(
            "cuda",
            "",
            "CUDAExecutionProvider",
            TargetHints(providers=("CUDA",)),
            (_HALF,),
            frozenset(),  # its INT8 operators fall to the CPU
        ),
    )
}


def unsupported(target: Target, operators: Mapping[str, int]) -> list[str]:
    """Those of a graph's operators (name -> count) that the target does not run on INT8, by name.

    They stay in float, with a conversion on each side: many of them say why INT8 does not pay.
    """
    return sorted(
        name for name, count in operators.items() if count and name not in target.integer | _NEUTRAL
    )
