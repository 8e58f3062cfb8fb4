"""agent.toml: the device's own settings, read once into one frozen object.

Sources, thresholds and paths stand here and only here: no cloud can change them. A key that we do not
know is an error that names it, because a misspelt setting that is silently ignored costs an afternoon.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from edgeward_agent.messages import SamplesSpec, SourceSpec
from edgeward_wire.document import Document, faults
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import DeviceId, Key, PipelineName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

MAX_CONFIG_BYTES = 256 << 10
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_STEP = "Correct the file and start again."
EXAMPLE = """\
[[pipelines.main.sources]]
name = "cam"
uri = "/dev/video0"
"""


class _Local(Document):
    model_config = ConfigDict(extra="forbid")


class Source(SourceSpec):
    """One `[[pipelines.NAME.sources]]`."""

    model_config = ConfigDict(extra="forbid")


class Samples(SamplesSpec):
    """One `[pipelines.NAME.samples]`."""

    model_config = ConfigDict(extra="forbid")


class Pipeline(_Local):
    """One `[pipelines.NAME]`."""

    sources: tuple[Source, ...] = Field(default=(), max_length=64)
    samples: Samples | None = None
    """Absent: no frame is ever kept."""

    @model_validator(mode="after")
    def _distinct(self) -> Pipeline:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        return self


class RegistrySettings(_Local):
    """`[registry]`."""

    poll_interval_s: float = Field(default=60, ge=1, le=86_400)


class TelemetrySettings(_Local):
    """`[telemetry]`."""

    window_s: float = Field(default=30, ge=1, le=3600)
    result_interval_s: float = Field(default=1, ge=0.1, le=3600)
    spool_bytes: int = Field(default=32 << 20, ge=64 << 10, le=64 << 30)


class QualifySettings(_Local):
    """`[qualify]`. `lock` is one file for the whole machine."""

    lock: str = Field(default="/run/lock/edgeward-qualify.lock", max_length=4096)
    providers: tuple[Key, ...] = Field(default=(), max_length=8)
    threads: int = Field(default=0, ge=0, le=1024)
    """0: cores / pipelines."""
    max_temp_c: float | None = Field(default=None, ge=20, le=150)
    """Hotter than this, nothing is measured; None: only throttling keeps qualify waiting."""
    cool_s: float = Field(default=600, ge=0, le=7200)
    """How long qualify waits for the device to cool, before it measures all the same, provisionally."""


class PageSettings(_Local):
    """`[page]`: the local page. Loopback only, unless it has a token."""

    port: int = Field(ge=1, le=65_535)
    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    token: str | None = Field(default=None, min_length=16, max_length=256, pattern=r"^[A-Za-z0-9._~-]+$")

    @model_validator(mode="after")
    def _guarded(self) -> PageSettings:
        if self.host not in LOOPBACK and self.token is None:
            raise ValueError("a page that others can reach needs a token of 16 letters and digits or more")
        return self


class ServeSettings(_Local):
    """`[serve]`: inference over HTTP for programs on this device. Without a port there is none."""

    port: int | None = Field(default=None, ge=0, le=65535)
    host: str = Field(default="127.0.0.1", max_length=64)
    """An IP address. Any but loopback needs a token."""
    token_file: str = Field(default="", max_length=4096)
    """Its first line is the token that requests bring: `Authorization: Bearer TOKEN`."""
    max_body: int = Field(default=32 << 20, ge=1 << 10, le=256 << 20)
    """Bytes of a request's body."""
    queue: int = Field(default=16, ge=1, le=1024)
    """Requests of a pipeline that may wait; more are told to come again."""

    @model_validator(mode="after")
    def _guarded(self) -> ServeSettings:
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            raise ValueError(f"host is an IP address, not {self.host}") from None
        if not loopback and not self.token_file:
            raise ValueError(f"host = {self.host} can be reached from outside: it needs a token_file")
        return self


class Config(_Local):
    """All of agent.toml."""

    device: DeviceId | None = None
    registry: RegistrySettings = RegistrySettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    qualify: QualifySettings = QualifySettings()
    page: PageSettings | None = None
    serve: ServeSettings = ServeSettings()
    pipelines: dict[PipelineName, Pipeline] = Field(default_factory=dict, max_length=16)

    def thread_budget(self, cores: int) -> int:
        """Threads for each pipeline's inference."""
        return self.qualify.threads or max(1, cores // max(1, len(self.pipelines)))

    def lock_path(self) -> Path:
        """Where qualify's lock is; in the temporary directory on a machine that has no /run/lock for us."""
        path = Path(self.qualify.lock)
        default = "lock" not in self.qualify.model_fields_set
        if default and not os.access(path.parent, os.W_OK):
            return Path(tempfile.gettempdir()) / path.name
        return path


def load_config(path: Path) -> Config:
    """Read agent.toml; the defaults when there is none.

    Raises:
        Rejected: it cannot be read, or something in it is not valid; the text names the key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return Config()
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise Rejected(f"{path} is longer than {MAX_CONFIG_BYTES} bytes.")
    try:
        data = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise Rejected(f"{path} is not UTF-8 text.", _STEP) from error
    except tomllib.TOMLDecodeError as error:
        raise Rejected(f"{path} is not valid TOML: {error}.", _STEP) from error
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise Rejected(f"{path}: {_explain(error)}.", _STEP) from error
    return _anchored(config, path.parent.absolute())


def _explain(error: ValidationError) -> str:
    unknown = [
        ".".join(str(part) for part in fault["loc"])
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
        if fault["type"] == "extra_forbidden"
    ]
    return f"unknown key {', '.join(unknown[:5])}" if unknown else faults(error)


def _anchored(config: Config, directory: Path) -> Config:
    """Relative uris and directories are next to agent.toml, wherever the daemon was started."""
    pipelines = {
        name: pipeline.model_copy(
            update={
                "sources": tuple(_anchor(source, directory) for source in pipeline.sources),
                "samples": _anchored_samples(pipeline.samples, directory),
            }
        )
        for name, pipeline in config.pipelines.items()
    }
    token = config.serve.token_file
    serve = config.serve.model_copy(update={"token_file": str(directory / token) if token else ""})
    return config.model_copy(update={"pipelines": pipelines, "serve": serve})


def _anchored_samples(samples: Samples | None, directory: Path) -> Samples | None:
    if samples is None or not samples.directory:
        return samples
    return samples.model_copy(update={"directory": str(directory / samples.directory)})


def _anchor(source: Source, directory: Path) -> Source:
    uri: str = source.uri
    if uri.isdecimal() or "://" in uri or "!" in uri or os.path.isabs(uri) or uri.startswith("mic:"):
        return source
    beginning = "pipe:" if uri.startswith("pipe:") else ""
    path = uri.removeprefix(beginning)
    if beginning and path == "-":
        return source
    change: dict[str, Any] = {"uri": f"{beginning}{directory / path}"}
    return source.model_copy(update=change)
