from __future__ import annotations

import hashlib
import json
import shutil
from datetime import datetime, timezone

import pytest
from tuf.api.exceptions import ExpiredMetadataError

from edgeward_agent.http import Http
from edgeward_agent.trust import BUILD_TIME, _Fetcher, _Look
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import ModelRef
from sim.device import DEVICE, Device
from sim.repository import DAY, LIVES, Repository, new_signer, small_manifest
from sim.server import Fault, Server

TIMESTAMP = "/tuf/metadata/timestamp.json"


def deployed(repository: Repository, **changes: object) -> ModelRef:
    ref = repository.release(small_manifest(**changes))  # type: ignore[arg-type]
    repository.assign(DEVICE, {"main": ref})
    return ref


def forget_cache(device: Device) -> None:
    shutil.rmtree(device.state / "tuf")
    device.restart()


def test_nothing_is_assigned_yet(device: Device) -> None:
    assert device.registry.check() is None


def test_the_assignment_and_its_manifest_come_verified(device: Device, repository: Repository) -> None:
    ref = deployed(repository)

    desired = device.registry.check()

    assert desired is not None
    assert desired.assignment.device == DEVICE
    assert desired.assignment.pipelines["main"].model == ref
    found = desired.manifests["main"]
    assert found.ref == ref
    assert found.manifest == small_manifest()
    assert hashlib.sha256(found.raw).hexdigest() == ref.sha256
    assert desired.refused == {}


def test_a_second_look_fetches_little(device: Device, repository: Repository, server: Server) -> None:
    deployed(repository)
    first = device.registry.check()
    server.requests.clear()

    assert device.registry.check() == first
    assert [r.path for r in server.requests] == ["/tuf/metadata/2.root.json", TIMESTAMP]


def test_a_newer_assignment_is_seen(device: Device, repository: Repository) -> None:
    deployed(repository)
    device.registry.check()
    newer = deployed(repository, version="2")

    desired = device.registry.check()

    assert desired is not None
    assert desired.assignment.pipelines["main"].model == newer


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "bin", "director", "models", "targets"])
def test_a_wrong_signature_is_refused(device: Device, repository: Repository, role: str) -> None:
    ref = deployed(repository)
    name = repository.bin_of(DEVICE) if role == "bin" else role
    repository.now += 1
    if role == "timestamp":
        repository.publish()
        repository.write("timestamp", signer=new_signer())
    elif role == "snapshot":
        publish_with_wrong_snapshot(repository)
    else:
        repository.roles[name].version += 1
        repository.write(name, signer=new_signer())
        repository.publish()

    if role == "models":
        desired = device.registry.check()
        assert desired is not None
        assert "models" in desired.refused["main"].what
        assert isinstance(desired.refused["main"], Rejected)
        assert not desired.manifests, ref
    else:
        with pytest.raises(Rejected, match="refused"):
            device.registry.check()


def publish_with_wrong_snapshot(repository: Repository) -> None:
    right = repository.signers["snapshot"]
    repository.signers["snapshot"] = new_signer()
    repository.publish()
    repository.signers["snapshot"] = right


def test_tampered_metadata_is_refused(device: Device, repository: Repository) -> None:
    deployed(repository)
    text = repository.files[TIMESTAMP].decode()
    repository.files[TIMESTAMP] = text.replace('"sha256"', '"sha257"').encode()
    with pytest.raises(Rejected):
        device.registry.check()


def test_metadata_that_is_not_json_is_refused(device: Device, repository: Repository) -> None:
    repository.files[TIMESTAMP] = b"<html>Please log in</html>"
    with pytest.raises(Rejected, match="refused"):
        device.registry.check()


def test_a_tampered_assignment_is_refused(device: Device, repository: Repository) -> None:
    deployed(repository)
    [path] = [p for p in repository.files if p.startswith("/tuf/targets/devices/")]
    repository.files[path] = repository.files[path].replace(b'"lab"', b'"bal"')
    with pytest.raises(Rejected, match="do not match what was signed"):
        device.registry.check()


def test_a_tampered_manifest_is_refused(device: Device, repository: Repository) -> None:
    deployed(repository)
    [path] = [p for p in repository.files if p.startswith("/tuf/targets/models/")]
    repository.files[path] = repository.files[path].replace(b"onnx", b"evil")

    desired = device.registry.check()

    assert desired is not None
    assert isinstance(desired.refused["main"], Rejected)
    assert not list((device.state / "manifests").glob("*"))


def test_an_assignment_for_another_device_is_refused(device: Device, repository: Repository) -> None:
    repository.assign(DEVICE, {}, device="other")
    with pytest.raises(Rejected, match="is for other"):
        device.registry.check()


def test_an_assignment_with_an_unknown_field_is_refused(device: Device, repository: Repository) -> None:
    document = json.loads(repository.assign(DEVICE, {}).to_bytes()) | {"shell": "rm"}
    repository.add_target(f"devices/{DEVICE}.json", json.dumps(document).encode(), repository.bin_of(DEVICE))
    repository.publish()
    with pytest.raises(Rejected, match="shell"):
        device.registry.check()


def test_the_director_alone_cannot_bring_in_a_model(device: Device, repository: Repository) -> None:
    manifest = small_manifest()
    raw = manifest.to_bytes()
    repository.add_target(manifest.path, raw, repository.bin_of(DEVICE))
    repository.assign(DEVICE, {"main": ModelRef(path=manifest.path, sha256=hashlib.sha256(raw).hexdigest())})

    desired = device.registry.check()

    assert desired is not None
    assert "no release key has signed" in desired.refused["main"].what


def test_another_sha256_than_the_signed_one_is_refused(device: Device, repository: Repository) -> None:
    ref = repository.release(small_manifest())
    repository.assign(DEVICE, {"main": ModelRef(path=ref.path, sha256="0" * 64)})
    desired = device.registry.check()
    assert desired is not None
    assert "another sha256" in desired.refused["main"].what


def test_a_manifest_under_a_wrong_path_is_refused(device: Device, repository: Repository) -> None:
    raw = small_manifest(version="1").to_bytes()
    repository.add_target("models/toy/2.json", raw, "models")
    ref = ModelRef(path="models/toy/2.json", sha256=hashlib.sha256(raw).hexdigest())
    repository.assign(DEVICE, {"main": ref})
    desired = device.registry.check()
    assert desired is not None
    assert "says that it is models/toy/1.json" in desired.refused["main"].what


def test_one_refused_pipeline_does_not_hold_up_another(device: Device, repository: Repository) -> None:
    good = repository.release(small_manifest())
    bad = ModelRef(path="models/none/1.json", sha256="0" * 64)
    repository.assign(DEVICE, {"bad": bad, "good": good})
    desired = device.registry.check()
    assert desired is not None
    assert set(desired.manifests) == {"good"}
    assert set(desired.refused) == {"bad"}


# --- rollback


@pytest.mark.parametrize("cache", ["kept", "deleted", "corrupt"])
def test_metadata_that_was_rolled_back_is_refused(device: Device, repository: Repository, cache: str) -> None:
    deployed(repository)
    old = repository.freeze()
    repository.now += 3600
    deployed(repository, version="2")
    assert device.registry.check() is not None
    repository.put_back(old)
    if cache == "deleted":
        forget_cache(device)
    elif cache == "corrupt":
        for path in (device.state / "tuf").glob("*.json"):
            if not path.is_symlink():
                path.write_bytes(b"\0" * 100)
        device.restart()

    with pytest.raises(Rejected):
        device.registry.check()


def test_a_revision_below_the_last_one_is_refused(device: Device, repository: Repository) -> None:
    deployed(repository)
    device.registry.check()
    device.restart()
    repository.assign(DEVICE, {}, revision=repository.revision - 10)
    with pytest.raises(Rejected, match="an older state was put back"):
        device.registry.check()


def test_a_cloud_restored_from_a_backup_is_accepted(device: Device, repository: Repository) -> None:
    ref = deployed(repository)
    backup = repository.saved()
    repository.now += 3600
    repository.assign(DEVICE, {"other": ref})
    assert device.registry.check() is not None
    repository.roles = backup
    repository.now += 3600
    repository.revision = int(repository.now)
    repository.assign(DEVICE, {})

    desired = device.registry.check()

    assert desired is not None
    assert desired.assignment.pipelines == {}


def test_an_older_root_is_refused_when_the_cache_is_gone(device: Device, repository: Repository) -> None:
    old = repository.freeze()
    repository.rotate("timestamp")
    repository.publish()
    assert device.registry.check() is None
    forget_cache(device)
    repository.put_back(old)
    with pytest.raises(Rejected, match="root"):
        device.registry.check()


def test_floors_lapse_when_root_rotates_the_keys(device: Device, repository: Repository) -> None:
    """Whoever stole an online key may have signed a high version: new keys begin anew."""
    repository.roles["timestamp"].version += DAY * 365
    repository.publish()
    assert device.registry.check() is None

    repository.rotate("timestamp")
    repository.roles["timestamp"].version = int(repository.now)
    repository.publish()

    assert device.registry.check() is None
    forget_cache(device)
    assert device.registry.check() is None


def test_a_version_that_jumps_too_far_is_refused(device: Device, repository: Repository) -> None:
    repository.roles["timestamp"].version = 1 << 40
    repository.publish()
    with pytest.raises(Rejected, match="jumps"):
        device.registry.check()
    assert device.floors.version("timestamp", [repository.signers["timestamp"].public_key.keyid]) == 0


def test_damaged_floors_refuse_every_update_and_are_not_overwritten(
    device: Device, repository: Repository
) -> None:
    deployed(repository)
    device.registry.check()
    path = device.state / "floors.json"
    path.write_bytes(b"{")
    device.restart()
    with pytest.raises(Rejected, match=r"floors\.json"):
        device.registry.check()
    assert path.read_bytes() == b"{"


# --- expiry and time


@pytest.mark.parametrize(
    ("role", "days", "who"),
    [
        ("timestamp", 8, "the cloud must re-sign it"),
        ("director", 31, "the cloud must re-sign it"),
        ("root", 731, "root keys"),
        ("targets", 366, "targets key"),
    ],
)
def test_expired_metadata_is_unavailable_and_says_who_must_act(
    device: Device, repository: Repository, role: str, days: int, who: str
) -> None:
    deployed(repository)
    assert device.registry.check() is not None
    renew_all_but(repository, role, days)
    device.now = repository.now + 60

    with pytest.raises(Unavailable, match=rf"{role}\.json expired at 20..-..-.. ..:.. UTC: .*{who}"):
        device.registry.check()
    assert "What runs goes on running" in catch(device).next_step


def renew_all_but(repository: Repository, left: str, days: int) -> None:
    repository.now += days * DAY
    for role in repository.roles:
        if role in (left, "snapshot", "timestamp"):
            continue
        repository.roles[role].version += 1
        repository.write(role)
    if left != "timestamp":
        repository.publish()


def catch(device: Device) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        device.registry.check()
    return caught.value


def test_an_expired_registry_works_again_once_it_is_signed(device: Device, repository: Repository) -> None:
    deployed(repository)
    repository.now += 8 * DAY
    device.now = repository.now
    catch(device)
    repository.publish()
    assert device.registry.check() is not None


def test_a_way_back_needs_no_valid_models_metadata(device: Device, repository: Repository) -> None:
    old = deployed(repository)
    device.registry.check()
    new = deployed(repository, version="2")
    renew_all_but(repository, "models", 366)
    device.now = repository.now + 60
    device.restart()

    desired = device.registry.check()
    assert desired is not None
    assert isinstance(desired.refused["main"], Unavailable), new
    assert "models.json expired" in desired.refused["main"].what
    assert "an operator must sign it again" in desired.refused["main"].what

    repository.assign(DEVICE, {"main": old})
    desired = device.registry.check()
    assert desired is not None
    assert desired.manifests["main"].ref == old


def test_a_damaged_manifest_on_disk_is_fetched_again(device: Device, repository: Repository) -> None:
    ref = deployed(repository)
    device.registry.check()
    stored = device.state / "manifests" / f"{ref.sha256}.json"
    stored.write_bytes(b"{}")
    desired = device.registry.check()
    assert desired is not None
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == ref.sha256
    stuck = stored.with_name(f"{'0' * 64}.json")
    stuck.mkdir()  # what even root cannot unlink
    device.registry.prune_manifests(set())
    assert not stored.exists()
    assert stuck.exists(), "and the daemon goes on"


def test_a_clock_at_1970_is_lifted_to_the_last_authenticated_time(
    device: Device, repository: Repository
) -> None:
    device.now = 0
    assert device.registry.trusted_time() == BUILD_TIME
    deployed(repository)
    assert device.registry.check() is not None
    device.restart()
    assert device.registry.trusted_time() == int(repository.now)

    repository.now += 8 * DAY
    repository.roles["models"].version += 1
    fresh_elsewhere = repository.freeze()
    repository.publish()
    device.registry.check()
    repository.put_back(fresh_elsewhere)
    with pytest.raises(Rejected):
        device.registry.check()


def test_what_expired_before_the_authenticated_time_is_refused_at_1970(
    device: Device, repository: Repository
) -> None:
    """The timestamp that is read in this very look tells the time for all that follows."""
    device.now = 0
    deployed(repository)
    renew_all_but(repository, "targets", 366)
    assert "targets.json expired" in catch(device).what


def test_one_visit_to_2106_expires_nothing_for_ever(device: Device, repository: Repository) -> None:
    deployed(repository)
    device.now = datetime(2106, 2, 7, tzinfo=timezone.utc).timestamp()
    error = catch(device)
    assert "expired" in error.what
    assert "2106-02-07" in error.next_step

    device.now = repository.now + 60
    device.restart()
    assert device.registry.check() is not None
    assert device.floors.last_authenticated_time == int(repository.now)


def test_a_far_time_from_a_stolen_key_is_refused(device: Device, repository: Repository) -> None:
    repository.now += 20 * 365 * DAY
    repository.roles["timestamp"].version = int(device.now) - (1 << 30)
    repository.publish()
    repository.roles["timestamp"].version = int(device.now)
    repository.write("timestamp")
    with pytest.raises(Rejected):
        device.registry.check()
    assert device.floors.last_authenticated_time == 0


def test_a_poisoned_time_lapses_with_the_key_that_signed_it(device: Device, repository: Repository) -> None:
    """A stolen timestamp key may claim a time five years ahead; a new root takes it back."""
    honest = repository.now
    repository.now += 5 * 365 * DAY
    for role in repository.roles:
        if role not in ("root", "snapshot", "timestamp"):
            repository.write(role)
    repository.publish()
    with pytest.raises(Unavailable, match="root"):
        device.registry.check()
    assert device.registry.trusted_time() == int(repository.now)

    repository.now = honest
    for role in ("timestamp", "snapshot"):
        repository.rotate(role)
        repository.roles[role].version = int(honest)
    for role in repository.roles:
        if role not in ("root", "snapshot", "timestamp"):
            repository.roles[role].version += 1
            repository.write(role)
    repository.publish()

    assert device.registry.check() is None
    assert device.floors.last_authenticated_time == int(honest)


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets", "models"])
def test_contract_every_expiry_check_of_tuf_reads_the_reference_time(
    device: Device, server: Server, role: str
) -> None:
    """Held against tuf itself: `_trusted_set.reference_time`, set before `refresh`, decides."""
    short = Repository(server.files, lives={**dict.fromkeys(LIVES, 1000), role: 5})
    ref = short.release(small_manifest())
    expires = short.now + 5 * DAY

    at(device, short, expires - 1).target(ref.path)
    with pytest.raises(Unavailable, match=rf"{role}\.json expired") as caught:
        at(device, short, expires + 1).target(ref.path)
    assert isinstance(caught.value.__cause__, ExpiredMetadataError)


def at(device: Device, repository: Repository, now: float) -> _Look:
    cache = device.state / f"tuf-{now}"
    cache.mkdir()
    return _Look(repository.root_bytes, cache, _Fetcher(device.http), now)


# --- the network


def test_endless_metadata_is_refused(device: Device, server: Server) -> None:
    server.faults[TIMESTAMP] = Fault(endless=True)
    with pytest.raises(Rejected, match="longer than 16384 bytes"):
        device.registry.check()


@pytest.mark.parametrize("fault", [Fault(drip=True), Fault(drip_headers=True)])
def test_a_server_that_drips_is_left(device: Device, hasty: Http, server: Server, fault: Fault) -> None:
    server.faults[TIMESTAMP] = fault
    device.http = hasty
    device.restart()
    with pytest.raises(Unavailable, match="bytes a second"):
        device.registry.check()


def test_metadata_that_breaks_off_is_unavailable(device: Device, server: Server) -> None:
    server.faults[TIMESTAMP] = Fault(cut_after=100)
    with pytest.raises(Unavailable, match="broke"):
        device.registry.check()


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_registry_without_its_timestamp_is_unavailable(device: Device, server: Server, status: int) -> None:
    server.faults[TIMESTAMP] = Fault(status=status)
    with pytest.raises(Unavailable, match=str(status)):
        device.registry.check()


def test_a_registry_that_is_away_is_unavailable(device: Device, server: Server) -> None:
    server.close()
    with pytest.raises(Unavailable, match="cannot be reached"):
        device.registry.check()
