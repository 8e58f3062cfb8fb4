"""Whom a Host header can mean: what keeps other people's web pages from asking in a browser's name. Pure."""

from __future__ import annotations

import ipaddress
import re

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_HOST = re.compile(r"(?:\[([0-9a-f:.]{2,45})\]|([a-z0-9._-]{1,253}))(?::\d{1,5})?", re.ASCII)


def known_host(header: str | None, names: frozenset[str]) -> bool:
    """Whether a Host header can be meant for us: an address, or one of our own names.

    A page of somebody else that makes its own name point here (DNS rebinding) still sends that name.
    """
    said = _HOST.fullmatch((header or "").lower())
    if said is None:
        return False
    host = said[1] or said[2]
    try:
        return host in names or bool(ipaddress.ip_address(host))
    except ValueError:
        return False
