"""An operator's profile: where the cloud is, and the keys to it. Read once, at the edge.

A profile is a directory, made by `edgeward-cloud init` and handed to the operator:

    profile.toml             url, operator, token, and the names of the files below
    server-ca.pem            the only anchor for TLS
    root.json                the pinned TUF root, the only anchor for signatures
    release-key.pem          the private release key (or any securesystemslib URI instead of a file)
    release-key.pub.json     its public half, as TUF writes keys

What agent-ctl remembers between runs (verified metadata) lives in `cache/` below it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeward_wire.errors import Rejected

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

ENVIRONMENT = "EDGEWARD_PROFILE"
FILE = "profile.toml"
_MAX_BYTES = 64 << 10
_KEYS = {"url", "operator", "token", "server_ca", "root", "release_key", "release_public_key"}
_HAND_OVER = (
    "`edgeward-cloud init` makes profiles under operators/<name>; copy yours here or name it with --profile."
)


@dataclass(frozen=True, slots=True)
class Profile:
    """One operator at one cloud. `release_key` is a securesystemslib URI, None where the key is elsewhere."""

    directory: Path
    url: str
    operator: str
    token: str
    server_ca: Path
    root: Path
    release_key: str | None
    release_public_key: Path

    @property
    def cache(self) -> Path:
        """Verified metadata of earlier runs."""
        return self.directory / "cache"


def find_directory(option: Path | None, environment: Mapping[str, str]) -> Path:
    """--profile, else EDGEWARD_PROFILE, else ~/.config/edgeward."""
    if option is not None:
        return option.expanduser()
    if environment.get(ENVIRONMENT):
        return Path(environment[ENVIRONMENT]).expanduser()
    config = environment.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "edgeward"


def load_profile(directory: Path) -> Profile:
    """Read and check a profile.

    Raises:
        Rejected: it is not there, or not whole; says which file or key.
    """
    file = directory / FILE
    values = _read(file)
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise Rejected(f"{file} has an unknown key {unknown[0]!r}.", f"Known are {', '.join(sorted(_KEYS))}.")
    for key in ("url", "token"):
        if not values.get(key):
            raise Rejected(f"{file} lacks {key!r}.", _HAND_OVER)
    for key, value in values.items():
        if not isinstance(value, str):
            raise Rejected(f"{file}: {key} must be a text in quotes.")
    url = str(values["url"]).rstrip("/")
    if not url.startswith("https://"):
        raise Rejected(f"{file}: url must start with https://, not {url[:60]!r}.")
    key_name = values.get("release_key", "release-key.pem")
    return Profile(
        directory=directory,
        url=url,
        operator=values.get("operator", ""),
        token=values["token"],
        server_ca=_present(directory / values.get("server_ca", "server-ca.pem"), "the cloud's CA"),
        root=_present(directory / values.get("root", "root.json"), "the pinned TUF root"),
        release_key=_key_uri(directory, key_name),
        release_public_key=directory / values.get("release_public_key", "release-key.pub.json"),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise Rejected(f"There is no profile at {file.parent}.", _HAND_OVER) from error
    except OSError as error:
        raise Rejected(f"{file} cannot be read: {error.strerror}.") from error
    if len(raw) > _MAX_BYTES:
        raise Rejected(f"{file} is {len(raw)} bytes long; that is no profile.")
    try:
        values: dict[str, Any] = tomllib.loads(raw.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Rejected(f"{file} is not valid TOML: {error}.") from error
    return values


def _present(file: Path, what: str) -> Path:
    if not file.is_file() or not os.access(file, os.R_OK):
        raise Rejected(f"{file} ({what}) is missing or cannot be read.", _HAND_OVER)
    return file


def _key_uri(directory: Path, name: str) -> str | None:
    """A file's name becomes a `file2:` URI; any other URI is passed on as it is."""
    scheme, colon, rest = name.partition(":")
    if colon and scheme != "file2":
        return name
    path = directory / (rest if colon else name)
    return f"file2:{path.absolute()}" if path.is_file() else None
