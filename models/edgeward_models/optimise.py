"""Graph optimisation at a chosen level, saved to look at, with what it changed and whether it paid.

    report = optimise(OptimiseRequest(Path("model.onnx"), Path("optimised.onnx")))

- `basic`: ONNX's own operators only (constants folded, BatchNormalization and pads taken in, identities
  removed). Any runtime and any processor of the fleet can load it: the one to deploy.
- `extended`: fused operators of com.microsoft as well, which only ONNX Runtime knows; for transformers the
  Python rules of onnxruntime.transformers come first.
- `all`: laid out for the processor that it was made on as well. To look at, not to deploy.

Invariants: a device's session fuses at load whatever its runtime can, so a file that is optimised here is
rarely faster there than one that is not: the report says so by numbers, both files raced under the same
plan. Both files' outputs are compared with all further optimisation off. The same input gives the same bytes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from edgeward_models import machine
from edgeward_models.feeding import Fed, feed
from edgeward_models.fusions import (
    Fusion,
    Patterns,
    constant_nodes,
    foreign,
    fusions,
    operators,
    patterns,
)
from edgeward_models.graph import all_graphs, load_graph, skeleton, weights_of
from edgeward_models.inspect import Inspection, inspect_model
from edgeward_models.liveness import Peak, peak_activations
from edgeward_models.made_names import set_apart
from edgeward_models.optimiser import fuse_transformer
from edgeward_models.progress import Progress, silent
from edgeward_models.race import Contender, Timing, race
from edgeward_models.similarity import cosine
from edgeward_models.whole_file import check_place, write_whole
from edgeward_runtime.sessions import CPU, NotLoaded, RunFailed, open_exact, save_optimised
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

Level = Literal["basic", "extended", "all"]
Kind = Literal["auto", "transformer", "cnn"]

LEVELS: tuple[Level, ...] = ("basic", "extended", "all")
KINDS: tuple[Kind, ...] = ("auto", "transformer", "cnn")
STEPS = ("reading the file", "optimising", "comparing outputs", "timing both")
UNOPTIMISED, BEFORE, AFTER = "before, as written", "before", "after"
_VECTORS = 4
_FLOAT_GATE, _INT8_GATE = 0.99999, 0.99


@dataclass(frozen=True)
class OptimiseRequest:
    """What to optimise. `samples` None: the sidecar's, else noise."""

    model: Path
    out: Path
    level: Level = "basic"
    kind: Kind = "auto"
    sidecar: Path | None = None
    samples: Path | None = None
    seconds: float = 2.0
    """How long the two files race; 0 leaves it out."""
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One of the two files."""

    bytes: int
    parameters: int
    nodes: int
    operators: dict[str, int]
    constant_nodes: int
    peak: Peak


@dataclass(frozen=True)
class Difference:
    """One output of both files on the same inputs."""

    output: str
    worst: float
    """The largest difference of any element; infinite when the optimised file's is not finite."""
    where: tuple[int, ...]
    largest: float
    """The largest element of the original output: what `worst` is to be held against."""
    cosine: float
    """The smallest of all inputs."""


@dataclass(frozen=True)
class OptimiseReport:
    """What was done, and what came of it."""

    model: Path
    out: Path
    level: Level
    kind: Literal["transformer", "cnn"]
    before: Side
    after: Side
    fusions: tuple[Fusion, ...]
    at_load: tuple[Fusion, ...]
    """What ONNX Runtime still fuses by itself when it loads the optimised file."""
    could: Patterns
    """What the original graph holds that can be fused."""
    foreign: tuple[str, ...]
    """Operators of the optimised file that are not ONNX's."""
    differences: tuple[Difference, ...]
    gate: float
    timings: tuple[Timing, ...]
    """Before, after, and before as written; empty when there was no race."""
    threads: int
    inputs: str
    machine: machine.Machine
    notes: tuple[str, ...]
    fault: str = ""
    """Why the optimised file does not load as a device loads it."""

    @property
    def right(self) -> bool:
        """Whether it can be used at all."""
        return self.same and not self.fault

    @property
    def folded(self) -> int:
        """Nodes with constant results that are gone."""
        return max(0, self.before.constant_nodes - self.after.constant_nodes)

    @property
    def same(self) -> bool:
        """Whether both files give the same outputs, within the gate."""
        return all(d.cosine >= self.gate and math.isfinite(d.worst) for d in self.differences)

    @property
    def timed(self) -> dict[str, Timing]:
        """The timings by name."""
        return {timing.name: timing for timing in self.timings}


def optimise(request: OptimiseRequest, progress: Progress = silent) -> OptimiseReport:
    """Optimise, save, compare and race.

    Raises:
        Rejected: the file is no good, or does not load at this level.
        Unavailable: a file cannot be read or written.
    """

    def step(k: int) -> None:
        progress(STEPS[k] if k < len(STEPS) else "optimised", k, len(STEPS))

    step(0)
    with tempfile.TemporaryDirectory(prefix="edgeward-optimise-") as directory:
        scratch = Path(directory)
        inspection = inspect_model(request.model, request.sidecar, scratch=scratch)
        check_place(request.out, request.model)
        fed = feed(inspection, request.samples, count=_VECTORS, seed=request.seed)
        before = load_graph(inspection.whole)
        step(1)
        made = _Maker(request, inspection.whole, before, fed, scratch).make()
        after = load_graph(made.file)
        write_whole(request.out, made.file.read_bytes())
        at_load, fault = _fused_at_load(made.file, after, scratch)
        step(2)
        differences = compare(inspection.whole, made.file, fed)
        step(3)
        timings = _race(inspection.whole, made.file, fed, request) if request.seconds > 0 else ()
        step(4)
        return OptimiseReport(
            model=request.model,
            out=request.out,
            level=request.level,
            kind=made.kind,
            before=_side(inspection.facts.bytes, before, fed),
            after=_side(made.file.stat().st_size, after, fed),
            fusions=tuple(fusions(before, after)),
            at_load=tuple(at_load),
            could=patterns(before),
            foreign=foreign(after),
            differences=differences,
            gate=_gate(inspection),
            timings=tuple(timings),
            threads=request.threads,
            inputs=fed.origin,
            machine=machine.facts(),
            notes=made.notes + _cautions(after, before, request),
            fault=fault,
        )


def compare(before: Path, after: Path, fed: Fed) -> tuple[Difference, ...]:
    """Each output of two files on the same inputs, all optimisation off.

    Raises:
        Rejected: a file does not load or run, or they have other outputs.
    """
    theirs, mine = _outputs(before, fed), _outputs(after, fed)
    if set(theirs) != set(mine):
        raise Rejected(f"The optimised file has other outputs: {', '.join(sorted(set(theirs) ^ set(mine)))}.")
    return tuple(_difference(name, theirs[name], mine[name]) for name in theirs)


def _outputs(path: Path, fed: Fed) -> dict[str, list[np.ndarray[Any, Any]]]:
    try:
        session = open_exact(path)
        try:
            runs = [session.run(feeds) for feeds in fed.feeds]
            return {port.name: [run[k] for run in runs] for k, port in enumerate(session.outputs)}
        finally:
            session.close()
    except RunFailed as error:
        raise Rejected(f"{path.name} loads, but does not run. {error.what}") from error


def _difference(
    name: str, theirs: Sequence[np.ndarray[Any, Any]], mine: Sequence[np.ndarray[Any, Any]]
) -> Difference:
    worst, largest, least = 0.0, 0.0, 1.0
    at: tuple[int, ...] = ()
    for a, b in zip(theirs, mine, strict=True):
        if a.shape != b.shape:
            raise Rejected(f"Output {name} has the shape {b.shape} after optimisation, {a.shape} before.")
        if not a.size:
            continue
        with np.errstate(invalid="ignore"):  # infinities on both sides
            gap = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        gap = np.where(np.isfinite(gap) | (a == b), np.nan_to_num(gap), math.inf)
        largest = max(largest, float(np.nan_to_num(np.abs(np.asarray(a, np.float64))).max()))
        least = min(least, cosine(b, a))
        k = np.unravel_index(int(gap.argmax()), gap.shape)
        if float(gap[k]) > worst:
            worst, at = float(gap[k]), tuple(int(i) for i in k)
    return Difference(name, worst, at, largest, least)


def _gate(inspection: Inspection) -> float:
    return _INT8_GATE if inspection.facts.precision == "int8" else _FLOAT_GATE


@dataclass(frozen=True)
class _Made:
    file: Path
    kind: Literal["transformer", "cnn"]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Maker:
    """The way from one file to the other."""

    request: OptimiseRequest
    whole: Path
    before: onnx.ModelProto
    fed: Fed
    scratch: Path

    def make(self) -> _Made:
        """The optimised file in scratch, tidy."""
        kind: Literal["transformer", "cnn"] = (
            self.request.kind
            if self.request.kind != "auto"
            else ("transformer" if patterns(self.before).transformer else "cnn")
        )
        source = self.whole
        notes: tuple[str, ...] = ()
        if kind == "transformer" and self.request.level != "basic":
            source, notes = self._fused()
        out = self.scratch / "optimised.onnx"
        try:
            save_optimised(source, _plan(self.request.level, self.request.threads), out)
        except NotLoaded as error:
            raise Rejected(
                f"{self.request.model.name} does not load at level {self.request.level}: {error.what}",
                "Try --level basic, or export it again.",
            ) from error
        _tidy(out, self.before)
        return _Made(out, kind, notes)

    def _fused(self) -> tuple[Path, tuple[str, ...]]:
        """The file with its transformer blocks fused, if that can be done and changes nothing."""
        made = fuse_transformer(self.before)
        if isinstance(made, str):
            return self.whole, (f"The transformer rules did not apply ({made}): the runtime's own did.",)
        fused = self.scratch / "fused.onnx"
        fused.write_bytes(made.SerializeToString(deterministic=True))
        try:
            worst = min(d.cosine for d in compare(self.whole, fused, self.fed))
        except Rejected as error:
            return self.whole, (f"What the transformer rules made was dropped: {error.what}",)
        if worst < _FLOAT_GATE:
            why = f"its outputs differ (cosine {worst:.5f})"
            return self.whole, (f"What the transformer rules made was dropped: {why}.",)
        return fused, ()


def _tidy(path: Path, before: onnx.ModelProto) -> None:
    """Only the operator sets that are used, the original's metadata, and bytes that do not vary."""
    model = onnx.load(str(path))
    used = {node.domain for graph in all_graphs(model.graph) for node in graph.node}
    used |= {node.domain for function in model.functions for node in function.node}
    kept = [entry for entry in model.opset_import if entry.domain in used or entry.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    if not model.metadata_props:
        model.metadata_props.extend(before.metadata_props)
    set_apart(model, before)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _fused_at_load(path: Path, after: onnx.ModelProto, scratch: Path) -> tuple[list[Fusion], str]:
    """What a device's session fuses when it loads the file; or why it does not load."""
    loaded = scratch / "loaded.onnx"
    try:
        save_optimised(path, _plan("all", 1), loaded)
    except NotLoaded as error:
        return [], error.what
    return fusions(after, load_graph(loaded)), ""


def _side(size: int, model: onnx.ModelProto, fed: Fed) -> Side:
    counted = operators(model)
    return Side(
        bytes=size,
        parameters=sum(math.prod(tensor.dims) for tensor in weights_of(model.graph)),
        nodes=sum(counted.values()),
        operators=counted,
        constant_nodes=constant_nodes(model),
        peak=peak_activations(skeleton(model, fed.sizes)),
    )


def _plan(level: str, threads: int) -> Plan:
    return Plan.model_validate(
        {"provider": CPU, "variant": "file", "threads": threads, "optimisation": level}
    )


def _race(before: Path, after: Path, fed: Fed, request: OptimiseRequest) -> list[Timing]:
    """Both files under the plan that a device would take; beside them the original, nothing optimised."""
    full, off = _plan("all", request.threads), _plan("none", request.threads)
    contenders = [
        Contender(BEFORE, before, full),
        Contender(AFTER, after, full),
        Contender(UNOPTIMISED, before, off),
    ]
    return race(contenders, fed.feeds, goal_s=request.seconds)


def _cautions(after: onnx.ModelProto, before: onnx.ModelProto, request: OptimiseRequest) -> tuple[str, ...]:
    own = foreign(after)
    if any(name.startswith("com.microsoft.nchwc") for name in own):
        return (
            "This file is laid out for the processor that it was made on: look at it, do not deploy it."
            " Devices optimise for themselves; level basic is the one for them.",
        )
    if set(own) - set(foreign(before)):
        some = ", ".join(own[:4]) + (", …" if len(own) > 4 else "")
        return (
            f"This file holds operators of ONNX Runtime's own ({some}): TensorRT and other runtimes cannot"
            " read them, and the quantiser may not know them. Level basic is the one to deploy.",
        )
    if request.level == "all":
        return ("What level all makes depends on the processor; basic is the one to deploy.",)
    return ()


def plain(report: OptimiseReport) -> dict[str, Any]:
    """Everything, for `--json`."""
    table = asdict(report)
    table |= {
        "schema": "edgeward.optimise/1",
        "model": str(report.model),
        "out": str(report.out),
        "machine": report.machine.plain(),
        "folded": report.folded,
        "same": report.same,
        "right": report.right,
    }
    table["differences"] = [
        asdict(d) | {"worst": d.worst if math.isfinite(d.worst) else None} for d in report.differences
    ]
    return table
