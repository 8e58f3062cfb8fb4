"""The store: one engine, and two kinds of transaction.

Invariants: a `write` transaction takes the write lock when it begins (SQLite: BEGIN IMMEDIATE), so that
what it read is still true when it writes; a transaction commits as a whole or leaves nothing. SQLite runs
in WAL with synchronous=NORMAL: after a power cut the newest commits may be gone, the file is never broken,
and devices send again what was not acknowledged.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Table, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from edgeward_cloud.store.models import Base
from edgeward_wire.errors import Unavailable

BUSY_TIMEOUT_S = 20
_WRITE = "edgeward_write"
_MIGRATIONS = Path(__file__).parent / "migrations"
_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}",
)


class Store:
    """The database. Sessions are short: never held across the network."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{_WRITE: True})

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A transaction that sees one state of the database and changes nothing."""
        with _blamed():
            async with AsyncSession(self._engine, expire_on_commit=False) as session:
                yield session

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction that holds the write lock; it commits on exit, and rolls back on an exception."""
        with _blamed():
            async with AsyncSession(self._writer, expire_on_commit=False) as session, session.begin():
                yield session

    async def migrate(self) -> None:
        """Bring the tables to the newest migration."""
        with _blamed():
            async with self._writer.begin() as connection:
                await connection.run_sync(_upgrade)

    async def check(self) -> None:
        """One round trip.

        Raises:
            Unavailable: the database does not answer.
        """
        async with self.read() as session:
            await session.execute(text("SELECT 1"))


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[Store]:
    """Open the database at a SQLAlchemy URL with an async driver, migrated; closed on exit."""
    engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        await asyncio.to_thread(_probe, engine.url.database or "")
        event.listen(engine.sync_engine, "connect", _on_sqlite_connect)
        event.listen(engine.sync_engine, "begin", _on_sqlite_begin)
    try:
        store = Store(engine)
        await store.migrate()
        yield store
    finally:
        await engine.dispose()


def _probe(path: str) -> None:
    """Fail here when the file cannot be opened: aiosqlite's own failure leaves a thread behind.

    Raises:
        Unavailable: it cannot.
    """
    try:
        sqlite3.connect(path).close()
    except sqlite3.Error as error:
        raise Unavailable(
            f"The database {path} cannot be opened: {error}.", "Check its directory."
        ) from error


@contextmanager
def _blamed() -> Iterator[None]:
    """A database that is full, locked or away is the world's fault; any other error of it is a bug."""
    try:
        yield
    except (OperationalError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        raise Unavailable(
            f"The database cannot be used: {cause}.", "See that its disk has room and is writable."
        ) from error


async def insert_new(session: AsyncSession, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
    """Insert rows; those that are there already (by any unique key) are left as they are."""
    values = [dict(row) for row in rows]
    if values:
        await session.execute(_dialect_insert(session, table).on_conflict_do_nothing(), values)


def table_of(model: type[Base]) -> Table:
    """The table behind a model."""
    table = model.__table__
    assert isinstance(table, Table)
    return table


def _dialect_insert(session: AsyncSession, table: Table) -> sqlite.Insert | postgresql.Insert:
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def _upgrade(connection: Connection) -> None:
    command.upgrade(alembic_config(connection), "head")


def alembic_config(connection: Connection) -> Config:
    """Alembic's configuration for an open connection; there is no alembic.ini."""
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _on_sqlite_connect(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself: we do
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _on_sqlite_begin(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
