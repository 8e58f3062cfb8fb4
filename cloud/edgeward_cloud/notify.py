"""What systemd is told (sd_notify(3)): one datagram a message, and silence where there is no systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class Notifier:
    """Talks to the service manager that the environment names; does nothing without one."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        address = given.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = _watchdog_s(given)
        """Feed the watchdog more often than this; None: there is none."""

    def ready(self, status: str) -> None:
        """All parts serve."""
        self._send(f"READY=1\nSTATUS={status}")

    def alive(self) -> None:
        """All parts make progress."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """An orderly stop has begun."""
        self._send("STOPPING=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            try:
                out.sendto(message.encode(), self._address)
            except OSError:
                return  # a manager that does not listen is no reason to stop serving


def _watchdog_s(given: Mapping[str, str]) -> float | None:
    text = given.get("WATCHDOG_USEC", "")
    mine = given.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if text.isdecimal() and int(text) and mine else None
