"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forwards only: a cloud goes back by restoring a backup."""
    _audit()
    _certificates()
    _fleets()
    _viewers()
    _devices()
    _enrol_tokens()
    _rollouts()
    _events()
    _rollout_targets()
    _windows()


def _audit() -> None:
    op.create_table(
        "audit",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("operator", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )


def _certificates() -> None:
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("serial", name="pk_certificates"),
    )
    op.create_index("ix_certificates_subject", "certificates", ["subject"], unique=False)


def _fleets() -> None:
    op.create_table(
        "fleets",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_fleets"),
    )


def _viewers() -> None:
    op.create_table(
        "viewers",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("username", sa.String(length=200), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_viewers"),
    )


def _devices() -> None:
    op.create_table(
        "devices",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("admission", sa.String(length=16), nullable=False),
        sa.Column("public_key_pem", sa.Text(), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("certificate_pem", sa.Text(), nullable=True),
        sa.Column("certificate_expires_at", sa.Double(), nullable=True),
        sa.Column("enrolled_at", sa.Double(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("birth", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("reported", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("online", sa.Boolean(), nullable=False),
        sa.Column("boot_id", sa.String(length=32), nullable=True),
        sa.Column("last_seen", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["fleet"], ["fleets.name"], name="fk_devices_fleet"),
        sa.PrimaryKeyConstraint("id", name="pk_devices"),
    )
    op.create_index("ix_devices_fleet", "devices", ["fleet"], unique=False)


def _enrol_tokens() -> None:
    op.create_table(
        "enrol_tokens",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("uses_left", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("preauthorised", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.ForeignKeyConstraint(["fleet"], ["fleets.name"], name="fk_enrol_tokens_fleet"),
        sa.PrimaryKeyConstraint("sha256", name="pk_enrol_tokens"),
    )


def _rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("fleet", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=True),
        sa.Column("pipeline", sa.String(length=64), nullable=False),
        sa.Column("model_path", sa.String(length=200), nullable=False),
        sa.Column("model_sha256", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.Column("probation_s", sa.Double(), nullable=False),
        sa.Column("restores", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["fleet"], ["fleets.name"], name="fk_rollouts_fleet"),
        sa.PrimaryKeyConstraint("number", name="pk_rollouts"),
        sa.UniqueConstraint("id", name="uq_rollouts_id"),
    )
    op.create_index(
        "ix_rollouts_fleet_pipeline_number", "rollouts", ["fleet", "pipeline", "number"], unique=False
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("boot_id", sa.String(length=32), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name="fk_events_device"),
        sa.PrimaryKeyConstraint("number", name="pk_events"),
        sa.UniqueConstraint("device", "boot_id", "seq", name="uq_events_device_boot_id_seq"),
    )
    op.create_index("ix_events_device_number", "events", ["device", "number"], unique=False)
    op.create_index("ix_events_received_at", "events", ["received_at"], unique=False)


def _rollout_targets() -> None:
    op.create_table(
        "rollout_targets",
        sa.Column("rollout", sa.String(length=64), nullable=False),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("result", sa.String(length=32), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("detail", sa.String(length=200), nullable=False),
        sa.Column("numbers", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=True),
        sa.Column("provider", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name="fk_rollout_targets_device"),
        sa.ForeignKeyConstraint(["rollout"], ["rollouts.id"], name="fk_rollout_targets_rollout"),
        sa.PrimaryKeyConstraint("rollout", "device", name="pk_rollout_targets"),
    )
    op.create_index("ix_rollout_targets_device", "rollout_targets", ["device"], unique=False)


def _windows() -> None:
    op.create_table(
        "windows",
        sa.Column(
            "number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("device", sa.String(length=64), nullable=False),
        sa.Column("boot_id", sa.String(length=32), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("first_seq", sa.BigInteger(), nullable=False),
        sa.Column("pipeline", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("model_path", sa.String(length=200), nullable=False),
        sa.Column("model_sha256", sa.String(length=64), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("provider", sa.String(length=64), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.Column("clock", sa.String(length=16), nullable=False),
        sa.Column("frames", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("errors", sa.BigInteger(), nullable=False),
        sa.Column("stages", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["devices.id"], name="fk_windows_device"),
        sa.PrimaryKeyConstraint("number", name="pk_windows"),
        sa.UniqueConstraint("device", "boot_id", "seq", name="uq_windows_device_boot_id_seq"),
    )
    op.create_index("ix_windows_device_ended_at", "windows", ["device", "ended_at"], unique=False)
    op.create_index("ix_windows_ended_at", "windows", ["ended_at"], unique=False)
