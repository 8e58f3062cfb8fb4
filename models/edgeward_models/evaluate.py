"""How good a model file is: against labels where there are some, and against its float original.

    found = evaluate(EvaluateRequest(Path("int8.onnx"), against=Path("fp32.onnx"), data=Path("pictures")))

Invariants: both files see the same inputs, through the preprocessing that the device runs; both run by
the same plan; an output that is not finite is an error, never a bad score; every figure has an interval
and the number of samples it stands on; one sample is in memory at a time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from edgeward_models import evaluation
from edgeward_models.answers import CLASSIFYING, reading
from edgeward_models.evaluation import Evaluation, Gate, Row, Subject
from edgeward_models.items import Item, LabelledSet, Sample
from edgeward_models.labelled import open_labelled
from edgeward_models.layers import Layers, layer_sqnr
from edgeward_models.mean_ap import need_pycocotools
from edgeward_models.passes import Pass, Runner
from edgeward_models.progress import Progress, silent
from edgeward_models.samples import MAX_COUNT, Feeds, Samples, open_samples
from edgeward_models.similarity import cosine
from edgeward_models.subjects import Asked, open_subjects
from edgeward_models.tallies import tally
from edgeward_runtime import golden, resources
from edgeward_runtime.labels import read_labels
from edgeward_runtime.parity import GATE
from edgeward_runtime.parity import gate as parity_gate
from edgeward_runtime.ports import constants, initial_states
from edgeward_runtime.sessions import CPU, NotLoaded, RunFailed, open_exact, open_session
from edgeward_runtime.tasks.detection import Kind, class_count, kind_of
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision
from edgeward_wire.verdict import Plan

SAMPLES = 300
"""Without labels, unless told otherwise."""
_PARITY_SAMPLES = 4
_LAYER_SAMPLES = 4
_MAX_THREADS = 4


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate, and on what."""

    model: Path
    """An ONNX file, a directory with one and its sidecar, or a bundle."""
    against: Path | None = None
    """The float original; None: the FP32 variant of the sidecar or bundle, if there is one."""
    sidecar: Path | None = None
    """None: the one beside the model, else the one beside `against`."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Has the sidecar's shape and wins over it."""
    variant: str | None = None
    """None: of a bundle the INT8 one for a machine like this, of a sidecar the file itself."""
    data: Path | None = None
    """Labelled: see `labelled`."""
    pictures: Path | None = None
    """Where the pictures of a COCO file are; None: beside it."""
    samples: Path | None = None
    """Unlabelled, for agreement and SQNR; None: the labelled data, else what the sidecar names, or noise."""
    count: int | None = None
    """At most so many samples; None: all labelled ones up to 10 000, else `SAMPLES`."""
    max_drop: float | None = None
    """The gate, 0..1: top-1 or mAP50-95 may be so much below FP32's; without labels, agreement below 1."""
    per_layer: bool | None = None
    """SQNR layer by layer. None: where there is an original, and a note where its layers cannot be found."""
    boxes: Kind | None = None
    """What a detector's output means, where its shape leaves that open."""
    exact: bool = False
    """Run with all optimisation off: the files' own answers, whatever this machine's kernels make of them."""
    threads: int | None = None
    """None: this machine's cores, at most 4."""
    seed: int = 0


def evaluate(request: EvaluateRequest, progress: Progress = silent) -> Evaluation:
    """Evaluate one file.

    Raises:
        Rejected: a file, the data or the request is no good, or there is nothing to hold the model against.
        Unavailable: a file cannot be read.
    """
    began = time.monotonic()
    _check(request)
    with tempfile.TemporaryDirectory(prefix="edgeward-evaluate-") as scratch:
        return _Evaluating(request, Path(scratch), progress, began).run()


def _check(request: EvaluateRequest) -> None:
    if request.count is not None and not 1 <= request.count <= MAX_COUNT:
        raise Rejected(f"{request.count} samples were asked for; 1 to {MAX_COUNT} can be taken.")
    if request.max_drop is not None and not 0 <= request.max_drop <= 1:
        raise Rejected(
            f"A drop of {request.max_drop:g} cannot be a gate.", "Give a share, 0 to 1: 0.01 is 1 %."
        )
    if request.threads is not None and not 1 <= request.threads <= 1024:
        raise Rejected(f"{request.threads} threads were asked for; 1 to 1024 can be used.")


class _Evaluating:
    """One evaluation in the making."""

    def __init__(self, request: EvaluateRequest, scratch: Path, progress: Progress, began: float) -> None:
        self.request, self.progress, self.began = request, progress, began
        opened = open_subjects(
            Asked(
                request.model,
                request.against,
                request.sidecar,
                request.flags,
                request.variant,
                labelled=request.data is not None,
                sampled=request.samples is not None,
            ),
            scratch,
        )
        self.contract, self.model, self.against = opened.contract, opened.model, opened.against
        self.source = request.samples or opened.samples
        if self.against is None and request.data is None:
            raise Rejected(
                f"There is nothing to hold {self.model.title} against.",
                "Give its float original with --against FP32.onnx, labelled data with --data, or both.",
            )
        if self.against is None and (request.max_drop is not None or request.per_layer):
            option = "--max-drop" if request.max_drop is not None else "--per-layer"
            raise Rejected(f"{option} compares with FP32.", "Give the float original: --against FP32.onnx.")
        self.labels = read_labels(opened.labels) if opened.labels is not None else ()
        self.data = self._data()
        self.notes: list[str] = []

    def run(self) -> Evaluation:
        """All of it."""
        mine = self._open(self.model)
        theirs = self._open(self.against) if self.against is not None else None
        parity = None if self.request.exact else self._parity(mine)
        passed: list[Pass] = []
        if self.data is not None:
            one = self._judge(labelled=True)
            self._pass(one, self.data.stream(self.contract), len(self.data.items), mine, theirs)
            passed.append(one)
        samples = None
        if self.against is not None and (self.data is None or self.request.samples is not None):
            samples = self._samples()
            count = self._count(samples)
            stream = _unlabelled(samples.stream("test", count, self.request.seed))
            one = self._judge(labelled=False)
            self._pass(one, stream, count, mine, theirs)
            passed.append(one)
        layers = self._layers()
        self.progress("computing figures", 0, 1)  # thousands of pictures with boxes take a minute
        found = self._found(passed, samples, parity, layers)
        self.progress("computing figures", 1, 1)
        return found

    def _found(
        self, passed: Sequence[Pass], samples: Samples | None, parity: float | None, layers: Layers | None
    ) -> Evaluation:
        rows: list[Row] = []
        first = passed[0].tally if self.data is not None else None
        if first is not None:
            rows += first.rows(self.request.seed)
        if self.against is not None:
            rows += passed[-1].rows(self.request.seed)
            self.notes += passed[-1].notes()
        return Evaluation(
            model=self.model,
            against=self.against,
            task=self.contract.task,
            data=self.data.origin if self.data is not None else "",
            samples=f"{passed[-1].count} from {samples.origin}" if samples is not None else "",
            evidence=samples.evidence if samples is not None and self.data is None else "strong",
            plan=self._plan_title(),
            rows=tuple(rows),
            labels=self.labels,
            classes=first.classes() if first is not None else (),
            confused=first.confused() if first is not None else (),
            class_ap=first.class_ap() if first is not None else {},
            layers=layers,
            parity=parity,
            gate=self._gate(rows),
            notes=tuple(self.notes),
            took_s=time.monotonic() - self.began,
        )

    # --- what goes in

    def _data(self) -> LabelledSet | None:
        if self.request.data is None:
            return None
        if self.contract.task not in CLASSIFYING | {"detection"}:
            raise Rejected(
                "Labelled data is judged for classification, audio-classification, vad and detection, not for"
                f" {self.contract.task}.",
                "Compare with FP32 instead: --against FP32.onnx, and --samples.",
            )
        if self.contract.task == "detection":
            need_pycocotools()
        whole = open_labelled(
            self.request.data, self.contract, self.labels, self._classes(), self.request.pictures
        )
        return whole.choose(min(self.request.count or MAX_COUNT, MAX_COUNT), self.request.seed)

    def _classes(self) -> int | None:
        """How many the model has, where that is known."""
        if self.labels:
            return len(self.labels)
        if self.contract.task == "detection":
            shape = next((p.shape for p in self.contract.results if len(p.shape) == 3), ())
            sizes = [side for side in shape if isinstance(side, int)]
            known = len(sizes) == 3
            return class_count(kind_of(sizes, None, self.request.boxes), sizes) if known else None
        port = self.contract.scores
        last = port.shape[-1] if port is not None and port.shape else None
        return (2 if last == 1 else last) if isinstance(last, int) else None

    def _samples(self) -> Samples:
        source = self.source
        samples = open_samples(self.contract, source, seed=self.request.seed)
        if samples.evidence == "weak":
            self.notes.append(
                "The samples are noise: figures of real inputs may be quite different. Give --samples."
            )
        elif source is not None and self.contract.source.image is not None and source.suffix != ".npz":
            pictures = len(golden.find_pictures(source))
            if pictures < self._count(samples):
                self.notes.append(
                    f"{self._count(samples)} crops of {pictures} pictures depend on one another:"
                    " the intervals are rather too narrow."
                )
        return samples

    def _count(self, samples: Samples) -> int:
        most = samples.limit("test")
        wanted = self.request.count or SAMPLES
        return wanted if most is None else min(wanted, most)

    # --- how it is run

    def _plan(self, precision: Precision) -> Plan:
        threads = self.request.threads or min(resources.cores(), _MAX_THREADS)
        return Plan(
            provider=CPU,
            variant=precision,
            threads=threads,
            optimisation="none" if self.request.exact else "all",
        )

    def _plan_title(self) -> str:
        threads = self._plan("fp32").threads
        how = "all optimisation off" if self.request.exact else "optimised"
        return f"CPU, {threads} thread{'s' * (threads != 1)}, {how}"

    def _open(self, subject: Subject) -> Runner:
        try:
            session = open_session(subject.whole, self._plan(subject.precision))
        except NotLoaded as error:
            raise Rejected(f"{subject.title} does not load: {error.what}") from error
        return Runner(session, self.contract, subject.title)

    def _judge(self, *, labelled: bool) -> Pass:
        how = reading(self.contract, self._classes(), self.request.boxes, labelled=labelled)
        return Pass(self.contract, how, tally(self.contract.task) if labelled else None)

    def _pass(
        self, one: Pass, stream: Iterator[Sample], count: int, mine: Runner, theirs: Runner | None
    ) -> None:
        """Run all samples through both files."""
        mine.begin()
        if theirs is not None:
            theirs.begin()
        for k, sample in enumerate(stream):
            self.progress("evaluating", k, count)
            one.look(sample, mine.run(sample), theirs.run(sample) if theirs is not None else None)
        self.progress("evaluating", count, count)

    def _parity(self, mine: Runner) -> float:
        """The smallest cosine of this plan's outputs with the file's own exact ones, on a few samples."""
        exact = Runner(open_exact(self.model.whole), self.contract, self.model.title)
        worst = 1.0
        mine.begin()
        for sample in self._few(_PARITY_SAMPLES):
            outputs, expected = mine.run(sample), exact.run(sample)
            worst = min(worst, *(cosine(outputs[name], expected[name]) for name in expected))
        exact.close()
        least = parity_gate(GATE, self.model.precision, CPU)
        if worst < least:
            self.notes.append(
                f"This machine's kernels change the answers: cosine {worst:.3f} with the file's own exact"
                f" outputs, where {least} is asked of a device. --exact measures the file itself."
            )
        return worst

    def _few(self, count: int) -> list[Sample]:
        """The first samples, as arrays of their own."""
        if self.data is not None:
            stream = self.data.stream(self.contract)
        else:
            samples = open_samples(self.contract, self.source, seed=self.request.seed)
            stream = _unlabelled(samples.stream("test", min(count, self._count(samples)), self.request.seed))
        return [
            Sample(s.item, {name: value.copy() for name, value in s.feeds.items()}, s.size)
            for s in islice(stream, count)
        ]

    def _layers(self) -> Layers | None:
        if self.against is None or self.request.per_layer is False:
            return None
        fixed = {**constants(self.contract), **initial_states(self.contract)}
        feeds = [{**fixed, **sample.feeds} for sample in self._few(_LAYER_SAMPLES)]
        try:
            return layer_sqnr(self.against.whole, self.model.whole, feeds, self.progress)
        except (Rejected, RunFailed) as error:
            if self.request.per_layer:
                raise
            self.notes.append(f"Layers were not compared: {error.what}")
            return None

    # --- the gate

    def _gate(self, rows: Sequence[Row]) -> Gate | None:
        allowed = self.request.max_drop
        if allowed is None:
            return None
        by_name = {row.name: row for row in rows}
        for name in ("top1", "map50_95"):
            row = by_name.get(name)
            if row is not None and row.drop is not None:
                return Gate(row.title, allowed, row.drop)
        if "agreement" not in by_name:
            raise Rejected(
                "The gate cannot be decided: neither model finds anything on these samples.",
                "Give samples with objects on them.",
            )
        row = by_name["agreement"]
        return Gate(row.title, allowed, evaluation.flipped(row.model))


def _unlabelled(feeds: Iterator[Feeds]) -> Iterator[Sample]:
    for k, feed in enumerate(feeds):
        yield Sample(Item(f"sample {k}"), feed, None)
