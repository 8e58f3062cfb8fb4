"""JSON Schemas and the AsyncAPI document, generated from the types: `python -m edgeward_wire.schemas DIR`.

`docs/schemas/` holds the generated files; a test fails when they and the types differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgeward_wire.ack import Ack, Refresh
from edgeward_wire.assignment import Assignment
from edgeward_wire.command import Command, CommandResponse
from edgeward_wire.document import Document
from edgeward_wire.event import Event
from edgeward_wire.manifest import Manifest
from edgeward_wire.reported import Reported
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth, Status
from edgeward_wire.telemetry import Window
from edgeward_wire.topics import (
    AT_MOST_ONCE,
    COMMAND,
    DOWN,
    MAX_PAYLOAD_BYTES,
    RESPONSE,
    RETAINED,
    ROOT,
    UP,
)
from edgeward_wire.verdict import Verdict

DOCUMENTS: dict[str, type[Document]] = {
    "manifest": Manifest,
    "assignment": Assignment,
    "reported": Reported,
    "telemetry": Window,
    "event": Event,
    "result": ResultMessage,
    "status": Status,
    "birth": Birth,
    "ack": Ack,
    "refresh": Refresh,
    "command": Command,
    "response": CommandResponse,
    "verdict": Verdict,
}


def schema_texts() -> dict[str, str]:
    """File name -> text: a JSON Schema for each document that crosses the wire, and the topics' AsyncAPI."""
    schemas = {f"{n}-1.schema.json": kind.model_json_schema(by_alias=True) for n, kind in DOCUMENTS.items()}
    documents = {**schemas, "asyncapi.json": asyncapi()}
    return {
        name: json.dumps(document, indent=2, sort_keys=True) + "\n" for name, document in documents.items()
    }


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3: every topic, who publishes on it, and what. `send` is the device's side."""
    kinds = [("up", kind, "send") for kind in UP] + [("down", kind, "receive") for kind in DOWN]
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for direction, kind, action in kinds:
        channels[kind] = {
            "address": f"{ROOT}/{{device}}/{direction}/{kind}",
            "parameters": {"device": {"description": "The device's id: its certificate's CN."}},
            "messages": {kind: {"payload": _payload(kind)}},
        }
        operations[f"{action}-{kind}"] = {
            "action": action,
            "channel": {"$ref": f"#/channels/{kind}"},
            "bindings": {"mqtt": {"qos": 0 if kind in AT_MOST_ONCE else 1, "retain": kind in RETAINED}},
        }
    _add_commands(channels, operations)
    about = f"MQTT 5 over mutual TLS; a payload is at most {MAX_PAYLOAD_BYTES} bytes of JSON."
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Edgeward devices", "version": "1", "description": about},
        "channels": channels,
        "operations": operations,
    }


def _add_commands(channels: dict[str, Any], operations: dict[str, Any]) -> None:
    """A command and the answers to it: numbered, and held together by the same correlation data."""
    correlated = {"correlationId": {"location": "$message.header#/correlationData"}}
    parameters = {
        "device": {"description": "The device's id: its certificate's CN."},
        "n": {"description": "The command's number: per device, and only growing."},
    }
    for direction, kind, document in (("down", COMMAND, "command"), ("up", RESPONSE, "response")):
        channels[kind] = {
            "address": f"{ROOT}/{{device}}/{direction}/{kind}/{{n}}",
            "parameters": parameters,
            "messages": {kind: {**correlated, "payload": _payload(document)}},
        }
    bindings = {"mqtt": {"qos": 1, "retain": False}}
    operations[f"receive-{COMMAND}"] = {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{COMMAND}"},
        "reply": {"channel": {"$ref": f"#/channels/{RESPONSE}"}},
        "bindings": bindings,
    }
    operations[f"send-{RESPONSE}"] = {
        "action": "send",
        "channel": {"$ref": f"#/channels/{RESPONSE}"},
        "bindings": bindings,
    }


def _payload(kind: str) -> dict[str, Any]:
    if kind == "metrics":  # flat on purpose: other people's dashboards read it
        return {"type": "object", "additionalProperties": {"type": "number"}}
    return {"$ref": f"./{kind}-1.schema.json"}


def main() -> None:
    """Write them into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in schema_texts().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
