"""Every MQTT topic is built and parsed here, and nowhere else.

The fleet is not in the topic: membership changes must not orphan retained messages. A command and the answers
to it have a number in theirs, and carry the same correlation data (MQTT 5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import DEVICE_PATTERN

ROOT = "edgeward/v1"
Up = Literal["status", "birth", "reported", "metrics", "telemetry", "event", "result"]
Down = Literal["refresh", "ack"]
Told = Literal["refresh", "ack", "cmd"]
"""What the cloud says to devices."""
UP: tuple[Up, ...] = ("status", "birth", "reported", "metrics", "telemetry", "event", "result")
DOWN: tuple[Down, ...] = ("refresh", "ack")
RETAINED: frozenset[Up] = frozenset({"status", "birth", "reported"})
AT_MOST_ONCE: frozenset[Up] = frozenset({"metrics", "result"})
COMMAND: Literal["cmd"] = "cmd"
RESPONSE: Literal["response"] = "response"
MAX_PAYLOAD_BYTES = 128 << 10

_DEVICE = re.compile(DEVICE_PATTERN)
_NUMBER = re.compile(r"[1-9][0-9]{0,14}")
_NUMBERED = {("down", COMMAND), ("up", RESPONSE)}


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic."""

    device: str
    direction: Literal["up", "down"]
    kind: str
    number: int | None = None
    """Of a command, and of an answer to one."""


def up(device: str, kind: Up) -> str:
    """What a device publishes on."""
    return f"{ROOT}/{device}/up/{kind}"


def down(device: str, kind: Down) -> str:
    """What a device listens on."""
    return f"{ROOT}/{device}/down/{kind}"


def all_up(kind: Up) -> str:
    """The subscription to one kind of every device."""
    return f"{ROOT}/+/up/{kind}"


def writable(device: str) -> tuple[str, ...]:
    """All that a device publishes on, and nothing else: so what it may leave behind is bounded."""
    return (*(up(device, kind) for kind in UP), f"{ROOT}/{device}/up/{RESPONSE}/+")


def all_down(device: str) -> str:
    """The subscription of one device."""
    return f"{ROOT}/{device}/down/#"


def command(device: str, number: int) -> str:
    """What a device is asked on."""
    return f"{ROOT}/{device}/down/{COMMAND}/{number}"


def response(device: str, number: int) -> str:
    """What a device answers a command on."""
    return f"{ROOT}/{device}/up/{RESPONSE}/{number}"


def all_responses() -> str:
    """The subscription to every device's answers."""
    return f"{ROOT}/+/up/{RESPONSE}/+"


def is_response(topic: str) -> bool:
    """Whether it is where answers go, whatever stands for the device and the number."""
    parts = topic.split("/")
    return len(parts) == 6 and topic.startswith(f"{ROOT}/") and parts[3:5] == ["up", RESPONSE]


def correlation(boot_id: str, number: int) -> bytes:
    """The correlation data of a command and of all answers to it."""
    return f"{boot_id}:{number}".encode()


def qos(kind: Up | Down) -> int:
    """0 for what may be lost, else 1."""
    return 0 if kind in AT_MOST_ONCE else 1


def parse_topic(topic: str) -> Topic:
    """Take a topic apart.

    Raises:
        Rejected: it is none of ours.
    """
    parts = topic.split("/")
    if len(parts) == 5 and "/".join(parts[:2]) == ROOT and _DEVICE.fullmatch(parts[2]):
        _, _, device, direction, kind = parts
        if direction == "up" and kind in UP:
            return Topic(device, "up", kind)
        if direction == "down" and kind in DOWN:
            return Topic(device, "down", kind)
    if len(parts) == 6 and "/".join(parts[:2]) == ROOT and _DEVICE.fullmatch(parts[2]):
        _, _, device, direction, kind, number = parts
        if (direction, kind) in _NUMBERED and _NUMBER.fullmatch(number):
            return Topic(device, "down" if direction == "down" else "up", kind, int(number))
    raise Rejected(f"Not a topic of ours: {topic[:200]!r}.")
