"""`edgeward-agent`: enroll, run, status, probe, sources, snapshot.

Light: each command imports what it needs, when it runs.
`run` is the daemon, and with `--model` the run of one model without a cloud.

Exit codes: 0 well, 1 it failed (or `status` found a fault; a broker that is away is none), 2 wrong usage.
Errors are two lines on stderr, `error: ...` and `next: ...`; no traceback reaches a person.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path

from edgeward_agent import local_cli, results_cli, sources_cli
from edgeward_agent.files import is_there
from edgeward_wire import __version__
from edgeward_wire.errors import EdgewardError, Rejected

DEFAULT_STATE = "/var/lib/edgeward"
DEFAULT_CONFIG = "/etc/edgeward/agent.toml"
LEVELS = ("debug", "info", "warning", "error")


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    words = sys.argv[1:] if argv is None else argv
    local = any(word == "--model" or word.startswith("--model=") for word in words)
    args = _parser(local=local).parse_args(words)
    _start_logging(args.log_level)
    try:
        code: int = args.handler(args)
    except EdgewardError as error:
        print(f"error: {error.what}", file=sys.stderr)
        if error.next_step:
            print(f"next: {error.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser(*, local: bool) -> argparse.ArgumentParser:
    """`local`: `run` is the run of one model without a cloud, and not the daemon."""
    parser = argparse.ArgumentParser(
        prog="edgeward-agent", description="Runs signed models on this device and reports how they do."
    )
    parser.add_argument("--version", action="version", version=f"edgeward-agent {__version__}")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="what goes to stderr (info)")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    enroll = commands.add_parser("enroll", help="make this machine a device of a fleet")
    enroll.add_argument("enrolment", metavar="STRING", help="what `agent-ctl enroll-token` printed")
    enroll.add_argument(
        "--device", metavar="ID", help="the device's id; default: `device` in agent.toml, else the host name"
    )
    _places(enroll)
    enroll.set_defaults(handler=_enroll)

    if local:
        local_cli.add_run(commands)
    else:
        run = commands.add_parser(
            "run",
            help="run the daemon; with --model: one model, without a cloud",
            epilog="Without a cloud: edgeward-agent run --model m.onnx --source 0 (and --help for more)",
        )
        _places(run)
        run.set_defaults(handler=_run)

    status = commands.add_parser("status", help="what the daemon does")
    status.add_argument("--json", action="store_true", help="one JSON object")
    _places(status)
    status.set_defaults(handler=_status)

    results_cli.add_results(commands, _places)
    local_cli.add_probe(commands)
    sources_cli.add_sources(commands, _places)
    sources_cli.add_snapshot(commands, _places)
    return parser


def _places(parser: argparse.ArgumentParser) -> None:
    """Under systemd, StateDirectory= and ConfigurationDirectory= say where; the options win."""
    state = os.environ.get("STATE_DIRECTORY", DEFAULT_STATE)
    directory = os.environ.get("CONFIGURATION_DIRECTORY")
    config = f"{directory}/agent.toml" if directory else DEFAULT_CONFIG
    parser.add_argument("--state", type=Path, default=Path(state), metavar="DIR", help=f"default: {state}")
    parser.add_argument(
        "--config", type=Path, default=Path(config), metavar="FILE", help=f"default: {config}"
    )


def _start_logging(level: str) -> None:
    # Under systemd the journal stamps lines itself, and reads <N> as their level.
    plain = "JOURNAL_STREAM" in os.environ
    form = "%(message)s" if plain else "%(asctime)s %(levelname).1s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=form, datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpcore").setLevel(logging.WARNING)
    logging.getLogger("tuf").setLevel(logging.WARNING)


def _enroll(args: argparse.Namespace) -> int:
    from edgeward_agent.config import load_config
    from edgeward_agent.enrol import enrol

    device = args.device or load_config(args.config).device or _own_name(socket.gethostname())
    _become_owner(args.state)
    identity = enrol(args.enrolment, device, args.state, wait=time.sleep, say=print)
    print(f"This is now device {identity.device} of fleet {identity.fleet}.")
    return 0


def _own_name(host: str) -> str:
    """A device id made of this machine's host name.

    Raises:
        Rejected: it makes none, or one that any machine may have.
    """
    name = re.sub(r"[^a-z0-9]+", "-", host.partition(".")[0].lower())[:63].strip("-")
    if name in ("", "localhost"):
        raise Rejected(f"The host name {host!r} makes no device id.", "Name the device: --device edge-01")
    return name


def _become_owner(state: Path) -> None:
    """Under sudo: what root writes, the agent's user, who owns the state directory, could not read."""
    if os.geteuid() != 0 or not is_there(state) or not state.is_dir():
        return
    owner = state.stat()
    if owner.st_uid != 0:
        os.setgroups([])
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)


def _run(args: argparse.Namespace) -> int:
    from edgeward_agent.sysinfo import save_memory

    save_memory()  # before the imports below fill the memory
    from edgeward_agent.daemon import run_daemon

    return run_daemon(args.config, args.state)


def _status(args: argparse.Namespace) -> int:
    from edgeward_agent.status import show_status

    text, code = show_status(args.state, as_json=args.json)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
