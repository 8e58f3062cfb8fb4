"""Which variants of a model this device may use, and so which blobs it fetches. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from edgeward_wire.manifest import BlobRef, Manifest, TargetHints


class Hardware(Protocol):
    """The part of `sysinfo.Machine` that decides."""

    @property
    def arch(self) -> str: ...

    @property
    def features(self) -> frozenset[str]: ...

    @property
    def providers(self) -> tuple[str, ...]: ...


def usable_variants(manifest: Manifest, hardware: Hardware, only: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the variants whose hints fit. `only`: the providers that agent.toml names; empty for all.

    Never fewer than what qualify will want to try (`edgeward_runtime.plans.fits`).
    """
    providers = {_short(name) for name in only} or {_short(name) for name in hardware.providers}
    fitting = (n for n, v in sorted(manifest.variants.items()) if _fits(v.targets, hardware, providers))
    return tuple(fitting)


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").lower()


def _fits(hints: TargetHints, hardware: Hardware, providers: set[str]) -> bool:
    """An empty hint fits anywhere; of a hint with several values, one is enough, as `plans.fits` has it."""
    return (
        (not hints.arch or hardware.arch in hints.arch)
        and (not hints.isa or not hardware.features or bool(set(hints.isa) & hardware.features))
        and (not hints.providers or bool({_short(p) for p in hints.providers} & providers))
    )


def needed_blobs(manifest: Manifest, hardware: Hardware, only: Iterable[str] = ()) -> tuple[BlobRef, ...]:
    """The blobs to fetch: labels, preprocessing, and the model and golden vectors of usable variants."""
    refs = [manifest.labels, manifest.preprocess]
    for name in usable_variants(manifest, hardware, tuple(only)):
        refs += [manifest.variants[name].model, manifest.variants[name].golden]
    return tuple({ref.sha256: ref for ref in refs if ref is not None}.values())
