"""The daemon's composition root: makes the parts, knots them together, and hands them to `lifetime`.

It loads no numpy, no cv2 and no onnxruntime: what a driver or a model can crash runs in children.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from pathlib import Path

from edgeward_agent import lookout as looking
from edgeward_agent import machine as machinery
from edgeward_agent import mqtt as linking
from edgeward_agent import page_keeper
from edgeward_agent import supply as supplying
from edgeward_agent.blobs import BlobStore
from edgeward_agent.config import EXAMPLE, Config, load_config
from edgeward_agent.floors import Floors
from edgeward_agent.http import Http
from edgeward_agent.identity import Identity
from edgeward_agent.journal import Journal
from edgeward_agent.lifetime import Lifetime, Pulse
from edgeward_agent.lookout import Lookout
from edgeward_agent.machine import Machine
from edgeward_agent.mqtt import Link
from edgeward_agent.notify import Notifier
from edgeward_agent.page_keeper import PageKeeper
from edgeward_agent.reporting import Reporter
from edgeward_agent.serving import supervising
from edgeward_agent.spool import Spool
from edgeward_agent.status import only_daemon
from edgeward_agent.supply import Supply
from edgeward_agent.sysinfo import this_machine
from edgeward_agent.trust import Registry
from edgeward_wire import __version__
from edgeward_wire.errors import Rejected

log = logging.getLogger(__name__)

MACHINE_JOIN_S = 20.0
"""Runners get some seconds to hand over their last windows."""


def run_daemon(config_path: Path, state: Path) -> int:
    """Serve until a signal. Returns the exit code.

    Raises:
        Rejected: the configuration, the identity, or another daemon is in the way.
    """
    config = load_config(config_path)
    identity = Identity.load(state)
    if config.device not in (None, identity.device):
        raise Rejected(
            f"{config_path} is for device {config.device}, but {state} is enrolled as {identity.device}.",
            "Correct `device` in agent.toml, or use another --state.",
        )
    _say_hello(config, config_path, identity)
    with only_daemon(state):
        return _compose(config, identity, state).run()


def _compose(config: Config, identity: Identity, state: Path) -> Lifetime:
    boot_id = secrets.token_hex(16)
    lifetime = Lifetime(Notifier(os.environ, os.getpid()))
    stop = threading.Event()

    floors = Floors(state / "floors.json")
    spool = Spool(state / "spool", boot_id, config.telemetry.spool_bytes)
    reporter = Reporter(
        device=identity.device,
        fleet=identity.fleet,
        boot_id=boot_id,
        state=state,
        spool=spool,
        machine=this_machine(),
        pipelines={name: tuple(s.name for s in p.sources) for name, p in config.pipelines.items()},
        clock_trusted=lambda: time.time() >= max(floors.last_authenticated_time, identity.issued_at),
    )
    supply = Supply(BlobStore(state / "blobs"), Http.of(identity, stop=stop), identity.token)
    if (fault := this_machine().runtime_fault) is not None:  # it goes on: who sees it can mend it
        reporter.fault("runtime", str(fault))
    machine = Machine(
        config=config,
        state=state,
        journal=Journal(state / "journal.json"),
        floors=floors,
        supply=supply,
        reporter=reporter,
        hardware=this_machine(),
    )
    http = Http.of(identity, stop=stop)
    registry = Registry(identity, http, state, floors, time.time)
    lookout = Lookout(identity, registry, http, machine, config.registry.poll_interval_s)
    machine.attach(lookout.ask)
    pulse = Pulse("link", linking.PULSE_S)
    link = Link(
        identity,
        boot_id,
        spool,
        on_refresh=lambda _refresh: lookout.refresh(),
        on_connected=machine.connected,
        failed=lifetime.failed,
        on_refused=lookout.refused,
        on_command=machine.command,
        beat=pulse.beat,
    )
    reporter.attach(link)

    # Stopped in the reverse order: the machine first, so that the runners' last windows reach the spool.
    lifetime.closing("spool", lambda _orderly: spool.close())
    lifetime.service("link", link.start, lambda _orderly: link.stop(), pulse)
    lifetime.thread("blobs", supply.run, lambda _orderly: supply.stop(), limit_s=supplying.PULSE_S)
    lifetime.thread("registry", lookout.run, lambda _orderly: lookout.stop(), limit_s=looking.PULSE_S)
    if config.page is not None:
        page = PageKeeper(config.page, state, window_s=config.telemetry.window_s)
        lifetime.thread("page", page.run, lambda _orderly: page.stop(), limit_s=page_keeper.PULSE_S)
    lifetime.closing("requests", lambda _orderly: stop.set())
    if config.serve.port is not None:
        serving = supervising.Serving(supervising.order(config.serve, tuple(config.pipelines), state))
        lifetime.thread("serving", serving.run, serving.stop, limit_s=supervising.PULSE_S)
    lifetime.thread("machine", machine.run, machine.stop, limit_s=machinery.PULSE_S, join_s=MACHINE_JOIN_S)
    return lifetime


def _say_hello(config: Config, config_path: Path, identity: Identity) -> None:
    log.info("edgeward-agent %s, device %s, fleet %s.", __version__, identity.device, identity.fleet)
    if not config.pipelines:
        log.warning(
            "%s has no pipelines: nothing can run here yet. Add for example:\n%s",
            config_path,
            EXAMPLE.strip(),
        )
