"""`edgeward-agent run` and `probe`: a model on this machine, with no cloud at all.

numpy, OpenCV and ONNX Runtime are imported by the handlers only: the daemon's command line stays light.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward_agent.cooling import PATIENCE_S, Cooling
from edgeward_agent.sensors import Sensors
from edgeward_agent.sysinfo import this_machine
from edgeward_wire.errors import EdgewardError, Rejected
from edgeward_wire.histogram import Recorder
from edgeward_wire.manifest import ModelRef
from edgeward_wire.result import headline
from edgeward_wire.telemetry import STAGES, Stage
from edgeward_wire.verdict import Plan, PlanOutcome

if TYPE_CHECKING:
    from edgeward_runtime.contract_guess import Guess
    from edgeward_runtime.pipeline import Happening, Pipeline, Saw
    from edgeward_runtime.probe import Findings

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_REDRAW_S = 0.5
_PLAIN_LINE_S = 1.0
_ENDING_POLL_S = 0.02
_CLOSED_POLL_S = 0.1
_MAX_WAITING = 64
"""Answers that nobody has read yet. Each may hold a picture of what was segmented."""
_SOURCE = "source"
_MAX_THREADS = 1024
_PROVIDER = re.compile(r"[A-Za-z][A-Za-z0-9]{0,39}")


def register(subparsers: Subparsers) -> None:
    """Add `run` and `probe`; each sets `handler`, which takes the arguments and returns the exit code."""
    add_run(subparsers)
    add_probe(subparsers)


def add_run(subparsers: Subparsers) -> None:
    """`run`: a model on a camera, a video, pictures or sound."""
    parser = subparsers.add_parser(
        "run", help="run a model on a camera, a video, pictures or sound, without a cloud"
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FILE", help="an ONNX file")
    parser.add_argument(
        "--source",
        required=True,
        help="a camera's number or device, a video file, a directory of pictures",
    )
    _model_arguments(parser)
    parser.add_argument("--realtime", action="store_true", help="play a file at its own pace")
    parser.add_argument("--loop", action="store_true", help="play a file again and again")
    parser.add_argument("--frames", type=_positive, metavar="N", help="end after N frames")
    parser.add_argument("--probe", action="store_true", help="find the fastest plan first (some seconds)")
    parser.add_argument("--json", action="store_true", help="one JSON object a frame, and the summary last")
    parser.set_defaults(handler=lambda arguments: _guarded(run, arguments))


def add_probe(subparsers: Subparsers) -> None:
    """`probe`: the table of plans."""
    parser = subparsers.add_parser("probe", help="try every way to run a model on this machine, and time it")
    parser.add_argument("model", type=Path, metavar="FILE", help="an ONNX file")
    _model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(handler=lambda arguments: _guarded(probe, arguments))


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", metavar="FILE", help="text, one label a line")
    parser.add_argument("--task", help="what the model is for, e.g. classification")
    parser.add_argument("--samples", metavar="DIR", help="pictures or WAV files like those that it will meet")
    parser.add_argument("--sidecar", type=Path, metavar="FILE", help="default: the .toml beside the model")
    parser.add_argument(
        "--provider",
        type=_provider,
        action="append",
        default=[],
        metavar="NAME",
        help="only this one, e.g. CPU (repeatable)",
    )
    parser.add_argument("--threads", type=_threads, metavar="N", help="default: all cores")


def _positive(text: str, most: int = 1 << 30) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 12 or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 1 to {most}")
    return int(text)


def _threads(text: str) -> int:
    return _positive(text, _MAX_THREADS)


def _provider(text: str) -> str:
    if not _PROVIDER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no provider's name: CPU, OpenVINO, CUDA, ...")
    return text


def _guarded(handler: Any, arguments: argparse.Namespace) -> int:
    """What goes wrong in two lines on stderr, and the exit code."""
    try:
        if (fault := this_machine().runtime_fault) is not None:
            raise fault
        code: int = handler(arguments)
        return code
    except EdgewardError as error:
        print(f"error: {error.what}", file=sys.stderr)
        if error.next_step:
            print(f"next: {error.next_step}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _guess(arguments: argparse.Namespace) -> Guess:
    from edgeward_agent.runner import prepare_process

    prepare_process()
    from edgeward_runtime.contract_guess import guess

    flags = {key: getattr(arguments, key) for key in ("labels", "task", "samples")}
    return guess(arguments.model, arguments.sidecar, {k: v for k, v in flags.items() if v is not None})


# --- probe


def probe(arguments: argparse.Namespace) -> int:
    """Exit code 0 when a plan passed, 1 when none did."""
    known = _guess(arguments).complete(without=("labels",))
    findings = _find(known, arguments)
    if arguments.json:
        print(json.dumps(_plain_findings(arguments.model, known, findings)))
    else:
        print("\n".join(findings_text(known, findings)))
    return 0 if findings.chosen else 1


def _find(known: Guess, arguments: argparse.Namespace) -> Findings:
    """Probe a file against golden vectors made on the spot."""
    from edgeward_runtime import parity, plans, resources, sessions
    from edgeward_runtime.engine import check_supported
    from edgeward_runtime.probe import probe
    from edgeward_runtime.trials import Candidate, Subject

    check_supported(known.contract)
    facts = plans.VariantFacts(known.precision, "")
    made = _golden(arguments.model, known)
    subject = Subject(known.contract, {known.precision: Candidate(facts, arguments.model, made, parity.GATE)})
    machine = plans.Machine(
        resources.machine(), resources.isa(), sessions.available_providers(), sessions.tensorrt_major()
    )
    found = plans.candidates(
        {known.precision: facts},
        machine,
        threads=arguments.threads or resources.cores(),
        only=arguments.provider,
        contract=known.contract,
    )
    live = sys.stderr.isatty()

    def progress(phase: str, done: int, total: int, note: str) -> None:
        if live:
            print(f"\r\x1b[K{phase} {done}/{total}: {note}"[:110], end="", file=sys.stderr, flush=True)

    calm = Cooling(Sensors(), max_temp_c=None, patience_s=PATIENCE_S, waiting=_Waiting(live=live))
    try:
        return probe(subject, found, progress=progress, calm=calm)
    finally:
        if live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Waiting:
    """Says on stderr why nothing is measured yet: over and over where somebody looks, else once."""

    def __init__(self, *, live: bool) -> None:
        self._live, self._said = live, False

    def __call__(self, why: str) -> None:
        if self._live:
            print(f"\r\x1b[K{why}"[:110], end="", file=sys.stderr, flush=True)
        elif not self._said:
            print(why, file=sys.stderr, flush=True)
        self._said = True


def _golden(model: Path, known: Guess) -> bytes:
    """Golden vectors from the samples, if there are any. Raises Rejected, Unavailable."""
    from edgeward_runtime import feeds, golden

    if known.samples is None:
        return golden.make_golden(model, known.contract)
    if any(port.audio is not None for port in known.contract.inputs):
        windows = feeds.windows_of(known.contract, known.samples, golden.SEQUENCE_STEPS)
        return golden.make_golden(model, known.contract, feeds=windows)
    return golden.make_golden(model, known.contract, golden.find_pictures(known.samples))


def findings_text(known: Guess, findings: Findings) -> list[str]:
    """The table of plans, why some failed, and the winner, as lines."""
    rows: list[tuple[str, ...]] = [
        ("plan", "result", "nodes", "cosine", "p50 ms", "p99 ms", "×", "load ms", "MB")
    ]
    rows += [_row(outcome) for outcome in findings.outcomes]
    lines = [*table(rows, right=frozenset(range(2, 9))), ""]
    lines += [f"{o.plan.title}: {o.reason}" for o in findings.outcomes if o.reason]
    if any(o.unverified for o in findings.outcomes):
        lines.append("* never run on its hardware before this release")
    if not known.samples:
        lines.append(
            "The vectors that the outputs were held against are made of noise: --samples DIR is stronger."
        )
    if findings.provisional:
        lines.append("Something else wanted the cores, or they were throttled: the numbers are provisional.")
    winner = f"Best: {findings.chosen.title}" if findings.chosen else findings.reason
    return [*lines, f"{winner}  ({findings.took_s:.1f} s)"]


def _row(outcome: PlanOutcome) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    nodes = "" if outcome.nodes_total is None else f"{outcome.nodes_on_provider}/{outcome.nodes_total}"
    return (
        outcome.plan.title + (" *" if outcome.unverified else ""),
        outcome.outcome.replace("_", " "),
        nodes,
        number(outcome.parity, ".4f"),
        number(outcome.p50_ms, ".2f"),
        number(outcome.p99_ms, ".2f"),
        number(outcome.ratio, ".2f"),
        number(outcome.load_ms, ".0f"),
        number(outcome.memory_mb, ".0f"),
    )


def _plain_findings(model: Path, known: Guess, findings: Findings) -> dict[str, Any]:
    return {
        "model": str(model),
        "precision": known.precision,
        "chosen": findings.chosen.model_dump(mode="json") if findings.chosen else None,
        "plans": [o.model_dump(mode="json", exclude_none=True) for o in findings.outcomes],
        "reason": findings.reason,
        "evidence": "strong" if known.samples else "weak",
        "provisional": findings.provisional,
        "took_s": round(findings.took_s, 3),
    }


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows as aligned lines, a rule below the first; columns in `right` are aligned to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (
            c.rjust(w) if k in right else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(rows[0]), "  ".join("─" * w for w in widths), *map(line, rows[1:])]


# --- run


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 at the end of the source, after --frames, or on Ctrl-C."""
    known = _guess(arguments).complete(without=("samples",))
    from edgeward_runtime.engine import Recipe, check_supported
    from edgeward_runtime.feeds import feedable
    from edgeward_runtime.labels import read_labels
    from edgeward_runtime.pipeline import Pipeline
    from edgeward_runtime.sources import kind_of
    from edgeward_runtime.sources.options import SourceOptions

    labels = read_labels(known.labels) if known.labels else ()
    check_supported(known.contract, labels)
    if not feedable(known.contract):
        takes = ", ".join(
            f"{port.name} {port.shape}" for port in known.contract.inputs if port.bind == "source"
        )
        raise Rejected(
            f"No source can feed this model: it takes {takes}, not one picture or one sound.",
            "Try it with `edgeward-agent probe`; a device serves it to those who ask it.",
        )
    options = SourceOptions(_SOURCE, arguments.source, realtime=arguments.realtime, loop=arguments.loop)
    kind_of(options)  # a file that is not there is a mistake here, where a daemon would wait for it
    recipe = Recipe(
        model=ModelRef(path=f"models/{known.name}/local.json", sha256="0" * 64),
        contract=known.contract,
        file=arguments.model,
        labels=labels,
        plan=_plan(known, arguments),
    )
    inbox = _Inbox(patient=options.policy == "every")
    pipeline = Pipeline("local", [options], inbox.put, result_interval_s=0.0)
    view = _View(recipe.plan, as_json=arguments.json)
    pipeline.serve(0, recipe)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            for saw in _answers(inbox, pipeline, arguments.frames):
                view.show(saw)
    finally:
        inbox.close()
        pipeline.stop()
    if pipeline.totals.errors and not pipeline.totals.frames:
        raise Rejected("Not one frame of the source could be run.", "The log above says why.")
    view.end(inbox.lost)
    return 0


def _plan(known: Guess, arguments: argparse.Namespace) -> Plan:
    from edgeward_runtime import plans, resources

    if arguments.probe:
        findings = _find(known, arguments)
        if findings.chosen is None:
            raise Rejected(findings.reason, "See `edgeward-agent probe` for every plan.")
        return findings.chosen
    provider = plans.provider_name(arguments.provider[0]) if arguments.provider else plans.CPU
    threads = arguments.threads or resources.cores()
    return Plan(provider=provider, variant=known.precision, threads=threads)


class _Inbox:
    """What the pipeline's threads say, until it is shown: bounded, however slowly somebody reads.

    `patient`: a file waits for its reader, and no answer of it is lost. A live source waits for nobody: what
    does not fit is lost and counted.
    """

    def __init__(self, *, patient: bool) -> None:
        self.lost = 0
        self._patient = patient
        self._waiting: queue.Queue[Happening] = queue.Queue(_MAX_WAITING)
        self._closed = False

    def put(self, happening: Happening) -> None:
        """From any thread of the pipeline; it holds up the thread while nothing fits."""
        from edgeward_runtime.pipeline import Saw

        if isinstance(happening, Saw) and not self._patient:
            try:
                self._waiting.put_nowait(happening)
            except queue.Full:
                self.lost += not self._closed
            return
        while not self._closed:
            with contextlib.suppress(queue.Full):
                self._waiting.put(happening, timeout=_CLOSED_POLL_S)
                return

    def get(self, wait_s: float) -> Happening:
        """The next. Raises queue.Empty."""
        return self._waiting.get(timeout=wait_s)

    def empty(self) -> bool:
        return self._waiting.empty()

    def close(self) -> None:
        """Nobody listens any more, and nobody is held up."""
        self._closed = True


def _answers(inbox: _Inbox, pipeline: Pipeline, frames: int | None) -> Iterator[Saw]:
    """What was seen, until the source ends or `frames` have come. Raises Rejected when the model fails."""
    from edgeward_runtime.capture import END_OF_FILE
    from edgeward_runtime.pipeline import Crashed, NotServed, Saw, Served, SourceChange

    seen, ended = 0, False
    while True:
        if ended and pipeline.idle() and inbox.empty():
            return  # in this order: an answer is emitted before its thread is idle
        try:
            happening = inbox.get(_ENDING_POLL_S if ended else 1.0)
        except queue.Empty:
            pipeline.tick(time.monotonic())
            continue
        if isinstance(happening, Served):
            pipeline.start()  # not before: the first frame would wait for the loading of the model
        elif isinstance(happening, Saw):
            yield happening
            seen += 1
            if seen == frames:
                return
        elif isinstance(happening, SourceChange) and not happening.up:
            ended = happening.detail == END_OF_FILE
            if not ended:
                print(f"The source is down: {happening.detail} Trying again.", file=sys.stderr)
        elif isinstance(happening, NotServed):
            raise Rejected(happening.reason, "See `edgeward-agent probe` for every plan.")
        elif isinstance(happening, Crashed):
            raise happening.error


class _Tally:
    """Frames and their stages over a stretch of time."""

    def __init__(self, since: float | None = None) -> None:
        """`since`: when the answer before came. None: there is none, and the first one only begins."""
        self._stages: dict[Stage, Recorder] = {stage: Recorder() for stage in STAGES}
        self._since, self.until = since, since
        self._intervals = 0
        self.frames = 0

    def add(self, stages: Mapping[Stage, float], now: float) -> None:
        self.frames += 1
        if self._since is None:
            self._since = now
        else:
            self._intervals += 1
        self.until = now
        for stage, took in stages.items():
            self._stages[stage].record(took)

    def fps(self) -> float:
        """Answers a second; 0 while there is only one."""
        if self._since is None or self.until is None or not self._intervals:
            return 0.0
        return self._intervals / max(self.until - self._since, 1e-9)

    def latencies(self) -> dict[Stage, tuple[float, float]]:
        """p50 and p99 in milliseconds; the tally is empty afterwards."""
        figures: dict[Stage, tuple[float, float]] = {}
        for stage, recorder in self._stages.items():
            taken = recorder.take()
            figures[stage] = (taken.percentile(0.5), taken.percentile(0.99))
        return figures


class _View:
    """What a person (or a program) sees of a run."""

    def __init__(self, plan: Plan, *, as_json: bool) -> None:
        self._plan, self._json = plan, as_json
        self._live = sys.stdout.isatty() and not as_json
        self._all, self._window = _Tally(), _Tally()
        self._due = 0.0

    def show(self, saw: Saw) -> None:
        """One answer."""
        now = time.monotonic()
        self._all.add(saw.stages, now)
        self._window.add(saw.stages, now)
        if self._json:
            print(json.dumps(_plain_saw(saw)), flush=True)
            return
        if now < self._due:
            return
        first, self._due = not self._due, now + (_REDRAW_S if self._live else _PLAIN_LINE_S)
        fps = "" if first else f"  {self._window.fps():.1f} fps"
        from edgeward_agent.results import message

        line = f"{headline(message(saw, 'local'))}{fps}  {_latencies_line(self._window.latencies())}"
        self._window = _Tally(now)
        if self._live:
            print("\r\x1b[K" + line[: os.get_terminal_size().columns - 1], end="", flush=True)
        else:
            print(line, flush=True)

    def end(self, lost: int) -> None:
        """The summary. `lost`: answers that came faster than they were read."""
        frames, fps, latencies = self._all.frames, self._all.fps(), self._all.latencies()
        if self._json:
            stages = {
                s: {"p50_ms": round(p50, 3), "p99_ms": round(p99, 3)} for s, (p50, p99) in latencies.items()
            }
            told = {"plan": self._plan.title, "frames": frames, "lost": lost, "fps": round(fps, 2)}
            print(json.dumps({**told, "stages": stages}))
            return
        print(f"{chr(10) * self._live}{frames} frames, {fps:.1f} a second, on {self._plan.title}")
        if lost:
            print(f"{lost} more were answered while nobody read.")
        if frames:
            rows = [(s.replace("_", " "), f"{p50:.2f}", f"{p99:.2f}") for s, (p50, p99) in latencies.items()]
            print("\n".join(table([("stage", "p50 ms", "p99 ms"), *rows], right=frozenset({1, 2}))))


def _latencies_line(latencies: Mapping[Stage, tuple[float, float]]) -> str:
    names: dict[Stage, str] = {
        "end_to_end": "end to end",
        "decode": "decode",
        "preprocess": "prep",
        "inference": "infer",
        "postprocess": "post",
    }
    parts = [f"{short} {latencies[s][0]:.1f}/{latencies[s][1]:.1f}" for s, short in names.items()]
    return "p50/p99 ms: " + "  ".join(parts)


def _plain_saw(saw: Saw) -> dict[str, Any]:
    """The result as MQTT has it, and the milliseconds of each stage."""
    from edgeward_agent import results

    told: dict[str, Any] = results.message(saw, "local").model_dump(mode="json", exclude_defaults=True)
    parts = ("source", "time", "top", "boxes", "areas", "speech", "values")
    shown = {key: told[key] for key in parts if key in told}
    return {**shown, "ms": {stage: round(took, 3) for stage, took in saw.stages.items()}}
