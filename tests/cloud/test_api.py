"""Every route, over a cloud made by the real ceremony and a real SQLite file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.apikit import Api, DeviceKit, running_api
from cloud.kit import Operator, make_manifest
from cloud.test_store import window
from edgeward_cloud import bounds
from edgeward_cloud.api.serving import PIECE, parse_range
from edgeward_cloud.ingest import event_row, window_row
from edgeward_cloud.operators import new_token
from edgeward_cloud.problem import Refused
from edgeward_cloud.store import devices, operations, streams
from edgeward_wire import __version__, api
from edgeward_wire.event import Event, Fault
from edgeward_wire.histogram import Histogram, Recorder, merge
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Reported
from edgeward_wire.result import ResultMessage, Seen
from edgeward_wire.status import Birth

pytestmark = pytest.mark.anyio
BOOT = "b" * 32


@pytest.fixture
async def the(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(tmp_path / "cloud") as one:
        yield one


# --- errors and bounds


async def test_every_error_is_a_problem_that_says_what_to_do(the: Api) -> None:
    assert (await the.problem("GET", "/v1/nothing", 404))["next_step"]
    assert (await the.problem("DELETE", "/v1/fleets", 405))["next_step"]
    invalid = await the.problem("POST", "/v1/fleets", 422, json={"name": "Not A Name"})
    assert "name" in invalid["detail"]
    assert "next_step" in invalid
    await the.problem("POST", "/v1/fleets", 422, content=b"{not json")
    await the.problem("GET", "/v1/rollouts?limit=0", 422)
    await the.problem("GET", "/v1/whoami", 401, headers={})
    await the.problem("GET", "/v1/whoami", 401, headers={"Authorization": "Bearer nobody"})
    await the.problem("GET", "/v1/whoami", 401, headers={"Authorization": "Basic eDp5"})


async def test_a_mistake_of_ours_is_a_problem_without_a_traceback(
    the: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(the.services.registry, "models", lambda: 1 / 0)
    found = await the.problem("GET", "/v1/models", 500)
    assert "ZeroDivisionError" in found["detail"]
    assert "Traceback" not in json.dumps(found)


async def test_a_body_is_bounded_whether_announced_or_streamed(the: Api) -> None:
    await the.problem("POST", "/v1/fleets", 413, content=b" " * (bounds.MAX_BODY + 1))

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 10_000

    await the.problem("POST", "/v1/fleets", 413, content=endless())


async def test_a_body_that_pauses_is_not_waited_for(the: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio

    monkeypatch.setattr(bounds, "PAUSE_S", 0.01)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await anyio.sleep(3600)

    found = await the.problem("POST", "/v1/fleets", 408, content=stalling())
    assert "pause" in found["detail"]


async def test_every_answer_carries_the_clouds_date_once(the: Api) -> None:
    the.clock.ahead = 86_400.0
    for path in ("/health", "/v1/whoami", "/v1/nothing"):
        before = int(the.clock())  # a Date has whole seconds
        answer = await the.http.get(path)
        [date] = answer.headers.get_list("date")
        assert before <= parsedate_to_datetime(date).timestamp() <= the.clock()


async def test_openapi_describes_the_routes_the_types_and_the_errors(the: Api) -> None:
    document = await the.call("GET", "/openapi.json", headers={})
    deploy = document["paths"]["/v1/rollouts"]["post"]
    assert deploy["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RolloutCreate")
    assert deploy["responses"]["201"]["content"]["application/json"]["schema"]["$ref"].endswith("/Rollout")
    assert deploy["responses"]["4XX"]["content"] == {
        "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
    }
    assert set(document["components"]["securitySchemes"]) == {"operator", "device"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    ids = [o["operationId"] for path in document["paths"].values() for o in path.values()]
    assert len(ids) == len(set(ids))


# --- public


async def test_health_and_the_ca_need_no_token(the: Api) -> None:
    assert await the.call("GET", "/health", headers={}) == {"status": "ok"}
    ca = await the.call("GET", "/v1/ca.pem", headers={})
    assert ca.text == the.services.pki.server_ca_pem


async def test_tuf_files_are_served_with_the_right_caching(the: Api) -> None:
    fresh = await the.http.get("/tuf/metadata/timestamp.json")
    assert fresh.headers["cache-control"] == "no-cache"
    assert fresh.headers["content-type"] == "application/json"
    assert fresh.json()["signed"]["_type"] == "timestamp"
    again = await the.http.get(
        "/tuf/metadata/timestamp.json", headers={"If-None-Match": fresh.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    root = await the.http.get("/tuf/metadata/1.root.json")
    assert "immutable" in root.headers["cache-control"]
    head = await the.http.head("/tuf/metadata/1.root.json")
    assert head.headers["content-length"] == str(len(root.content))
    ref = the.release("1")
    target = await the.http.get(f"/tuf/targets/models/net/{ref.sha256}.1.json")
    assert hashlib.sha256(target.content).hexdigest() == ref.sha256


@pytest.mark.parametrize(
    "path",
    [
        "/tuf/metadata/2.root.json",
        "/tuf/metadata/..%2f..%2fcloud.toml",
        "/tuf/metadata/.lock",
        "/tuf/metadata/%2e%2e",
        "/tuf/targets/../../cloud.toml",
        "/tuf/targets/..%2f..%2fcloud.toml",
        "/tuf/targets/models/net/" + "a" * 64 + ".1.json",
        "/tuf/targets/models",
        "/tuf/targets/devices/",
        "/tuf/nothing",
    ],
)
async def test_what_is_not_there_is_404_and_never_cached(the: Api, path: str) -> None:
    await the.problem("GET", path, 404, headers={})


# --- operators, fleets


async def test_whoami(the: Api) -> None:
    before = the.clock()
    found = api.WhoAmI.model_validate(await the.call("GET", "/v1/whoami"))
    assert (found.operator, found.cloud) == ("ann", __version__)
    assert before <= found.server_time <= the.clock()


async def test_a_new_token_counts_at_once_and_the_old_one_no_more(the: Api) -> None:
    await the.call("GET", "/v1/whoami")
    token = new_token(the.services.settings.operators_file, "ann")
    await the.problem("GET", "/v1/whoami", 401)
    await the.call("GET", "/v1/whoami", headers={"Authorization": f"Bearer {token}"})


async def test_fleets_are_made_once_and_show_what_they_run(the: Api) -> None:
    await the.enrol("d1", "d2")
    assert "already" in (await the.problem("POST", "/v1/fleets", 409, json={"name": "edge"}))["detail"]
    await the.call("POST", "/v1/fleets", 201, json={"name": "other"})
    ref = the.release("1")
    await the.deploy(ref)
    edge, other = [api.Fleet.model_validate(f) for f in await the.call("GET", "/v1/fleets")]
    assert (edge.name, edge.devices, edge.online, edge.assigned) == ("edge", 2, 0, {"main": ref})
    assert (other.name, other.devices, other.assigned) == ("other", 0, {})


async def test_what_operators_change_is_in_the_audit(the: Api) -> None:
    await the.enrol("d1")
    async with the.services.store.read() as session:
        rows = await operations.audit(session, 10)
    assert [(r.operator, r.action, r.subject) for r in reversed(rows)] == [
        ("ann", "fleet", "edge"),
        ("ann", "enroll-token", "edge"),
        ("token by ann", "enrol", "d1"),
    ]
    assert "token" not in json.dumps([r.detail for r in rows])


# --- devices


async def test_devices_show_what_they_said(the: Api) -> None:
    await the.enrol("d1", "d2")
    birth = Birth(device="d1", boot_id=BOOT, time=1, agent="0.1.0", arch="x86_64", cores=2, memory_mb=1.0)
    reported = Reported(device="d1", boot_id=BOOT, time=2.0)
    result = ResultMessage(
        pipeline="main",
        source="cam",
        time=3.0,
        model="net",
        version="1",
        latency_ms=4.0,
        top=(Seen(label="cat", index=1, score=0.5),),
    )
    the.results["d1"] = (result,)
    async with the.services.store.write() as session:
        fields = {"birth": birth.model_dump(), "reported": reported.model_dump(mode="json"), "online": True}
        await devices.change(session, "d1", fields)
        await devices.change(session, "d2", {"birth": {"from": "a later release"}})
    found = api.Device.model_validate(await the.call("GET", "/v1/devices/d1"))
    assert (found.birth, found.reported, found.results, found.online) == (birth, reported, (result,), True)
    assert found.certificate_expires_at
    other = (await the.call("GET", "/v1/devices?fleet=edge"))[1]
    assert (other["id"], other["birth"], other["online"]) == ("d2", None, False)
    assert len(await the.call("GET", "/v1/devices")) == 2
    await the.problem("GET", "/v1/devices/d9", 404)
    assert "There are: edge" in (await the.problem("GET", "/v1/devices?fleet=none", 404))["detail"]


async def test_a_devices_log_is_newest_first(the: Api) -> None:
    await the.enrol("d1")
    events = [
        Event(boot_id=BOOT, seq=n, time=float(n), what=Fault(subject="disk", detail=f"no {n}"))
        for n in range(3)
    ]
    async with the.services.store.write() as session:
        await streams.add_events(session, [event_row("d1", e, 10.0 + e.seq) for e in events])
    found = await the.call("GET", "/v1/devices/d1/log?limit=2")
    assert [api.LogEntry.model_validate(e).event for e in found] == [events[2], events[1]]
    await the.problem("GET", "/v1/devices/d9/log", 404)


# --- models and blobs


async def test_two_operators_publish_and_the_second_merges(the: Api) -> None:
    blobs = the.services.registry.blobs
    first, second = make_manifest(blobs, version="1"), make_manifest(blobs, version="2")
    signer = Operator(the.services.settings)
    current = await the.http.get("/v1/registry/models", headers=the.operator)
    tag = {**the.operator, "If-Match": current.headers["etag"]}

    def body(raw: bytes, *manifests: Any) -> dict[str, Any]:
        metadata, texts = signer.next(raw, *manifests)
        return {"metadata": metadata.decode(), "manifests": texts}

    put = "/v1/registry/models"
    one = await the.call("PUT", put, headers=tag, json=body(current.content, first))
    lost = await the.problem("PUT", put, 412, headers=tag, json=body(current.content, second))
    assert lost["next_step"]
    await the.problem("PUT", put, 428, json=body(current.content, second))
    newer = await the.http.get(put, headers=the.operator)
    assert newer.headers["etag"] == f'"{one["version"]}"'
    again = {**the.operator, "If-Match": newer.headers["etag"]}
    await the.call("PUT", put, headers=again, json=body(newer.content, second))
    entries = [api.ModelEntry.model_validate(e) for e in await the.call("GET", "/v1/models")]
    assert {e.version for e in entries} == {"1", "2"}
    assert entries[0].content is not None
    bad = {**the.operator, "If-Match": f'"{one["version"] + 1}"'}
    await the.problem("PUT", put, 422, headers=bad, json={"metadata": "{}", "manifests": {}})


async def test_blobs_are_stored_once_and_only_as_what_they_are(the: Api) -> None:
    data = b"weights" * 300_000
    name = hashlib.sha256(data).hexdigest()
    path = f"/v1/blobs/sha256/{name}"
    assert (await the.http.head(path, headers=the.operator)).status_code == 404
    await the.problem("PUT", path, 422, content=b"something else")
    await the.problem("PUT", path, 401, content=data, headers={})
    await the.problem("PUT", "/v1/blobs/sha256/nothex", 422, content=data)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    await the.call("PUT", path, 201, content=pieces())
    await the.call("PUT", path, 200, content=data)
    head = await the.http.head(path, headers=the.operator)
    assert head.headers["content-length"] == str(len(data))
    damaged = the.services.registry.blobs.path(name)
    damaged.chmod(0o644)
    damaged.write_bytes(data[:-1] + b"?")
    assert (await the.http.head(path, headers=the.operator)).status_code == 404, "so that it is sent again"
    await the.call("PUT", path, 201, content=data)
    assert damaged.read_bytes() == data
    assert not list((the.services.settings.blobs / "incoming").iterdir())


async def test_a_blob_is_served_whole_and_in_ranges(the: Api) -> None:
    [device] = await the.enrol("d1")
    data = bytes(range(256)) * (3 * PIECE // 256) + b"end"
    name = hashlib.sha256(data).hexdigest()
    the.services.registry.blobs.put(name, [data])
    path = f"/blobs/sha256/{name}"

    async def get(**headers: str) -> Any:
        return await the.http.get(path, headers={**device.headers(), **headers})

    whole = await get()
    assert (whole.status_code, whole.content) == (200, data)
    assert (whole.headers["etag"], whole.headers["accept-ranges"]) == (f'"{name}"', "bytes")
    part = await get(Range=f"bytes={PIECE + 5}-")
    assert (part.status_code, part.content) == (206, data[PIECE + 5 :])
    assert part.headers["content-range"] == f"bytes {PIECE + 5}-{len(data) - 1}/{len(data)}"
    assert (await get(Range="bytes=-3")).content == b"end"
    assert (await get(Range="bytes=1-4")).content == data[1:5]
    assert (await get(Range="bytes=0-1,5-6")).status_code == 200
    assert (await get(**{"Range": "bytes=5-", "If-Range": '"other"'})).status_code == 200
    assert (await get(**{"Range": "bytes=5-", "If-Range": f'"{name}"'})).status_code == 206
    past = await the.http.get(path, headers={**device.headers(), "Range": f"bytes={len(data)}-"})
    assert (past.status_code, past.headers["content-range"]) == (416, f"bytes */{len(data)}")
    assert past.headers["content-type"] == "application/problem+json"
    assert (await the.http.head(path, headers=the.operator)).headers["content-length"] == str(len(data))
    await the.problem("GET", f"/blobs/sha256/{'0' * 64}", 404)
    await the.problem("GET", path, 401, headers={})


@given(st.text(alphabet="bytes=0123456789-, ", max_size=24), st.integers(0, 50))
def test_a_range_lies_within_the_file_or_is_refused(header: str, length: int) -> None:
    found = None
    with contextlib.suppress(Refused):
        found = parse_range(header, length)
    if found is not None:
        assert 0 <= found[0] <= found[1] < length


# --- rollouts


async def test_a_deploy_signs_and_tells_every_accepted_device(the: Api) -> None:
    await the.enrol("d1", "d2")
    ref = the.release("1")
    the.told.clear()
    made = api.Rollout.model_validate(await the.deploy(ref, probation_s=5.0))
    assert (made.fleet, made.pipeline, made.model, made.state) == ("edge", "main", ref, "running")
    assert [(t.device, t.state, t.online) for t in made.targets] == [
        ("d1", "pending", False),
        ("d2", "pending", False),
    ]
    for device in ("d1", "d2"):
        signed = the.services.registry.assignment(device)
        assert signed is not None
        row = signed.pipelines["main"]
        assert (row.model, row.rollout, row.attempt, row.probation_s) == (ref, made.id, 1, 5.0)
        assert signed.revision <= made.revision
    assert [(device, kind) for device, kind, _ in the.told] == [("d1", "refresh"), ("d2", "refresh")]
    assert made == api.Rollout.model_validate(await the.call("GET", f"/v1/rollouts/{made.id}"))


async def test_a_device_that_cannot_follow_the_registry_says_why_its_rollout_waits(the: Api) -> None:
    await the.enrol("d1", "d2")
    made = api.Rollout.model_validate(await the.deploy(the.release("1")))
    why = "The metadata cache cannot be written: no space."
    reported = Reported(device="d1", boot_id=BOOT, time=2.0, registry=why)
    async with the.services.store.write() as session:
        fields = {"reported": reported.model_dump(mode="json"), "online": True}
        await devices.change(session, "d1", fields)
    now = api.Rollout.model_validate(await the.call("GET", f"/v1/rollouts/{made.id}"))
    assert [(t.device, t.state, t.reason) for t in now.targets] == [
        ("d1", "pending", why),
        ("d2", "pending", ""),
    ]
    assert [api.Rollout.model_validate(r) for r in await the.call("GET", "/v1/rollouts")] == [now]


async def test_a_deploy_that_cannot_be_is_refused_and_changes_nothing(the: Api) -> None:
    ref = the.release("1")
    assert "no fleet" in (await the.problem("POST", "/v1/rollouts", 404, json=_body(ref)))["detail"]
    await the.call("POST", "/v1/fleets", 201, json={"name": "edge"})
    empty = await the.problem("POST", "/v1/rollouts", 409, json=_body(ref))
    assert "no accepted device" in empty["detail"]
    assert "enroll-token" in empty["next_step"]
    await the.enrol("d1")
    other = ModelRef(path="models/net/9.json", sha256="9" * 64)
    await the.problem("POST", "/v1/rollouts", 422, json=_body(other))
    await the.problem("POST", "/v1/rollouts", 422, json={"model": ref.model_dump()})
    await the.problem("POST", "/v1/rollouts", 422, json={**_body(ref), "device": "d1"})
    await the.problem("POST", "/v1/rollouts", 404, json={"model": ref.model_dump(), "device": "d9"})
    await the.problem("GET", "/v1/rollouts/none", 404)
    assert await the.call("GET", "/v1/rollouts") == []


def _body(ref: ModelRef, **more: Any) -> dict[str, Any]:
    return {"fleet": "edge", "model": ref.model_dump(), **more}


async def test_a_pipeline_that_no_device_has_is_refused(the: Api) -> None:
    await the.enrol("d1", "d2")
    ref = the.release("1")
    birth = {"pipelines": {"main": ["cam"], "side": []}}
    for device in ("d1", "d2"):
        async with the.services.store.write() as session:
            await devices.change(session, device, {"birth": birth})
    found = await the.problem("POST", "/v1/rollouts", 409, json=_body(ref, pipeline="mian"))
    assert "they have: main, side" in found["detail"]
    await the.deploy(ref, pipeline="side")


async def test_a_redeploy_is_a_new_attempt_and_supersedes(the: Api) -> None:
    await the.enrol("d1")
    ref = the.release("1")
    first = await the.deploy(ref)
    await the.deploy(ref)
    signed = the.services.registry.assignment("d1")
    assert signed is not None
    assert signed.pipelines["main"].attempt == 2
    newest, older = await the.call("GET", "/v1/rollouts?fleet=edge")
    assert (newest["state"], older["state"], older["id"]) == ("running", "superseded", first["id"])
    assert older["targets"][0]["result"] == "superseded"


async def test_a_rollback_brings_back_the_model_before(the: Api) -> None:
    await the.enrol("d1", "d2")
    one, two = the.release("1"), the.release("2")
    nothing = await the.problem("POST", "/v1/rollbacks", 409, json={"fleet": "edge"})
    assert "Nothing was ever deployed" in nothing["detail"]
    await the.succeed((await the.deploy(one, probation_s=7.0))["id"])
    refused = await the.problem("POST", "/v1/rollbacks", 409, json={"fleet": "edge"})
    assert "nothing to roll fleet edge back to" in refused["detail"]
    await the.succeed((await the.deploy(two))["id"], "failed_rolled_back")
    made = api.Rollout.model_validate(await the.call("POST", "/v1/rollbacks", 201, json={"fleet": "edge"}))
    assert (made.model, made.probation_s) == (one, 7.0)
    signed = the.services.registry.assignment("d2")
    assert signed is not None
    assert (signed.pipelines["main"].model, signed.pipelines["main"].attempt) == (one, 2)


async def test_one_device_is_deployed_to_and_rolled_back_alone(the: Api) -> None:
    await the.enrol("d1", "d2")
    one, two = the.release("1"), the.release("2")
    await the.succeed((await the.deploy(one))["id"])
    made = await the.deploy(two, device="d1")
    assert (made["fleet"], [t["device"] for t in made["targets"]]) == (None, ["d1"])
    await the.succeed(made["id"])
    back = await the.call("POST", "/v1/rollbacks", 201, json={"device": "d1"})
    assert back["model"] == one.model_dump()
    other = the.services.registry.assignment("d2")
    assert other is not None
    assert other.pipelines["main"].attempt == 1


async def test_a_full_disk_at_signing_is_503_and_the_next_sync_mends_it(
    the: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeward_cloud.director import Director
    from edgeward_wire.errors import Unavailable

    await the.enrol("d1")
    ref = the.release("1")

    def full(_: object) -> None:
        raise Unavailable("The disk is full.", "Free some space.")

    with monkeypatch.context() as broken:
        broken.setattr(the.services.registry, "assign", full)
        found = await the.problem("POST", "/v1/rollouts", 503, json=_body(ref))
        assert found["next_step"] == "Free some space."
    await Director(the.services.store, the.services.registry, the.services.deliver).sync_all()
    signed = the.services.registry.assignment("d1")
    assert signed is not None
    assert signed.pipelines["main"].model == ref


# --- telemetry


def _histogram(*values: float) -> Histogram:
    recorder = Recorder()
    for value in values:
        recorder.record(value)
    return recorder.take()


async def test_percentiles_are_those_of_all_values_together(the: Api) -> None:
    await the.enrol("d1", "d2")
    now = the.clock()
    fast, slow = _histogram(*[10.0] * 97), _histogram(*[500.0] * 3)
    rows = [
        window_row(
            device,
            window(1, start=now - 60, stages={"inference": histogram}, frames=n, labels={"cat": n}),
            now,
        )
        for device, histogram, n in (("d1", fast, 97), ("d2", slow, 3))
    ]
    old = window_row("d1", window(0, start=now - 7200, frames=1), now)
    async with the.services.store.write() as session:
        await streams.add_windows(session, [*rows, old])
    answer = await the.http.get("/v1/telemetry?fleet=edge", headers=the.operator)
    assert float(answer.headers["edgeward-since"]) == pytest.approx(now - 600, abs=5)
    one, two, both = [api.Telemetry.model_validate(row) for row in answer.json()]
    assert (one.device, two.device, both.device, both.source) == ("d1", "d2", None, None)
    exact = merge([fast, slow])
    assert both.stages["inference"] == api.figures(exact)
    assert both.stages["inference"].p50 == pytest.approx(10, rel=0.02)
    assert both.stages["inference"].p99 == pytest.approx(500, rel=0.02)
    assert (both.frames, both.windows, both.labels) == (100, 2, {"cat": 100})
    assert both.fps == 50.0  # per source
    only = await the.call("GET", "/v1/telemetry?device=d1&merged=false&since=0")
    assert [(row["device"], row["windows"]) for row in only] == [("d1", 2)]
    assert len(await the.call("GET", "/v1/telemetry?merged=true")) == 1
    await the.problem("GET", "/v1/telemetry?device=d9", 404)
    await the.problem("GET", "/v1/telemetry?fleet=none", 404)


_MOST = 1 << 53
_HUGE = {"count": 1, "sum": 1.7e308, "min": 1.0, "max": 1.0, "zero": 1}


@pytest.mark.parametrize(
    ("name", "stored", "alone"),
    [
        ("moment", [{"frames": 1, "duration_s": 1e-310}], False),
        ("many", [{"frames": _MOST}, {"frames": _MOST}], False),
        ("long", [{"stages": {"inference": _HUGE}}, {"stages": {"inference": _HUGE}}], False),
        ("full", [{"frames": _MOST}], True),
    ],
    ids=["a moment", "more than can be counted", "an infinite sum", "only too much with others"],
)
async def test_what_was_stored_without_bounds_takes_nobody_elses_figures_away(
    the: Api, caplog: pytest.LogCaptureFixture, name: str, stored: list[dict[str, Any]], alone: bool
) -> None:
    await the.enrol(name, "other")
    now = the.clock()
    rows = [
        {**window_row(name, window(n, start=now - 60), now), **columns} for n, columns in enumerate(stored)
    ]
    rows.append(window_row("other", window(9, start=now - 60), now))
    async with the.services.store.write() as session:
        await streams.add_windows(session, rows)
    for _ in range(2):
        shown = await the.call("GET", "/v1/telemetry?merged=false")
        assert [row["device"] for row in shown] == ([name, "other"] if alone else ["other"])
        together = await the.call("GET", "/v1/telemetry?merged=true")
        assert [row["frames"] for row in together] == ([] if alone else [5])
    told = [r.getMessage() for r in caplog.records if "does not add up" in r.getMessage()]
    assert len(told) == 1
    assert ("all devices together" if alone else name) in told[0]


async def test_what_is_merged_is_bounded_and_says_how_far_it_reaches(
    the: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeward_cloud.api import telemetry

    monkeypatch.setattr(telemetry, "MAX_WINDOWS", 3)
    await the.enrol("d1")
    now = the.clock()
    rows = [window_row("d1", window(n, start=now - 100 + n), now) for n in range(10)]
    async with the.services.store.write() as session:
        await streams.add_windows(session, rows)
    answer = await the.http.get("/v1/telemetry", headers=the.operator)
    assert answer.json()[0]["windows"] == 3
    assert float(answer.headers["edgeward-since"]) == pytest.approx(now - 92, abs=0.01)


async def test_a_viewer_gets_a_certificate_of_its_own(the: Api) -> None:
    kit = DeviceKit("whatever")
    body = {"name": "grafana", "csr_pem": kit.csr_pem}
    made = api.ViewerCertificateIssued.model_validate(
        await the.call("POST", "/v1/mqtt-certificates", 201, json=body)
    )
    assert made.username == "_viewer-grafana"
    assert made.certificate_pem.count("BEGIN CERTIFICATE") == 2
    assert made.server_ca_pem == the.services.pki.server_ca_pem
    assert (made.host, made.port) == ("127.0.0.1", the.services.settings.broker.port)
    async with the.services.store.read() as session:
        assert await operations.viewer_usernames(session) == ["_viewer-grafana"]
    await the.call("POST", "/v1/mqtt-certificates", 201, json=body)
    await the.problem("POST", "/v1/mqtt-certificates", 422, json={**body, "csr_pem": "no"})
