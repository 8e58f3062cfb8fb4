"""The model card: what a bundle is, in Markdown, for those who decide whether to run it.

Pure: everything stands in the manifest, or is told beside it. Invariant: the same bundle gives the same
text, and nothing in it can break a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeward_wire.contract import Contract, InputPort, OutputPort
from edgeward_wire.manifest import Manifest, TargetHints, Variant


@dataclass(frozen=True)
class About:
    """What the manifest does not say."""

    work: str
    """"int8: 87 % of 385 M multiplications are INT8"."""
    parameters: int
    evidence: str
    """Where the golden inputs come from: "9 pictures in pictures"."""
    labels: Sequence[str] = ()
    assumed: Sequence[str] = ()
    risks: Sequence[str] = ()
    """What may go wrong on some devices."""


def card_text(manifest: Manifest, about: About) -> str:
    """The card. The manifest's version is left out: the same bundle may get any."""
    parts = [
        _head(manifest, about),
        _contract(manifest.contract, about.labels),
        _variants(manifest.variants),
        "\n\n".join(f"**Beware.** {_cell(risk)}" for risk in about.risks),
        _accuracy(manifest.variants),
        _evidence(manifest, about),
        _limits(manifest),
        _notes(manifest, about),
        _table("Provenance", ("what", "value"), sorted(manifest.provenance.items())),
        _deploy(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(manifest: Manifest, about: About) -> str:
    lines = [
        f"# {manifest.name}",
        "",
        f"A model for the task {manifest.task}; {about.work}; {about.parameters / 1e6:.2f} M parameters."
        f" Bundled {manifest.created}.",
    ]
    if manifest.float_reason:
        lines += ["", f"**No INT8 variant**: {_cell(manifest.float_reason)}"]
    return "\n".join(lines)


def _contract(contract: Contract, labels: Sequence[str]) -> str:
    rows = [
        *((port.name, "in", port.dtype, _shape(port.shape), _fed(port)) for port in contract.inputs),
        *((port.name, "out", port.dtype, _shape(port.shape), _given(port)) for port in contract.outputs),
    ]
    text = _table("Inputs and outputs", ("name", "", "type", "shape", "what"), rows)
    if contract.dimensions:
        text += "\n"
    for name, span in sorted(contract.dimensions.items()):
        text += f"\n- {_cell(name)}: {span.min} to {span.max}, {span.default} on a device"
    if labels:
        shown = ", ".join(_cell(label) for label in labels[:8])
        text += f"\n\n{len(labels)} labels: {shown}{', ...' if len(labels) > 8 else ''}"
    return text


def _fed(port: InputPort) -> str:
    if port.image is not None:
        image = port.image
        how = {
            "stretch": "stretched",
            "shorter_side": f"shorter side to {image.resize_to}, centre cut",
            "letterbox": f"letterboxed on {image.pad}",
        }[image.resize]
        scales = ", ".join(f"{v:.6g}" for v in image.scale)
        biases = ", ".join(f"{v:.6g}" for v in image.bias)
        return (
            f"a picture of {image.width} x {image.height}, {image.colour}, {how} ({image.interpolation});"
            f" y = x * ({scales}) + ({biases}), x in 0..255"
        )
    if port.audio is not None:
        audio = port.audio
        return (
            f"sound of {audio.rate} Hz, windows of {audio.window} samples every {audio.hop},"
            f" {audio.context} samples of context before each"
        )
    if port.const is not None:
        return (
            f"constant {', '.join(f'{v:g}' for v in port.const[:4])}{' ...' if len(port.const) > 4 else ''}"
        )
    return "a tensor" if port.bind == "source" else f"{port.bind}, from zero"


def _given(port: OutputPort) -> str:
    if port.bind != "result":
        return f"{port.bind}, for the next run"
    return "the result" if port.activation == "none" else f"the result, through {port.activation}"


def _variants(variants: Mapping[str, Variant]) -> str:
    rows = (
        (
            name,
            one.precision,
            f"{one.model.length / 1e6:.2f} MB",
            _targets(one.targets),
            str(one.opset),
            one.evidence,
            f"cosine {one.parity.cosine:g}",
        )
        for name, one in sorted(variants.items())
    )
    heads = ("variant", "precision", "size", "for", "opset", "evidence", "parity gate")
    return _table("Variants", heads, rows)


def _targets(hints: TargetHints) -> str:
    parts = [", ".join(values) for values in (hints.arch, hints.isa, hints.providers) if values]
    return "; ".join(parts) or "anything"


def _accuracy(variants: Mapping[str, Variant]) -> str:
    rows = [(name, *row) for name, one in sorted(variants.items()) for row in _figures(one.accuracy)]
    if not rows:
        return "## Accuracy\n\nNothing was declared about it."
    return _table("Accuracy, measured when it was built", ("variant", "figure", "value", "interval"), rows)


def _figures(accuracy: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
    """(name, value, interval): `x`, `x_low` and `x_high` are one figure."""
    for name, value in sorted(accuracy.items()):
        stem = name.removesuffix("_low").removesuffix("_high")
        if stem != name and stem in accuracy:
            continue
        low, high = accuracy.get(f"{name}_low"), accuracy.get(f"{name}_high")
        interval = f"{low:g} to {high:g}" if low is not None and high is not None else ""
        yield name, f"{value:g}", interval


def _evidence(manifest: Manifest, about: About) -> str:
    weak = any(one.evidence == "weak" for one in manifest.variants.values())
    text = (
        "## Evidence\n\nEach variant carries golden vectors: inputs, and what this very file gives for them"
        " with all optimisation off. A device runs a variant only after its own kernels have given the same."
        f" The inputs: {_cell(about.evidence)}."
    )
    return text + (" They are noise: **weak evidence**." if weak else "")


def _limits(manifest: Manifest) -> str:
    rows = [
        (name, f"{value:g} {unit}")
        for name, value, unit in (
            ("p99 latency at most", manifest.limits.p99_ms, "ms"),
            ("memory at most", manifest.limits.memory_mb, "MB"),
        )
        if value is not None
    ]
    rows.append(("features that a device needs", ", ".join(manifest.requires) or "none"))
    return _table("Limits", ("what", "value"), rows)


def _notes(manifest: Manifest, about: About) -> str:
    annotations = dict(manifest.annotations)
    licence = annotations.pop("licence", None) or annotations.pop("license", None)
    rows = [("licence", licence or "not declared"), *sorted(annotations.items())]
    text = _table("Licence and annotations", ("what", "value"), rows)
    if about.assumed:
        text += "\n\nAssumed, because nobody said otherwise:\n\n"
        text += "\n".join(f"- {_cell(note)}" for note in about.assumed)
    return text


def _deploy(manifest: Manifest) -> str:
    return (
        "## How to deploy it\n\n"
        f"    agent-ctl deploy {manifest.name}.bundle --fleet FLEET --dry-run\n"
        f"    agent-ctl deploy {manifest.name}.bundle --fleet FLEET"
    )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return ""
    rule = "|" + "---|" * len(heads)
    return "\n".join([f"## {title}", "", "| " + " | ".join(heads) + " |", rule, *lines])


def _shape(shape: Sequence[Any]) -> str:
    return " x ".join(str(side) for side in shape) or "scalar"


def _cell(text: str) -> str:
    """One line that neither ends a cell nor begins markup."""
    line = " ".join(str(text).split())
    for mark in ("\\", "|", "`", "<", "*", "_", "[", "]"):
        line = line.replace(mark, f"\\{mark}")
    return line
