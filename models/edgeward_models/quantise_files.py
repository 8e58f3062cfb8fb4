"""What a quantisation leaves behind.

    OUT/NAME.onnx, OUT/NAME.toml, OUT/labels.txt     to deploy; only where something is offered
    OUT/NAME-TARGET.onnx                             for further targets
    OUT/report.json, OUT/report.md, OUT/pareto.svg   always

Invariants: what an earlier run wrote and this one does not offer is gone afterwards, and nothing that
somebody else wrote is touched; every file is whole or not there; the sidecar reads back as a sidecar.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from edgeward_models.findings import TargetReport
from edgeward_models.graph import read_facts
from edgeward_models.inspect import Inspection, sidecar_text
from edgeward_models.quantise_report import SCHEMA, QuantiseReport, markdown, plot
from edgeward_models.schemes import TARGETS
from edgeward_models.variants import Further
from edgeward_models.workspace import file_digest
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import TargetHints

_MAX_REPORT_BYTES = 64 << 20


def write_report(report: QuantiseReport, source: Inspection, samples: Path | None, out: Path) -> None:
    """Write everything; `source` is the float model's inspection. Raises Unavailable, Rejected."""
    try:
        _forget(out)
        offered = _offer(report, source, samples, out) if report.targets[0].offered is not None else {}
        plain = {**report.plain(), "files": {path.name: file_digest(path) for path in offered.values()}}
        _write(out / "report.json", json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        _write(out / "report.md", markdown(report))
        _write(out / "pareto.svg", plot(report))
    except OSError as error:
        raise Unavailable(f"{out} cannot be written: {error.strerror}.", "Is the disk full?") from error


def _forget(out: Path) -> None:
    """Delete what the last report offered, as long as it is still what was written then."""
    try:
        raw = (out / "report.json").read_bytes()[:_MAX_REPORT_BYTES]
        report = json.loads(raw)
        files = report["files"] if report["schema"] == SCHEMA else {}
        known = {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name, digest in known.items():
        path = out / Path(name).name
        if path.is_file() and file_digest(path) == digest:
            path.unlink()


def _offer(report: QuantiseReport, source: Inspection, samples: Path | None, out: Path) -> dict[str, Path]:
    """Copy what is offered, and write the sidecar; returns what was written."""
    several = len(report.targets) > 1
    main = report.targets[0]
    model = _placed(main, out, report)
    written = {"model": model}
    further = []
    for target in report.targets[1:]:
        if target.offered is None:
            continue
        path = _placed(target, out, report)
        written[target.target] = path
        facts = read_facts(path)
        accuracy = _accuracy(target)
        further.append(Further(target.target, path, facts.precision, TARGETS[target.target].hints, accuracy))
    known = source.guess
    if known.labels is not None:
        written["labels"] = _copied(known.labels, out / "labels.txt")
    hints = TARGETS[main.target].hints
    guess = replace(
        known,
        precision="int8",
        labels=written.get("labels"),
        samples=samples.absolute() if samples is not None else None,
        float_reason=None,
        accuracy=_accuracy(main),
        report=out / "report.json",
        # A lone file may be tried anywhere: the device's probe decides, as ever.
        targets=hints if several or hints.isa else TargetHints(),
        notes=(),
    )
    inspection = Inspection(read_facts(model), guess, model, tuple(further))
    written["sidecar"] = out / f"{report.name}.toml"
    _write(written["sidecar"], sidecar_text(inspection))
    return written


def _placed(target: TargetReport, out: Path, report: QuantiseReport) -> Path:
    one, name = target.offered, report.file(target)
    assert one is not None
    assert one.file is not None
    assert name is not None
    path = out / name
    if path.exists() and file_digest(path) == report.sha256:
        raise Rejected(f"{path} is the float model, and would be written over.", "Give another --out.")
    return _copied(one.file, path)


def _copied(source: Path, path: Path) -> Path:
    if not (path.exists() and path.samefile(source)):
        beside = path.with_name(f".{path.name}.new")
        shutil.copyfile(source, beside)
        os.replace(beside, path)
    return path


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _accuracy(target: TargetReport) -> dict[str, float]:
    return target.final.accuracy() if target.final is not None else {}
