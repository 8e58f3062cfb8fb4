"""Names and numbers that occur in every document, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

DEVICE_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
VERSION_PATTERN = r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
MODEL_PATH_PATTERN = r"^models/[a-z0-9][a-z0-9._-]{0,62}/[0-9A-Za-z][0-9A-Za-z.+_-]{0,62}\.json$"

DeviceId = Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]
"""Certificate CN = MQTT client id = topic segment."""

FleetName = Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]
PipelineName = Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]
SourceName = Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]
ModelName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
VariantName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Version = Annotated[str, StringConstraints(pattern=VERSION_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]
ModelPath = Annotated[str, StringConstraints(pattern=MODEL_PATH_PATTERN)]
"""The manifest's TUF target path: `models/<name>/<version>.json`."""

BootId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Random at each start of the daemon."""

Key = Annotated[str, StringConstraints(min_length=1, max_length=64)]
ShortText = Annotated[str, StringConstraints(max_length=200)]
Reason = Annotated[str, StringConstraints(max_length=2000)]
Revision = Annotated[int, Field(ge=0, le=1 << 53)]
UnixTime = Annotated[float, Field(ge=0, le=1e11)]
"""Seconds since 1970 on the wall clock."""

Milliseconds = Annotated[float, Field(ge=0, le=1e10)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]


def model_path(name: str, version: str) -> str:
    """The TUF target path of one version's manifest."""
    return f"models/{name}/{version}.json"


def assignment_path(device: str) -> str:
    """The TUF target path of one device's assignment."""
    return f"devices/{device}.json"


def blob_path(sha256: str) -> str:
    """The path of a blob below the registry's address."""
    return f"blobs/sha256/{sha256}"
