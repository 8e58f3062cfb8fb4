"""Qualify as the machine sees it: start it, watch it, and remember its verdicts.

Invariants: everything here runs on the machine's thread. A qualify that overruns, crashes or ends without a
verdict is a failure with a reason; it never takes the daemon with it. A cached verdict is used only for the
very key it was made under, and not when it was provisional.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from edgeward_agent import messages
from edgeward_agent.files import replace_file
from edgeward_agent.running import Post
from edgeward_agent.workers import Child, Exit
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.verdict import Verdict

log = logging.getLogger(__name__)

MAX_VERDICT_BYTES = 1 << 20
MAX_VERDICTS = 64
WORK_S = 3600.0
"""Engine builds take ten minutes on an Orin; an hour is a hang."""
WAIT_S = 4 * 3600.0
"""For the machine's lock, behind other pipelines and other agents."""
NICE = 10
EXIT_LATER = 75
"""As qualify says that the world was in the way: EX_TEMPFAIL."""


class Verdicts:
    """The directory `<state>/verdicts`: one file a key. A cache: losing it costs time only."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def get(self, key: str, model_sha256: str) -> Verdict | None:
        """The verdict of this key if it is there, whole, final, and about this model."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                verdict = parse(Verdict, file.read(MAX_VERDICT_BYTES + 1), limit=MAX_VERDICT_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, Rejected) as error:
            log.warning("The cached verdict %s is not readable and is made again: %s", path.name, error)
            return None
        fits = verdict.key == key and verdict.model_sha256 == model_sha256 and verdict.chosen is not None
        return verdict if fits and not verdict.provisional else None

    def put(self, verdict: Verdict) -> None:
        """Keep it; a full disk is no reason to fail."""
        try:
            replace_file(self._path(verdict.key), verdict.to_bytes())
            self._prune()
        except OSError as error:
            log.warning("The verdict is not cached: %s", error.strerror)

    def forget(self, key: str) -> None:
        """It does not hold any more."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"

    def _prune(self) -> None:
        files = sorted(self._directory.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for path in files[:-MAX_VERDICTS]:
            path.unlink()


class Trial:
    """One run of qualify. Callbacks come on the machine's thread; `ended` exactly once unless `kill`ed."""

    def __init__(
        self,
        name: str,
        command: tuple[str, ...],
        request: messages.Qualify,
        post: Post,
        *,
        progressed: Callable[[messages.QualifyProgress], None],
        ended: Callable[[Verdict | Rejected | Unavailable], None],
    ) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started.
        """
        self._progressed = progressed
        self._ended = ended
        self._verdict: Verdict | None = None
        self._note = ""
        self._over = False
        self._deadline = time.monotonic() + WORK_S
        self._waiting = False
        child: Child[messages.QualifyMessage] = Child(
            name,
            command,
            messages.FROM_QUALIFY,
            lambda message: post(partial(self._said, message)),
            lambda ended: post(partial(self._exited, ended)),
            nice=NICE,
        )
        self._child = child
        child.send(request)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    def kill(self) -> None:
        """Nobody wants to know any more."""
        self._over = True
        self._child.kill("It is not needed any more.")

    def tick(self, now: float) -> None:
        """The deadline."""
        if not self._over and now > self._deadline:
            self._child.kill(f"It took longer than {WAIT_S if self._waiting else WORK_S:g} s{self._note}.")

    def _said(self, message: messages.QualifyMessage) -> None:
        if self._over:
            return
        if isinstance(message, messages.QualifyDone):
            self._verdict = message.verdict
            return
        waiting = message.phase == "waiting"
        if waiting != self._waiting:
            self._waiting = waiting
            self._deadline = time.monotonic() + (WAIT_S if waiting else WORK_S)
        self._note = f" at {message.note}" if message.note else ""
        self._progressed(message)

    def _exited(self, ended: Exit) -> None:
        if self._over:
            return
        self._over = True
        if self._verdict is not None:
            self._ended(self._verdict)
        elif ended.code == EXIT_LATER:
            self._ended(Unavailable(f"Qualify could not work: {ended.text}."))
        else:
            self._ended(Rejected(f"Qualify ended without a verdict{self._note}: {ended.text}."))
