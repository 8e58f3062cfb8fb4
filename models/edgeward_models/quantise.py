"""From a float ONNX file to the INT8 file that pays on a target: prepare, search, measure, decide, write.

    report = quantise_model(QuantiseRequest(Path("model.onnx"), samples=Path("pictures")), Path("out"))

Invariants: what is offered was measured faster than FP32 on its target, gives its own exact outputs under
the plan that runs here, and passed the gate on samples that neither calibrated nor searched; the model
itself is never written to. All work lies in OUT/.work under keys of everything that it depends on: a run that
was killed goes on where it was; a second run redoes nothing, and spends its budget on searching further.
"""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from edgeward_models import machine
from edgeward_models.answers import AGREEMENT_SCORE, CLASSIFYING, Detections
from edgeward_models.calibration import Ranges, calibrate, source_ranges
from edgeward_models.graph import Facts
from edgeward_models.hunt import search_targets
from edgeward_models.inspect import Inspection, inspect_model
from edgeward_models.prepare import prepare
from edgeward_models.progress import Progress, silent
from edgeward_models.quantise_files import check_place, write_report
from edgeward_models.quantise_report import QuantiseReport
from edgeward_models.quantiser import quantisable
from edgeward_models.samples import Feeds, Samples, open_samples
from edgeward_models.schemes import TARGETS, Calibration, Target
from edgeward_models.search import TOP1, Gate
from edgeward_models.study import Study
from edgeward_models.trials import Bench, Effort, drive, effort, set_bench
from edgeward_models.workspace import Workspace, file_digest
from edgeward_runtime import sessions
from edgeward_runtime.labels import read_labels
from edgeward_runtime.sessions import CPU, NotLoaded, RunFailed, open_session
from edgeward_runtime.tasks.detection import Settings
from edgeward_wire import __version__
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan

AGREEMENT = 0.90
"""The default gate of a classification: the share of samples with FP32's first answer."""
SQNR_DB = 15.0
"""The default gate of everything else."""
MAX_BUDGET_S = 24 * 3600.0
_MARGIN_DB = 0.3
_PROBES = 6
FIT_SEED, CALIBRATION_SEED = 2, 1


@dataclass(frozen=True)
class QuantiseRequest:
    """What to quantise, for what, and how long to search."""

    model: Path
    sidecar: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Has the sidecar's shape and wins over it."""
    samples: Path | None = None
    """Pictures, WAV files or an .npz; None: what the sidecar names, else noise."""
    targets: tuple[str, ...] = ()
    """Names of `TARGETS`, the first that something is found for is the main one; empty: this machine's."""
    budget_s: float = 600.0
    max_drop: float | None = None
    """How much of the top-1 agreement with FP32 may be lost, 0..1: a gate at what is left."""
    min_agreement: float | None = None
    """A gate: the share of samples with FP32's first answer, 0..1."""
    min_sqnr_db: float | None = None
    """A gate: SQNR in dB. One or both of these replace the default gate."""
    threads: int = 1
    seed: int = 0
    keep_float: tuple[str, ...] = ()
    """Nodes that stay in float whatever the search finds."""


def quantise_model(request: QuantiseRequest, out: Path, progress: Progress = silent) -> QuantiseReport:
    """Search, and write OUT/NAME.onnx with its sidecar and reports; returns what was found.

    Where nothing passes, no model is written: see `QuantiseReport.exit_code` and `.conclusion`.

    Raises:
        Rejected: the model, the samples or the request is no good; says what to do.
        Unavailable: a file cannot be read or written.
    """
    began = time.monotonic()
    targets = _targets(request)
    work = Workspace(out / ".work")
    with work.alone(), tempfile.TemporaryDirectory(prefix="edgeward-quantise-") as scratch:
        source = open_source(request, work, Path(scratch), progress)
        inspection, known, samples = source.inspection, source.inspection.guess, source.samples
        _check_place(inspection.facts, out / f"{known.name}.onnx")
        check_place(known.name, [target.name for target in targets], out)
        study = make_study(source, began)
        report = QuantiseReport(
            name=known.name,
            model=inspection.facts,
            sha256=file_digest(inspection.whole),
            origin=samples.origin,
            evidence=samples.evidence,
            effort=study.effort,
            machine=machine.facts(),
            threads=request.threads,
            targets=tuple(search_targets(study, targets)),
            took_s=time.monotonic() - began,
        )
        write_report(report, inspection, request.samples or known.samples, out)
    return report


# --- what is asked for


def _targets(request: QuantiseRequest) -> list[Target]:
    """The targets by name. Raises Rejected."""
    if not 0 < request.budget_s <= MAX_BUDGET_S:
        raise Rejected(f"A budget of {request.budget_s:g} s cannot be kept.", "Give 1s to 24h.")
    if request.max_drop is not None and not 0 <= request.max_drop < 1:
        raise Rejected(
            f"A drop of {request.max_drop:g} is no share.", "Give 0 to 0.99, e.g. --max-drop 0.01."
        )
    if request.max_drop is not None and request.min_agreement is not None:
        raise Rejected("--max-drop and --min-agreement say the same in two ways.", "Give one of them.")
    if request.min_agreement is not None and not 0 < request.min_agreement <= 1:
        raise Rejected(f"An agreement of {request.min_agreement:g} is no share.", "Give 0.01 to 1.")
    if request.min_sqnr_db is not None and not -100 < request.min_sqnr_db < 200:
        raise Rejected(f"An SQNR of {request.min_sqnr_db:g} dB is no gate.", "15 is usual, 30 is careful.")
    names = request.targets or (_own_target(),)
    for name in names:
        if name not in TARGETS:
            raise Rejected(f"There is no target {name!r}.", f"There are: {', '.join(TARGETS)}.")
    return [TARGETS[name] for name in dict.fromkeys(names)]


def _own_target() -> str:
    """The target that this machine's processor is."""
    arch = platform.machine()
    for name, target in TARGETS.items():
        if target.arch == arch:
            return name
    raise Rejected(f"No target is of this machine's kind ({arch}).", f"Name one: {', '.join(TARGETS)}.")


def _check_model(facts: Facts) -> None:
    if facts.precision == "int8":
        raise Rejected(
            f"{facts.path.name} is INT8 already: {facts.int8_share * 100:.0f} % of its multiplications.",
            "Give the float file that it was made of.",
        )
    if facts.precision == "fp16":
        raise Rejected(f"{facts.path.name} is FP16.", "Give the FP32 file that it was made of.")
    if not facts.macs:
        raise Rejected(
            f"{facts.path.name} has no convolutions or matrix products: there is nothing to quantise.",
            'Deploy it as it is, with float = "reason" in its sidecar.',
        )


def _check_place(facts: Facts, offer: Path) -> None:
    if offer.exists() and offer.samefile(facts.path):
        raise Rejected(f"{offer} is the model itself, and would be written over.", "Give another --out.")


def gate_of(
    request: QuantiseRequest,
    contract: Contract,
    metadata: Mapping[str, str],
    boxes: Detections | None = None,
) -> tuple[Gate, str]:
    """The gate, and why it is that one; `boxes` is how a detector's are read. Raises Rejected."""
    # Where nobody speaks most of the time, two models agree whatever they are worth: noise tells more.
    several = contract.task in CLASSIFYING and contract.task != "vad"
    agreement = request.min_agreement if request.max_drop is None else 1 - request.max_drop
    if agreement is not None and contract.task not in CLASSIFYING and boxes is None:
        raise Rejected(
            f"A model for {contract.task!r} gives no first answers that could agree.",
            f"Give --min-sqnr; the default is {SQNR_DB:g} dB. `agent-ctl model evaluate` gates on labels.",
        )
    if agreement is not None or request.min_sqnr_db is not None:
        return Gate(agreement, request.min_sqnr_db, boxes.title if boxes else TOP1), "as asked for"
    if several and random_weights(metadata):
        return Gate(sqnr_db=SQNR_DB), "the default where weights are random: noise decides the first answers"
    if several:
        return Gate(agreement=AGREEMENT), "the default of classifications"
    return Gate(sqnr_db=SQNR_DB, answers=boxes.title if boxes else TOP1), f"the default for {contract.task}"


def random_weights(metadata: Mapping[str, str]) -> bool:
    """Whether the file says that it was never trained."""
    return any("random weights" in value.lower() for value in metadata.values())


def boxes_of(inspection: Inspection) -> Detections | None:
    """How a detector's output is read; None where that is not known, or where its answers mean nothing."""
    known = inspection.guess
    if known.contract.task != "detection" or random_weights(inspection.facts.metadata):
        return None
    classes = len(read_labels(known.labels)) if known.labels is not None else None
    try:
        found = Detections(known.contract, classes, None, Settings(AGREEMENT_SCORE))
        sides = [port.shape for port in known.contract.results if len(port.shape) == 3]
        found.kind([side if isinstance(side, int) else 1 for side in sides[0]])
    except Rejected:
        return None
    return found


def aim_of(must: Gate, fit: int) -> Gate:
    """What the search aims for with `fit` samples: a little more than what must be reached.

    The best of many candidates looks better on the samples that chose it than on any others: by about one
    standard error of an agreement.
    """
    agreement, sqnr_db = must.agreement, must.sqnr_db
    if agreement is not None:
        agreement = min(1.0, agreement + math.sqrt(agreement * (1 - agreement) / max(1, fit)))
    return replace(must, agreement=agreement, sqnr_db=None if sqnr_db is None else sqnr_db + _MARGIN_DB)


# --- what all candidates are held against


def open_source(request: QuantiseRequest, work: Workspace, scratch: Path, progress: Progress) -> Source:
    """Read the model and look at the samples. Raises Rejected, Unavailable."""
    progress("reading", 0, 1)
    inspection = inspect_model(request.model, request.sidecar, request.flags, scratch=scratch)
    _check_model(inspection.facts)
    known = inspection.guess.complete(without=("labels", "samples") if request.samples else ("labels",))
    samples = open_samples(known.contract, request.samples or known.samples, seed=request.seed)
    progress("reading", 1, 1)
    key = _key(request, inspection, samples)
    plan = Plan(provider=CPU, variant="fp32", threads=request.threads)
    return Source(request, inspection, samples, work, progress, key, plan)


@dataclass(frozen=True)
class Source:
    """The float model with its samples, before anything is known of them."""

    request: QuantiseRequest
    inspection: Inspection
    samples: Samples
    work: Workspace
    progress: Progress
    key: Mapping[str, Any]
    plan: Plan

    @property
    def contract(self) -> Contract:
        return self.inspection.guess.contract

    def full_feeds(self, samples: Iterable[Feeds]) -> Iterator[Feeds]:
        """Each sample with constants, and the states as the float model leaves them. Raises Rejected."""
        file = self.inspection.whole
        try:
            session = open_session(file, self.plan)
            try:
                for feeds, _ in drive(session, self.contract, samples):
                    yield feeds
            finally:
                session.close()
        except NotLoaded as error:
            raise Rejected(f"{file.name} does not load: {error.what}") from error
        except RunFailed as error:
            raise Rejected(f"{file.name} does not run on the samples. {error.what}") from error

    def effort(self, feeds: Sequence[Feeds]) -> Effort:
        """How many samples each step takes. Kept, so that a second run takes the same ones."""
        budget, samples = self.request.budget_s, self.samples

        def measure() -> dict[str, int]:
            session = open_session(self.inspection.whole, self.plan)
            outputs = session.run(feeds[0])
            took = []
            for k in range(_PROBES):
                begun = time.perf_counter()
                session.run(feeds[k % len(feeds)])
                took.append(time.perf_counter() - begun)
            session.close()
            size = sum(value.nbytes for value in (*feeds[0].values(), *outputs))
            return asdict(
                effort(statistics.median(took), budget, samples.limit("fit"), samples.limit("test"), size)
            )

        key = {**self.key, "budget_s": budget, "threads": self.request.threads}
        return Effort(**self.work.json("effort", key, measure))

    def ranges(self, prepared: Path, method: Calibration, count: int) -> Ranges:
        """What the activations take on, by one method of calibration."""

        def make() -> dict[str, list[float]]:
            stream = self.samples.stream("fit", count, CALIBRATION_SEED)
            return calibrate(
                prepared,
                self.full_feeds(stream),
                method,
                progress=self.progress,
                known=source_ranges(self.contract),
                total=count,
            ).plain()

        return Ranges(
            self.work.json(f"ranges-{method}", {**self.key, "method": method, "count": count}, make)
        )


def make_study(source: Source, began: float) -> Study:
    """Prepare the model, and run FP32 over the samples that the search uses."""
    request, work, progress = source.request, source.work, source.progress
    contract, whole = source.contract, source.inspection.whole
    few = list(source.full_feeds(source.samples.stream("fit", min(4, source.samples.limit("fit") or 4))))
    progress("preparing", 0, 1)
    prepared = work.file("prepared.onnx", source.key, lambda out: _prepare(whole, out, few))
    names = tuple(quantisable(prepared))
    _check_names(request.keep_float, names)
    progress("preparing", 1, 1)
    planned = source.effort(few)
    boxes = boxes_of(source.inspection)

    @cache
    def bench() -> Bench:
        progress("FP32 on the samples", 0, 1)
        fit = source.samples.take("fit", planned.fit, FIT_SEED)
        made = set_bench(whole, contract, source.plan, fit, planned.exact, boxes=boxes)
        progress("FP32 on the samples", 1, 1)
        return made

    must, why = gate_of(request, contract, source.inspection.facts.metadata, boxes)
    return Study(
        whole=whole,
        prepared=prepared,
        operators=source.inspection.facts.operators,
        names=names,
        contract=contract,
        samples=source.samples,
        effort=planned,
        bench=bench,
        boxes=boxes,
        feeds=few,
        full_feeds=lambda count: list(source.full_feeds(bench().samples[:count])),
        ranges=lambda method: source.ranges(prepared, method, planned.calibrate),
        keep_float=tuple(name for name in names if name in request.keep_float),
        aim=aim_of(must, planned.fit),
        must=must,
        why=why,
        float_plan=source.plan,
        work=work,
        key=source.key,
        budget_s=request.budget_s,
        deadline=began + request.budget_s,
        progress=progress,
    )


def _key(request: QuantiseRequest, inspection: Inspection, samples: Samples) -> dict[str, Any]:
    """What every result depends on."""
    return {
        "model": file_digest(inspection.whole),
        "contract": inspection.guess.contract.model_dump(mode="json"),
        "samples": samples.digest,
        "seed": request.seed,
        "ort": sessions.version(),
        "edgeward": __version__,
    }


def _prepare(whole: Path, out: Path, feeds: Sequence[Feeds]) -> None:
    prepare(whole, out, feeds)


def _check_names(wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            close = [other for other in names if name.lower() in other.lower()][:5] or list(names[:5])
            raise Rejected(
                f"No node that could be quantised is called {name!r}.",
                f"There are, for example: {', '.join(close)}.",
            )
