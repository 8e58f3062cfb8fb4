"""The demo: the way of one model, from `agent-ctl deploy` to frames on three devices, on real parts."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from camera import make_video
from ending import end_in_order, held
from stack import Stack, StackError

from edgeward_wire.errors import EdgewardError

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".demo"
ZOO = ROOT / "models/zoo"
MODEL = ZOO / "efficientnet-lite0.onnx"
FLEET = "edge-01"
DEVICES = ("edge-01-a", "edge-01-b", "edge-01-c")
PICTURES = ("camera.jpg", "coffee.jpg", "chelsea.jpg", "rocket.jpg")
WINDOW_S = 5.0
WINDOWS_WANTED = 3
PATIENCE_S = 180.0


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone: that is no reason to leave processes
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the demo's directory: a second one would remove the first one's state."""
    HOME.mkdir(exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StackError("another demo runs in this checkout: end it first") from error
        yield


def make_cameras() -> dict[str, Path]:
    """A video for each device, made once: the same pictures, each device beginning with another."""
    media = HOME / "media"
    media.mkdir(parents=True, exist_ok=True)
    videos = {}
    for k, device in enumerate(DEVICES):
        videos[device] = video = media / f"camera-{k}.avi"
        if not video.exists():
            order = PICTURES[k:] + PICTURES[:k]
            make_video(video, [ZOO / "pictures" / name for name in order], backwards=k % 2 == 1)
    return videos


def start(stack: Stack, videos: dict[str, Path]) -> None:
    """Cloud first, then the devices, each enrolled with the one string that the operator hands out."""
    say("Starting the cloud: API, registry and broker, all over TLS ...")
    stack.init_cloud()
    stack.start_cloud()
    say(f"Enrolling {len(DEVICES)} devices into the fleet {FLEET} ...")
    stack.ctl_json("fleets", "create", FLEET)
    token = stack.ctl_json("enroll-token", "--fleet", FLEET, "--uses", str(len(DEVICES)))
    agents = []
    for device in DEVICES:
        camera = f'uri = "{videos[device]}"\nslot = "latest"\nrealtime = true\nloop = true'
        stack.add_device(device, token["enrolment"], {"cam": camera})
        agents.append(stack.start_agent(device))
    stack.wait_for(lambda: stack.online() == len(DEVICES), "all devices to be online", *agents)


def deploy(stack: Stack) -> float:
    """The real command, with its progress on this terminal. Returns its seconds."""
    command = [str(stack.bin / "agent-ctl"), "--profile", str(stack.profile)]
    command += ["deploy", str(MODEL.relative_to(ROOT)), "--fleet", FLEET, "--probation", "5"]
    say(f"\n$ agent-ctl {' '.join(command[3:])}")
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise StackError(f"agent-ctl deploy ended with {done.returncode}")
    return time.monotonic() - began


def once(stack: Stack, deploy_s: float) -> dict[str, Any]:
    """Wait for three stored windows of each device; the summary's figures are the cloud's."""

    def windows() -> dict[str, int]:
        return {row["device"]: row["windows"] for row in stack.telemetry(fleet=FLEET)}

    def enough() -> bool:
        return sum(n >= WINDOWS_WANTED for n in windows().values()) == len(DEVICES)

    stack.wait_for(enough, f"{WINDOWS_WANTED} windows of each device", seconds=PATIENCE_S)
    subprocess.run(
        [str(stack.bin / "agent-ctl"), "--profile", str(stack.profile), "status", "--fleet", FLEET],
        stdout=sys.stderr,
        check=False,
    )
    found = stack.telemetry(fleet=FLEET)
    return {
        "ok": True,
        "devices": {
            row["device"]: {
                "model": row["model"]["path"],
                "provider": row["provider"],
                "variant": row["variant"],
                "windows": row["windows"],
                "fps": round(row["fps"], 2),
                "p50_ms": row["stages"]["end_to_end"]["p50"],
                "p99_ms": row["stages"]["end_to_end"]["p99"],
                "sees": row["labels"],
            }
            for row in found
        },
        "deploy_s": round(deploy_s, 1),
    }


def watch(stack: Stack) -> None:
    """The live table, until Ctrl-C."""
    command = [str(stack.bin / "agent-ctl"), "--profile", str(stack.profile), "watch", "--fleet", FLEET]
    say("Ctrl-C ends the demo.\n")
    child = None
    try:
        with held():
            child = subprocess.Popen(command)
        child.wait()
    finally:
        if child is not None:
            end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """See a child out. Ctrl-C has reached it as well; whatever else ends us has not."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            child.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1 if number is None else 10)
            return


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end by itself, with a JSON summary last")
    arguments = parser.parse_args()
    end_in_order()
    try:
        with alone():
            return run(only_once=arguments.once)
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except (StackError, EdgewardError) as error:
        say(f"error: {error}")
        say(f"next: look at the logs in {HOME.relative_to(ROOT)}/logs")
        if arguments.once:
            print(json.dumps({"ok": False, "reason": str(error).splitlines()[0]}))
        return 1


def run(*, only_once: bool) -> int:
    """The demo from its beginning to its end."""
    began = time.monotonic()
    for old in ("cloud", "devices", "logs"):
        shutil.rmtree(HOME / old, ignore_errors=True)
    with Stack(HOME, window_s=WINDOW_S) as stack:
        start(stack, make_cameras())
        deploy_s = deploy(stack)
        say(f"Serving after {time.monotonic() - began:.0f} s.")
        if not only_once:
            watch(stack)
            return 0
        summary = once(stack, deploy_s)
    print(json.dumps({**summary, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
