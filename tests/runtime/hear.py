"""Program: what a microphone gives, as JSON. Run by test_sources_sound.py, with ALSA configured for it."""

from __future__ import annotations

import json
import sys

from edgeward_runtime.sources import open_source
from edgeward_runtime.sources.microphone import microphones
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError


def main(uri: str) -> None:
    names = [microphone.name for microphone in microphones()]
    try:
        source = open_source(SourceOptions("mic", uri))
    except EdgewardError as error:
        print(json.dumps({"names": names, "error": error.what}))
        return
    heard: list[float] = []
    for _ in range(3):
        assert source.grab()
        heard += [float(value) for value in source.retrieve(None)]
    source.close()
    print(json.dumps({"names": names, "rate": source.rate, "lost_s": source.lost_s, "heard": heard}))


if __name__ == "__main__":
    main(sys.argv[1])
