"""Enrolment: pin -> root -> CSR -> admission -> certificate. The network is trusted for nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeward_agent.http import Http
from edgeward_agent.identity import Identity


def enrol(
    enrolment: str, device: str, state: Path, *, wait: Callable[[float], None], say: Callable[[str], None]
) -> Identity:
    """Make this state directory the device `device` of the cloud that the string names.

    `wait` sleeps for seconds (and may raise to give up), `say` shows one line to a person. Doing it again
    with the same string is harmless: the key stays and the server gives the certificate again.

    Raises:
        Rejected: wrong string, pin, root, token or id; or an operator has rejected the device.
        Unavailable: the cloud cannot be reached, or the disk does not take the files.
    """
    raise NotImplementedError


def renew(identity: Identity, http: Http) -> Identity:
    """Fetch and store a new certificate for the same key and id. Raises like `enrol`."""
    raise NotImplementedError
