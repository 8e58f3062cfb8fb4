"""What an ONNX file takes and gives, from the file itself and from what people say about it.

What people declare (`sidecar.declarations`) wins over what can be inferred. What had to be inferred and
could be wrong is in `notes`; what nobody can infer is in `missing`, each with what to do about it:
`model inspect` prints both, `deploy` calls `Guess.complete` first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from edgeward_runtime.findings import Findings, Missing
from edgeward_runtime.labels import read_labels
from edgeward_runtime.onnx_file import Facts, read_facts
from edgeward_runtime.port_guess import carried_states, classical, layout, same_kind, scores
from edgeward_runtime.sessions import NotLoaded, Port, Session, open_exact
from edgeward_runtime.sidecar import AUDIO_KEYS, IMAGE_KEYS, Declared, declarations
from edgeward_runtime.spec_guess import audio_spec, image_spec
from edgeward_runtime.tasks.detection import kind_of, kinds_of
from edgeward_wire.contract import AudioSpec, Contract, DimensionRange, ImageSpec, InputPort, OutputPort, Task
from edgeward_wire.document import faults
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import NAME_PATTERN
from edgeward_wire.manifest import Limits, Precision, TargetHints

_NAME_STEP = "Use a-z, 0-9, dot, dash and underscore, beginning with a letter or number."
_SCORED: tuple[Task, ...] = ("classification", "audio-classification")
_HEARS: tuple[Task, ...] = ("audio-classification", "vad")


@dataclass(frozen=True)
class Guess:
    """What is known of a model. With `missing` empty it can be deployed."""

    name: str
    contract: Contract
    precision: Precision
    opset: int
    labels: Path | None = None
    samples: Path | None = None
    float_reason: str | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    targets: TargetHints = field(default_factory=TargetHints)
    annotations: dict[str, str] = field(default_factory=dict)
    report: Path | None = None
    """What the quantiser said of its work."""
    variants: Mapping[str, Declared] = field(default_factory=dict)
    """`[variants.NAME]` as declared, each `file` with its directory."""
    notes: tuple[str, ...] = ()
    missing: tuple[Missing, ...] = ()

    def complete(self, without: Collection[str] = ()) -> Guess:
        """Itself, if nothing is missing but the keys in `without`. Raises Rejected with the first that is."""
        missing = [one for one in self.missing if one.key not in without]
        if missing:
            first, more = missing[0], len(missing) - 1
            also = f" ({more} more: see `agent-ctl model inspect`)" if more else ""
            raise Rejected(first.what + also, first.next_step)
        return self


def guess(path: Path, sidecar: Path | None = None, flags: Declared | None = None) -> Guess:
    """Everything that can be said about one ONNX file.

    `sidecar` None: the .toml of the same name, if it is there. `flags` has the sidecar's shape;
    relative paths in it are relative to the working directory.

    Raises:
        Rejected: not ONNX, an operator set that is not supported, a sidecar that is wrong.
        Unavailable: a file cannot be read.
    """
    facts = read_facts(path)
    declared = declarations(path, facts.metadata, sidecar, flags or {})
    try:
        session = open_exact(path)
    except NotLoaded as error:
        raise _does_not_load(path, error) from error
    try:
        return _Inference(path, facts, session, declared).guess()
    finally:
        session.close()


# --- what can be inferred


class _Inference:
    """One file's guess in the making."""

    def __init__(self, path: Path, facts: Facts, session: Session, declared: dict[str, Any]) -> None:
        self.path, self.facts, self.session, self.declared = path, facts, session, declared
        self.findings = Findings(f"{path.stem}.toml")
        self.dimensions: dict[str, DimensionRange] = {}
        for part, ports in (("inputs", session.inputs), ("outputs", session.outputs)):
            names = [port.name for port in ports]
            for name in declared.get(part, {}):
                if name not in names:
                    raise Rejected(
                        f"{path.name} has no {part[:-1]} named {name!r}.", f"It has: {', '.join(names)}."
                    )
        self.states = self._states()

    def guess(self) -> Guess:
        try:
            inputs = self._inputs()
            task = self._task(inputs)
            labels = self._labels(task)
            outputs = tuple(self._output(port, task) for port in self.session.outputs)
            outputs = self._boxes(outputs, labels) if task == "detection" else outputs
            self._check_states(outputs)
            contract = Contract(
                task=task, inputs=inputs, outputs=outputs, dimensions={**self.dimensions, **self._ranges()}
            )
            accuracy = {str(k): float(v) for k, v in self.declared.get("accuracy", {}).items()}
            limits = Limits(**self.declared.get("limits", {}))
            targets = TargetHints(**self.declared.get("targets", {}))
        except ValidationError as error:
            raise Rejected(
                f"What is declared about {self.path.name} is not valid: {faults(error)}."
            ) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise Rejected(f"What is declared about {self.path.name} is not valid: {error}.") from None
        return Guess(
            name=self._name(),
            contract=contract,
            precision=self._precision(),
            opset=self.facts.opset,
            labels=labels,
            samples=self._samples(),
            float_reason=self.declared.get("float"),
            accuracy=accuracy,
            limits=limits,
            targets=targets,
            annotations={str(k): str(v) for k, v in self.declared.get("annotations", {}).items()},
            report=self._report(),
            variants=self.declared.get("variants", {}),
            notes=tuple(self.findings.notes),
            missing=tuple(self.findings.missing),
        )

    def _states(self) -> dict[str, str]:
        """The binding of each port that is state, by name: what is declared, or else looks like it."""
        declared = {**self.declared.get("inputs", {}), **self.declared.get("outputs", {})}
        if any("bind" in table for table in declared.values()):
            return {}  # whoever declares one state declares all of them
        free = [port for port in self.session.inputs if not declared.get(port.name)]
        found: dict[str, str] = {}
        for read, written in carried_states(free, self.session.outputs).items():
            state = re.sub(r"[^a-z0-9_]", "_", read.lower())[:32]
            found[read] = found[written] = f"state:{state}"
            self.findings.note(
                f"{read} is not declared: taken as state that {written} carries on, from zero."
            )
        return found

    def _inputs(self) -> tuple[InputPort, ...]:
        """The first input that looks like a picture is the source, else the first; others are declared."""
        ports = self.session.inputs
        declared = self.declared.get("inputs", {})
        free = [
            port
            for port in ports
            if not {"bind", "const"} & set(declared.get(port.name, {})) and port.name not in self.states
        ]
        seen = [p for p in free if set(declared.get(p.name, {})) & (IMAGE_KEYS | AUDIO_KEYS)]
        pictures = [p for p in free if layout(p) is not None]
        source = next(iter(seen or pictures or free), None)
        return tuple(self._input(port, declared.get(port.name, {}), port is source) for port in ports)

    def _input(self, port: Port, declared: Declared, source: bool) -> InputPort:
        bind = declared.get("bind") or self.states.get(port.name)
        bind = bind or ("const" if "const" in declared else "source")
        if bind == "source" and not source and "bind" not in declared:
            self.findings.lack(
                f"inputs.{port.name}",
                f"Nothing says what goes into input {port.name}.",
                f"Declare const or bind under [inputs.{port.name}] in {self.findings.sidecar}.",
            )
        heard = bind == "source" and bool(set(declared) & AUDIO_KEYS)
        pictured = bind == "source" and (
            bool(set(declared) & IMAGE_KEYS) or (source and not heard and layout(port) is not None)
        )
        detector = self.declared.get("task") == "detection"
        image = image_spec(port, declared, self.findings, detector=detector) if pictured else None
        audio = audio_spec(port, declared, self.findings) if heard else None
        const = declared.get("const")
        values = (
            tuple(float(v) for v in (const if isinstance(const, list) else [const]))
            if const is not None
            else None
        )
        return InputPort(
            name=port.name,
            dtype=port.dtype,
            shape=self._shape(port, image, audio),
            bind=bind,
            image=image,
            audio=audio,
            const=values,
        )

    def _shape(self, port: Port, image: ImageSpec | None, audio: AudioSpec | None) -> tuple[int | str, ...]:
        """The port's shape with every free dimension named and ranged."""
        sizes: dict[int, int] = {}
        if image is not None and len(port.shape) == 4:
            first = 2 if image.layout == "nchw" else 1
            sizes = {first: image.height, first + 1: image.width, (1 if first == 2 else 3): image.channels}
        if audio is not None:
            sizes = {len(port.shape) - 1: audio.context + audio.window}
        shape: list[int | str] = []
        for axis, dimension in enumerate(port.shape):
            if isinstance(dimension, int):
                shape.append(dimension)
            elif axis in sizes:
                shape.append(sizes[axis])
            else:
                name = (dimension or f"{port.name}_{axis}")[:64]
                self.dimensions.setdefault(name, DimensionRange())
                shape.append(name)
        return tuple(shape)

    def _output(self, port: Port, task: Task) -> OutputPort:
        declared = self.declared.get("outputs", {}).get(port.name, {})
        activation = declared.get("activation")
        if activation is None:
            activation = "none"
            if task in _SCORED and port is scores(self.session.outputs) and not classical(self.facts):
                last = self.facts.producer_of(port.name)
                activation = "none" if last in ("Softmax", "Sigmoid") else "softmax"
                if activation == "softmax":
                    self.findings.note(f"activation of {port.name} is not declared: taken as softmax.")
            if task == "segmentation" and len(port.shape) == 4 and 1 in (port.shape[1], port.shape[3]):
                # One channel is one class and the rest: whether it is in 0..1 decides where the border is.
                activation = "none" if self.facts.producer_of(port.name) == "Sigmoid" else "sigmoid"
                if activation == "sigmoid":
                    self.findings.note(f"activation of {port.name} is not declared: taken as sigmoid.")
        shape = tuple(
            d if isinstance(d, int) else (d or f"{port.name}_{axis}")[:64]
            for axis, d in enumerate(port.shape)
        )
        return OutputPort(
            name=port.name,
            dtype=port.dtype,
            shape=shape,
            activation=activation,
            bind=declared.get("bind") or self.states.get(port.name, "result"),
            boxes=declared.get("boxes"),
        )

    def _boxes(self, outputs: tuple[OutputPort, ...], labels: Path | None) -> tuple[OutputPort, ...]:
        """What a detector's boxes are is missing where shape and labels fit several kinds.

        What they tell is not written down, even if somebody declared it: see OutputPort. Raises Rejected.
        """
        found = [port for port in outputs if port.bind == "result" and len(port.shape) == 3]
        sides = tuple(side for side in found[0].shape if isinstance(side, int)) if len(found) == 1 else ()
        if len(found) != 1 or len(sides) != 3:
            return outputs  # the task says what is wrong, or looks at what comes out
        port, classes = found[0], len(read_labels(labels)) if labels else None
        fitting = kinds_of(sides, classes)
        if port.boxes is not None or len(fitting) == 1:
            kind = kind_of(sides, classes, port.boxes)
            told = kind if len(fitting) > 1 else None
            return tuple(p.model_copy(update={"boxes": told}) if p is port else p for p in outputs)
        if not fitting:
            kind_of(sides, classes)  # says what is read
        self.findings.lack(
            f"outputs.{port.name}",
            f"Output {port.name} of shape {sides} could be {' or '.join(fitting)}.",
            f"Declare boxes under [outputs.{port.name}] in {self.findings.sidecar}, or give --labels.",
        )
        return outputs

    def _check_states(self, outputs: Sequence[OutputPort]) -> None:
        """What a run leaves must be what the next one takes. Raises Rejected."""
        written = {port.bind: port.name for port in outputs}
        made = {port.name: port for port in self.session.outputs}
        declared = self.declared.get("inputs", {})
        for port in self.session.inputs:
            bind = declared.get(port.name, {}).get("bind") or self.states.get(port.name, "")
            other = made.get(written.get(bind, "")) if bind.startswith("state:") else None
            if other is not None and not same_kind(port, other):
                raise Rejected(
                    f"{bind} cannot be carried on: {port.name} is {port.dtype} {_shape_text(port)}, but"
                    f" {other.name} is {other.dtype} {_shape_text(other)}."
                )

    def _task(self, inputs: tuple[InputPort, ...]) -> Task:
        declared = self.declared.get("task")
        if declared is not None:
            if declared not in get_args(Task):
                raise Rejected(
                    f"The task {declared!r} is not known.", f"Known are: {', '.join(get_args(Task))}."
                )
            task: Task = declared
            source = next((p for p in inputs if p.bind == "source"), None)
            if task in _HEARS and source is not None and source.image is None and source.audio is None:
                self.findings.lack(
                    f"inputs.{source.name}",
                    f"Nothing says at what rate input {source.name} takes sound.",
                    f"Declare rate (and window, hop, context) under [inputs.{source.name}] in"
                    f" {self.findings.sidecar}.",
                )
            return task
        rows = scores(self.session.outputs).shape
        one_row = len(rows) == 2 and (rows[0] == 1 or not isinstance(rows[0], int))
        if any(p.image is not None for p in inputs) and one_row:
            self.findings.note("task is not declared: one row of numbers a picture, taken as classification.")
            return "classification"
        known = classical(self.facts)
        if known is not None:
            kind = "a classifier" if known == "classification" else "a regressor"
            self.findings.note(f"task is not declared: {kind} of scikit-learn's kind, taken as {known}.")
            return known
        self.findings.lack("task", f"Nothing says what {self.path.name} is for.", "Say it with --task.")
        return "tensor"

    def _ranges(self) -> dict[str, DimensionRange]:
        return {str(k): DimensionRange(**v) for k, v in self.declared.get("dimensions", {}).items()}

    def _name(self) -> str:
        declared = self.declared.get("name")
        if declared is not None:
            if not re.match(NAME_PATTERN, str(declared)):
                raise Rejected(f"{declared!r} cannot be a model's name.", _NAME_STEP)
            return str(declared)
        name = re.sub(r"[^a-z0-9._-]+", "-", self.path.stem.lower()).strip("-._")[:63]
        return name or "model"

    def _precision(self) -> Precision:
        declared = self.declared.get("precision")
        if declared is None:
            return self.facts.precision
        if declared not in get_args(Precision):
            raise Rejected(
                f"The precision {declared!r} is not known.", f"Known are: {', '.join(get_args(Precision))}."
            )
        precision: Precision = declared
        return precision

    def _labels(self, task: Task) -> Path | None:
        declared = self.declared.get("labels")
        if declared is not None:
            path = Path(declared)
            if not path.is_file():
                raise Rejected(
                    f"The labels file {path} is not there.", "Name a text file with one label a line."
                )
            return path
        if task == "classification":
            classes = next(iter(scores(self.session.outputs).shape[-1:]), None)
            lines = f"{classes} lines" if isinstance(classes, int) else "lines"
            self.findings.lack(
                "labels",
                f"A classification needs labels, and nothing names those of {self.path.name}.",
                f"Give --labels FILE: {lines} of text, one a class.",
            )
        elif task in ("detection", "segmentation", "audio-classification"):
            self.findings.note("no labels are named: the classes have numbers (--labels FILE).")
        return None

    def _samples(self) -> Path | None:
        declared = self.declared.get("samples")
        if declared is None:
            self.findings.note("no samples are named: the golden vectors are made of noise (evidence: weak).")
            return None
        path = Path(declared)
        if not path.exists():  # often only where the model was made
            step = "Name a directory of pictures or WAV files, or an .npz of inputs."
            self.findings.lack("samples", f"The samples {path} are not there.", step)
            return None
        return path

    def _report(self) -> Path | None:
        declared = self.declared.get("report")
        if declared is not None and not Path(declared).is_file():
            raise Rejected(
                f"The report {declared} is not there.", "Copy it too, or take `report` out of the sidecar."
            )
        return Path(declared) if declared is not None else None


def _shape_text(port: Port) -> str:
    return "(" + ", ".join(str(d) if d is not None else "?" for d in port.shape) + ")"


def _does_not_load(path: Path, error: NotLoaded) -> Rejected:
    step = "Export it again with an operator set that is supported."
    if "seq(" in error.what or "map(" in error.what:
        step = "Convert it again with options={'zipmap': False}, so that probabilities are one array."
    elif "tensor(string)" in error.what:
        step = "Export it with numbers as inputs and as labels: no device feeds or reads text."
    elif "tensor(double)" in error.what:
        step = "Export it with float32 inputs."
    return Rejected(f"{path.name} does not load: {error.what}", step)
