"""Which version a bundle gets. Pure.

Invariants: the same content keeps its version; a version once given never changes its content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import model_path
from edgeward_wire.manifest import ModelRef


@dataclass(frozen=True, slots=True)
class Release:
    """A signed entry of the `models` role."""

    ref: ModelRef
    length: int
    content: str | None
    """The bundle's content digest; None when whoever signed it did not say."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The version to publish as, or the release that holds this very content already."""

    version: str
    existing: Release | None = None


def choose_version(
    releases: Mapping[str, Release], name: str, content: str, wanted: str | None = None
) -> Choice:
    """`releases` by target path. Numbered versions count on from the largest: 1, 2, ...

    Raises:
        Rejected: `wanted` is taken by other content.
    """
    ours = [release for release in releases.values() if release.ref.name == name]
    if wanted is not None:
        taken = releases.get(model_path(name, wanted))
        if taken is None:
            return Choice(wanted)
        if taken.content == content:
            return Choice(wanted, taken)
        raise Rejected(
            f"Version {wanted} of {name} is taken: it was released with other content.",
            "A version never changes. Choose another with --version, or leave it out to get the next number.",
        )
    same = [release for release in ours if release.content == content]
    if same:
        newest = max(same, key=lambda release: (_number(release.ref.version), release.ref.version))
        return Choice(newest.ref.version, newest)
    return Choice(str(max((_number(release.ref.version) for release in ours), default=0) + 1))


def _number(version: str) -> int:
    return int(version) if version.isascii() and version.isdigit() and len(version) <= 15 else 0
