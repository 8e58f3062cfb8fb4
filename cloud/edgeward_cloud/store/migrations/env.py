"""Alembic's entry: migrations run on the connection that `database.py` hands over, never on their own."""

from __future__ import annotations

from alembic import context

from edgeward_cloud.store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,  # SQLite changes a table by making it anew
)
with context.begin_transaction():
    context.run_migrations()
