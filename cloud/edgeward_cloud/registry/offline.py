"""What only the offline keys can do: renew root, targets and the agent's branch, before they expire.

Invariant: each keeps its content, gets the next version, and is signed by every root key that is there.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from edgeward_cloud.keys import Signer, load_signer, public_path
from edgeward_cloud.registry.repository import Registry
from edgeward_cloud.settings import Settings
from edgeward_wire.errors import Rejected


def resign_offline(settings: Settings, keys: Path, *, now: float | None = None) -> dict[str, datetime]:
    """Renew root, targets and the agent's branch with the keys in `keys`; role -> its new expiry.

    Raises:
        Rejected: a key is missing (one root key suffices), or they are not this registry's.
    """
    moment = time.time() if now is None else now
    roots = [_signer(path) for path in sorted(keys.glob("root-*.pem"))]
    if not roots:
        raise Rejected(f"There is no root key in {keys}.", "Name the directory with the offline keys.")
    targets, agent = _signer(keys / "targets.pem"), _signer(keys / "agent.pem")
    return Registry(settings, clock=lambda: moment).renew_offline(roots, targets, agent)


def _signer(path: Path) -> Signer:
    return load_signer(f"file2:{path.absolute()}", public_path(path), base=path.parent)
