"""A bundle as a directory: what `model bundle` writes, and `deploy` reads.

    NAME.bundle/
      manifest.json      version "0", canonical JSON: whoever releases it gives it a version
      blobs/<sha256>     every blob that the manifest names, and nothing else
      card.md            for people; its digest stands in the manifest's provenance

Invariants: the directory is there whole or not at all; what is read is what was written, byte for byte
(every hash is checked); a bundle that was read has the content of the one that was written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from edgeward_models.bundle import Bundle
from edgeward_models.progress import Progress, silent
from edgeward_models.workspace import file_digest
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import MAX_MANIFEST_BYTES, BlobRef, Manifest

MANIFEST, BLOBS, CARD = "manifest.json", "blobs", "card.md"
MAX_CARD_BYTES = 1 << 20
_SCHEMA = "edgeward.manifest/"
_MAKE_STEP = "Make it with `agent-ctl model bundle MODEL --out DIR.bundle`."
_AGAIN_STEP = "Copy the whole directory again, or bundle the model again."


def is_bundle(path: Path) -> bool:
    """Whether a path is meant to be a bundle: a directory with a manifest, or with a bundle's name."""
    return path.is_dir() and ((path / MANIFEST).exists() or path.suffix == ".bundle")


def write_bundle(bundle: Bundle, out: Path, progress: Progress = silent) -> Path:
    """Write the directory `out`; a bundle that is there already is replaced.

    Raises:
        Rejected: `out` is something else than a bundle.
        Unavailable: it cannot be written.
    """
    if out.is_symlink() or (out.exists() and not _replaceable(out)):
        raise Rejected(f"{out} is there already, and is no bundle.", "Name another directory with --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise Unavailable(f"{out} cannot be made: {error.strerror or error}.") from error
    try:
        _fill(bundle, beside, progress)
        _put_in_place(beside, out)
    except OSError as error:
        raise Unavailable(
            f"{out} cannot be written: {error.strerror or error}.", "Is the disk full?"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def _replaceable(out: Path) -> bool:
    if not out.is_dir():
        return False
    names = {entry.name for entry in out.iterdir()}
    return not names or (MANIFEST in names and names <= {MANIFEST, BLOBS, CARD})


def _fill(bundle: Bundle, home: Path, progress: Progress) -> None:
    home.chmod(0o755)  # mkdtemp's own directories are for one's eyes only
    (home / BLOBS).mkdir()
    refs = bundle.manifest.blobs()
    for k, ref in enumerate(refs):
        progress(f"writing {ref.name or ref.sha256[:12]}", k, len(refs))
        shutil.copyfile(bundle.blobs[ref.sha256], home / BLOBS / ref.sha256)
    (home / CARD).write_text(bundle.card, encoding="utf-8")
    (home / MANIFEST).write_bytes(bundle.manifest.to_bytes())
    progress("written", len(refs), len(refs))


def _put_in_place(beside: Path, out: Path) -> None:
    """A directory cannot be renamed over another one that holds something: the old one steps aside."""
    if not out.exists():
        beside.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
    out.rename(old / out.name)
    try:
        beside.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def read_bundle(path: Path, progress: Progress = silent) -> Bundle:
    """Read a bundle's directory and check every byte of it.

    Raises:
        Rejected: it is no bundle, or not as it was written: what is missing, damaged or foreign is named.
        Unavailable: it cannot be read.
    """
    if not path.is_dir():
        raise Rejected(f"{path} is not a bundle: it is not a directory.", _MAKE_STEP)
    try:
        manifest = _read_manifest(path)
        refs = manifest.blobs()
        _check_files(path, refs)
        for k, ref in enumerate(refs):
            progress(f"checking {ref.name or ref.sha256[:12]}", k, len(refs))
            _check_blob(path, ref)
        card = _read_card(path, manifest)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    progress("checked", len(refs), len(refs))
    return Bundle(manifest, {ref.sha256: path / BLOBS / ref.sha256 for ref in refs}, (), card)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise Rejected(f"{path} is not a bundle: it has no {MANIFEST}.", _MAKE_STEP)
    with file.open("rb") as stream:
        raw = stream.read(MAX_MANIFEST_BYTES + 1)
    schema = _schema(raw)
    if schema.startswith(_SCHEMA) and schema != f"{_SCHEMA}1":
        raise Rejected(
            f"{path} was made by a newer Edgeward: its manifest is {schema}; this one reads {_SCHEMA}1.",
            "Update agent-ctl, and the agents of the devices that shall run it.",
        )
    return parse(Manifest, raw, limit=MAX_MANIFEST_BYTES, name=f"{path / MANIFEST}")


def _schema(raw: bytes) -> str:
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        return ""  # `parse` says what is wrong with it
    schema = said.get("schema") if isinstance(said, dict) else None
    return schema[:64] if isinstance(schema, str) else ""


def _check_files(path: Path, refs: tuple[BlobRef, ...]) -> None:
    """Exactly the files that belong there: a stray one would be released unseen, or not at all."""
    _check_names(path, {MANIFEST, BLOBS, CARD}, path)
    blobs = path / BLOBS
    if not blobs.is_dir() or blobs.is_symlink():
        raise Rejected(f"{path} is not whole: it has no {BLOBS} directory.", _AGAIN_STEP)
    _check_names(blobs, {ref.sha256 for ref in refs}, path)


def _check_names(directory: Path, known: set[str], bundle: Path) -> None:
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in known)
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        name = (directory / foreign[0]).relative_to(bundle)
        raise Rejected(
            f"{bundle} holds what is not part of the bundle: {str(name)[:120]}{more}.",
            "Take it out: only what the manifest names belongs there.",
        )


def _check_blob(path: Path, ref: BlobRef) -> None:
    file = path / BLOBS / ref.sha256
    title = f"{ref.name} ({ref.sha256[:12]}…)" if ref.name else f"{ref.sha256[:12]}…"
    if file.is_symlink() or not file.is_file():
        raise Rejected(f"{path} is not whole: the blob {title} is missing.", _AGAIN_STEP)
    length = file.stat().st_size
    if length != ref.length:
        raise Rejected(
            f"{path} is damaged: the blob {title} has {length} bytes, not {ref.length}.", _AGAIN_STEP
        )
    if file_digest(file) != ref.sha256:
        raise Rejected(f"{path} is damaged: the blob {title} has another hash.", _AGAIN_STEP)


def _read_card(path: Path, manifest: Manifest) -> str:
    wanted = manifest.provenance.get("card_sha256")
    file = path / CARD
    if wanted is None:
        return ""
    if not file.is_file() or file.is_symlink():
        raise Rejected(f"{path} is not whole: {CARD} is missing.", _AGAIN_STEP)
    with file.open("rb") as stream:
        raw = stream.read(MAX_CARD_BYTES + 1)
    if hashlib.sha256(raw).hexdigest() != wanted:
        raise Rejected(
            f"{path} is damaged: {CARD} is not the one that was written.",
            "Put what you want to add into the sidecar's [annotations], and bundle the model again.",
        )
    return raw.decode()
