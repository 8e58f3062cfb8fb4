"""The registry against python-tuf's own client over a real HTTP server, and its writer's failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuf.api.exceptions import ExpiredMetadataError
from tuf.api.metadata import Delegations, Metadata, Root, Snapshot, Targets, Timestamp

from cloud.kit import (
    Client,
    Operator,
    key_service,
    make_assignment,
    make_blob,
    make_cloud,
    make_manifest,
    ref_of,
    serving,
)
from edgeward_cloud.files import write_atomic
from edgeward_cloud.keys import new_key
from edgeward_cloud.registry import Conflict, Registry, versions
from edgeward_cloud.registry.beginning import begin
from edgeward_cloud.registry.offline import resign_offline
from edgeward_cloud.settings import Settings
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import ModelRef


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_cloud(tmp_path / "cloud", ("ann", "bob"))


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(settings)


@pytest.fixture
def ann(settings: Settings) -> Operator:
    return Operator(settings, "ann")


@pytest.fixture
def url(settings: Settings) -> Iterator[str]:
    with serving(settings.metadata.parent) as address:
        yield address


@pytest.fixture
def client(settings: Settings, url: str, tmp_path: Path) -> Client:
    return Client(settings, url, tmp_path / "device")


def timestamp_of(settings: Settings) -> Timestamp:
    return Metadata[Timestamp].from_file(str(settings.metadata / "timestamp.json")).signed


def snapshot_of(settings: Settings) -> Snapshot:
    version = timestamp_of(settings).snapshot_meta.version
    return Metadata[Snapshot].from_file(str(settings.metadata / f"{version}.snapshot.json")).signed


# --- what a fresh registry is


def test_root_reserves_every_role_from_the_start(settings: Settings) -> None:
    root = Metadata[Root].from_file(str(settings.metadata / "1.root.json"))
    assert root.signed.consistent_snapshot
    assert len(root.signed.roles["root"].keyids) == 2
    assert root.signed.roles["root"].threshold == 1
    assert len(root.signatures) == 2
    owners = [tuple(role.keyids) for role in root.signed.roles.values()]
    assert len(set(owners)) == 4, "each top-level role has keys of its own"
    targets = Metadata[Targets].from_file(str(settings.metadata / "1.targets.json")).signed
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    roles = list(targets.delegations.roles.values())
    assert [(role.name, role.paths, role.terminating) for role in roles] == [
        ("models", ["models/*/*"], True),
        ("director", ["devices/*"], True),
        ("agent", ["agent/*/*"], True),
    ]
    assert [len(role.keyids) for role in roles] == [2, 1, 1], "both operators' release keys sign models"
    assert len({keyid for role in roles for keyid in role.keyids}) == 4
    assert not targets.targets


def test_a_root_threshold_equal_to_the_number_of_keys_is_refused(tmp_path: Path) -> None:
    signers = [new_key(tmp_path / f"{i}.pem") for i in range(2)]
    same = dict.fromkeys(("targets", "agent", "timestamp", "snapshot", "director"), signers[0])
    with pytest.raises(Rejected, match="one lost key"):
        begin(
            Settings(dir=tmp_path / "c"),
            root=signers,
            root_threshold=2,
            signers=same,
            release=signers,
            now=time.time(),
        )


def test_a_fresh_client_finds_nothing_in_a_fresh_registry(client: Client, registry: Registry) -> None:
    assert client.assignment("edge-01") is None
    assert client.manifest("net", "1") is None
    assert client.get("agent/any/thing") is None
    assert registry.assignment("edge-01") is None
    assert registry.models() == []


def test_no_registry_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    settings = make_cloud(tmp_path / "cloud")
    (settings.metadata / "timestamp.json").unlink()
    with pytest.raises(Rejected, match="no registry") as caught:
        Registry(settings)
    assert "edgeward-cloud init" in caught.value.next_step


# --- models


def test_published_models_reach_a_client(
    registry: Registry, ann: Operator, client: Client, settings: Settings
) -> None:
    first = make_manifest(registry.blobs, "net", "1")
    assert ann.publish(registry, first) == 2
    second = make_manifest(registry.blobs, "net", "2")
    assert Operator(settings, "bob").publish(registry, second) == 3
    assert client.manifest("net", "1") == first
    assert client.manifest("net", "2") == second
    entries = registry.models()
    assert {entry.version for entry in entries} == {"1", "2"}
    assert entries[0].content == first.content_digest() or entries[1].content == first.content_digest()
    assert registry.manifest(ref_of(first)) == first
    with pytest.raises(Rejected, match="another digest"):
        registry.manifest(ModelRef(path=first.path, sha256="0" * 64))
    with pytest.raises(Rejected, match="not released"):
        registry.manifest(ModelRef(path="models/other/1.json", sha256="0" * 64))


def test_a_stale_if_match_conflicts(registry: Registry, ann: Operator) -> None:
    current, version = registry.models_metadata()
    raw, texts = ann.next(current, make_manifest(registry.blobs, "net", "1"))
    ann.publish(registry, make_manifest(registry.blobs, "net", "2"))
    with pytest.raises(Conflict, match="version 2"):
        registry.publish_models(raw, texts, version)
    with pytest.raises(Rejected, match="has version 2, not 3"):
        registry.publish_models(raw, texts, version + 1)


def test_two_operators_at_the_same_moment_both_land(settings: Settings, client: Client) -> None:
    each, conflicts = 4, []
    gate = threading.Barrier(2)

    def work(name: str) -> None:
        registry, operator = Registry(settings), Operator(settings, name)
        gate.wait(60)
        for number in range(each):
            manifest = make_manifest(registry.blobs, f"net-{name}", str(number))
            while True:
                try:
                    operator.publish(registry, manifest)
                    break
                except Conflict:
                    conflicts.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    registry = Registry(settings)
    assert registry.models_metadata()[1] == 1 + 2 * each
    assert len(registry.models()) == 2 * each
    assert client.manifest("net-ann", "3") is not None
    assert client.manifest("net-bob", "3") is not None


Spoil = Callable[[Registry, Operator, bytes], "tuple[bytes, dict[str, str]]"]


def _stranger(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    ann.signer = new_key(registry.blobs.path("0" * 64).with_name("stranger.pem"))
    return ann.next(current, make_manifest(registry.blobs))


def _tampered(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    raw, texts = ann.next(current, make_manifest(registry.blobs))
    return raw.replace(b'"length":', b'"length":1'), texts


def _other_text(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    raw, texts = ann.next(current, make_manifest(registry.blobs))
    return raw, {path: text + " " for path, text in texts.items()}


def _missing_text(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, make_manifest(registry.blobs))[0], {}


def _extra_text(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    raw, texts = ann.next(current, make_manifest(registry.blobs))
    return raw, {**texts, "models/x/1.json": "{}"}


def _missing_blob(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs)
    registry.blobs.path(manifest.blobs()[0].sha256).unlink()
    return ann.next(current, manifest)


def _lying_length(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs)
    blob = make_blob(registry.blobs, b"labels").model_copy(update={"length": 7, "name": "labels.txt"})
    return ann.next(current, manifest.model_copy(update={"labels": blob}))


def _renamed(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs, version="1")
    raw, texts = ann.next(current, manifest)
    metadata = Metadata[Targets].from_bytes(raw)
    target = metadata.signed.targets.pop(manifest.path)
    metadata.signed.targets["models/net/2.json"] = target
    metadata.sign(ann.signer)
    return metadata.to_bytes(), {"models/net/2.json": texts[manifest.path]}


def _elsewhere(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs)
    raw, texts = ann.next(current, manifest)
    metadata = Metadata[Targets].from_bytes(raw)
    metadata.signed.targets["devices/edge-01.json"] = metadata.signed.targets.pop(manifest.path)
    metadata.sign(ann.signer)
    return metadata.to_bytes(), {"devices/edge-01.json": texts[manifest.path]}


def _wrong_content(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs)
    raw, texts = ann.next(current, manifest)
    metadata = Metadata[Targets].from_bytes(raw)
    metadata.signed.targets[manifest.path].unrecognized_fields["custom"] = {"content": "0" * 64}
    metadata.sign(ann.signer)
    return metadata.to_bytes(), texts


def _not_a_manifest(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    manifest = make_manifest(registry.blobs)
    raw, _ = ann.next(current, manifest)
    metadata = Metadata[Targets].from_bytes(raw)
    text = '{"schema":"edgeward.manifest/1"}'
    target = type(metadata.signed.targets[manifest.path]).from_data(manifest.path, text.encode(), ["sha256"])
    target.unrecognized_fields["custom"] = {"content": "0" * 64}
    metadata.signed.targets[manifest.path] = target
    metadata.sign(ann.signer)
    return metadata.to_bytes(), {manifest.path: text}


def _delegating(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, change={"delegations": Delegations({}, {})})


def _expired(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, change={"expires": datetime(2020, 1, 1, tzinfo=timezone.utc)})


def _for_ever(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, change={"expires": datetime(2100, 1, 1, tzinfo=timezone.utc)})


def _skipping(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, change={"version": 9})


def _unknown_field(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return ann.next(current, change={"unrecognized_fields": {"x": 1}})


def _no_metadata(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return b"{}", {}


def _another_type(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    metadata = Metadata(Snapshot(2))
    metadata.sign(ann.signer)
    return metadata.to_bytes(), {}


def _too_long(registry: Registry, ann: Operator, current: bytes) -> tuple[bytes, dict[str, str]]:
    return current + b" " * 5_000_000, {}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_stranger, "No release key"),
        (_tampered, "No release key"),
        (_other_text, "not the one that was signed"),
        (_missing_text, "was not sent along"),
        (_extra_text, "no new entry"),
        (_missing_blob, "is not in the store"),
        (_lying_length, "labels.txt .* has 6 bytes, not 7"),
        (_renamed, "calls itself net 1"),
        (_elsewhere, "is not models/"),
        (_wrong_content, "content digest"),
        (_not_a_manifest, "is not valid"),
        (_delegating, "must not delegate"),
        (_expired, "expires at 2020"),
        (_for_ever, "expires at 2100"),
        (_skipping, "version 9, not 2"),
        (_unknown_field, "unknown field 'x'"),
        (_no_metadata, "not TUF metadata"),
        (_another_type, "not of type targets"),
        (_too_long, "bytes long"),
    ],
)
def test_a_bad_release_changes_nothing(
    registry: Registry, ann: Operator, settings: Settings, spoil: Spoil, says: str
) -> None:
    current, version = registry.models_metadata()
    raw, texts = spoil(registry, ann, current)
    before = sorted(file.name for file in settings.metadata.iterdir())
    with pytest.raises(Rejected, match=says):
        registry.publish_models(raw, texts, version)
    assert sorted(file.name for file in settings.metadata.iterdir()) == before
    assert registry.models_metadata() == (current, version)


@pytest.mark.parametrize("how", ["dropped", "changed"])
def test_what_is_released_stays(registry: Registry, ann: Operator, how: str) -> None:
    manifest = make_manifest(registry.blobs)
    ann.publish(registry, manifest)
    current, version = registry.models_metadata()
    metadata = Metadata[Targets].from_bytes(ann.next(current)[0])
    if how == "dropped":
        metadata.signed.targets.pop(manifest.path)
    else:
        metadata.signed.targets[manifest.path].length += 1
    metadata.sign(ann.signer)
    with pytest.raises(Rejected, match="drops" if how == "dropped" else "changes"):
        registry.publish_models(metadata.to_bytes(), {}, version)


# --- assignments


def test_assignments_reach_their_devices_through_the_bins(
    registry: Registry, ann: Operator, client: Client
) -> None:
    manifest = make_manifest(registry.blobs)
    ann.publish(registry, manifest)
    devices = [f"edge-{i:02d}" for i in range(20)]
    signed = registry.assign([make_assignment(device, ref_of(manifest)) for device in devices])
    assert [each.device for each in signed] == devices
    for each in (signed[0], signed[7], signed[19]):
        assert client.assignment(each.device) == each
        assert registry.assignment(each.device) == each
    assert client.assignment("edge-99") is None


def test_only_released_models_can_be_assigned(registry: Registry) -> None:
    manifest = make_manifest(registry.blobs)
    with pytest.raises(Rejected, match="not released"):
        registry.assign([make_assignment("edge-01", ref_of(manifest))])
    assert registry.assignment("edge-01") is None


def test_assign_writes_only_the_bins_that_it_touches(registry: Registry, settings: Settings) -> None:
    before = {name: meta.version for name, meta in snapshot_of(settings).meta.items()}
    registry.assign([make_assignment("edge-01")])
    after = {name: meta.version for name, meta in snapshot_of(settings).meta.items()}
    changed = [name for name in after if after[name] != before[name]]
    assert len(changed) == 1
    assert changed[0].startswith("bin-")


def test_revisions_and_versions_only_grow(settings: Settings) -> None:
    clock = {"now": float(int(time.time()))}
    registry = Registry(settings, clock=lambda: clock["now"])
    first = registry.assign([make_assignment("edge-01")])[0]
    assert first.revision == clock["now"]
    clock["now"] -= 86_400
    again = registry.assign([make_assignment("edge-01").model_copy(update={"fleet": "other"})])[0]
    assert again.revision == first.revision + 1, "a clock that went back does not take the revision along"
    version = timestamp_of(settings).version
    clock["now"] += 10 * 86_400
    later = registry.assign([make_assignment("edge-01")])[0]
    assert later.revision == clock["now"]
    assert timestamp_of(settings).version == clock["now"] > version


def test_saying_the_same_again_signs_nothing(registry: Registry, settings: Settings) -> None:
    first = registry.assign([make_assignment("edge-01")])
    version = timestamp_of(settings).version
    assert registry.assign([make_assignment("edge-01")]) == first
    assert timestamp_of(settings).version == version


def test_many_writers_lose_nothing(settings: Settings) -> None:
    names = [[f"edge-{t}-{i}" for i in range(5)] for t in range(4)]

    def work(mine: list[str]) -> None:
        registry = Registry(settings)
        for name in mine:
            registry.assign([make_assignment(name)])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    registry = Registry(settings)
    assert all(registry.assignment(name) is not None for mine in names for name in mine)


# --- freshness


def test_the_timestamp_says_when_it_was_signed(registry: Registry, settings: Settings) -> None:
    registry.assign([make_assignment("edge-01")])
    signed_at = timestamp_of(settings).unrecognized_fields["x-edgeward-signed-at"]
    moment = datetime.strptime(signed_at, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert abs(moment.timestamp() - time.time()) < 60
    assert timestamp_of(settings).expires == moment + timedelta(days=7)


def test_online_roles_are_signed_again_at_half_of_their_life(
    settings: Settings, registry: Registry, client: Client
) -> None:
    registry.assign([make_assignment("edge-01")])
    begun = snapshot_of(settings)
    due = registry.resign_due()
    assert snapshot_of(settings) == begun, "nothing is due yet"
    assert due == pytest.approx(time.time() + 3.5 * 86_400, abs=60)
    assert registry.resign_due(due - 60) == due
    assert snapshot_of(settings) == begun
    after = registry.resign_due(due)
    assert after == pytest.approx(due + 3.5 * 86_400, abs=1)
    assert snapshot_of(settings).version > begun.version
    bins = {n: m.version for n, m in begun.meta.items() if n.startswith("bin-")}
    assert {n: m.version for n, m in snapshot_of(settings).meta.items() if n in bins} == bins, "not the bins"
    late = time.time() + 16 * 86_400
    registry.resign_due(late)
    fresh = snapshot_of(settings).meta
    assert all(fresh[name].version > version for name, version in bins.items())
    assert fresh["director.json"].version > begun.meta["director.json"].version
    assert client.assignment("edge-01", reference_time=late + 14 * 86_400 - 8 * 86_400) is not None


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "director"])
def test_a_key_service_that_is_away_is_not_a_bug_and_harms_nothing(
    settings: Settings, client: Client, role: str
) -> None:
    with key_service(settings, role) as (elsewhere, service):
        registry = Registry(elsewhere)
        first = registry.assign([make_assignment("edge-01")])
        service.away = True
        with pytest.raises(Unavailable, match=f"{role if role != 'director' else 'bin-'}.* cannot be signed"):
            registry.assign([make_assignment("edge-01"), make_assignment("edge-02")])
        assert [client.assignment("edge-01"), client.assignment("edge-02")] == [*first, None]
        service.away = False
        second = registry.assign([make_assignment("edge-02")])
        assert [client.assignment("edge-01"), client.assignment("edge-02")] == [*first, *second]


def test_a_server_that_sleeps_for_too_long_lets_clients_see_it(registry: Registry, client: Client) -> None:
    with pytest.raises(ExpiredMetadataError):
        client.assignment("edge-01", reference_time=time.time() + 8 * 86_400)
    registry.resign_due(time.time() + 8 * 86_400)
    assert client.assignment("edge-01", reference_time=time.time() + 8 * 86_400) is None


def test_superseded_files_stay_for_two_days_and_roots_for_ever(
    settings: Settings, ann: Operator, registry: Registry, client: Client
) -> None:
    manifest = make_manifest(registry.blobs)
    ann.publish(registry, manifest)
    registry.assign([make_assignment("edge-01")])
    old = {file.name for file in settings.metadata.iterdir()}
    registry.assign([make_assignment("edge-01", ref_of(manifest))])
    now = time.time()
    registry.resign_due(now + 47 * 3600)
    assert old <= {file.name for file in settings.metadata.iterdir()}
    assert len(list((settings.targets / "devices").iterdir())) == 2
    registry.resign_due(now + 49 * 3600)
    names = [versions.split_name(file.name) for file in settings.metadata.iterdir()]
    kept = [parts[1] for parts in names if parts]
    assert len(kept) == len(set(kept)), "one version of each role"
    assert "root" in kept
    assert len(list((settings.targets / "devices").iterdir())) == 1
    assert client.assignment("edge-01") is not None
    assert client.manifest("net", "1") == manifest


def test_the_offline_keys_renew_root_and_targets(settings: Settings, client: Client, tmp_path: Path) -> None:
    assert client.assignment("edge-01") is None
    (settings.offline_keys / "root-1.pem").unlink()
    year = time.time() + 300 * 86_400
    expires = resign_offline(settings, settings.offline_keys, now=year)
    assert expires["root"].timestamp() == pytest.approx(year + 730 * 86_400, abs=2)
    assert client.assignment("edge-01") is None
    assert (settings.metadata / "2.root.json").exists()
    assert client.get("agent/any/thing") is None
    assert Registry(settings).root().signed.version == 2
    stranger = tmp_path / "keys"
    stranger.mkdir()
    new_key(stranger / "root-1.pem")
    for role in ("targets", "agent"):
        new_key(stranger / f"{role}.pem")
    with pytest.raises(Rejected, match="not this registry's keys"):
        resign_offline(settings, stranger)
    with pytest.raises(Rejected, match="no root key"):
        resign_offline(settings, tmp_path)


def test_a_missing_online_key_is_named(settings: Settings) -> None:
    (settings.online_keys / "snapshot.pem").unlink()
    with pytest.raises(Rejected, match=r"snapshot\.pem"):
        Registry(settings)


# --- power cuts


class PowerCut(BaseException):
    """Nothing after this write happens."""


def dying_after(writes: int) -> Callable[[Path, bytes], None]:
    left = [writes]

    def write(path: Path, data: bytes) -> None:
        if left[0] == 0:
            raise PowerCut
        left[0] -= 1
        write_atomic(path, data)

    return write


@pytest.mark.parametrize("dies_after", range(7))
def test_a_power_cut_between_files_leaves_the_old_state_or_the_new(
    settings: Settings, client: Client, tmp_path: Path, url: str, dies_after: int
) -> None:
    devices = ["edge-01", "edge-03"]  # in different bins: six files in all
    old = Registry(settings).assign([make_assignment(device) for device in devices])
    wanted = [make_assignment(device).model_copy(update={"fleet": "new"}) for device in devices]
    assert [client.assignment(device) for device in devices] == old
    cut = dies_after < 6
    try:
        Registry(settings, write=dying_after(dies_after)).assign(wanted)
    except PowerCut:
        assert cut
    else:
        assert not cut
    for device in (client, Client(settings, url, tmp_path / "fresh")):
        fleets = [each.fleet for name in devices if (each := device.assignment(name))]
        assert fleets == (["edge", "edge"] if cut else ["new", "new"])
    repaired = Registry(settings).assign(wanted)
    assert [client.assignment(device) for device in devices] == repaired
    assert all(each.revision > before.revision for each, before in zip(repaired, old, strict=True))


@pytest.mark.parametrize("dies_after", range(5))
def test_a_power_cut_while_publishing_loses_no_version(
    settings: Settings, ann: Operator, client: Client, dies_after: int
) -> None:
    registry = Registry(settings)
    manifest = make_manifest(registry.blobs, "net", "1")
    try:
        ann.publish(Registry(settings, write=dying_after(dies_after)), manifest)
    except PowerCut:
        assert client.manifest("net", "1") is None
        other = make_manifest(registry.blobs, "other", "1")
        assert ann.publish(registry, other) == 2, "the version that never came into force is used again"
        assert client.manifest("other", "1") == other
    else:
        assert dies_after == 4
        assert client.manifest("net", "1") == manifest


# --- pure functions


@given(previous=st.integers(1, 1 << 40), now=st.floats(0, 1e10))
def test_the_next_version_grows_and_reaches_the_clock(previous: int, now: float) -> None:
    version = versions.next_version(previous, now)
    assert version > previous
    assert version >= int(now)


@given(name=st.text(max_size=40), modified=st.floats(0, 1e9), now=st.floats(0, 2e9))
def test_pruning_takes_only_old_versioned_files(name: str, modified: float, now: float) -> None:
    if versions.may_be_pruned(name, {}, modified, now):
        assert versions.split_name(name) is not None or name.endswith(".tmp")
        assert now - modified > versions.KEEP_S - 1


@pytest.mark.parametrize(
    ("name", "pruned"),
    [
        ("3.bin-a.json", False),
        ("2.bin-a.json", True),
        ("4.bin-a.json", True),
        ("1.root.json", False),
        ("9.root.json", False),
        ("timestamp.json", False),
        ("7.unheard-of.json", True),
        ("../2.bin-a.json", False),
        (".2.bin-a.json.12.tmp", True),
    ],
)
def test_what_is_in_force_is_never_pruned(name: str, pruned: bool) -> None:
    assert versions.may_be_pruned(name, {"bin-a": 3}, 0, 10 * versions.KEEP_S) is pruned
