"""What both ends of shared memory agree on, and what the daemon and the server tell each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from edgeward_wire.document import Document
from edgeward_wire.identifiers import PipelineName

MAX_CHANNELS = 4
"""Of one runner: enough that the next request lies ready while one runs."""
MAX_MEMORY = 256 << 20
_ALIGNED = 64


def aligned(offset: int) -> int:
    """The next place where a tensor may begin."""
    return -(-offset // _ALIGNED) * _ALIGNED


class Start(Document):
    """Daemon → server, once: serve like this."""

    run: str
    """Directory of the runners' local sockets."""
    pipelines: tuple[PipelineName, ...] = Field(max_length=16)
    host: str
    port: int = Field(ge=0, le=65535)
    token: str = ""
    """Whoever asks must know it; empty: anybody who reaches the address."""
    max_body: int = Field(ge=1 << 10, le=MAX_MEMORY)
    queue: int = Field(ge=1, le=1024)


class Listening(Document):
    """Server → daemon: it takes requests."""

    kind: Literal["listening"] = "listening"
    port: int


class Refused(Document):
    """Server → daemon: it cannot, for this reason; it ends."""

    kind: Literal["refused"] = "refused"
    reason: str = Field(max_length=300)


FROM_SERVER: TypeAdapter[Listening | Refused] = TypeAdapter(
    Annotated[Listening | Refused, Field(discriminator="kind")]
)
