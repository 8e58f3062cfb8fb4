"""Work that is done once: what was made for a key is found again, and what was cut off is made again.

Invariants: a file in the workspace is whole (it is made elsewhere in the workspace and renamed); its name
holds the digest of its key, so another key never finds it. Whoever may leave damage behind (a disk that was
full, a file that somebody truncated) is met by a length and a digest beside the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeward_wire.errors import Rejected, Unavailable

_SEAL = ".sha256"
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Workspace:
    """A directory of finished steps. Who writes into it holds it (`alone`); readers need no lock."""

    def __init__(self, directory: Path) -> None:
        """Make the directory. Raises Unavailable when that is not possible."""
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{directory} cannot be made: {error.strerror}.") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the directory, and sweep away what a run that was killed left in the making.

        The lock is the kernel's: it ends with the process. Raises Rejected while another one holds it.
        """
        held = os.open(self.directory, os.O_RDONLY)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Rejected(
                    f"Another quantise is at work in {self.directory.parent}.", "Wait, or give another --out."
                ) from None
            for leftover in self.directory.glob(".making-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            os.close(held)

    def file(self, name: str, key: Mapping[str, object], make: Callable[[Path], None]) -> Path:
        """The file that `make(path)` writes, made once for this key.

        `name` tells people what it is and keeps its suffix; `key` is whatever the content depends on, as
        values that JSON knows. Raises what `make` raises; Unavailable when the disk refuses.
        """
        path = self.directory / _file_name(name, key)
        return path if _whole(path) else self._made(path, make)

    def json(self, name: str, key: Mapping[str, object], make: Callable[[], object]) -> Any:
        """What `make()` returns, made once for this key, as JSON reads it back (tuples become lists)."""
        path = self.file(f"{name}.json", key, lambda path: _dump(path, make()))
        return json.loads(path.read_text(encoding="utf-8"))

    def so_far(self, name: str, key: Mapping[str, object]) -> Any:
        """What was kept of work that goes on from run to run; None when it was not begun."""
        path = self.directory / _file_name(f"{name}.json", key)
        return json.loads(path.read_text(encoding="utf-8")) if _whole(path) else None

    def keep(self, name: str, key: Mapping[str, object], value: object) -> None:
        """Keep how far such work got, in place of what was kept before. Raises Unavailable."""
        self._made(self.directory / _file_name(f"{name}.json", key), lambda path: _dump(path, value))

    def _made(self, path: Path, make: Callable[[Path], None]) -> Path:
        try:
            with tempfile.TemporaryDirectory(dir=self.directory, prefix=".making-") as scratch:
                made = Path(scratch) / path.name
                make(made)
                _seal(path).unlink(missing_ok=True)
                os.replace(made, path)
            _write(_seal(path), f"{_digest(path)} {path.stat().st_size}\n")
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}.", "Is the disk full?") from error
        return path


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def digest_of(key: Mapping[str, object]) -> str:
    """sha256 (hex) of a key's canonical JSON. Raises ValueError where JSON has no word for a value."""
    try:
        text = json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"a key is made of what JSON knows: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes: how a key names an input file. Raises Rejected."""
    try:
        return _digest(path)
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}.") from error


def _file_name(name: str, key: Mapping[str, object]) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a plain file name: {name!r}")
    stem, dot, suffix = name.rpartition(".")
    digest = digest_of(key)[:20]
    return f"{stem}-{digest}.{suffix}" if dot else f"{name}-{digest}"


def _seal(path: Path) -> Path:
    return path.with_name(path.name + _SEAL)


def _whole(path: Path) -> bool:
    """Whether the file is there, as it was when it was made."""
    try:
        digest, length = _seal(path).read_text(encoding="utf-8").split()
        return path.stat().st_size == int(length) and _digest(path) == digest
    except (OSError, ValueError):
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
