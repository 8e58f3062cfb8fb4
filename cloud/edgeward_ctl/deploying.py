"""`deploy` and `rollback`: bundle, upload, sign, publish, roll out, and follow it to its end."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeward_ctl import checked, screen, views
from edgeward_ctl.client import Client
from edgeward_ctl.follow import INTERRUPTED, MARGIN_S, OK, UNDECIDED, Followed, follow
from edgeward_ctl.profile import Profile
from edgeward_ctl.releases import Choice, choose_version
from edgeward_ctl.screen import Progressing
from edgeward_wire.api import Device, RollbackCreate, Rollout, RolloutCreate
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import ModelRef

if TYPE_CHECKING:
    from edgeward_ctl.signing import Models, ReleaseKey
    from edgeward_models.bundle import Bundle


_OPTIONS = ("name", "task", "labels", "samples")
"""Flags that have an option of their own."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Whether and how long to follow a rollout."""

    detach: bool = False
    timeout_s: float | None = None
    """None: the probation and `MARGIN_S`."""
    as_json: bool = False
    began: float = field(default_factory=time.monotonic)
    """When the key was pressed (monotonic)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What `deploy` was asked for."""

    model: Path
    """An ONNX file, a directory with one and its sidecar, or a bundle's directory."""
    target: Mapping[str, str]
    pipeline: str = "main"
    version: str | None = None
    sidecar: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    allow_float: str | None = None
    probation_s: float | None = None
    dry_run: bool = False


def deploy(profile: Profile, wish: Wish, waiting: Waiting) -> int:
    """The whole way of one model. Returns the exit code.

    Raises:
        Rejected: the file, the target, the profile or the signature is no good.
        Unavailable: the cloud or a file cannot be reached.
    """
    try:
        return _deploy(profile, wish, waiting)
    except KeyboardInterrupt:  # `follow` answers for itself
        screen.say("Stopped. Unless a device stands above, nothing was assigned: devices go on as they are.")
        return INTERRUPTED


def _deploy(profile: Profile, wish: Wish, waiting: Waiting) -> int:
    from edgeward_ctl.signing import Models, ReleaseKey

    make_bundle = _bundler()
    with (
        Client(profile) as client,
        tempfile.TemporaryDirectory(prefix="agent-ctl-") as scratch,
    ):
        # Whatever can fail at once fails before the work.
        _check_rollout(wish)
        _check_target(client, wish.target, wish.pipeline)
        key = ReleaseKey(profile)
        models = Models(client)
        with screen.board(began=waiting.began) as board:
            bundle = make_bundle(wish, Path(scratch), board)
            _say_notes(bundle, board)
            if wish.dry_run:
                choice = choose_version(models.releases(), bundle.manifest.name, bundle.content, wish.version)
                missing = sum(not client.has_blob(ref) for ref in bundle.manifest.blobs())
                # What is said last is said when the bars are gone.
                end = partial(_print_plan, bundle, choice, missing, wish, waiting)
            else:
                _upload(client, bundle, board)
                released = _release(models, bundle, key, wish.version, board)
                rollout = _start(client, wish, released)
                followed = _follow(client, rollout, waiting, board)
                end = partial(_print_end, followed, rollout, waiting, bundle)
    return end()


def release(client: Client, wish: Wish, board: Progressing) -> ModelRef:
    """Bundle, upload, sign and publish; assigns it to nobody. What was released before keeps its version.

    Raises:
        Rejected: the file, the profile or the signature is no good.
        Unavailable: the cloud or a file cannot be reached.
    """
    from edgeward_ctl.signing import Models, ReleaseKey

    make_bundle = _bundler()
    key = ReleaseKey(client.profile)
    models = Models(client)
    with tempfile.TemporaryDirectory(prefix="agent-ctl-") as scratch:
        bundle = make_bundle(wish, Path(scratch), board)
        _say_notes(bundle, board)
        _upload(client, bundle, board)
        return _release(models, bundle, key, wish.version, board)


def rollback(profile: Profile, target: Mapping[str, str], pipeline: str, waiting: Waiting) -> int:
    """Back to what the target had finished with before. Returns the exit code."""
    with Client(profile) as client:
        request = checked.request(RollbackCreate, pipeline=pipeline, **target)
        rollout = client.create_rollback(request)
        with screen.board(began=waiting.began) as board:
            board.say(f"Back to {rollout.model.name} {rollout.model.version}.")
            followed = _follow(client, rollout, waiting, board)
    return _print_end(followed, rollout, waiting, None)


# --- the steps


def _bundler() -> Callable[[Wish, Path, Progressing], Bundle]:
    """What makes a bundle of a file, or reads one, if its libraries are installed."""
    try:
        from edgeward_models.bundle import BundleRequest, make_bundle
        from edgeward_models.bundle_files import is_bundle, read_bundle
    except ImportError as error:
        raise Rejected(
            f"Making bundles needs a library that is not installed: {error.name}.",
            "pip install 'edgeward[ctl,models]'",
        ) from error

    def run(wish: Wish, scratch: Path, board: Progressing) -> Bundle:
        said = ""

        def progress(what: str, done: int, total: int) -> None:
            # The last step is shown when there is something to say about it.
            board.step("bundle", done if said else min(done, total - 1), total, said or what)

        with _local_files():
            if is_bundle(wish.model):
                _check_nothing_is_declared(wish)
                bundle = read_bundle(wish.model, progress)
            else:
                request = BundleRequest(
                    model=wish.model, sidecar=wish.sidecar, flags=wish.flags, allow_float=wish.allow_float
                )
                bundle = make_bundle(request, scratch, progress)
        said = f"{bundle.manifest.name}: {bundle.precisions}, {screen.size(bundle.bytes)}"
        progress("", 1, 1)
        return bundle

    return run


@contextmanager
def _local_files() -> Iterator[None]:
    """A file of this machine that cannot be used is what was typed, and not a cloud that is away."""
    try:
        yield
    except Unavailable as error:
        if isinstance(error.__cause__, OSError):
            raise Rejected(error.what, error.next_step) from error
        raise


def _check_nothing_is_declared(wish: Wish) -> None:
    """A bundle is what its hashes say: nobody can say something else about it any more."""
    said = ["--sidecar"] if wish.sidecar is not None else []
    said += ["--allow-float"] if wish.allow_float is not None else []
    said += [f"--{key}" if key in _OPTIONS else f"--set {key}" for key in sorted(wish.flags)]
    if said:
        raise Rejected(
            f"{said[0]} cannot change a bundle: {wish.model} says all about its model.",
            f"Leave it out, or give it to `agent-ctl model bundle` ({', '.join(said)}).",
        )


def _check_target(client: Client, target: Mapping[str, str], pipeline: str) -> None:
    """The target is there and has the pipeline. An unknown device is refused by the cloud, by name.

    The cloud checks the pipeline too, but only when the model has been signed and released.
    """
    if "device" in target:
        check_pipeline([client.device(target["device"])], pipeline)
        return
    name = target["fleet"]
    fleets = {fleet.name: fleet for fleet in client.fleets()}
    if name not in fleets:
        raise unknown_fleet(name, set(fleets))
    if not fleets[name].devices:
        raise Rejected(
            f"Fleet {name} has no accepted device.",
            f"Enrol one with `agent-ctl enroll-token --fleet {name}`.",
        )
    check_pipeline([device for device in client.devices(name) if device.admission == "accepted"], pipeline)


def _check_rollout(wish: Wish) -> None:
    """The rollout could be asked for, whatever the release will be called."""
    _rollout(wish, ModelRef(path="models/any/1.json", sha256="0" * 64))


def check_pipeline(devices: Sequence[Device], pipeline: str) -> None:
    """Raises Rejected when no device has the pipeline. One that was not heard of yet may have any."""
    there: set[str] = set()
    for device in devices:
        names = set(device.birth.pipelines) if device.birth is not None else set()
        if not names or pipeline in names:
            return
        there |= names
    if devices:
        alone = len(devices) == 1
        who = f"Device {devices[0].id} has no" if alone else f"None of the {len(devices)} devices there has a"
        raise Rejected(
            f"{who} pipeline {pipeline!r}; {'it has' if alone else 'they have'}:"
            f" {', '.join(sorted(there)[:20])}.",
            "Name one of these with --pipeline, or add it to the devices' agent.toml.",
        )


def unknown_fleet(name: str, fleets: set[str]) -> Rejected:
    """Names those that are there, and how to make one."""
    there = f"There are: {', '.join(sorted(fleets)[:10])}. " if fleets else ""
    return Rejected(f"There is no fleet {name!r}.", f"{there}Make it with `agent-ctl fleets create {name}`.")


def _say_notes(bundle: Bundle, board: Progressing) -> None:
    for note in bundle.notes:
        board.say(f"note: {note}")
    if bundle.weak:
        board.say(
            "note: evidence: weak. The golden inputs are seeded noise; with --samples DIR they are pictures"
            " as your devices see them, and parity means more."
        )
    if bundle.float_reason:
        board.say(f"note: not INT8: {bundle.float_reason}")


def _upload(client: Client, bundle: Bundle, board: Progressing) -> None:
    """Send the blobs that the registry lacks."""
    board.step("upload", 0, 1, "asking what is there")
    missing = [ref for ref in bundle.manifest.blobs() if not client.has_blob(ref)]
    total = sum(ref.length for ref in missing)
    sent = 0

    def progress(count: int) -> None:
        nonlocal sent
        sent += count
        board.step("upload", sent, total + 1, f"{screen.size(sent)} of {screen.size(total)}")

    for ref in missing:
        client.put_blob(ref, bundle.blobs[ref.sha256], progress)
    known = len(bundle.manifest.blobs()) - len(missing)
    board.step("upload", 1, 1, f"{screen.size(total)} sent, {known} blobs were there")


def _release(
    models: Models, bundle: Bundle, key: ReleaseKey, version: str | None, board: Progressing
) -> ModelRef:
    board.step("sign", 0, 1)
    done = models.publish(bundle.manifest, key, wanted=version, say=board.say)
    label = f"{done.ref.name} {done.ref.version}"
    board.step("sign", 1, 1, f"{label} was released before" if done.reused else f"released {label}")
    return done.ref


def _start(client: Client, wish: Wish, ref: ModelRef) -> Rollout:
    return client.create_rollout(_rollout(wish, ref))


def _rollout(wish: Wish, ref: ModelRef) -> RolloutCreate:
    return checked.request(
        RolloutCreate, pipeline=wish.pipeline, model=ref, probation_s=wish.probation_s, **wish.target
    )


def _follow(client: Client, rollout: Rollout, waiting: Waiting, board: Progressing) -> Followed | None:
    if waiting.detach:
        return None
    timeout = waiting.timeout_s if waiting.timeout_s is not None else rollout.probation_s + MARGIN_S
    return follow(lambda: client.rollout(rollout.id), rollout, board, timeout_s=timeout, began=waiting.began)


# --- the end


def _print_plan(bundle: Bundle, choice: Choice, missing: int, wish: Wish, waiting: Waiting) -> int:
    manifest = bundle.manifest.model_copy(update={"version": choice.version})
    target = " ".join(wish.target.values())
    if waiting.as_json:
        screen.print_json(
            {
                "dry_run": True,
                "version": choice.version,
                "released_before": choice.existing is not None,
                "blobs_to_upload": missing,
                "bytes": bundle.bytes,
                "content": bundle.content,
                "manifest": manifest.model_dump(mode="json", by_alias=True, exclude_none=True),
            }
        )
        return OK
    how = "is released already with this very content" if choice.existing else "would be signed and released"
    console = screen.out()
    console.print(f"{manifest.name} {choice.version} {how}.", markup=False)
    console.print(
        screen.table(
            ("variant", "precision", "size", "evidence", "golden"),
            (
                (name, v.precision, screen.size(v.model.length), v.evidence, screen.size(v.golden.length))
                for name, v in sorted(manifest.variants.items())
            ),
        )
    )
    console.print(f"{missing} of {len(manifest.blobs())} blobs would be sent; then {target} would run it.")
    console.print("Nothing was changed (--dry-run).")
    return OK


def _print_end(followed: Followed | None, rollout: Rollout, waiting: Waiting, bundle: Bundle | None) -> int:
    model = rollout.model
    if followed is None:
        if waiting.as_json:
            screen.print_json({"rollout": _plain(rollout), "detached": True})
        else:
            screen.say(f"Rollout {rollout.id} of {model.name} {model.version} is on its way.")
            _say_how_to_watch(rollout)
        return OK
    rows = views.endings(followed)
    if waiting.as_json:
        judgement = followed.judgement
        screen.print_json(
            {
                "rollout": _plain(followed.rollout),
                "exit": followed.exit_code,
                "succeeded": judgement.succeeded,
                "failed": judgement.failed,
                "waiting": judgement.waiting,
                "offline": judgement.offline,
                "devices": [asdict(row) for row in rows],
                "evidence": ("weak" if bundle.weak else "strong") if bundle else None,
            }
        )
    elif rows:
        screen.out().print(screen.endings_table(rows))
    _say_what_it_means(followed)
    return followed.exit_code


def _say_what_it_means(followed: Followed) -> None:
    rollout, judgement = followed.rollout, followed.judgement
    model = f"{rollout.model.name} {rollout.model.version}"
    if followed.exit_code == INTERRUPTED:
        screen.say("You stopped watching; the rollout goes on.")
        _say_how_to_watch(rollout)
    elif rollout.state in ("superseded", "canceled"):
        screen.say(f"This rollout was {rollout.state}: a newer one took its place.")
    elif judgement.failed:
        first = judgement.failed[0]
        screen.say(
            f"{model} failed on {len(judgement.failed)} of {len(rollout.targets)} devices."
            f" Why: agent-ctl log {first} -v"
        )
    elif followed.exit_code == UNDECIDED and judgement.waiting:
        screen.say(f"Time is up, and these are not done: {_names(judgement.waiting)}. The rollout goes on.")
        _say_how_to_watch(rollout)
    elif followed.exit_code == UNDECIDED:
        screen.say(
            f"No device of this rollout is online. {model} is assigned: each takes it up when it comes back."
        )
        _say_how_to_watch(rollout)
    if judgement.offline and not (followed.exit_code == UNDECIDED and not judgement.waiting):
        screen.say(f"Offline, pending: {_names(judgement.offline)}. They take it up when they come back.")


def _say_how_to_watch(rollout: Rollout) -> None:
    whom = f" --fleet {rollout.fleet}" if rollout.fleet else ""
    screen.say(f"Watch it: agent-ctl watch{whom}")


def _names(devices: Sequence[str]) -> str:
    shown = ", ".join(devices[:10])
    return f"{shown} and {len(devices) - 10} more" if len(devices) > 10 else shown


def _plain(rollout: Rollout) -> dict[str, Any]:
    return rollout.model_dump(mode="json", by_alias=True, exclude_none=True)
