"""The cloud's settings: `<dir>/cloud.toml`, read once into a frozen object.

Invariants: nothing else reads the environment or this file; every path of the cloud's directory is
named here and nowhere else; an unknown key is an error that names it; addresses are loopback unless
the file says otherwise.
"""

from __future__ import annotations

import ipaddress
import json
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from edgeward_cloud.files import read_bounded, write_atomic
from edgeward_wire.document import faults
from edgeward_wire.enrolment import BrokerAddress
from edgeward_wire.errors import Rejected

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # mypy checks for 3.10 on any

FILE = "cloud.toml"
MAX_BYTES = 64 << 10
LOOPBACK = "127.0.0.1"


class Part(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_max_length=2048)


class HttpSettings(Part):
    """Where the HTTPS server listens."""

    host: str = LOOPBACK
    port: int = Field(default=8443, ge=1, le=65535)


class BrokerSettings(Part):
    """The broker: our own Mosquitto, or any MQTT 5 broker that trusts our device CA."""

    managed: bool = True
    """False: do not start Mosquitto; `host` and `port` say where the broker is."""
    bind: str = LOOPBACK
    """Where our own Mosquitto listens."""
    host: str = LOOPBACK
    """The name that devices are told."""
    port: int = Field(default=8883, ge=1, le=65535)


class DatabaseSettings(Part):
    """An SQLAlchemy address; empty means SQLite in the cloud's directory."""

    url: str = ""


class CertificateSettings(Part):
    """Lives of the certificates that the device CA issues, in days."""

    device_days: int = Field(default=365, ge=1, le=3650)
    viewer_days: int = Field(default=365, ge=1, le=3650)


class KeySettings(Part):
    """Where the online TUF keys are: securesystemslib URIs; a relative `file2:` is relative to the directory.

    The public key of each stands in `keys/<role>.pub.json`.
    """

    timestamp: str = "file2:keys/timestamp.pem"
    snapshot: str = "file2:keys/snapshot.pem"
    director: str = "file2:keys/director.pem"


class Settings(Part):
    """All settings, and the paths that follow from them."""

    dir: Path
    url: str = Field(default=f"https://{LOOPBACK}:8443", max_length=200)
    """The base of every address that devices and operators use."""
    http: HttpSettings = HttpSettings()
    broker: BrokerSettings = BrokerSettings()
    database: DatabaseSettings = DatabaseSettings()
    certificates: CertificateSettings = CertificateSettings()
    keys: KeySettings = KeySettings()

    @field_validator("url")
    @classmethod
    def _https(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be an https address without a query")
        return url.rstrip("/")

    @staticmethod
    def load(directory: Path | str) -> Settings:
        """Read `<directory>/cloud.toml`.

        Raises:
            Rejected: there is none, or it is not valid; says what to do.
        """
        root = Path(directory).resolve()
        path = root / FILE
        try:
            raw = read_bounded(path, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError) as error:
            hint = f"Make one with `edgeward-cloud init --dir {directory}`."
            raise Rejected(f"There is no cloud in {directory}: {FILE} is missing.", hint) from error
        except OSError as error:
            raise Rejected(
                f"Cannot read {path}: {error.strerror}.", "Run as the user who owns it."
            ) from error
        try:
            table: dict[str, Any] = tomllib.loads(raw.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Rejected(f"{path} is not TOML: {error}.", "Correct the file.") from error
        if "dir" in table:
            raise Rejected(f"{path}: dir cannot be set here.", "Remove the line.")
        try:
            return Settings(dir=root, **table)
        except ValidationError as error:
            raise Rejected(f"{path}: {faults(error)}.", "Correct the file.") from error

    def save(self) -> None:
        """Write `cloud.toml` (0600), with a comment for whoever reads it."""
        write_atomic(self.dir / FILE, self.to_toml().encode(), mode=0o600)

    def to_toml(self) -> str:
        """The file's text."""
        plain = self.model_dump(mode="json", exclude={"dir"})
        lines = ["# Edgeward's cloud. Read once, at the start of `edgeward-cloud up`."]
        lines += [
            f"{key} = {toml_value(value)}" for key, value in plain.items() if not isinstance(value, dict)
        ]
        for name, table in plain.items():
            if isinstance(table, dict):
                lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"

    @property
    def database_url(self) -> str:
        """The SQLAlchemy address (async driver)."""
        return self.database.url or f"sqlite+aiosqlite:///{self.dir / 'edgeward.db'}"

    @property
    def broker_address(self) -> BrokerAddress:
        """What devices are told."""
        return BrokerAddress(host=self.broker.host, port=self.broker.port)

    @property
    def broker_connect(self) -> BrokerAddress:
        """Where the cloud's own client connects."""
        if not self.broker.managed:
            return self.broker_address
        return BrokerAddress(host=reachable(self.broker.bind), port=self.broker.port)

    @property
    def pki(self) -> Path:
        """Certificate authorities and certificates."""
        return self.dir / "pki"

    @property
    def online_keys(self) -> Path:
        """Online TUF keys."""
        return self.dir / "keys"

    @property
    def offline_keys(self) -> Path:
        """Offline TUF keys, as long as nobody has moved them away."""
        return self.dir / "offline"

    @property
    def operators(self) -> Path:
        """One directory an operator, to be handed over."""
        return self.dir / "operators"

    @property
    def operators_file(self) -> Path:
        """Hashes of the operators' tokens (`edgeward_cloud.operators`)."""
        return self.dir / "operators.json"

    @property
    def metadata(self) -> Path:
        """TUF metadata, served at /tuf/metadata/."""
        return self.dir / "registry" / "metadata"

    @property
    def targets(self) -> Path:
        """TUF targets, served at /tuf/targets/."""
        return self.dir / "registry" / "targets"

    @property
    def blobs(self) -> Path:
        """The blob store; blobs lie in `sha256/<hex>` below."""
        return self.dir / "blobs"

    @property
    def mosquitto(self) -> Path:
        """The broker's generated configuration and its persistence."""
        return self.dir / "mosquitto"


def reachable(bind: str) -> str:
    """The address by which a server bound to `bind` is reached from this machine."""
    return {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(bind, bind)


def is_wildcard(host: str) -> bool:
    """Whether a server bound to it listens on every address."""
    try:
        return host == "" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def authority(host: str, port: int) -> str:
    """`host:port` for an address, with brackets round IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def toml_value(value: str | float | bool) -> str:
    """A value as TOML writes it: a JSON one, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
