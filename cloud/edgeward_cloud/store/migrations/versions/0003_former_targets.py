"""What the hardware did that had a device's id before."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Forwards only: a cloud goes back by restoring a backup."""
    op.add_column(
        "rollout_targets", sa.Column("former", sa.Boolean(), nullable=False, server_default=sa.false())
    )
