"""Values that an operator typed, checked before they go anywhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from edgeward_wire.document import Document, faults
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import DEVICE_PATTERN, NAME_PATTERN, VERSION_PATTERN

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

D = TypeVar("D", bound=Document)
_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*([a-z]*)$")
_EPOCH_FROM = 1e9


def request(kind: type[D], **values: Any) -> D:
    """A request from what was typed. Raises Rejected naming the field."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise Rejected(f"That cannot be asked for: {faults(error)}.", "See --help.") from error


def device_name(text: str, what: str = "device") -> str:
    """A device's, fleet's or pipeline's name."""
    if not re.match(DEVICE_PATTERN, text):
        raise Rejected(
            f"{text[:80]!r} cannot be the name of a {what}.",
            "Names have up to 63 of a-z, 0-9 and -, and begin with a letter or digit.",
        )
    return text


def version_name(text: str | None) -> str | None:
    """A version that the operator chose."""
    if text is not None and not re.match(VERSION_PATTERN, text):
        raise Rejected(f"{text[:80]!r} cannot be a version.", "Versions have letters, digits and . + _ -.")
    return text


def model_name(text: str | None) -> str | None:
    """A model's name that the operator chose."""
    if text is not None and not re.match(NAME_PATTERN, text):
        raise Rejected(
            f"{text[:80]!r} cannot be a model's name.", "Names have up to 63 of a-z, 0-9 and . _ -."
        )
    return text


def one_target(fleet: str | None, device: str | None) -> dict[str, str]:
    """Exactly one of --fleet and --device, as a request's field."""
    if (fleet is None) == (device is None):
        raise Rejected("Say for whom: --fleet NAME or --device NAME, one of the two.")
    if fleet is not None:
        return {"fleet": device_name(fleet, "fleet")}
    return {"device": device_name(device or "")}


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `24h`, `7d` as seconds."""
    match = _DURATION.match(text.strip().lower())
    if not match or match.group(2) not in _UNITS:
        raise Rejected(f"{text[:40]!r} is no length of time.", "Write 90s, 15m, 24h or 7d.")
    return float(match.group(1)) * _UNITS[match.group(2)]


def moment(text: str) -> float:
    """Unix seconds, or how long ago, as Unix seconds."""
    value = seconds(text)
    return value if value > _EPOCH_FROM else time.time() - value


def settings(assignments: Sequence[str]) -> dict[str, Any]:
    """`inputs.image.width=320` and the like, in the sidecar's shape. Values are TOML, or plain words."""
    merged: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip() or "\n" in assignment:
            raise Rejected(
                f"--set {assignment[:80]!r} is not KEY=VALUE.", "For example --set inputs.image.width=320."
            )
        _merge(merged, _read(key.strip(), value.strip()), assignment)
    return merged


def _read(key: str, value: str) -> dict[str, Any]:
    for text in (value, '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'):
        try:
            table: dict[str, Any] = tomllib.loads(f"{key} = {text}")
        except tomllib.TOMLDecodeError:
            continue
        return table
    raise Rejected(
        f"--set: {key[:80]!r} is no key.", "Quote names with dots: --set 'inputs.\"a.b\".width=320'."
    )


def _merge(into: dict[str, Any], table: dict[str, Any], assignment: str) -> None:
    for key, value in table.items():
        there = into.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _merge(there, value, assignment)
        elif isinstance(value, dict) != isinstance(there, dict) and key in into:
            raise Rejected(f"--set {assignment[:80]!r} contradicts an earlier --set.")
        else:
            into[key] = value
