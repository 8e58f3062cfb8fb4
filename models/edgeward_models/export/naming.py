"""What inputs and outputs of an exported graph are called. Pure.

Invariant: names are unique over inputs and outputs, and short enough for a contract.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from edgeward_models.export.inputs import MAX_NAME
from edgeward_models.export.report import ExportOptions
from edgeward_wire.contract import MAX_PORTS
from edgeward_wire.errors import Rejected


def check_names(names: Sequence[str]) -> None:
    """Raises Rejected for names that are empty, too long, too many, or not unique."""
    if len(names) > MAX_PORTS:
        raise Rejected(f"There are {len(names)} names; at most {MAX_PORTS} are possible.")
    for name in names:
        if not name or len(name) > MAX_NAME:
            raise Rejected(
                f"{name[:MAX_NAME]!r} cannot be a name.", f"1 to {MAX_NAME} characters are possible."
            )
        if names.count(name) > 1:
            raise Rejected(f"Two inputs or outputs are called {name}.", "Give each a name of its own.")


def output_names(own: Sequence[str], taken: Sequence[str], wished: Sequence[str] = ()) -> tuple[str, ...]:
    """One for each output: those that were wished for, the module's own, or output (output_0, output_1, ...).

    `own` has "" where the module has none; `taken` are the inputs. Raises Rejected.
    """
    if wished:
        if len(wished) != len(own):
            raise Rejected(f"The module has {len(own)} outputs, but {len(wished)} names were given for them.")
        check_names([*taken, *wished])
        return tuple(wished)
    names: list[str] = []
    for k, name in enumerate(own):
        plain = "output" if len(own) == 1 else f"output_{k}"
        wish = (name or plain)[:MAX_NAME]
        while wish in names or wish in taken:
            wish = f"{plain}_out" if wish == plain else plain if wish != f"{plain}_out" else f"{wish}_"
        names.append(wish)
    check_names([*taken, *names])
    return tuple(names)


def states_of(options: ExportOptions) -> dict[str, Any]:
    """What the sidecar's shape says of carried states."""
    if not options.states:
        return {}
    slugs = {into: re.sub(r"[^a-z0-9_]+", "_", into.lower())[:32] or "state" for into in options.states}
    if len(set(slugs.values())) < len(slugs):
        raise Rejected("Two states have the same name.", "Give the inputs other names with --input.")
    return {
        "inputs": {into: {"bind": f"state:{slugs[into]}"} for into in options.states},
        "outputs": {out: {"bind": f"state:{slugs[into]}"} for into, out in options.states.items()},
    }
