"""`agent-ctl model bench ... --on DEVICE`: what a model does on a real device of the fleet.

Invariants: the device measures what a release key has signed, so a file is released first, and assigned to
nobody; stopping to watch stops nothing, and the same command again watches on. Exit codes: 0 a plan passed,
1 the device refused or failed or no plan passed, 3 nobody there or not decided in time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from edgeward_ctl import checked, deploying, screen
from edgeward_ctl.client import Client
from edgeward_ctl.follow import FAILED, INTERRUPTED, OK, POLL_S, UNDECIDED
from edgeward_ctl.profile import Profile
from edgeward_ctl.screen import Progressing
from edgeward_wire.api import CommandCreate, CommandStatus
from edgeward_wire.command import FINAL, SECONDS, MachineFacts
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Outcome, PlanOutcome, Verdict

MARGIN_S = 240.0
"""More than the cloud takes to call a silent device's command expired or failed."""
_ANY = ModelRef(path="models/any/1.json", sha256="0" * 64)
"""To check a wish by before there is a model."""
_STYLES: dict[Outcome, str] = {"chosen": "bold green", "passed": "green", "skipped": "yellow"}
_STEPS = {"verifying": "verify", "downloading": "download", "waiting": "wait", "measuring": "measure"}


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure, and how to bundle a file that is not released yet."""

    threads: int | None = None
    seconds: float = SECONDS
    sidecar: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    allow_float: str | None = None


def run(
    profile: Profile, target: str, device: str, waiting: deploying.Waiting, options: Options | None = None
) -> int:
    """Measure FILE, or NAME[@VERSION] of a released model, on a device. Returns the exit code.

    Raises:
        Rejected: the file, the name, the device or the wish is no good; the cloud says why.
        Unavailable: the cloud, its broker or a file cannot be reached.
    """
    asked: list[CommandStatus] = []
    try:
        with Client(profile) as client:
            return _run(client, (target, device), waiting, options or Options(), asked)
    except KeyboardInterrupt:
        _say_stopped(asked[-1] if asked else None)
        return INTERRUPTED


def _run(
    client: Client,
    what: tuple[str, str],
    waiting: deploying.Waiting,
    options: Options,
    asked: list[CommandStatus],
) -> int:
    """`asked` gets the command as soon as there is one."""
    target, device = what
    checked.device_name(device)
    if not client.device(device).online:  # whatever can fail at once fails before the work
        return _say_offline(device, waiting)
    checked.request(CommandCreate, model=_ANY, threads=options.threads, seconds=options.seconds)
    with screen.board(began=waiting.began) as board:
        model = _resolve(client, target, options, board)
        status = _open_command(client, device, model, board) or client.send_command(
            device, CommandCreate(model=model, threads=options.threads, seconds=options.seconds)
        )
        asked.append(status)
        if not waiting.detach:
            timeout = waiting.timeout_s if waiting.timeout_s is not None else options.seconds + MARGIN_S
            status = watch(lambda: client.command(device, status.n), status, board, timeout_s=timeout)
    return _print_end(status, waiting)


# --- what is measured


def _resolve(client: Client, target: str, options: Options, board: Progressing) -> ModelRef:
    path = Path(target)
    if path.exists() or "/" in target or path.suffix == ".onnx":
        wish = deploying.Wish(
            model=path,
            target={},
            sidecar=options.sidecar,
            flags=options.flags,
            allow_float=options.allow_float,
        )
        return deploying.release(client, wish, board)
    if options.sidecar is not None or options.flags or options.allow_float is not None:
        raise Rejected(
            f"{target} names a release: --sidecar, --set and --allow-float cannot change it.",
            "Leave them out, or name a file.",
        )
    return _released(client, target)


def _released(client: Client, target: str) -> ModelRef:
    """NAME, for its newest version, or NAME@VERSION. The device verifies what the cloud lists."""
    name, _, version = target.partition("@")
    entries = [entry for entry in client.models() if entry.name == name]
    for entry in entries:
        if version in ("", entry.version):
            return ModelRef(path=entry.path, sha256=entry.sha256)
    if entries:
        there = ", ".join(entry.version for entry in entries[:10])
        raise Rejected(f"{name} has no version {version!r}.", f"There are: {there}.")
    raise Rejected(
        f"{target!r} is neither a file nor a released model.",
        "`agent-ctl models` lists what is released; a file is named by its path.",
    )


def _open_command(client: Client, device: str, model: ModelRef, board: Progressing) -> CommandStatus | None:
    """The same wish under way already, to be watched on."""
    for status in client.commands(device):
        if status.state not in FINAL and status.model == model:
            board.say(f"{device} is at it already (command {status.n}, by {status.created_by}): watching.")
            return status
    return None


# --- watching


def watch(
    fetch: Callable[[], CommandStatus],
    first: CommandStatus,
    board: Progressing,
    *,
    timeout_s: float,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> CommandStatus:
    """Ask until the device has said its last word or time is up. A cloud that is away ends nothing."""
    status, away, shown = first, False, ""
    deadline = clock() + timeout_s
    while True:
        shown = _show(status, board, shown)
        if status.state in FINAL or clock() >= deadline:
            return status
        wait(POLL_S)
        try:
            status = fetch()
        except Unavailable as error:
            if not away:
                board.say(f"{error.what} Still trying; the device goes on without us.")
            away = True
            continue
        if away:
            board.say("The cloud answers again.")
        away = False


def _show(status: CommandStatus, board: Progressing, shown: str) -> str:
    """Move the bars; returns the step that is under way."""
    if status.state in FINAL:
        board.step(shown or "ask", 1, 1, status.state)
        return shown
    response = status.response
    phase = response.phase if response else None
    step = _STEPS[phase] if phase else "ask"
    if shown and step != shown:
        board.step(shown, 1, 1)
    away = "" if status.online else "offline; it goes on by itself. "
    progress = min(response.progress, 0.999) if response else 0.0
    board.step(step, progress, 1, away + (response.detail if response else f"{status.device} was asked"))
    return step


# --- the end


def exit_code(status: CommandStatus) -> int:
    """What a command's standing amounts to."""
    if status.state == "done":
        verdict = status.response.verdict if status.response else None
        return OK if verdict is not None and verdict.chosen is not None else FAILED
    return FAILED if status.state in ("refused", "failed") else UNDECIDED


def plain(status: CommandStatus, code: int) -> dict[str, Any]:
    """The JSON of it."""
    response = status.response
    verdict = response.verdict if response else None
    machine = response.machine if response else None
    return {
        "device": status.device,
        "command": status.n,
        "model": {"name": status.model.name, "version": status.model.version, **status.model.model_dump()},
        "state": status.state,
        "exit": code,
        "reason": status.reason,
        "chosen": verdict.chosen.title if verdict and verdict.chosen else None,
        "plans": [_plain(outcome) for outcome in verdict.plans] if verdict else [],
        "evidence": verdict.evidence if verdict else None,
        "provisional": verdict.provisional if verdict else None,
        "runtime": verdict.runtime if verdict else {},
        "machine": machine.model_dump(mode="json", exclude_none=True) if machine else None,
        "took_s": response.took_s if response else None,
    }


def _plain(outcome: PlanOutcome) -> dict[str, Any]:
    return {"title": outcome.plan.title, **outcome.model_dump(mode="json", exclude_none=True)}


def plans_table(verdict: Verdict) -> Table:
    """Every plan that was tried, a line each."""
    columns = ("provider", "variant", "threads", "options", "parity", "p50 ms", "p99 ms", "ratio")
    return screen.table(
        (*columns, "memory MB", "verdict", "why"),
        (_line(outcome) for outcome in verdict.plans),
        right=("threads", "parity", "p50 ms", "p99 ms", "ratio", "memory MB"),
    )


def _line(outcome: PlanOutcome) -> list[str | Text]:
    plan = outcome.plan
    options = [
        f"{k.removeprefix('session.')}={v}" for k, v in sorted({**plan.options, **plan.session}.items())
    ]
    if plan.optimisation != "all":
        options.append(f"opt={plan.optimisation}")
    return [
        plan.provider.removesuffix("ExecutionProvider"),
        plan.variant,
        str(plan.threads),
        " ".join(options)[:60],
        screen.number(outcome.parity, 4),
        screen.number(outcome.p50_ms, 2),
        screen.number(outcome.p99_ms, 2),
        screen.number(outcome.ratio, 3),
        screen.number(outcome.memory_mb, 0),
        Text(outcome.outcome, _STYLES.get(outcome.outcome, "red")),
        outcome.reason,
    ]


def machine_lines(device: str, facts: MachineFacts, verdict: Verdict) -> list[str]:
    """What it was measured on, for people."""
    board = f", {facts.board}" if facts.board and facts.board != facts.cpu else ""
    lines = [
        f"{device}: {facts.cpu or facts.arch}{board}, {facts.cores} cores, {facts.memory_mb / 1024:.1f} GB"
    ]
    isa = f"{facts.arch} with {', '.join(facts.isa)}" if facts.isa else facts.arch
    lines.append(f"{isa}; budget {facts.threads} threads; agent {facts.agent}")
    runtime = ", ".join(f"{name} {version}" for name, version in sorted(verdict.runtime.items()))
    before, after = facts.temperature_before_c, facts.temperature_after_c
    heat = f"{before:.0f} to {after:.0f} °C" if before is not None and after is not None else ""
    power = f"power mode {facts.power_mode}" if facts.power_mode else ""
    lines.append("; ".join(filter(None, (runtime, power, heat))))
    lines += [f"beside {line}" for line in facts.beside]
    return [line for line in lines if line]


def _print_end(status: CommandStatus, waiting: deploying.Waiting) -> int:
    code = OK if waiting.detach else exit_code(status)
    response = status.response
    if waiting.as_json:
        screen.print_json(plain(status, code))
    elif response is not None and response.verdict is not None:
        console = screen.out()
        console.print(plans_table(response.verdict))
        if response.machine is not None:
            for line in machine_lines(status.device, response.machine, response.verdict):
                console.print(line, markup=False, soft_wrap=True)
    _say_what_it_means(status)
    return code


def _say_what_it_means(status: CommandStatus) -> None:
    model = f"{status.model.name} {status.model.version}"
    response = status.response
    verdict = response.verdict if response else None
    if status.state not in FINAL:
        screen.say(f"{status.device} has not finished; it goes on measuring {model}.")
        _say_how_to_watch()
    elif status.state != "done":
        screen.say(f"{status.device}: {status.state}. {status.reason}")
    elif verdict is not None and verdict.chosen is None:
        screen.say(f"No plan of {model} passed on {status.device}: {verdict.reason}")
    if verdict is not None and verdict.provisional:
        screen.say("note: provisional. The device was throttled, or others wanted its cores.")
    if verdict is not None and verdict.evidence == "weak":
        screen.say("note: evidence: weak. The golden inputs are seeded noise.")


def _say_stopped(asked: CommandStatus | None) -> None:
    if asked is None:
        screen.say("Stopped. Unless the cloud had just passed it on, the device was not asked.")
        return
    screen.say(f"You stopped watching; {asked.device} goes on measuring.")
    _say_how_to_watch()


def _say_how_to_watch() -> None:
    screen.say("Watch on: give the same command again.")


def _say_offline(device: str, waiting: deploying.Waiting) -> int:
    what = f"{device} is offline: nothing can be measured there now."
    if waiting.as_json:
        screen.print_json({"device": device, "state": "offline", "exit": UNDECIDED, "reason": what})
    screen.say(f"{what} Try again when `agent-ctl devices` shows it online.")
    return UNDECIDED
