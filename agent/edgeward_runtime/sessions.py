"""The only importer of onnxruntime: one session for one plan, and what it says about itself.

Invariants: providers are always named; a session that silently fell back to another provider is
`WrongProvider`, never a session; worker threads never spin between runs, and within them only where the
plan says so; a file goes in by its path (its bytes would be kept); every fault of the runtime becomes one
short line. A session belongs to the thread that opened it: open, warm, run and close it there (CUDA graphs
are bound to theirs).
"""

from __future__ import annotations

import json
import mmap
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state  # pyright: ignore[reportAttributeAccessIssue]

from edgeward_runtime.plans import ARENA, SPINNING
from edgeward_wire.contract import DType
from edgeward_wire.errors import EdgewardError, Rejected
from edgeward_wire.verdict import Plan

if TYPE_CHECKING:
    import numpy as np

CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_SILENT = 4
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
# ONNX Runtime's exceptions share no base but Exception; which of them exist depends on its version.
_FAULTS: tuple[type[Exception], ...] = (
    MemoryError,
    RuntimeError,
    ValueError,
    *(kind for kind in vars(_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)
_MAX_REASON = 300


class NotLoaded(Rejected):
    """The file does not load under this plan: a verdict on the plan, with the reason on one line."""


class WrongProvider(NotLoaded):
    """A session loaded, but not on the provider that was asked for."""


class RunFailed(EdgewardError):
    """One run failed."""


@dataclass(frozen=True)
class Port:
    """One input or output of the graph; a dimension is a number, a name, or None."""

    name: str
    dtype: DType
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Placement:
    """How many of the graph's nodes the plan's provider runs."""

    on_provider: int
    total: int


class Session:
    """One loaded model. Use it from the thread that opened it."""

    def __init__(self, session: Any, plan: Plan, device: str = "") -> None:
        """`device`: where inputs are kept between runs; empty: nowhere."""
        self.plan = plan
        self.inputs = tuple(_port(p) for p in session.get_inputs())
        self.outputs = tuple(_port(p) for p in session.get_outputs())
        self._session: Any = session
        self._names = [p.name for p in self.outputs]
        self._bound = _Bound(session, self._names, device, plan) if device else None

    @property
    def metadata(self) -> dict[str, str]:
        """The file's `metadata_props`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """All outputs in the graph's order. Raises RunFailed."""
        try:
            if self._bound is not None:
                return self._bound.run(feeds)
            outputs: list[np.ndarray[Any, Any]] = self._session.run(self._names, feeds)
        except _FAULTS as error:
            raise RunFailed(f"A run failed: {reason_of(error)}") from None
        return outputs

    def placement(self) -> Placement | None:
        """Where the nodes are, if the session was opened with `placement` and the runtime can say so."""
        ask = getattr(self._session, "get_provider_graph_assignment_info", None)
        if ask is None:
            return None
        try:
            parts = [(part.ep_name, len(part.get_nodes())) for part in ask()]
        except _FAULTS:
            return None  # the session was opened without recording
        mine = sum(n for provider, n in parts if provider == self.plan.provider)
        return Placement(mine, sum(n for _, n in parts))

    def close(self) -> None:
        """Free the model now."""
        self._session = self._bound = None


class _Bound:
    """Runs with inputs that stay where the model is: each is copied over into memory that is kept.

    Never run on a GPU in our hands; what runs on the CPU is the same code with another device.
    """

    def __init__(self, session: Any, outputs: list[str], device: str, plan: Plan) -> None:
        self._session = session
        self._binding: Any = session.io_binding()
        self._device, self._number = device, int(plan.options.get("device_id", "0"))
        self._inputs: dict[str, tuple[tuple[int, ...], str, Any]] = {}
        self._outputs = outputs

    def run(self, feeds: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """Arrays of the caller's own. Raises as ONNX Runtime does."""
        for name, array in feeds.items():
            self._feed(name, array)
        for name in self._outputs:  # each time: what is bound is replaced by what a run gave
            self._binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(self._binding)
        outputs: list[np.ndarray[Any, Any]] = [value.numpy() for value in self._binding.get_outputs()]
        return outputs

    def _feed(self, name: str, array: np.ndarray[Any, Any]) -> None:
        array = array if array.flags.c_contiguous else array.copy()
        shape, dtype, value = self._inputs.get(name, ((), "", None))
        if value is not None and (shape, dtype) == (array.shape, array.dtype.str):
            value.update_inplace(array)
            return
        value = ort.OrtValue.ortvalue_from_numpy(array.copy(), self._device, self._number)
        self._binding.bind_ortvalue_input(name, value)
        self._inputs[name] = (array.shape, array.dtype.str, value)


def version() -> str:
    """ONNX Runtime's version."""
    return str(ort.__version__)


def available_providers() -> tuple[str, ...]:
    """What this build was compiled with; that one of them works is for a probe to prove."""
    return tuple(ort.get_available_providers())


def tensorrt_major() -> int | None:
    """The TensorRT that this build of ONNX Runtime links; None when it links none, or does not say which."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found:
            linked = re.search(rb"\0libnvinfer\.so\.(\d{1,3})\0", found)
            return int(linked[1]) if linked else None
    except (OSError, ValueError):
        return None


def open_session(path: Path, plan: Plan, *, placement: bool = False, bound: bool = False) -> Session:
    """Load a file as the plan says; `placement` also records where the nodes go.

    On CUDA inputs are kept on the device; `bound` runs the same way on the CPU, to test and to measure it.

    Raises:
        WrongProvider: it loaded on another provider.
        NotLoaded: it did not load.
    """
    session = _open(path, plan, placement=placement)
    actual = session.get_providers()
    if not actual or actual[0] != plan.provider:
        came_up = _short(actual[0]) if actual else "none"
        raise WrongProvider(f"{_short(plan.provider)} was asked for, and the session came up on {came_up}.")
    try:
        return Session(session, plan, "cuda" if plan.provider == _CUDA else "cpu" if bound else "")
    except KeyError as error:
        raise NotLoaded(f"A port has the type {error.args[0]}, which is not supported.") from None


def open_exact(path: Path) -> Session:
    """The file as it is: on the CPU, one thread, with all optimisation off."""
    return open_session(path, Plan(provider=CPU, variant="exact", threads=1, optimisation="none"))


def save_optimised(path: Path, plan: Plan, out: Path) -> None:
    """Write the graph that ONNX Runtime makes of a file under the plan (its `optimisation`), to look at it.

    Above `basic` the result holds operators of ONNX Runtime's own, and at `all` it is laid out for the
    processor that it was made on. Raises NotLoaded.
    """
    _open(path, plan, placement=False, saved=str(out))


def _open(path: Path, plan: Plan, *, placement: bool, profile: str = "", saved: str = "") -> Any:
    if plan.provider not in ort.get_available_providers():
        raise NotLoaded(f"{_short(plan.provider)} is not in this build of ONNX Runtime.")
    ort.set_default_logger_severity(_SILENT)
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = plan.threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[plan.optimisation])
    options.add_session_config_entry(SPINNING, plan.session.get(SPINNING, "0"))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # with the run
    if placement:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if saved:
        options.optimized_model_filepath = saved
    for key, value in plan.session.items():
        if key == ARENA:
            options.enable_cpu_mem_arena = value != "0"
        elif key != SPINNING:
            options.add_session_config_entry(key, value)
    providers: list[Any] = [(plan.provider, dict(plan.options))]
    if plan.provider == _TENSORRT and _CUDA in ort.get_available_providers():
        device = plan.options.get("device_id", "0")
        providers.append((_CUDA, {"device_id": device}))  # what TensorRT leaves should stay on the GPU
    if plan.provider != CPU:
        providers.append(CPU)  # for the nodes that the provider leaves; placement counts them
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except _FAULTS as error:
        raise NotLoaded(reason_of(error)) from None


def profiled_placement(path: Path, plan: Plan, feeds: Mapping[str, np.ndarray[Any, Any]]) -> Placement | None:
    """The same for ONNX Runtime before 1.24: from the profile of one run. Raises NotLoaded, RunFailed."""
    with tempfile.TemporaryDirectory(prefix="edgeward-profile-") as scratch:
        session = _open(path, plan, placement=False, profile=str(Path(scratch) / "run"))
        try:
            session.run(None, feeds)
        except _FAULTS as error:
            raise RunFailed(f"A run failed: {reason_of(error)}") from None
        events = json.loads(Path(session.end_profiling()).read_bytes())
    nodes = {e["name"]: e["args"]["provider"] for e in events if "provider" in e.get("args", {})}
    return Placement(sum(p == plan.provider for p in nodes.values()), len(nodes)) if nodes else None


def _port(port: Any) -> Port:
    shape = tuple(d if isinstance(d, int) and d >= 0 else (d or None) for d in port.shape)
    return Port(
        port.name, _DTYPES[port.type], tuple(None if isinstance(d, int) and d < 0 else d for d in shape)
    )


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


_NOISE = (
    re.compile(r"\[ONNXRuntimeError\]\s*:\s*\d+\s*:\s*[A-Z_]+\s*:\s*"),
    re.compile(r"Load model from .*? failed:"),
    re.compile(r"(?:Non-zero status code returned while running )"),
    re.compile(
        r"\S*/onnxruntime\S*?:\d+\s+(?:[^()]|\([^()]*\))*?\([^()]*(?:\([^()]*\)[^()]*)*\)\s*(?:const)?\s*"
    ),
)


_OPSET = re.compile(r"Opset (\d+) is under development.*till opset (\d+)", re.DOTALL)


def reason_of(error: BaseException) -> str:
    """A fault of ONNX Runtime on one line, without its source positions and codes."""
    text = str(error)
    opset = _OPSET.search(text)
    if opset:
        mine, most = opset.groups()
        return f"It uses operator set {mine}; ONNX Runtime {version()} reads up to {most}."
    for noise in _NOISE:
        text = noise.sub("", text)
    text = " ".join(text.split()).strip(" :") or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1].rstrip() + "…"
