"""`edgeward-cloud init | up | token | resign`: what the cloud's administrator types.

Errors are two lines on stderr, `error:` and `next:`, and exit code 1; no traceback reaches a person.
"""

from __future__ import annotations

import argparse
import os
import pwd
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from edgeward_cloud.ceremony import Wishes, create_cloud, explain
from edgeward_cloud.operators import load_operators, new_token
from edgeward_cloud.settings import LOOPBACK, Settings
from edgeward_wire import __version__
from edgeward_wire.errors import EdgewardError, Rejected


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except EdgewardError as error:
        print(f"error: {error.what}", file=sys.stderr)
        if error.next_step:
            print(f"next: {error.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _init(options: argparse.Namespace) -> None:
    operators = tuple(options.operator or ("admin",))
    wishes = Wishes(
        dir=options.dir,
        operators=operators,
        host=options.host,
        port=options.port,
        broker_port=options.broker_port,
        sans=tuple(options.san or ()),
    )
    settings = create_cloud(wishes)
    print(explain(settings, operators, str(options.dir)), end="")


def _up(options: argparse.Namespace) -> None:
    settings = Settings.load(options.dir)
    # Late: only `up` needs the server and what it imports.
    try:
        from edgeward_cloud.server import serve
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library.startswith("edgeward"):
            raise
        what = f"The cloud needs a library that is not installed: {library}."
        raise Rejected(what, "pip install 'edgeward[cloud]'") from error

    serve(settings)


def _token(options: argparse.Namespace) -> None:
    settings = _owned(options.dir, f"token --dir {options.dir} {options.name}")
    known = options.name in load_operators(settings.operators_file)
    token = new_token(settings.operators_file, options.name)
    print(token)
    says = (
        f"The old token of {options.name} no longer counts."
        if known
        else "A new operator, without a release key."
    )
    print(f"{says} Put the token into profile.toml: it is not shown again.", file=sys.stderr)


def _resign(options: argparse.Namespace) -> None:
    settings = _owned(options.dir, f"resign --dir {options.dir} --keys {options.keys}")
    from edgeward_cloud.registry.offline import resign_offline

    for role, expires in resign_offline(settings, options.keys).items():
        print(f"{role} is signed until {expires:%Y-%m-%d}.")


def _owned(directory: Path, command: str) -> Settings:
    """The settings, if the directory is ours: what root writes there, the cloud could not read any more.

    Raises:
        Rejected: it belongs to somebody else, or there is no cloud in it.
    """
    settings = Settings.load(directory)
    owner = settings.dir.stat().st_uid
    if owner == os.geteuid():
        return settings
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = f"#{owner}"
    raise Rejected(
        f"{directory} belongs to {name}: files of another user would lock the cloud out of it.",
        f"Run it as its owner: runuser -u {name} -- edgeward-cloud {command}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgeward-cloud", description="Edgeward's cloud.")
    parser.add_argument("--version", action="version", version=f"edgeward-cloud {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--dir", type=Path, required=True, help="the cloud's directory")
        sub.set_defaults(command=command)
        return sub

    init = add("init", _init, "Make a new cloud: keys, root, certificate authorities, operators.")
    init.add_argument("--operator", action="append", metavar="NAME", help="repeatable; default: admin")
    init.add_argument("--host", default=LOOPBACK, help=f"where to listen (default: {LOOPBACK})")
    init.add_argument("--port", type=int, default=8443, help="HTTPS (default: 8443)")
    init.add_argument("--broker-port", type=int, default=8883, help="MQTT over TLS (default: 8883)")
    init.add_argument(
        "--san",
        action="append",
        metavar="NAME|IP",
        help="a name of this machine; repeatable, the first is public",
    )
    add("up", _up, "Run the cloud: API, registry and broker, until it is told to stop.")
    token = add("token", _token, "Make an operator's token; the old one ends.")
    token.add_argument("name", metavar="NAME", help="the operator")
    resign = add("resign", _resign, "Renew with the offline keys what they have signed.")
    resign.add_argument("--keys", type=Path, required=True, help="the directory with the offline keys")
    return parser


if __name__ == "__main__":
    sys.exit(main())
