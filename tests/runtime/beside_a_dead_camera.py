"""Program: a film beside a camera that takes connections and says nothing. Run by test_sources_streams.py.

Prints how many frames of the film came while the camera was still being opened, and whether it still was.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from edgeward_runtime import images
from edgeward_runtime.capture import Capture
from edgeward_runtime.slots import Slots
from edgeward_runtime.sources.options import SourceOptions
from runtime.builders import frame, video_file
from sim.rtsp import RtspCamera


def main(directory: Path) -> None:
    images.be_light()
    film = video_file(directory / "film.avi")
    reports: list[str] = []
    with RtspCamera([images.encode_jpeg(frame("red"))]) as camera:
        camera.mute = True
        asked = threading.Event()
        camera.on_request = asked.set
        slots = Slots(["latest", "every"])
        sources = [SourceOptions("dead", camera.url()), SourceOptions("film", str(film), loop=True)]
        captures = [
            Capture(k, options, slots, on_change=lambda name, up, _: reports.append(name), on_crash=print)
            for k, options in enumerate(sources)
        ]
        captures[0].start()
        assert asked.wait(20), "FFmpeg is in the middle of opening now"
        captures[1].start()
        seen = 0
        while seen < 300 and (taken := slots.take(lambda: False)) is not None:
            seen += taken.source
            taken.release()
        print(seen, reports == ["film"], flush=True)
        for capture in captures:
            capture.stop()
        slots.close()
    for capture in captures:
        capture.join(30)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
