"""`agent-ctl model bundle`: a model file becomes a directory that holds all that a device needs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward_ctl.model.libraries import needing

if TYPE_CHECKING:
    from edgeward_models.bundle import Bundle


def command(
    model: Annotated[
        Path,
        typer.Argument(help="The ONNX file, or a directory with one and its sidecar.", show_default=False),
    ],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="The bundle.", show_default="NAME.bundle")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name.", show_default="the file's")] = None,
    task: Annotated[str | None, typer.Option(help="classification, detection, ...")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one label a line.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Pictures or WAV files as the devices see and hear them, or an .npz."),
    ] = None,
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A sidecar's setting, e.g. inputs.image.width=320.")
    ] = None,
    p99_ms: Annotated[float | None, typer.Option(help="A device must be this fast.", min=0.001)] = None,
    memory_mb: Annotated[float | None, typer.Option(help="It must not take more.", min=0.001)] = None,
    licence: Annotated[str | None, typer.Option(help="Of the model, for its card.")] = None,
    allow_float: Annotated[
        str | None, typer.Option("--allow-float", metavar="REASON", help="Bundle a model that is not INT8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Bundle variants, golden vectors, contract, labels and card. `deploy` takes the directory as it is."""
    from edgeward_ctl import checked, screen

    with needing("models"):
        from edgeward_models.bundle import BundleRequest, make_bundle
        from edgeward_models.bundle_files import write_bundle

    flags: dict[str, Any] = checked.settings(settings or [])
    said = {"name": checked.model_name(name), "task": task, "labels": labels, "samples": samples}
    flags.update({key: str(value) for key, value in said.items() if value is not None})
    limits = {"p99_ms": p99_ms, "memory_mb": memory_mb}
    for part, table in (("limits", limits), ("annotations", {"licence": licence})):
        given = {key: value for key, value in table.items() if value is not None}
        if given:
            flags[part] = {**flags.get(part, {}), **given}
    request = BundleRequest(model, sidecar, flags, allow_float)
    with (
        screen.board(began=time.monotonic()) as board,
        tempfile.TemporaryDirectory(prefix="agent-ctl-") as scratch,
    ):
        bundle = make_bundle(
            request, Path(scratch), lambda what, done, total: board.step("bundle", done, total, what)
        )
        where = out if out is not None else Path(f"{bundle.manifest.name}.bundle")
        write_bundle(bundle, where, lambda what, done, total: board.step("write", done, total, what))
    if as_json:
        screen.print_json(_plain(bundle, where))
    else:
        _print(bundle, where)


def _plain(bundle: Bundle, where: Path) -> dict[str, Any]:
    return {
        "bundle": str(where),
        "content": bundle.content,
        "bytes": bundle.bytes,
        "weak": bundle.weak,
        "assumed": list(bundle.notes),
        "manifest": bundle.manifest.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def _print(bundle: Bundle, where: Path) -> None:
    from edgeward_ctl import screen

    for note in bundle.notes:
        screen.say(f"note: {note}")
    if bundle.float_reason:
        screen.say(f"note: not INT8: {bundle.float_reason}")
    rows = (
        (name, one.precision, screen.size(one.model.length), one.evidence, screen.size(one.golden.length))
        for name, one in sorted(bundle.manifest.variants.items())
    )
    console = screen.out()
    console.print(screen.table(("variant", "precision", "size", "evidence", "golden"), rows))
    console.print(f"{where}: content {bundle.content[:12]}, {screen.size(bundle.bytes)}.", markup=False)
    screen.say(f"Deploy it: agent-ctl deploy {where} --fleet FLEET")
