"""What survives a power cut: each pipeline's record, the newest verified assignment, and how we stopped.

Invariants: the file is replaced whole (temporary file, fsync, rename, fsync of the directory), so it is the
old one or the new one. It embeds the verified rows and manifests, so that the metadata cache is disposable.
A damaged file is set aside and said; a record in a state that this version does not know goes back to
its last committed model. Nothing in here can stop the daemon from starting.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from edgeward_agent.files import replace_file
from edgeward_agent.states import STATES, Deployment, Record
from edgeward_wire.assignment import MAX_ASSIGNMENT_BYTES
from edgeward_wire.document import Document, faults
from edgeward_wire.errors import Unavailable
from edgeward_wire.identifiers import PipelineName, ShortText

log = logging.getLogger(__name__)

MAX_JOURNAL_BYTES = 32 << 20


class Saved(Document):
    """The file's contents."""

    schema_: Literal["edgeward.journal/1"] = Field(default="edgeward.journal/1", alias="schema")
    orderly: bool = False
    """True from an orderly stop until the next start."""
    assignment: str = Field(default="", max_length=MAX_ASSIGNMENT_BYTES)
    """The newest verified assignment's text."""
    pipelines: dict[PipelineName, Record] = Field(default_factory=dict)
    note: ShortText = ""


class Journal:
    """`<state>/journal.json`. Owned by the machine's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.fault = ""
        """What was wrong with the file at start, in words for a person; empty when nothing was."""

    def load(self) -> Saved:
        """Read it; what cannot be read is quarantined beside it as `journal.json.damaged`."""
        try:
            with self._path.open("rb") as file:
                raw = file.read(MAX_JOURNAL_BYTES + 1)
        except FileNotFoundError:
            return Saved()
        except OSError as error:
            return self._quarantine(f"it cannot be read: {error.strerror}")
        if len(raw) > MAX_JOURNAL_BYTES:
            return self._quarantine(f"it is longer than {MAX_JOURNAL_BYTES} bytes")
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            return self._quarantine("it is not JSON")
        if not isinstance(data, dict) or not isinstance(data.get("pipelines", {}), dict):
            return self._quarantine("it is not a journal")
        return self._read(data)

    def save(self, saved: Saved) -> None:
        """Make it durable before anything acts on it.

        Raises:
            Unavailable: the disk does not take it; the old file stands.
        """
        try:
            replace_file(self._path, saved.to_bytes(), mode=0o600)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            why = "disk full" if full else (error.strerror or str(error))
            step = f"Free some space below {self._path.parent}." if full else ""
            raise Unavailable(f"The journal cannot be written: {why}.", step) from error

    def _read(self, data: Mapping[str, Any]) -> Saved:
        records: dict[str, Record] = {}
        for name, plain in data.get("pipelines", {}).items():
            record, fault = read_record(plain)
            if fault:
                self._say(f"pipeline {name}: {fault}")
            if record is not None:
                records[name] = record
        try:
            return Saved.model_validate({**data, "pipelines": records})
        except ValidationError as error:
            return self._quarantine(faults(error))

    def _quarantine(self, why: str) -> Saved:
        aside = self._path.with_name(self._path.name + ".damaged")
        with contextlib.suppress(OSError):
            os.replace(self._path, aside)
        self._say(f"{why}; it was set aside as {aside.name} and the device starts without it")
        return Saved()

    def _say(self, text: str) -> None:
        log.error("The journal %s: %s.", self._path, text)
        self.fault = f"{self.fault}; {text}".strip("; ")


def read_record(plain: object) -> tuple[Record | None, str]:
    """A record from untrusted JSON, and what had to be given up. None: not even a committed model is left."""
    if not isinstance(plain, dict):
        return None, "the record is not readable"
    if plain.get("state") in STATES:
        try:
            record = Record.model_validate(plain)
        except ValidationError as error:
            fault = faults(error)
        else:
            return _checked(record)
    else:
        fault = f"unknown state {str(plain.get('state'))[:40]!r}"
    committed, previous = _deployment(plain.get("committed")), _deployment(plain.get("previous"))
    if committed is None:
        return None, f"{fault}; no committed model is left"
    record = Record(committed=committed, previous=previous)
    return record, f"{fault}; back to the last committed model {committed.title}"


def _checked(record: Record) -> tuple[Record | None, str]:
    """Deployments whose manifest is not what was signed are dropped."""
    change: dict[str, Any] = {}
    for name in ("candidate", "committed", "previous"):
        deployment = getattr(record, name)
        if deployment is not None and _deployment(deployment) is None:
            change[name] = None
    if not change:
        return record, ""
    if "candidate" in change or record.candidate is None:
        change |= {"state": "idle", "candidate": None, "update": None, "ending": None}
    return record.model_copy(update=change), f"damaged manifest of {', '.join(sorted(change))}"


def _deployment(plain: object) -> Deployment | None:
    try:
        deployment = plain if isinstance(plain, Deployment) else Deployment.model_validate(plain)
    except ValidationError:
        return None
    digest = hashlib.sha256(deployment.manifest.encode()).hexdigest()
    return deployment if digest == deployment.row.model.sha256 else None
