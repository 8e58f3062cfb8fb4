"""The store on real SQLite files: migrations, transactions, and that what comes twice leaves one row."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from edgeward_cloud.ingest import window_row
from edgeward_cloud.rollout import Rollout, Target
from edgeward_cloud.store import devices, fleets, operations, rollouts, streams, tokens
from edgeward_cloud.store.database import Store, open_store
from edgeward_cloud.store.models import Base, DeviceRow, EnrolTokenRow
from edgeward_wire.errors import Unavailable
from edgeward_wire.manifest import ModelRef
from edgeward_wire.telemetry import Window

pytestmark = pytest.mark.anyio
MODEL = ModelRef(path="models/net/1.json", sha256="a" * 64)
BOOT = "b" * 32


def url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path / 'edgeward.db'}"


def device_row(name: str, fleet: str = "edge", **more: Any) -> DeviceRow:
    columns: dict[str, Any] = {"admission": "accepted", "public_key_pem": "", "key_fingerprint": ""}
    return DeviceRow(id=name, fleet=fleet, enrolled_at=1.0, **{"online": False, **columns, **more})


async def seed(store: Store, *names: str) -> None:
    async with store.write() as session:
        await fleets.create(session, "edge", 1.0)
        session.add_all(device_row(name) for name in names)


def window(seq: int, **more: Any) -> Window:
    values: dict[str, Any] = {
        "boot_id": BOOT,
        "seq": seq,
        "first_seq": seq,
        "pipeline": "main",
        "source": "cam",
        "model": MODEL,
        "variant": "int8",
        "provider": "CPUExecutionProvider",
        "start": 1000.0 + seq,
        "duration_s": 1.0,
        "frames": 5,
    }
    return Window(**{**values, **more})


async def test_migrations_and_models_agree(tmp_path: Path) -> None:
    def differences(connection: Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))

    async with open_store(url(tmp_path)) as store, store._engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_migrating_twice_changes_nothing_and_the_file_is_in_wal(tmp_path: Path) -> None:
    for _ in range(2):
        async with open_store(url(tmp_path)) as store:
            await store.migrate()
            await store.check()
    with sqlite3.connect(tmp_path / "edgeward.db") as plain:
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert plain.execute("SELECT version_num FROM alembic_version").fetchall() == [("0003",)]
    plain.close()


async def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with open_store(url(tmp_path)) as store:

        async def half() -> None:
            async with store.write() as session:
                await fleets.create(session, "edge", 1.0)
                raise RuntimeError("midway")

        with pytest.raises(RuntimeError, match="midway"):
            await half()
        async with store.read() as session:
            assert not await fleets.exists(session, "edge")


async def test_writers_wait_for_one_another(tmp_path: Path) -> None:
    """What a write transaction read is still true when it writes: no update is lost."""
    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1")

        async def count() -> None:
            async with store.write() as session:
                row = await devices.get(session, "d1")
                assert row is not None
                row.revision += 1
                await asyncio.sleep(0)

        await asyncio.gather(*(count() for _ in range(12)))
        async with store.read() as session:
            row = await devices.get(session, "d1")
            assert row is not None
            assert row.revision == 12


async def test_a_token_is_never_used_more_often_than_it_may(tmp_path: Path) -> None:
    token = EnrolTokenRow(
        sha256="c" * 64,
        fleet="edge",
        uses_left=3,
        expires_at=9.0,
        preauthorised=True,
        created_at=1.0,
        created_by="ann",
    )
    async with open_store(url(tmp_path)) as store:
        await seed(store)
        async with store.write() as session:
            await tokens.add(session, token)

        async def use() -> bool:
            async with store.write() as session:
                return await tokens.take_use(session, "c" * 64)

        assert sum(await asyncio.gather(*(use() for _ in range(8)))) == 3
        async with store.write() as session:
            await tokens.prune(session, 9.0 + tokens.KEEP_S + 1)
            assert await tokens.get(session, "c" * 64) is None


async def test_windows_and_events_that_come_twice_leave_one_row(tmp_path: Path) -> None:
    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1", "d2")
        rows = [window_row(d, window(seq), 2000.0) for d in ("d1", "d2") for seq in range(3)]
        event = {"device": "d1", "boot_id": BOOT, "seq": 1, "body": {"a": 1}, "received_at": 5.0}
        for _ in range(2):
            async with store.write() as session:
                await streams.add_windows(session, [*rows, *rows])
                await streams.add_events(session, [event])
        async with store.read() as session:
            assert len(await streams.windows(session, 0.0, 100)) == 6
            assert len(await streams.windows(session, 0.0, 100, device="d1")) == 3
            assert len(await streams.windows(session, 0.0, 2, fleet="edge")) == 2
            assert not await streams.windows(session, 0.0, 2, fleet="other")
            assert len(await streams.events(session, "d1", 10)) == 1
        async with store.write() as session:
            await streams.prune(session, 1002.5 + streams.KEEP_WINDOWS_S)
        async with store.read() as session:
            assert {row.seq for row in await streams.windows(session, 0.0, 100)} == {2}


async def test_a_window_ends_when_its_clock_says_unless_that_is_wrong() -> None:
    assert window_row("d1", window(1), 2000.0)["ended_at"] == 1002.0
    assert window_row("d1", window(1, clock="untrusted"), 2000.0)["ended_at"] == 2000.0
    assert window_row("d1", window(1, start=9e9), 2000.0)["ended_at"] == 2000.0


async def test_a_rollout_comes_back_as_it_was_and_saves_what_changed(tmp_path: Path) -> None:
    first = Rollout(
        "r1",
        "edge",
        "main",
        MODEL,
        attempt=1,
        created_at=1.0,
        created_by="ann",
        targets=(Target("d1"), Target("d2")),
    )
    done = Target(
        "d1",
        "idle",
        "succeeded",
        "fine",
        progress=1.0,
        numbers={"p50_ms": 3.5},
        variant="int8",
        provider="CPUExecutionProvider",
    )
    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1", "d2", "d3")
        after = Rollout(
            **{
                **{f: getattr(first, f) for f in first.__slots__},
                "targets": (done, Target("d2")),
                "revision": 7,
            }
        )
        async with store.write() as session:
            await rollouts.add(session, first)
            await rollouts.save(session, first, after)
            await rollouts.add_target(session, first, "d3")
            await rollouts.add_target(session, first, "d3")
        async with store.read() as session:
            found = await rollouts.get(session, "r1")
            assert found is not None
            assert found.targets == (done, Target("d2"), Target("d3"))
            assert (found.revision, found.state) == (7, "running")
            [sample] = await rollouts.history(session, "edge")
            assert [t.device for t in sample.targets] == ["d1"]
            [mine] = await rollouts.history(session, "edge", "d2")
            assert [t.device for t in mine.targets] == ["d2"]


async def test_the_newest_rollout_of_each_device_and_pipeline_is_assigned(tmp_path: Path) -> None:
    def made(name: str, pipeline: str, *names: str, **more: Any) -> Rollout:
        targets = tuple(Target(n) for n in names)
        return Rollout(
            name,
            "edge",
            pipeline,
            MODEL,
            attempt=1,
            created_at=1.0,
            created_by="",
            targets=targets,
            **more,
        )

    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1", "d2")
        async with store.write() as session:
            for each in (
                made("r1", "main", "d1", "d2"),
                made("r2", "side", "d1"),
                made("r3", "main", "d1", device="d1"),
                made("r4", "main", "d1", "d2", state="canceled"),
            ):
                await rollouts.add(session, each)
        async with store.read() as session:
            found = await rollouts.assigned(session, ["d1", "d2"])
            assert [(r.id, [t.device for t in r.targets]) for r in found] == [
                ("r1", ["d2"]),
                ("r2", ["d1"]),
                ("r3", ["d1"]),
            ]
            assert sorted(r.id for r in await rollouts.of_fleets(session)) == ["r1", "r2"]
            assert [r.id for r in await rollouts.newest(session, 2)] == ["r4", "r3"]


async def test_fleets_count_their_devices(tmp_path: Path) -> None:
    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1")
        async with store.write() as session:
            session.add_all(
                [device_row("d2", online=True), device_row("d3", admission="rejected", online=True)]
            )
            await fleets.create(session, "empty", 1.0)
            assert not await fleets.create(session, "empty", 2.0)
        async with store.read() as session:
            assert await fleets.counts(session) == [("edge", 2, 1), ("empty", 0, 0)]
            assert await operations.revoked_devices(session) == ["d3"]


async def test_revoked_serials_stay_until_they_expire(tmp_path: Path) -> None:
    async with open_store(url(tmp_path)) as store:
        async with store.write() as session:
            await operations.add_certificate(session, "aa", "d1", 100.0)
            await operations.add_certificate(session, "bb", "d2", 100.0)
            await session.flush()
            await operations.revoke(session, "d1", 5.0)
        async with store.write() as session:
            assert await operations.revoked_serials(session) == ["aa"]
            await operations.prune_certificates(session, 101.0)
            assert await operations.revoked_serials(session) == []


async def test_a_full_disk_is_the_worlds_fault_and_passes(tmp_path: Path) -> None:
    async with open_store(url(tmp_path)) as store:
        await seed(store, "d1")

        async def fill(pages: int) -> None:
            body = {"text": "x" * 100_000}
            row = {"device": "d1", "boot_id": BOOT, "seq": 1, "body": body, "received_at": 5.0}
            async with store.write() as session:
                await session.execute(text(f"PRAGMA max_page_count={pages}"))
                await streams.add_events(session, [row])

        with pytest.raises(Unavailable, match="full"):
            await fill(1)
        await fill(1 << 20)


async def test_a_database_that_is_gone_is_the_worlds_fault(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    async with open_store(url(tmp_path / "in")):
        pass
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(Unavailable, match=r"edgeward\.db cannot be opened"):
        async with open_store(url(tmp_path / "in")):
            pass
