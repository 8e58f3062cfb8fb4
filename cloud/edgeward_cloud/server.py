"""`edgeward-cloud up`: one process that holds all parts of the cloud, from start to stop.

Invariants: parts start in the order in which they need one another and stop in the reverse one; the first
part that fails stops all of them, and its reason is the one line that a person reads; systemd hears READY
when everything serves, and its watchdog is fed only while the event loop turns and the database answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from edgeward_cloud import access
from edgeward_cloud.app import create_app
from edgeward_cloud.auth import Operators
from edgeward_cloud.broker import Broker
from edgeward_cloud.director import Director
from edgeward_cloud.ingest import Ingest
from edgeward_cloud.mqtt import Inbox, Link
from edgeward_cloud.notify import Notifier
from edgeward_cloud.pki import Pki, TlsFiles
from edgeward_cloud.registry import Registry
from edgeward_cloud.services import Services
from edgeward_cloud.settings import Settings
from edgeward_cloud.store import operations, streams
from edgeward_cloud.store.database import Store, open_store
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

BROKER_READY_S = 20.0
GRACE_S = 10
"""How long open requests may take to end when the cloud stops."""

HOUSEKEEPING_S = 3600.0
RESIGN_AGAIN_S = 60.0
MAX_CONNECTIONS = 2000
_log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Run the cloud until SIGTERM or SIGINT.

    Raises:
        EdgewardError: a part failed; it says which and what to do.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    notifier = Notifier()
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(_signals())
        listener = stack.enter_context(_listening(settings))
        store = await stack.enter_async_context(open_store(settings.database_url))
        pki, registry = _pki(settings), Registry(settings)
        lists = await access.prepare(store, pki, time.time())
        broker = (
            await stack.enter_async_context(_broker(settings, lists)) if settings.broker.managed else None
        )
        inbox = Inbox()
        link = Link(settings.broker_connect, pki, inbox)
        ingest = Ingest(store, link, inbox)
        services = Services(
            settings=settings,
            store=store,
            registry=registry,
            pki=pki,
            operators=Operators(settings.operators_file),
            clock=time.time,
            broker=broker,
            deliver=link.deliver,
            results=ingest.results,
            ingest_fault=lambda: ingest.fault,
        )
        director = Director(store, registry, link.deliver)
        parts = _Parts(stop)
        stack.push_async_callback(parts.stop)
        await stack.enter_async_context(_running_link(parts, link))
        await stack.enter_async_context(_running_ingest(parts, ingest))
        await _until_broker(parts, link, managed=broker is not None)
        await director.sync_all()
        parts.start("re-signing", _resign(registry))
        parts.start("housekeeping", _housekeeping(store))
        await stack.enter_async_context(_running_http(parts, services, listener))
        parts.start("watchdog", _watchdog(notifier, store))
        print(f"Edgeward cloud serves at {settings.url}", flush=True)
        notifier.ready(f"Serving at {settings.url}")
        await parts.first_to_end()
        notifier.stopping()


class _Parts:
    """Tasks that should run for ever, and the wish to stop."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._tasks: dict[asyncio.Task[None], str] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a part."""
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = name
        return task

    async def first_to_end(self, also: asyncio.Task[Any] | None = None) -> None:
        """Until somebody wants the cloud to stop, or a part ends, or `also` does.

        Raises:
            EdgewardError: what the part failed of.
        """
        wish = asyncio.create_task(self._stop.wait())
        waited: set[asyncio.Task[Any]] = {wish, *self._tasks}
        try:
            done, _ = await asyncio.wait(
                waited | ({also} if also else set()), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            wish.cancel()
        for task in done & set(self._tasks):
            raise _failure(self._tasks[task], task.exception())

    @property
    def stopping(self) -> bool:
        """Whether somebody wants the cloud to stop."""
        return self._stop.is_set()

    async def stop(self) -> None:
        """End all of them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _failure(name: str, error: BaseException | None) -> EdgewardError:
    if isinstance(error, EdgewardError):
        return error
    if error is None:
        return Unavailable(f"The cloud's {name} ended by itself.", "See the log.")
    _log.error("The cloud's %s failed.", name, exc_info=error)
    what = f"The cloud's {name} failed: {type(error).__name__}: {error}"
    return Unavailable(what, "This is a mistake of Edgeward's: please report it with the log.")


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    yield stop
    # Handlers stay until the loop is closed: a second signal must not cut the orderly stop short.


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """The HTTPS socket, bound before anything else is touched: a second cloud ends here."""
    host, port = settings.http.host, settings.http.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise Unavailable(
            f"Cannot listen on {host}: {error}.", "Correct [http] host in cloud.toml."
        ) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1024)
        except OSError as error:
            raise Unavailable(
                f"Cannot listen on {host} port {port}: {error.strerror}.",
                "Stop the program that listens there, or change [http] in cloud.toml.",
            ) from error
        yield listener


def _pki(settings: Settings) -> Pki:
    pki = Pki(settings.pki)
    needed = (*_files(pki.server), *_files(pki.cloud_client), pki.server_ca, pki.device_ca)
    for path in needed:
        if not os.access(path, os.R_OK):
            raise Rejected(f"{path} is missing or cannot be read.", "Restore it from a backup.")
    return pki


def _files(files: TlsFiles) -> tuple[Path, Path]:
    return files.certificate, files.key


@asynccontextmanager
async def _broker(settings: Settings, lists: access.Lists) -> AsyncIterator[Broker]:
    broker = Broker(settings)
    try:
        await asyncio.to_thread(broker.start, lists.viewers, lists.revoked)
        yield broker
    finally:
        await asyncio.to_thread(broker.stop)


@asynccontextmanager
async def _running_link(parts: _Parts, link: Link) -> AsyncIterator[None]:
    task = parts.start("MQTT client", link.run())
    try:
        yield
    finally:
        await _ended(task)


@asynccontextmanager
async def _running_ingest(parts: _Parts, ingest: Ingest) -> AsyncIterator[None]:
    task = parts.start("ingest", ingest.run())
    try:
        yield
    finally:
        ingest.stop()
        await asyncio.wait({task}, timeout=GRACE_S)
        await _ended(task)


@asynccontextmanager
async def _running_http(parts: _Parts, services: Services, listener: socket.socket) -> AsyncIterator[None]:
    server = _Uvicorn(
        uvicorn.Config(
            create_app(services),
            ssl_certfile=str(services.pki.server.certificate),
            ssl_keyfile=str(services.pki.server.key),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,  # `Bounds` sends it
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_S,
            h11_max_incomplete_event_size=32 << 10,
        )
    )
    task = parts.start("HTTPS server", server.serve(sockets=[listener]))
    try:
        while not server.started and not parts.stopping:
            await parts.first_to_end(asyncio.create_task(asyncio.sleep(0.02)))
        yield
    finally:
        server.should_exit = True
        await asyncio.wait({task}, timeout=GRACE_S + 5)
        await _ended(task)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: all parts stop in order, not this one alone."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, without the half minute that TLS waits for an idle client to say goodbye."""
        parting = asyncio.create_task(self._part_from_idle())
        await super().shutdown(sockets)
        parting.cancel()

    async def _part_from_idle(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            if not self.server_state.tasks:  # no request is being answered
                for connection in list(self.server_state.connections):
                    connection.transport.abort()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _until_broker(parts: _Parts, link: Link, *, managed: bool) -> None:
    """Wait for our own broker. Somebody else's may be away: the API serves all the same."""
    waiting = asyncio.create_task(link.until_connected(BROKER_READY_S if managed else 2.0))
    try:
        await parts.first_to_end(waiting)
        if managed and not parts.stopping and not await waiting:
            raise Unavailable("The broker runs, but does not take the cloud's client.", "See the log.")
    finally:
        waiting.cancel()


async def _resign(registry: Registry) -> None:
    """Re-sign the online roles at half of their life."""
    while True:
        await asyncio.sleep(await _resign_once(registry))


async def _resign_once(registry: Registry) -> float:
    """Re-sign what is due; the seconds until the next look.

    A key service or a disk that is away is no reason to stop: what is signed holds for days.
    """
    try:
        due = await asyncio.to_thread(registry.resign_due)
    except (Unavailable, OSError) as error:
        _log.error("Metadata cannot be signed; again in %.0f s: %s", RESIGN_AGAIN_S, error)
        return RESIGN_AGAIN_S
    return min(max(due - time.time(), 1.0), HOUSEKEEPING_S)


async def _housekeeping(store: Store) -> None:
    """Forget what is old."""
    while True:
        now = time.time()
        try:
            async with store.write() as session:
                await streams.prune(session, now)
                await operations.prune_certificates(session, now)
        except Unavailable as error:
            _log.error("Old rows cannot be removed: %s", error)
        await asyncio.sleep(HOUSEKEEPING_S)


async def _watchdog(notifier: Notifier, store: Store) -> None:
    """Feed systemd's watchdog while the loop turns and the database answers."""
    if notifier.watchdog_s is None:
        await asyncio.Event().wait()
    assert notifier.watchdog_s is not None
    while True:
        with contextlib.suppress(Unavailable):  # a full disk is reported, and no reason to be killed
            await store.check()
        notifier.alive()
        await asyncio.sleep(notifier.watchdog_s / 3)
