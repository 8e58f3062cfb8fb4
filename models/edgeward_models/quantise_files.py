"""What a quantisation leaves behind.

    OUT/NAME.onnx, OUT/NAME.toml, OUT/labels.txt     to deploy; only where something is offered
    OUT/NAME-TARGET.onnx                             for further targets
    OUT/report.json, OUT/report.md, OUT/pareto.svg   always

Invariants: what an earlier run wrote and this one does not offer is gone afterwards, and nothing that
somebody else wrote or changed is touched: what lies in the way is refused before the search. What is written
is noted first (OUT/.work/written.json), so that a run that was killed here knows its own files again. Every
file is whole or not there; the sidecar reads back as a sidecar.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgeward_models.findings import TargetReport
from edgeward_models.graph import read_facts
from edgeward_models.inspect import Inspection, sidecar_text
from edgeward_models.quantise_report import SCHEMA, QuantiseReport, markdown, plot
from edgeward_models.schemes import TARGETS
from edgeward_models.search import TOP1
from edgeward_models.variants import Further
from edgeward_models.workspace import file_digest
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import TargetHints

_MAX_REPORT_BYTES = 64 << 20
_REPORT = "report.json"
_BESIDE = ("report.md", "pareto.svg")


def check_place(name: str, targets: Sequence[str], out: Path) -> None:
    """Raises Rejected where something that is not an earlier run's own work would be written over."""
    known = _own(out)
    mine = _last_report(out) is not None
    further = [f"{name}-{target}.onnx" for target in targets] if len(targets) > 1 else []
    for file in (f"{name}.onnx", f"{name}.toml", "labels.txt", *further, _REPORT, *_BESIDE):
        path = out / file
        if not path.exists() and not path.is_symlink():
            continue
        if mine and (file == _REPORT or (file in _BESIDE and file not in known)):
            continue
        if not path.is_file() or file_digest(path) not in known.get(file, ()):
            raise Rejected(
                f"{path} is not what an earlier run left there, and would be written over.",
                "Move it away, or give another --out.",
            )


def write_report(report: QuantiseReport, source: Inspection, samples: Path | None, out: Path) -> None:
    """Write everything; `source` is the float model's inspection. Raises Unavailable, Rejected."""
    try:
        _forget(out)
        main = report.main
        offered = _offer(report, main, source, samples, out) if main is not None else {}
        plain = {**report.plain(), "files": {path.name: file_digest(path) for path in offered.values()}}
        _write(out / _REPORT, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        _write(out / "report.md", markdown(report))
        _write(out / "pareto.svg", plot(report))
    except OSError as error:
        raise Unavailable(f"{out} cannot be written: {error.strerror}.", "Is the disk full?") from error


def _forget(out: Path) -> None:
    """Delete what earlier runs offered, as long as it is still what was written then."""
    for name, digests in _own(out).items():
        path = out / Path(name).name
        if name not in (_REPORT, *_BESIDE) and path.is_file() and file_digest(path) in digests:
            path.unlink()


def _own(out: Path) -> dict[str, set[str]]:
    """What earlier runs wrote: name -> digests."""
    found: dict[str, set[str]] = {}
    for files in (_last_report(out), _read_names(_ledger(out))):
        for name, digests in (files or {}).items():
            found.setdefault(name, set()).update(digests)
    return found


def _last_report(out: Path) -> dict[str, list[str]] | None:
    """The files that the report in OUT speaks of; None without one of ours."""
    return _read_names(out / _REPORT)


def _read_names(path: Path) -> dict[str, list[str]] | None:
    try:
        report = json.loads(path.read_bytes()[:_MAX_REPORT_BYTES])
        if report["schema"] != SCHEMA:
            return None
        return {str(name): str(digests).split() for name, digests in report["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _ledger(out: Path) -> Path:
    return out / ".work" / "written.json"


def _note(path: Path, content: Path) -> None:
    """Say that `path` is about to become what `content` is; until then it is what it was."""
    ledger = _ledger(path.parent)
    known = _read_names(ledger) or {}
    known[path.name] = [file_digest(content), *known.get(path.name, [])[:1]]
    files = {name: " ".join(digests) for name, digests in known.items()}
    beside = ledger.with_name(f".{ledger.name}.new")
    beside.write_text(json.dumps({"schema": SCHEMA, "files": files}, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, ledger)


def _offer(
    report: QuantiseReport, main: TargetReport, source: Inspection, samples: Path | None, out: Path
) -> dict[str, Path]:
    """Copy what is offered, and write the sidecar; returns what was written."""
    several = len(report.targets) > 1
    model = _placed(main, out, report)
    written = {"model": model}
    further = []
    for target in report.targets:
        if target.offered is None or target is main:
            continue
        path = _placed(target, out, report)
        written[target.target] = path
        hints = TARGETS[target.target].hints
        precision = read_facts(path).precision
        further.append(Further(target.target, path, precision, hints, _accuracy(target)))
    known = source.guess
    if known.labels is not None:
        written["labels"] = _copied(known.labels, out / "labels.txt")
    facts, hints = read_facts(model), TARGETS[main.target].hints
    guess = replace(
        known,
        precision=facts.precision,
        labels=written.get("labels"),
        samples=samples,
        float_reason=None,
        accuracy=_accuracy(main),
        report=out / "report.json",
        # A lone file may be tried anywhere: the device's probe decides, as ever.
        targets=hints if several or hints.isa else TargetHints(),
        notes=(),
        missing=tuple(one for one in known.missing if one.key != "samples"),
    )
    inspection = Inspection(facts, guess, model, tuple(further))
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
        _note(path, beside)
        os.replace(beside, path)
    return path


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    _note(path, beside)
    os.replace(beside, path)


def _accuracy(target: TargetReport) -> dict[str, float]:
    name = "top1_agreement_fp32" if target.gate.answers == TOP1 else "agreement_fp32"
    return target.final.accuracy(name) if target.final is not None else {}
