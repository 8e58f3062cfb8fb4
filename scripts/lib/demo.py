"""The demo: the way of one model, from `agent-ctl deploy` to frames on three devices, on real parts."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from camera import make_video
from stack import Stack, StackError

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
    print(text, file=sys.stderr, flush=True)


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
    child = subprocess.Popen(command)
    try:
        child.wait()
    except KeyboardInterrupt:
        child.wait(10)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end by itself, with a JSON summary last")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    began = time.monotonic()
    for old in ("cloud", "devices", "logs"):
        shutil.rmtree(HOME / old, ignore_errors=True)
    try:
        with Stack(HOME, window_s=WINDOW_S) as stack:
            start(stack, make_cameras())
            deploy_s = deploy(stack)
            say(f"Serving after {time.monotonic() - began:.0f} s.")
            if not arguments.once:
                watch(stack)
                return 0
            summary = once(stack, deploy_s)
    except KeyboardInterrupt:
        say("Stopped.")
        return 130
    except StackError as error:
        say(f"error: {error}")
        say(f"next: look at the logs in {HOME.relative_to(ROOT)}/logs")
        if arguments.once:
            print(json.dumps({"ok": False, "reason": str(error).splitlines()[0]}))
        return 1
    print(json.dumps({**summary, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
