"""How every HTTP error of the cloud looks. Its own file: a device needs it, and nothing else of the API."""

from __future__ import annotations

from edgeward_wire.document import Open
from edgeward_wire.identifiers import ShortText


class Problem(Open):
    """RFC 9457. `next_step` says what to do."""

    type: ShortText = "about:blank"
    title: ShortText
    status: int
    detail: str = ""
    next_step: str = ""
