"""`edgeward-cloud init`: the ceremony that makes a cloud, once.

It makes every key on this machine and then says which of them must leave it. Invariants: nothing that
exists is overwritten; `cloud.toml` is written last, so that half a ceremony is not a cloud; private keys
are 0600; root's threshold is one of two keys, so that one may be lost.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeward_cloud.files import PRIVATE, write_atomic
from edgeward_cloud.keys import Signer, new_key
from edgeward_cloud.operators import new_token
from edgeward_cloud.pki import Pki, check_names
from edgeward_cloud.registry.beginning import begin, root_file
from edgeward_cloud.settings import (
    FILE,
    LOOPBACK,
    BrokerSettings,
    HttpSettings,
    Settings,
    authority,
    is_wildcard,
    toml_value,
)
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from edgeward_wire.identifiers import DEVICE_PATTERN

ROOT_KEYS = ("root-1", "root-2")
ROOT_THRESHOLD = 1
OFFLINE_KEYS = (*ROOT_KEYS, "targets", "agent")
ONLINE_ROLES = ("timestamp", "snapshot", "director")
RELEASE_KEY = "release-key.pem"

OFFLINE_README = """\
The offline keys of an Edgeward cloud. They do not belong on the machine that runs it.

root-1.pem    signs root: the keys of all roles. Needed when a key changes, and every two years.
root-2.pem    the same, for recovery: keep it in another place. Either one suffices; without both, every
              device would have to be enrolled again with a new cloud.
targets.pem   signs which release keys may publish models. Needed when an operator joins or leaves, and
              once a year.
agent.pem     signs the packages of the agent itself. Reserved: nothing is signed with it yet.

`edgeward-cloud resign --dir DIR --keys THIS_DIRECTORY` renews what they have signed.
"""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `init` was asked for."""

    dir: Path
    operators: Sequence[str] = ("admin",)
    host: str = LOOPBACK
    port: int = 8443
    broker_port: int = 8883
    sans: Sequence[str] = ()

    @property
    def public_host(self) -> str:
        """The name that devices and operators use.

        Raises:
            Rejected: the servers listen everywhere and nobody said under which name.
        """
        if not is_wildcard(self.host):
            return self.host
        if not self.sans:
            raise Rejected(
                f"With --host {self.host} devices need a name to reach this machine by.",
                "Add --san NAME, or give --host the address itself.",
            )
        return self.sans[0]

    @property
    def names(self) -> list[str]:
        """All names that the server certificates carry, the public one first."""
        local = ["localhost", LOOPBACK, "::1"]
        return list(dict.fromkeys([self.public_host, *self.sans, *local]))


def create_cloud(wishes: Wishes, *, now: float | None = None) -> Settings:
    """Make keys, root, CAs, operators and configuration in an empty directory.

    Raises:
        Rejected: the directory holds something, or a wish cannot be granted. Unavailable: the disk refuses.
    """
    moment = time.time() if now is None else now
    _check(wishes)
    directory = wishes.dir.resolve()
    host = wishes.public_host
    settings = Settings(
        dir=directory,
        url=f"https://{authority(host, wishes.port)}",
        http=HttpSettings(host=wishes.host, port=wishes.port),
        broker=BrokerSettings(bind=wishes.host, host=host, port=wishes.broker_port),
    )
    _make_directories(settings, wishes.operators)
    try:
        _fill(settings, wishes, moment)
    except EdgewardError:
        _empty(directory)
        raise
    return settings


def explain(settings: Settings, operators: Sequence[str], shown: str) -> str:
    """What was made, and what to do with it. `shown` is the directory as the person named it."""
    profiles = "\n".join(f"    operators/{name}/" for name in operators)
    return f"""\
A new cloud in {shown}, at {settings.url}.

  offline/      root, targets and agent keys: they say whose signatures count
  keys/         keys that the running cloud signs assignments and freshness with
  pki/          the CA of its servers, the CA of its devices, and their certificates
  registry/     signed metadata: what is released, and who should run it
  operators/    one directory an operator: address, token, trust anchors, release key

Do now:
  1. Move offline/ off this machine. Keep root-2.pem, the recovery key, apart from root-1.pem:
     one of the two can renew everything, and if both are lost, all devices enrol anew.
  2. Hand each operator their directory, and delete it here (as ~/.config/edgeward agent-ctl finds it):
{profiles}
  3. Start it: edgeward-cloud up --dir {shown}
"""


def _check(wishes: Wishes) -> None:
    if wishes.dir.is_dir() and any(wishes.dir.iterdir()):
        what = "There is a cloud" if (wishes.dir / FILE).exists() else "There is something"
        raise Rejected(f"{what} in {wishes.dir} already.", "Name an empty directory: nothing is overwritten.")
    if wishes.dir.exists() and not wishes.dir.is_dir():
        raise Rejected(f"{wishes.dir} is not a directory.", "Name an empty directory.")
    if wishes.port == wishes.broker_port:
        raise Rejected("HTTPS and the broker cannot share a port.", "Change --port or --broker-port.")
    for port in (wishes.port, wishes.broker_port):
        if not 1 <= port <= 65535:
            raise Rejected(f"{port} is not a port.", "Ports are 1 to 65535.")
    if not wishes.operators:
        raise Rejected("A cloud needs an operator.", "Add --operator NAME.")
    for name in wishes.operators:
        if not re.fullmatch(DEVICE_PATTERN, name):
            raise Rejected(f"{name!r} cannot be an operator's name.", "Use a-z, 0-9 and -, 63 at most.")
    check_names(wishes.names)
    if len(set(wishes.operators)) != len(wishes.operators):
        raise Rejected("An operator is named twice.", "Name each once.")


def _fill(settings: Settings, wishes: Wishes, now: float) -> None:
    Pki.create(settings.pki, wishes.names, now=now)
    release = [new_key(settings.operators / name / RELEASE_KEY) for name in wishes.operators]
    _begin_registry(settings, release, now)
    for name in wishes.operators:
        _write_profile(settings, name, new_token(settings.operators_file, name, now=now))
    settings.save()


def _empty(directory: Path) -> None:
    """Take back a ceremony that failed. All that is in there is ours: it was empty when we began."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _make_directories(settings: Settings, operators: Sequence[str]) -> None:
    try:
        settings.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in (settings.online_keys, settings.offline_keys, settings.operators, settings.mosquitto):
            each.mkdir(mode=0o700)
        for name in operators:
            (settings.operators / name).mkdir(mode=0o700)
    except OSError as error:
        raise Unavailable(f"Cannot make {settings.dir}: {error.strerror}.", "Check its parent.") from error


def _begin_registry(settings: Settings, release: list[Signer], now: float) -> None:
    offline = {name: new_key(settings.offline_keys / f"{name}.pem") for name in OFFLINE_KEYS}
    online = {role: new_key(settings.online_keys / f"{role}.pem") for role in ONLINE_ROLES}
    write_atomic(settings.offline_keys / "README.txt", OFFLINE_README.encode())
    begin(
        settings,
        root=[offline[name] for name in ROOT_KEYS],
        root_threshold=ROOT_THRESHOLD,
        signers={**online, **offline},
        release=release,
        now=now,
    )


def _write_profile(settings: Settings, name: str, token: str) -> None:
    directory = settings.operators / name
    values = {
        "url": settings.url,
        "operator": name,
        "token": token,
        "server_ca": "server-ca.pem",
        "root": "root.json",
        "release_key": f"file2:{RELEASE_KEY}",
        "release_public_key": "release-key.pub.json",
    }
    lines = [
        "# A profile for agent-ctl. Whoever has this directory can publish models: keep it private.",
        "# release_key is a securesystemslib URI: hsm:, awskms: and others work as well.",
        *(f"{key} = {toml_value(value)}" for key, value in values.items()),
    ]
    write_atomic(directory / "server-ca.pem", (settings.pki / "server-ca.pem").read_bytes())
    write_atomic(directory / "root.json", root_file(settings).read_bytes())
    write_atomic(directory / "profile.toml", ("\n".join(lines) + "\n").encode(), mode=PRIVATE)
