"""sd_notify(3): one datagram to the service manager. Without `NOTIFY_SOCKET` every call does nothing."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping

_MAX_STATUS = 200


class Notifier:
    """Tells systemd READY, STATUS, WATCHDOG and STOPPING. A lost datagram is systemd's to notice."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog(environment, pid)
        """How often systemd wants to hear from us, in seconds; None when it does not watch."""

    def ready(self, status: str = "") -> None:
        """Start-up is done."""
        self._send("READY=1", *self._status(status))

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(*self._status(text))

    def watchdog(self) -> None:
        """Still making progress."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """An orderly stop has begun."""
        self._send("STOPPING=1")

    @staticmethod
    def _status(text: str) -> tuple[str, ...]:
        return (f"STATUS={' '.join(text.split())[:_MAX_STATUS]}",) if text else ()

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        # "@name" is Linux's abstract name space: a leading NUL on the wire.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.settimeout(1.0)
            sock.sendto("\n".join(lines).encode(), address)


def _watchdog(environment: Mapping[str, str], pid: int) -> float | None:
    text, owner = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or (owner and owner != str(pid)):
        return None
    return int(text) / 1e6
