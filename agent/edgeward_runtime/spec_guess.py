"""How pictures and sound go into an input: from its port, and from what is declared about it. Opens no file.

Invariants: what the file fixes cannot be declared otherwise. Whatever is taken for granted is noted; a size
or a rate that nobody knows is missing, and a stand-in keeps the contract whole until it is declared.
"""

from __future__ import annotations

from typing import Any

from edgeward_runtime.findings import Findings
from edgeward_runtime.port_guess import layout
from edgeward_runtime.sessions import Port
from edgeward_runtime.sidecar import AUDIO_KEYS, IMAGE_KEYS, Declared
from edgeward_wire.contract import AudioSpec, ImageSpec
from edgeward_wire.errors import Rejected


def audio_spec(port: Port, declared: Declared, findings: Findings) -> AudioSpec:
    """Sound: its last axis is time, and holds the context and the window. Raises Rejected."""
    spec = {key: value for key, value in declared.items() if key in AUDIO_KEYS}
    length = port.shape[-1] if port.shape else None
    context = spec.get("context", 0)
    for key in ("rate", "window"):
        if key == "window" and isinstance(length, int):
            spec.setdefault("window", length - context)
        elif key not in spec:
            spec[key] = 16_000
            findings.lack(
                f"inputs.{port.name}",
                f"Input {port.name} takes sound, and nothing says its {key}.",
                f"Declare {key} under [inputs.{port.name}] in {findings.sidecar}"
                f" ({'Hz' if key == 'rate' else 'in samples'}).",
            )
    if isinstance(length, int) and spec["window"] + context != length:
        raise Rejected(
            f"Input {port.name} is {length} samples long in the file, but window {spec['window']} and"
            f" context {context} are declared."
        )
    if "hop" not in spec:
        spec["hop"] = spec["window"]
        findings.note(f"hop of {port.name} is not declared: taken as its window, {spec['hop']}.")
    if port.dtype not in ("float32", "float16"):
        raise Rejected(f"Input {port.name} is {port.dtype}; sound goes in as float32 or float16.")
    return AudioSpec(**spec)


def image_spec(port: Port, declared: Declared, findings: Findings, *, detector: bool) -> ImageSpec:
    """A picture: size and channels are the port's, where it has them. Raises Rejected.

    `detector`: the model is declared to be one.
    """
    placed = declared.get("layout") or layout(port) or "nchw"
    rank4 = len(port.shape) == 4
    height, width = (port.shape[2:4] if placed == "nchw" else port.shape[1:3]) if rank4 else (None, None)
    channels = (port.shape[1] if placed == "nchw" else port.shape[3]) if rank4 else 3
    spec = {k: v for k, v in declared.items() if k in IMAGE_KEYS}
    spec["layout"] = placed
    for key, size in (("width", width), ("height", height)):
        if key not in spec and isinstance(size, int):
            spec[key] = size
        elif key not in spec:
            spec[key] = 224
            findings.lack(
                f"inputs.{port.name}",
                f"Input {port.name} takes pictures of any {key}.",
                f"Declare width and height under [inputs.{port.name}] in {findings.sidecar}.",
            )
        elif isinstance(size, int) and spec[key] != size:
            raise Rejected(f"Input {port.name} has {key} {size} in the file, but {spec[key]} is declared.")
    spec.setdefault("colour", "gray" if channels == 1 else "rgb")
    _normalise(port, spec, findings)
    if "resize" not in spec and detector:
        spec["resize"] = "letterbox"
        findings.note(f"resize of {port.name} is not declared: taken as letterbox, as detectors have.")
    elif "resize" not in spec:
        findings.note(f"resize of {port.name} is not declared: taken as stretch.")
    return ImageSpec(**spec)


def _normalise(port: Port, spec: dict[str, Any], findings: Findings) -> None:
    channels = 1 if spec["colour"] == "gray" else 3
    if "scale" not in spec:
        one = 1.0 if port.dtype == "uint8" else 1 / 255
        spec["scale"] = [one] * channels
        if port.dtype != "uint8":
            findings.note(
                f"scale and bias of {port.name} are not declared: taken as 1/255 and 0 (colours in 0..1)."
            )
    for key, default in (("scale", 1.0), ("bias", 0.0)):
        value = spec.get(key, default)
        # One number stands for every channel.
        spec[key] = (
            [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * channels
        )
