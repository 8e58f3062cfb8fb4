"""The serving process: `python -m edgeward_agent.serving --fd N`, a child of the daemon.

The first line on the socket says what to serve; end of file on it ends the process.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from edgeward_agent.messages import MAX_LINE, encode
from edgeward_agent.serving.wire import Listening, Refused, Start

_SWITCH_S = 0.0005


def main() -> int:
    """Exit code 0 when the daemon closed the socket, 1 when the address cannot be had."""
    parser = argparse.ArgumentParser(prog="edgeward-serving")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the daemon")
    fd = parser.parse_args().fd
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="serving: %(levelname)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which closes the socket
    sys.setswitchinterval(_SWITCH_S)  # a health check waits for the thread that reads a body
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    with socket.socket(fileno=fd) as link:
        return _serve(link)


def _serve(link: socket.socket) -> int:
    from edgeward_agent.serving.app import App
    from edgeward_agent.serving.link import Link
    from edgeward_agent.serving.metrics import Metrics
    from edgeward_agent.serving.server import Server

    with link.makefile("rb") as lines:
        start = Start.model_validate_json(lines.readline(MAX_LINE))
        metrics = Metrics()
        links = [Link(Path(start.run), name, start.queue) for name in start.pipelines]
        try:
            server = Server(
                (start.host, start.port),
                App(links, metrics),
                metrics.count,
                token=start.token,
                max_body=start.max_body,
            )
        except OSError as error:
            reason = f"{start.host} port {start.port}: {error.strerror or error}"
            link.sendall(encode(Refused(reason=reason[:300])))
            return 1
        threading.Thread(target=server.serve_forever, name="accept", daemon=True).start()
        link.sendall(encode(Listening(port=server.server_port)))
        while lines.read(1):
            pass
        server.socket.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
