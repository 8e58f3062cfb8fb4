"""The cloud's tables, the same for SQLite and PostgreSQL.

Invariants: times are Unix seconds; a device's stream is unique by (device, boot_id, seq), which makes
inserts idempotent; a document of the wire is kept as the JSON that it came as. The migrations and these
models agree: a test compares them.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows by itself only in a column of type INTEGER.
_RowId = BigInteger().with_variant(Integer, "sqlite")
_Name = String(64)
_Digest = String(64)
_Path = String(200)


class Base(DeclarativeBase):
    """Constraints have names of their own, so that a migration can drop them on any database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        dict[str, Any]: JSON(none_as_null=True),
        int: BigInteger,
        float: Double,
    }


class FleetRow(Base):
    """A fleet: devices that get the same models."""

    __tablename__ = "fleets"

    name: Mapped[str] = mapped_column(_Name, primary_key=True)
    created_at: Mapped[float]


class DeviceRow(Base):
    """A device, from its enrolment on."""

    __tablename__ = "devices"

    id: Mapped[str] = mapped_column(_Name, primary_key=True)
    fleet: Mapped[str] = mapped_column(_Name, ForeignKey("fleets.name"), index=True)
    admission: Mapped[str] = mapped_column(String(16))
    public_key_pem: Mapped[str] = mapped_column(Text)
    key_fingerprint: Mapped[str] = mapped_column(_Digest)
    certificate_pem: Mapped[str | None] = mapped_column(Text)
    certificate_expires_at: Mapped[float | None]
    enrolled_at: Mapped[float]
    revision: Mapped[int] = mapped_column(default=0)
    birth: Mapped[dict[str, Any] | None]
    reported: Mapped[dict[str, Any] | None]
    online: Mapped[bool] = mapped_column(default=False)
    boot_id: Mapped[str | None] = mapped_column(String(32))
    last_seen: Mapped[float | None]


class EnrolTokenRow(Base):
    """A token that admits devices to a fleet; only its hash is kept."""

    __tablename__ = "enrol_tokens"

    sha256: Mapped[str] = mapped_column(_Digest, primary_key=True)
    fleet: Mapped[str] = mapped_column(_Name, ForeignKey("fleets.name"))
    uses_left: Mapped[int]
    expires_at: Mapped[float]
    preauthorised: Mapped[bool]
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(_Path)


class RolloutRow(Base):
    """One model for one pipeline of a fleet, or of one device of it. `number` is the order of creation."""

    __tablename__ = "rollouts"
    __table_args__ = (Index(None, "fleet", "pipeline", "number"),)

    number: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(_Name, unique=True)
    fleet: Mapped[str] = mapped_column(_Name, ForeignKey("fleets.name"))
    device: Mapped[str | None] = mapped_column(_Name)
    pipeline: Mapped[str] = mapped_column(_Name)
    model_path: Mapped[str] = mapped_column(_Path)
    model_sha256: Mapped[str] = mapped_column(_Digest)
    attempt: Mapped[int]
    probation_s: Mapped[float]
    restores: Mapped[str | None] = mapped_column(_Name)
    state: Mapped[str] = mapped_column(String(16))
    revision: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(_Path)
    finished_at: Mapped[float | None]


class RolloutTargetRow(Base):
    """One device of a rollout, and how far it is."""

    __tablename__ = "rollout_targets"

    rollout: Mapped[str] = mapped_column(_Name, ForeignKey("rollouts.id"), primary_key=True)
    device: Mapped[str] = mapped_column(_Name, ForeignKey("devices.id"), primary_key=True, index=True)
    state: Mapped[str] = mapped_column(String(16))
    result: Mapped[str | None] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(Text, default="")
    progress: Mapped[float] = mapped_column(default=0.0)
    detail: Mapped[str] = mapped_column(_Path, default="")
    numbers: Mapped[dict[str, Any]] = mapped_column(default=dict)
    variant: Mapped[str | None] = mapped_column(_Name)
    provider: Mapped[str | None] = mapped_column(_Name)
    former: Mapped[bool] = mapped_column(default=False, server_default=false())


class WindowRow(Base):
    """One telemetry window, its histograms as they came."""

    __tablename__ = "windows"
    __table_args__ = (
        UniqueConstraint("device", "boot_id", "seq"),
        Index(None, "ended_at"),
        Index(None, "device", "ended_at"),
    )

    number: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    device: Mapped[str] = mapped_column(_Name, ForeignKey("devices.id"))
    boot_id: Mapped[str] = mapped_column(String(32))
    seq: Mapped[int]
    first_seq: Mapped[int]
    pipeline: Mapped[str] = mapped_column(_Name)
    source: Mapped[str] = mapped_column(_Name)
    model_path: Mapped[str] = mapped_column(_Path)
    model_sha256: Mapped[str] = mapped_column(_Digest)
    variant: Mapped[str] = mapped_column(_Name)
    provider: Mapped[str] = mapped_column(_Name)
    ended_at: Mapped[float]
    duration_s: Mapped[float]
    clock: Mapped[str] = mapped_column(String(16))
    frames: Mapped[int]
    dropped: Mapped[int]
    errors: Mapped[int]
    stages: Mapped[dict[str, Any]]
    labels: Mapped[dict[str, Any]]
    received_at: Mapped[float]


class EventRow(Base):
    """One event of a device."""

    __tablename__ = "events"
    __table_args__ = (
        UniqueConstraint("device", "boot_id", "seq"),
        Index(None, "device", "number"),
        Index(None, "received_at"),
    )

    number: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    device: Mapped[str] = mapped_column(_Name, ForeignKey("devices.id"))
    boot_id: Mapped[str] = mapped_column(String(32))
    seq: Mapped[int]
    body: Mapped[dict[str, Any]]
    received_at: Mapped[float]


class CommandRow(Base):
    """One command to one device, and what the device last said of it."""

    __tablename__ = "commands"

    device: Mapped[str] = mapped_column(_Name, ForeignKey("devices.id"), primary_key=True)
    n: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    boot_id: Mapped[str] = mapped_column(String(32))
    kind: Mapped[str] = mapped_column(_Name)
    model_path: Mapped[str] = mapped_column(_Path)
    model_sha256: Mapped[str] = mapped_column(_Digest)
    seconds: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    issued_at: Mapped[float]
    expires_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(_Path)
    response: Mapped[dict[str, Any] | None]


class CertificateRow(Base):
    """A client certificate that our CA has issued; the revoked ones make the CRL."""

    __tablename__ = "certificates"

    serial: Mapped[str] = mapped_column(_Name, primary_key=True)
    subject: Mapped[str] = mapped_column(_Path, index=True)
    expires_at: Mapped[float]
    revoked_at: Mapped[float | None]


class ViewerRow(Base):
    """A read-only client of the broker."""

    __tablename__ = "viewers"

    name: Mapped[str] = mapped_column(_Name, primary_key=True)
    username: Mapped[str] = mapped_column(_Path)
    expires_at: Mapped[float]
    created_at: Mapped[float]
    created_by: Mapped[str] = mapped_column(_Path)


class AuditRow(Base):
    """Who changed what, and when. Rows are only added."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(_RowId, primary_key=True, autoincrement=True)
    at: Mapped[float]
    operator: Mapped[str] = mapped_column(_Path)
    action: Mapped[str] = mapped_column(_Name)
    subject: Mapped[str] = mapped_column(_Path)
    detail: Mapped[dict[str, Any]]
