"""What somebody should know of a variant before devices get it: sums that some processors would cut off."""

from __future__ import annotations

from pathlib import Path

from edgeward_models.pairsafe import worst_pairs
from edgeward_wire.manifest import TargetHints

_VNNI = {"avx512_vnni", "avx_vnni"}


def saturation_note(name: str, file: Path, targets: TargetHints) -> str | None:
    """One paragraph, or None where the sums always fit or no processor that the hints allow cuts them off."""
    if not _cuts_off(targets):
        return None
    bounds = [bound for bound in worst_pairs(file) if bound.worst]
    count = sum(not bound.safe for bound in bounds)
    if not count:
        return None
    return (
        f"Variant {name}: sums of {count} of {len(bounds)} nodes may saturate on x86-64 without VNNI, which"
        " adds in 16 bits. Golden vectors tell such a kernel, and a device then takes a slower, exact plan or"
        " none. Pair weights (agent-ctl model quantise) cannot saturate and are as fast; or let the sidecar's"
        " isa ask for VNNI."
    )


def _cuts_off(targets: TargetHints) -> bool:
    """Whether the hints let in a processor that adds in 16 bits; one value of a hint is enough for it."""
    vnni = bool(targets.isa) and set(targets.isa) <= _VNNI
    return not vnni and (not targets.arch or "x86_64" in targets.arch)
