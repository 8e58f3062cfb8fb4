"""Qualify: prove on this device which plan runs a model best. `python -m edgeward_agent.qualify --fd N`.

A short-lived child of the daemon: it reads one `Qualify`, tells its progress, and ends with one
`QualifyDone`. One at a time on a machine: it waits for the lock, within bounds. Whatever a provider does
(crash, leak, take ten minutes) ends with this process; SIGTERM ends it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from edgeward_agent.cooling import Cooling
from edgeward_agent.messages import (
    MAX_LINE,
    Qualify,
    QualifyDone,
    QualifyMessage,
    QualifyProgress,
    encode,
)
from edgeward_agent.runner import prepare_process, versions
from edgeward_agent.sensors import Sensors
from edgeward_wire.document import parse
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from edgeward_wire.manifest import Manifest
from edgeward_wire.verdict import Verdict

if TYPE_CHECKING:
    from edgeward_runtime.probe import Findings
    from edgeward_runtime.trials import Subject

log = logging.getLogger("edgeward.qualify")

EXIT_ABANDONED = 70
EXIT_LATER = 75
MAX_LOCK_WAIT_S = 1800.0
_LOCK_POLL_S = 0.1
_SAY_WAITING_S = 5.0
_READ_TIMEOUT_S = 60.0
_MAX_NOTE = 200
_MAX_REASON = 2000


Send = Callable[[QualifyMessage], None]


def subject_of(order: Qualify) -> Subject:
    """The files that an order names."""
    from edgeward_runtime.plans import VariantFacts
    from edgeward_runtime.trials import Candidate, Subject

    manifest, blobs = order.manifest, Path(order.blobs)
    variants = {
        name: Candidate(
            facts=VariantFacts(variant.precision, variant.model.sha256, variant.targets),
            file=blobs / variant.model.sha256,
            golden=blobs / variant.golden.sha256,
            cosine=variant.parity.cosine,
        )
        for name, variant in manifest.variants.items()
        if (blobs / variant.model.sha256).is_file()  # a device fetches only what it may use
    }
    return Subject(
        contract=manifest.contract,
        variants=variants,
        preprocess=blobs / manifest.preprocess.sha256 if manifest.preprocess else None,
        limits=manifest.limits,
    )


def labels_of(manifest: Manifest, blobs: Path) -> tuple[str, ...]:
    """The model's labels; none when it has none. Raises Rejected, Unavailable."""
    from edgeward_runtime.labels import read_labels

    return read_labels(blobs / manifest.labels.sha256) if manifest.labels else ()


def qualify(order: Qualify, say: Send) -> Verdict:
    """Probe every plan that may work here; what does not is in the verdict. It waits while the device is hot.

    Raises:
        Unavailable: the machine was in the way.
    """
    from edgeward_runtime import engine, plans, probe, resources, sessions

    def progress(phase: str, done: int, total: int, note: str) -> None:
        known = cast(Literal["preparing", "validating"], phase)
        say(QualifyProgress(phase=known, done=done, total=total, note=note[:_MAX_NOTE]))

    def waiting(why: str) -> None:
        say(QualifyProgress(phase="waiting", done=0, total=0, note=why[:_MAX_NOTE]))

    cooling = Cooling(
        Sensors(Path(order.root)), max_temp_c=order.max_temp_c, patience_s=order.cool_s, waiting=waiting
    )
    machine = plans.Machine(
        resources.machine(), resources.isa(), sessions.available_providers(), sessions.tensorrt_major()
    )
    reason, findings = "", None
    try:
        engine.check_supported(order.manifest.contract, labels_of(order.manifest, Path(order.blobs)))
        subject = subject_of(order)
        found = plans.candidates(
            {name: variant.facts for name, variant in subject.variants.items()},
            machine,
            threads=order.threads,
            only=order.providers,
            scratch=order.scratch,
            contract=order.manifest.contract,
        )
        findings = probe.probe(
            subject,
            found,
            incumbent=order.incumbent,
            progress=progress,
            budget_s=order.budget_s,
            calm=cooling,
        )
    except Rejected as error:
        reason = error.what
    return _verdict(order, findings, reason)


def _verdict(order: Qualify, findings: Findings | None, reason: str) -> Verdict:
    chosen = findings.chosen if findings else None
    variant = order.manifest.variants.get(chosen.variant) if chosen else None
    return Verdict(
        model_sha256=order.model.sha256,
        key=order.key,
        chosen=chosen,
        plans=findings.outcomes if findings else (),
        reason=((findings.reason if findings else "") or reason)[:_MAX_REASON],
        runtime=versions(),
        evidence=variant.evidence if variant else "strong",
        provisional=findings.provisional if findings else False,
        decided_at=time.time(),
        took_s=findings.took_s if findings else 0.0,
    )


@contextlib.contextmanager
def machine_lock(
    path: Path, waiting: Callable[[float], None], limit_s: float = MAX_LOCK_WAIT_S
) -> Iterator[None]:
    """Hold the machine's lock; `waiting` is called now and then with the seconds waited so far.

    Raises:
        Unavailable: another qualify held it for all of `limit_s`, or the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Unavailable(
            f"The lock {path} cannot be opened: {error.strerror}.", "Set [qualify] lock in agent.toml."
        ) from error
    started, said = time.monotonic(), 0.0
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
                if waited > limit_s:
                    raise Unavailable(f"Another qualify has held {path} for {waited:.0f} s.") from None
                if not said or waited - said > _SAY_WAITING_S:
                    said = waited or 1e-9
                    waiting(waited)
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock


def read_order(link: socket.socket) -> Qualify:
    """The one line that the daemon sends."""
    link.settimeout(_READ_TIMEOUT_S)
    received = bytearray()
    while b"\n" not in received:
        raw = link.recv(1 << 16)
        if not raw:
            raise ConnectionResetError("the daemon closed the socket before it sent an order")
        received += raw
        if len(received) > MAX_LINE:
            raise ValueError(f"a line of more than {MAX_LINE} bytes came from the daemon")
    link.settimeout(None)
    return parse(Qualify, bytes(received.split(b"\n", 1)[0]), limit=MAX_LINE)


def end_with(link: socket.socket, done: threading.Event) -> None:
    """End this process when the daemon goes: nobody would read the verdict."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while link.recv(4096):
                pass
        os._exit(0 if done.is_set() else EXIT_ABANDONED)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def main() -> int:
    """Exit code 0 once the verdict is written; 75 (try again later) when the world was in the way."""
    parser = argparse.ArgumentParser(prog="edgeward-qualify")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the daemon")
    fd = parser.parse_args().fd
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="qualify: %(levelname)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which ends us
    with socket.socket(fileno=fd) as link:
        order = read_order(link)
        done = threading.Event()
        end_with(link, done)

        def say(message: QualifyMessage) -> None:
            link.sendall(encode(message))

        def waiting(waited_s: float) -> None:
            note = f"Another qualify is at work on this machine ({waited_s:.0f} s)."
            say(QualifyProgress(phase="waiting", done=0, total=0, note=note))

        try:
            with machine_lock(Path(order.lock), waiting):
                prepare_process()
                verdict = qualify(order, say)
                done.set()
                say(QualifyDone(verdict=verdict))
        except (BrokenPipeError, ConnectionResetError):
            return EXIT_ABANDONED
        except EdgewardError as error:
            log.error("%s", error)
            return EXIT_LATER
    return 0


if __name__ == "__main__":
    sys.exit(main())
