"""`agent-ctl`: the commands, and the boundary behind which no error is a traceback.

Invariants: nothing heavy is imported before a command runs, so that `--help` answers at once; every
error leaves as `error: what` and `next: step` on stderr (and as JSON on stdout with --json). Exit codes:
0 done, 1 failed, 2 bad usage or input, 3 not decided (time is up, nobody online), 69 the cloud is
unreachable, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward_ctl.model import app as model_app
from edgeward_wire import __version__
from edgeward_wire.errors import EdgewardError, Unavailable

if TYPE_CHECKING:
    from edgeward_ctl.deploying import Waiting
    from edgeward_ctl.profile import Profile

USAGE, UNAVAILABLE, INTERRUPTED, BUG = 2, 69, 130, 70
DEBUG = "EDGEWARD_DEBUG"
_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="agent-ctl",
    help="Deploy signed models to fleets of edge devices, and see how they do.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)
fleets_app = typer.Typer(
    help="Fleets: list them, or create one.", invoke_without_command=True, context_settings=_HELP
)
mqtt_app = typer.Typer(
    help="Access to the broker for dashboards.", no_args_is_help=True, context_settings=_HELP
)
app.add_typer(fleets_app, name="fleets")
app.add_typer(model_app, name="model")
app.add_typer(mqtt_app, name="mqtt")

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Fleet = Annotated[str | None, typer.Option("--fleet", "-f", help="A fleet's name.")]
OneDevice = Annotated[str | None, typer.Option("--device", "-d", help="One device's name.")]
Pipeline = Annotated[str, typer.Option(help="Which model slot of the device.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the devices.")]
Timeout = Annotated[
    str | None,
    typer.Option(
        "--timeout", help="How long to wait for the devices, e.g. 10m.", show_default="probation + 15m"
    ),
]


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"agent-ctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    *,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="Profile directory.",
            envvar="EDGEWARD_PROFILE",
            show_default="~/.config/edgeward",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which this is.")
    ] = False,
) -> None:
    context.obj = profile


# --- deploy


@app.command()
def deploy(
    context: typer.Context,
    *,
    model: Annotated[Path, typer.Argument(help="The ONNX file, or a bundle.", show_default=False)],
    fleet: Fleet = None,
    device: OneDevice = None,
    pipeline: Pipeline = "main",
    name: Annotated[str | None, typer.Option(help="The model's name.", show_default="the file's")] = None,
    version: Annotated[str | None, typer.Option(help="Its version.", show_default="the next number")] = None,
    task: Annotated[str | None, typer.Option(help="classification, ...")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one label a line.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Pictures or WAV files as the devices see and hear them, or an .npz.")
    ] = None,
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A sidecar's setting, e.g. inputs.image.width=320.")
    ] = None,
    allow_float: Annotated[
        str | None, typer.Option("--allow-float", metavar="REASON", help="Deploy a model that is not INT8.")
    ] = None,
    probation: Annotated[
        str | None,
        typer.Option(
            help="How long it must prove itself on live frames, e.g. 5m.", show_default="the cloud's, 5m"
        ),
    ] = None,
    timeout: Timeout = None,
    detach: Detach = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Bundle and check, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Sign a model here, publish it, and roll it out; shows each device's way until it serves."""
    from edgeward_ctl import checked, deploying

    flags: dict[str, Any] = checked.settings(settings or [])
    said = {"name": checked.model_name(name), "task": task, "labels": labels, "samples": samples}
    flags.update({key: str(value) for key, value in said.items() if value is not None})
    wish = deploying.Wish(
        model=model,
        target=checked.one_target(fleet, device),
        pipeline=checked.device_name(pipeline, "pipeline"),
        version=checked.version_name(version),
        sidecar=sidecar,
        flags=flags,
        allow_float=allow_float,
        probation_s=checked.seconds(probation) if probation is not None else None,
        dry_run=dry_run,
    )
    waiting = _waiting(timeout, detach, as_json)
    raise typer.Exit(deploying.deploy(_profile(context), wish, waiting))


@app.command()
def rollback(
    context: typer.Context,
    *,
    fleet: Fleet = None,
    device: OneDevice = None,
    pipeline: Pipeline = "main",
    timeout: Timeout = None,
    detach: Detach = False,
    as_json: Json = False,
) -> None:
    """Go back to the model that was finished with before."""
    from edgeward_ctl import checked, deploying

    target = checked.one_target(fleet, device)
    pipeline = checked.device_name(pipeline, "pipeline")
    waiting = _waiting(timeout, detach, as_json)
    raise typer.Exit(deploying.rollback(_profile(context), target, pipeline, waiting))


# --- look


@app.command()
def status(context: typer.Context, fleet: Fleet = None, as_json: Json = False) -> None:
    """What runs where, how fast, and what it sees."""
    from edgeward_ctl import showing

    showing.status(_profile(context), _fleet(fleet), as_json)


@app.command()
def watch(context: typer.Context, fleet: Fleet = None, as_json: Json = False) -> None:
    """The same, live, until Ctrl-C."""
    from edgeward_ctl import showing

    showing.watch(_profile(context), _fleet(fleet), as_json)


@app.command()
def results(
    context: typer.Context,
    *,
    fleet: Fleet = None,
    device: OneDevice = None,
    follow: Annotated[bool, typer.Option("--follow", help="What is new, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """What the devices see."""
    from edgeward_ctl import checked
    from edgeward_ctl import results as seen

    who = checked.device_name(device) if device is not None else None
    code = seen.show(_profile(context), fleet=_fleet(fleet), device=who, follow=follow, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def devices(context: typer.Context, fleet: Fleet = None, as_json: Json = False) -> None:
    """Who is enrolled, and on what hardware."""
    from edgeward_ctl import showing

    showing.devices(_profile(context), _fleet(fleet), as_json)


@app.command()
def models(context: typer.Context, as_json: Json = False) -> None:
    """What has been released."""
    from edgeward_ctl import showing

    showing.models(_profile(context), as_json)


@app.command()
def log(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="The device's name.", show_default=False)],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=500, help="How many entries.")] = 20,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="All numbers and every plan tried.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Each deployment of a device, with its reason and numbers."""
    from edgeward_ctl import checked, showing

    name = checked.device_name(device)
    showing.log(_profile(context), name, limit=limit, verbose=verbose, as_json=as_json)


@app.command()
def telemetry(
    context: typer.Context,
    fleet: Fleet = None,
    device: OneDevice = None,
    since: Annotated[str, typer.Option(help="How long ago (10m, 24h), or Unix seconds.")] = "10m",
    as_json: Json = False,
) -> None:
    """Frames, drops and true percentiles since a moment.

    Where there is more than the cloud merges at once, a line on stderr says since when they are complete.
    """
    from edgeward_ctl import checked, showing

    who = checked.device_name(device) if device is not None else None
    showing.telemetry(_profile(context), _fleet(fleet), who, checked.moment(since), as_json)


# --- who belongs


@fleets_app.callback()
def fleets(context: typer.Context, as_json: Json = False) -> None:
    """Fleets: list them, or create one."""
    if context.invoked_subcommand is None:
        from edgeward_ctl import showing

        showing.fleets(_profile(context), as_json)


@fleets_app.command("create")
def fleets_create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The fleet's name.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Create a fleet."""
    from edgeward_ctl import managing

    before = context.parent is not None and bool(context.parent.params.get("as_json"))
    managing.create_fleet(_profile(context), name, as_json or before)


@app.command("enroll-token")
def enroll_token(
    context: typer.Context,
    *,
    fleet: Annotated[str, typer.Option("--fleet", "-f", help="The fleet to join.", show_default=False)],
    uses: Annotated[int, typer.Option(min=1, max=100_000, help="How many devices may use it.")] = 1,
    ttl: Annotated[str, typer.Option(help="How long it is good for, e.g. 30m, 24h, 7d.")] = "24h",
    pending: Annotated[bool, typer.Option("--pending", help="Devices wait for `accept`.")] = False,
    as_json: Json = False,
) -> None:
    """Print the string that lets a device in, and what to type there."""
    from edgeward_ctl import checked, managing

    managing.enroll_token(
        _profile(context), fleet, uses=uses, ttl_s=checked.seconds(ttl), pending=pending, as_json=as_json
    )


@app.command()
def accept(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="The device's name.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Let a pending device in."""
    from edgeward_ctl import managing

    managing.admit(_profile(context), device, "accepted", as_json)


@app.command()
def reject(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="The device's name.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Keep a device out, also one that was in."""
    from edgeward_ctl import managing

    managing.admit(_profile(context), device, "rejected", as_json)


@mqtt_app.command("cert")
def mqtt_cert(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The dashboard's name.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", help="Directory for key and certificates.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Make a read-only client certificate `_viewer-NAME` for the broker."""
    from edgeward_ctl import managing

    managing.viewer_certificate(_profile(context), name, out, as_json)


# --- the boundary


def main() -> None:
    """The entry point."""
    try:
        code = app(standalone_mode=False)
    except EdgewardError as error:
        code = _say_error(
            error.what, error.next_step, UNAVAILABLE if isinstance(error, Unavailable) else USAGE
        )
    except KeyboardInterrupt:
        code = _say_error("Interrupted.", "", INTERRUPTED)
    except BrokenPipeError:  # whoever read us went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:  # noqa: BLE001  # the last boundary before a person
        code = _say_other(error)
    sys.exit(code if isinstance(code, int) else 0)


def _say_other(error: Exception) -> int:
    """A usage error of the command line's parser, or a bug of ours."""
    told = getattr(error, "format_message", None)
    if told is not None:  # of typer, which has changed where its exceptions live
        if not told().strip():  # no command was given, and the help has been shown
            return USAGE
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "agent-ctl"
        return _say_error(told(), f"{command} --help", USAGE)
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    what = f"agent-ctl has a bug: {type(error).__name__}: {error}".rstrip(".")
    return _say_error(f"{what}.", f"Report it, with what {DEBUG}=1 agent-ctl ... shows.", BUG)


def _say_error(what: str, next_step: str, code: int) -> int:
    sys.stderr.write(f"error: {what}\n" + (f"next: {next_step}\n" if next_step else ""))
    if "--json" in sys.argv:
        sys.stdout.write(
            json.dumps({"error": what, "next_step": next_step, "exit": code}, ensure_ascii=False) + "\n"
        )
    return code


def _profile(context: typer.Context) -> Profile:
    from edgeward_ctl.profile import find_directory, load_profile

    return load_profile(find_directory(context.obj, os.environ))


def _fleet(fleet: str | None) -> str | None:
    from edgeward_ctl import checked

    return checked.device_name(fleet, "fleet") if fleet is not None else None


def _waiting(timeout: str | None, detach: bool, as_json: bool) -> Waiting:
    from edgeward_ctl import checked, deploying

    seconds = checked.seconds(timeout) if timeout is not None else None
    return deploying.Waiting(detach=detach, timeout_s=seconds, as_json=as_json, began=_key_press())


def _key_press() -> float:
    """When this process was started, on the monotonic clock; now where the kernel does not tell."""
    now = time.monotonic()
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age < 3600 else now


if __name__ == "__main__":
    main()
