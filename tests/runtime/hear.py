"""Program: what a microphone gives, as JSON. Run by test_sources_sound.py, with ALSA configured for it.

With a second argument, what ALSA is configured with once the microphone was looked for in vain: it is
plugged in then, and looked for again.
"""

from __future__ import annotations

import json
import os
import sys

from edgeward_runtime.sources import open_source
from edgeward_runtime.sources.base import Source
from edgeward_runtime.sources.microphone import microphones
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError


def opened(uri: str) -> Source | str:
    """The microphone, or why not."""
    try:
        return open_source(SourceOptions("mic", uri))
    except EdgewardError as error:
        return error.what


def main(uri: str, later: str = "") -> None:
    names = [microphone.name for microphone in microphones()]
    source = opened(uri)
    if later:
        assert isinstance(source, str), "it is not there yet"
        os.replace(later, os.environ["ALSA_CONFIG_PATH"])
        source = opened(uri)
    if isinstance(source, str):
        print(json.dumps({"names": names, "error": source}))
        return
    heard: list[float] = []
    for _ in range(3):
        assert source.grab()
        heard += [float(value) for value in source.retrieve(None)]
    source.close()
    print(json.dumps({"names": names, "rate": source.rate, "lost_s": source.lost_s, "heard": heard}))


if __name__ == "__main__":
    main(*sys.argv[1:])
