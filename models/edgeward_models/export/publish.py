"""The common end of every export: clean, verify, and only then put the file in its place.

Invariants: whatever goes wrong, what lay at `out` before still lies there; nothing else is left behind;
the file that is moved is, byte for byte, the file that was verified.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeward_models.bundle import MAX_LABELS_BYTES
from edgeward_models.export.document import finish
from edgeward_models.export.report import Attempt, ExportOptions, ExportReport, NotExported
from edgeward_models.export.verify import Trial, Verification, verify
from edgeward_models.graph import Facts
from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected, Unavailable


@dataclass(frozen=True)
class Candidate:
    """One way to write the file; `make` raises NotExported and returns notes."""

    exporter: str
    make: Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class Subject:
    """A model with all that is known of it, ready to be written."""

    source: str
    candidates: Iterable[Candidate]
    """In the order in which they are tried, until the file of one verifies."""
    trials: Sequence[Trial]
    evidence: str
    classifier: bool = False
    labels: tuple[str, ...] | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    """For the file's metadata, but for the labels."""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Made:
    file: Path
    facts: Facts
    attempt: Attempt
    verification: Verification
    notes: tuple[str, ...]


def publish(subject: Subject, out: Path, options: ExportOptions, progress: Progress = silent) -> ExportReport:
    """Try the candidates in turn. A report with `out` None: files were written, but none was right.

    Raises:
        Rejected: no exporter can write the model; says why and what to do.
        Unavailable: the disk.
    """
    check_out(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
            return _publish(subject, out, options, Path(scratch), progress)
    except OSError as error:
        raise Unavailable(
            f"{out} cannot be written: {error.strerror or error}.",
            "Is the disk full, or the place read-only?",
        ) from error


def check_out(out: Path) -> None:
    """Raises Rejected for what cannot be the file's name."""
    if out.suffix != ".onnx" or out.is_dir():
        raise Rejected(f"{out} cannot be the name of the file.", "Name a file that ends in .onnx.")


def _publish(
    subject: Subject, out: Path, options: ExportOptions, scratch: Path, progress: Progress
) -> ExportReport:
    labels_name = f"{out.stem}-labels.txt" if subject.labels else ""
    declared = dict(subject.declared) | ({"labels": labels_name} if labels_name else {})
    failures: list[tuple[Attempt, NotExported]] = []
    tried: list[_Made] = []
    attempts: list[Attempt] = []
    for k, candidate in enumerate(subject.candidates):
        progress(f"exporting ({candidate.exporter})", 0, 1)
        try:
            made = _make(
                subject, candidate, declared, options=options, scratch=scratch / str(k), progress=progress
            )
        except NotExported as error:
            attempts.append(Attempt(candidate.exporter, "failed", error.what))
            failures.append((attempts[-1], error))
            continue
        attempts.append(made.attempt)
        tried.append(made)
        if made.verification.passed:
            break
    if not tried:
        raise _none_of(failures)
    best = min(tried, key=_distance)
    labels = None
    if best.verification.passed:
        labels = _write_labels(subject.labels, scratch, out.parent / labels_name)
        os.replace(best.file, out)
    return ExportReport(
        source=subject.source,
        out=out if best.verification.passed else None,
        exporter=best.attempt.exporter,
        attempts=tuple(attempts),
        verification=best.verification,
        facts=replace(best.facts, path=out),
        labels=labels,
        notes=(*subject.notes, *best.notes),
        versions=subject.versions,
    )


def _make(
    subject: Subject,
    candidate: Candidate,
    declared: Mapping[str, Any],
    *,
    options: ExportOptions,
    scratch: Path,
    progress: Progress,
) -> _Made:
    """One candidate's file, verified or not. Raises NotExported."""
    scratch.mkdir()
    raw, file = scratch / "raw.onnx", scratch / "model.onnx"
    notes = tuple(candidate.make(raw))
    provenance = {"exporter": candidate.exporter, "source": subject.source, **subject.versions}
    observed = [
        (trial.batch, {name: array.shape for name, array in step.expected.items()})
        for trial in subject.trials
        for step in trial.steps
    ]
    facts = finish(raw, file, declared, provenance, observed)
    verification = verify(
        file,
        subject.trials,
        options.tolerance,
        evidence=subject.evidence,
        classifier=subject.classifier,
        progress=progress,
    )
    passed = verification.passed
    attempt = Attempt(candidate.exporter, "verified" if passed else "differs", verification.failure)
    return _Made(file, facts, attempt, verification, notes)


def _distance(made: _Made) -> tuple[bool, float]:
    """How far a file is from being right: what could be compared comes before what could not."""
    checked = made.verification
    return not checked.passed, checked.worst.excess if checked.worst and not checked.faults else math.inf


def _none_of(failures: Sequence[tuple[Attempt, NotExported]]) -> Rejected:
    if len(failures) == 1:
        attempt, error = failures[0]
        named = "" if attempt.exporter in error.what else f"The {attempt.exporter} exporter cannot do it: "
        return Rejected(f"{named}{error.what}", error.next_step)
    reasons = " ".join(f"{attempt.exporter}: {attempt.reason}" for attempt, _ in failures)
    step = next((error.next_step for _, error in failures if error.next_step), "")
    return Rejected(f"No exporter can do it. {reasons}", step)


# --- labels


def read_labels(labels: Path | tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The classes' names, one a line. Raises Rejected, Unavailable."""
    if labels is None or isinstance(labels, tuple):
        return labels
    try:
        with labels.open("rb") as stream:
            raw = stream.read(MAX_LABELS_BYTES + 1)
    except FileNotFoundError:
        raise Rejected(f"There is no file {labels}.", "Name a text file with one label a line.") from None
    except OSError as error:
        raise Unavailable(f"{labels} cannot be read: {error.strerror}.", "Check the path.") from error
    if len(raw) > MAX_LABELS_BYTES:
        raise Rejected(f"The labels {labels} are longer than {MAX_LABELS_BYTES >> 20} MB.")
    try:
        lines = raw.decode("utf-8-sig").rstrip("\r\n").splitlines()
    except UnicodeDecodeError:
        raise Rejected(
            f"The labels {labels} are not UTF-8 text.", "Save them as UTF-8, one a line."
        ) from None
    return tuple(line.strip() for line in lines)


def check_labels(labels: tuple[str, ...] | None, scores: tuple[int, ...]) -> None:
    """Raises Rejected when the first output, of that shape, is no row of one score a label."""
    if len(scores) != 2:
        raise Rejected(
            f"A classification gives one row of scores, but the first output has the shape {scores}.",
            "Choose another --task, or return the scores first.",
        )
    if labels is not None and len(labels) != scores[1]:
        raise Rejected(
            f"There are {len(labels)} labels, but the model has {scores[1]} classes.",
            "One label a line, in the order of the classes.",
        )


def _write_labels(labels: tuple[str, ...] | None, scratch: Path, to: Path) -> Path | None:
    if not labels:
        return None
    written = scratch / "labels.txt"
    written.write_text("".join(" ".join(label.split()) + "\n" for label in labels), encoding="utf-8")
    os.replace(written, to)
    return to
