"""What is evaluated, and what it is held against: a file with its sidecar, or a bundle's variant.

Invariants: the two take the same inputs; whatever a sidecar or bundle declares about the model holds for its
float original too, so that both are fed alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgeward_models.bundle import Bundle, find_model
from edgeward_models.bundle_files import is_bundle, read_bundle
from edgeward_models.evaluation import Subject
from edgeward_models.graph import Facts, embed_external_data, read_facts
from edgeward_models.inspect import inspect_model
from edgeward_runtime import resources
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Variant


@dataclass(frozen=True)
class Asked:
    """What was asked for."""

    model: Path
    """An ONNX file, a directory with one, or a bundle."""
    against: Path | None = None
    sidecar: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    labelled: bool = False
    """Whether there are labels: then a task must be known, and the sidecar's samples are not needed."""
    sampled: bool = False
    """Whether samples are given: then the sidecar's are not needed either."""


@dataclass(frozen=True)
class Opened:
    """Both files, and what is known of them."""

    model: Subject
    against: Subject | None
    contract: Contract
    labels: Path | None
    samples: Path | None


def open_subjects(asked: Asked, scratch: Path) -> Opened:
    """Find and read both files. Copies that are whole go into the directory `scratch`.

    Raises:
        Rejected: a file, the bundle or a declaration is no good, or the two are not of one model.
        Unavailable: a file cannot be read.
    """
    opened = _of_bundle(asked, scratch) if is_bundle(asked.model) else _of_file(asked, scratch)
    if asked.against is not None:
        facts = read_facts(find_model(asked.against))
        opened = replace(opened, against=_subject(facts, _home(scratch, "against"), facts.path.name))
    if opened.against is not None:
        _check_ports(opened.model, opened.against)
    return opened


def _of_file(asked: Asked, scratch: Path) -> Opened:
    model = find_model(asked.model)
    inspection = inspect_model(model, _sidecar(model, asked), asked.flags, scratch=scratch)
    # A task is needed where there are labels to hold the answers against; their names never are.
    needless = {"labels"} if asked.labelled else {"labels", "task"}
    if asked.labelled or asked.sampled:
        needless.add("samples")
    known = inspection.guess.complete(without=needless)
    facts, whole = inspection.facts, inspection.whole
    files = {one.name: one.file for one in inspection.further}
    mine = Subject(facts.path.name, facts.path, whole, facts.precision, facts.bytes)
    if asked.variant is not None:
        facts = read_facts(_named(files, asked.variant, facts.path.name))
        mine = _subject(facts, _home(scratch, "variant"), facts.path.name)
    others = [read_facts(file) for file in files.values() if mine.precision != "fp32"]
    floats = [_subject(f, _home(scratch, "float"), f.path.name) for f in others if f.precision == "fp32"][:1]
    return Opened(mine, next(iter(floats), None), known.contract, known.labels, known.samples)


def _of_bundle(asked: Asked, scratch: Path) -> Opened:
    if asked.sidecar is not None or asked.flags:
        raise Rejected(
            f"{asked.model.name} is a bundle: what is declared about the model is in it.",
            "Leave --sidecar, --task, --labels and --set out, or evaluate the ONNX file.",
        )
    bundle = read_bundle(asked.model)
    variants = bundle.manifest.variants
    name = asked.variant or _usual(variants)
    mine = _of_variant(bundle, name, _named(variants, name, asked.model.name), scratch)
    floats = [n for n, v in sorted(variants.items()) if v.precision == "fp32" and n != name]
    against = None
    if floats and mine.precision != "fp32":
        against = _of_variant(bundle, floats[0], variants[floats[0]], scratch)
    labels = bundle.manifest.labels
    return Opened(
        mine,
        against,
        bundle.manifest.contract,
        bundle.blobs[labels.sha256] if labels is not None else None,
        None,
    )


def _usual(variants: Mapping[str, Variant]) -> str:
    """The INT8 variant that is meant for a machine like this one, else any INT8, else any."""

    def rank(name: str) -> tuple[bool, bool, str]:
        one = variants[name]
        elsewhere = bool(one.targets.arch) and resources.machine() not in one.targets.arch
        return one.precision != "int8", elsewhere, name

    return min(variants, key=rank)


def _of_variant(bundle: Bundle, name: str, variant: Variant, scratch: Path) -> Subject:
    facts = read_facts(bundle.blobs[variant.model.sha256])
    return _subject(facts, _home(scratch, name), f"{bundle.manifest.name} {name}")


def _subject(facts: Facts, home: Path, title: str) -> Subject:
    return Subject(title, facts.path, embed_external_data(facts, home), facts.precision, facts.bytes)


def _sidecar(model: Path, asked: Asked) -> Path | None:
    """What was named; else nothing where one lies beside the model, else the one beside the original."""
    if asked.sidecar is not None or model.with_suffix(".toml").is_file() or asked.against is None:
        return asked.sidecar
    other = asked.against.with_suffix(".toml")
    return other if other.is_file() else None


def _named(files: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in files:
        raise Rejected(
            f"{where} has no variant {name!r}.", f"It has: {', '.join(sorted(files))}." if files else ""
        )
    return files[name]


def _home(scratch: Path, name: str) -> Path:
    home = scratch / f"whole-{name}"
    home.mkdir(exist_ok=True)
    return home


def _check_ports(mine: Subject, theirs: Subject) -> None:
    takes, wanted = _ports(theirs), _ports(mine)
    if takes != wanted:
        raise Rejected(
            f"{theirs.title} takes {takes}, and {mine.title} {wanted}.",
            "Give the float file that it was made from.",
        )


def _ports(subject: Subject) -> str:
    facts = read_facts(subject.file)
    return ", ".join(sorted(f"{port.name} ({port.dtype})" for port in facts.inputs))
