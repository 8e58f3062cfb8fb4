"""Enrolment through the API: tokens, keys, admission, certificates."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata

from cloud.apikit import Api, DeviceKit, running_api
from edgeward_cloud.store import operations
from edgeward_wire.enrolment import EnrolmentString, EnrolResponse

pytestmark = pytest.mark.anyio


@pytest.fixture
async def the(tmp_path: Path) -> AsyncIterator[Api]:
    async with running_api(tmp_path / "cloud") as one:
        await one.call("POST", "/v1/fleets", 201, json={"name": "edge"})
        yield one


async def ask(the: Api, kit: DeviceKit, token: str, expect: int = 200) -> EnrolResponse:
    answer = await the.call("POST", "/v1/enroll", expect, json=kit.request(token), headers={})
    return EnrolResponse.model_validate(answer)


async def refused(the: Api, kit: DeviceKit, token: str, status: int) -> str:
    found = await the.problem("POST", "/v1/enroll", status, json=kit.request(token), headers={})
    assert found["next_step"]
    return str(found["detail"])


async def test_the_string_pins_the_ca_and_root_1(the: Api) -> None:
    made = await the.call("POST", "/v1/enroll-tokens", 201, json={"fleet": "edge", "uses": 2})
    string = EnrolmentString.decode(made["enrolment"])
    ca = (await the.http.get("/v1/ca.pem")).text
    assert string.url == the.services.settings.url
    der = ssl.PEM_cert_to_DER_cert(ca)
    assert string.ca_sha256 == hashlib.sha256(der).hexdigest()
    root = (await the.http.get("/tuf/metadata/1.root.json")).content
    assert string.root_sha256 == hashlib.sha256(root).hexdigest()
    assert Metadata.from_bytes(root).signed.type == "root"
    raw = (the.services.settings.dir / "edgeward.db").read_bytes()
    assert string.token.encode() not in raw  # only its hash is kept
    assert (
        "no fleet" in (await the.problem("POST", "/v1/enroll-tokens", 404, json={"fleet": "none"}))["detail"]
    )


async def test_a_preauthorised_device_gets_a_certificate_and_an_assignment_at_once(the: Api) -> None:
    kit, before = DeviceKit("d1"), the.clock()
    found = await ask(the, kit, await the.token())
    assert (found.admission, found.device, found.fleet) == ("accepted", "d1", "edge")
    assert found.broker == the.services.settings.broker_address
    assert found.certificate_pem is not None
    assert found.certificate_pem.count("BEGIN CERTIFICATE") == 2
    assert before <= found.server_time <= the.clock()
    signed = the.services.registry.assignment("d1")
    assert signed is not None
    assert (signed.fleet, signed.pipelines) == ("edge", {})


async def test_the_same_key_gets_its_certificate_again_and_uses_nothing_up(the: Api) -> None:
    kit, token = DeviceKit("d1"), await the.token(uses=1)
    first = await ask(the, kit, token)
    again = await ask(the, kit, token)
    assert again.certificate_pem == first.certificate_pem
    await ask(the, kit, "whatever it is by now")
    # Past half of its life the same request brings a new one.
    the.clock.ahead = 200 * 86_400.0
    assert (await ask(the, kit, token)).certificate_pem != first.certificate_pem


async def test_what_is_wrong_with_a_token_is_said(the: Api) -> None:
    kit = DeviceKit("d9")
    used = await the.token(uses=1)
    await ask(the, DeviceKit("d1"), used)
    assert "used up" in await refused(the, kit, used, 403)
    assert "not known" in await refused(the, kit, "guessed", 403)
    short = await the.token(ttl_s=1)
    the.clock.ahead = 2.0
    assert "expired" in await refused(the, kit, short, 403)
    assert [d["id"] for d in await the.call("GET", "/v1/devices")] == ["d1"]


async def test_a_token_for_one_admits_one_of_many_that_ask_at_once(the: Api) -> None:
    token = await the.token(uses=2)
    kits = [DeviceKit(f"d{n}") for n in range(6)]
    answers = await asyncio.gather(*(the.http.post("/v1/enroll", json=kit.request(token)) for kit in kits))
    assert sorted(a.status_code for a in answers) == [200, 200, 403, 403, 403, 403]


async def test_an_id_belongs_to_its_first_key(the: Api) -> None:
    token = await the.token(uses=3)
    await ask(the, DeviceKit("d1"), token)
    thief = DeviceKit("d1")
    assert "another device with the id d1" in await refused(the, thief, token, 409)
    # Without a good token nobody learns which ids there are.
    assert "not known" in await refused(the, thief, "guessed", 403)
    await ask(the, DeviceKit("d2"), token)
    await ask(the, DeviceKit("d3"), token)  # the refusal used nothing up


@pytest.mark.parametrize(
    "change",
    [{"csr_pem": "rubbish"}, {"device": "Not An Id"}, {"device": "_cloud"}, {"csr_pem": "x" * 20_000}],
)
async def test_a_request_that_is_not_valid_is_refused(the: Api, change: dict[str, Any]) -> None:
    token = await the.token()
    body = {**DeviceKit("d1").request(token), **change}
    await the.problem("POST", "/v1/enroll", 422, json=body, headers={})


async def test_a_pending_device_waits_for_an_operator(the: Api) -> None:
    kit, token = DeviceKit("d1"), await the.token(preauthorised=False)
    waiting = await ask(the, kit, token, 202)
    assert (waiting.admission, waiting.certificate_pem) == ("pending", None)
    assert the.services.registry.assignment("d1") is None
    await the.problem(
        "POST", "/v1/device/certificate", 403, headers=kit.headers(), json={"csr_pem": kit.csr_pem}
    )
    shown = await the.call("POST", "/v1/devices/d1/admission", json={"admission": "accepted"})
    assert shown["admission"] == "accepted"
    assert not shown["certificate_revoked"], "it never had one"
    assert (await ask(the, kit, token)).certificate_pem
    await the.problem("POST", "/v1/devices/d9/admission", 404, json={"admission": "accepted"})


async def test_a_newcomer_gets_what_its_fleet_runs(the: Api) -> None:
    await the.enrol("d1")
    good, bad = the.release("1"), the.release("2")
    await the.succeed((await the.deploy(good))["id"])
    await the.succeed((await the.deploy(bad))["id"], "failed_rolled_back")
    await the.enrol("d2")
    signed = the.services.registry.assignment("d2")
    assert signed is not None
    assert signed.pipelines["main"].model == good
    rollouts = await the.call("GET", "/v1/rollouts")
    assert [[t["device"] for t in r["targets"]] for r in rollouts] == [["d1"], ["d1", "d2"]]


async def test_a_rejected_device_is_out_at_once(the: Api) -> None:
    kit, _ = await the.enrol("d1", "d2")
    rollout = await the.deploy(the.release("1"))
    await the.call("POST", "/v1/devices/d1/admission", json={"admission": "rejected"})
    await the.problem("GET", f"/blobs/sha256/{'0' * 64}", 403, headers=kit.headers())
    assert "rejected" in await refused(the, kit, "whatever", 403)
    async with the.services.store.read() as session:
        [serial] = await operations.revoked_serials(session)
        assert await operations.revoked_devices(session) == ["d1"]
    assert serial
    # The rollout does not wait for it.
    progress = await the.call("GET", f"/v1/rollouts/{rollout['id']}")
    assert [t["result"] for t in progress["targets"]] == ["canceled", None]
    shown = await the.call("POST", "/v1/devices/d1/admission", json={"admission": "accepted"})
    assert shown["certificate_revoked"], "it has to enrol again"
    assert (await ask(the, kit, "whatever")).certificate_pem
    assert not (await the.call("GET", "/v1/devices/d1"))["certificate_revoked"]
    assert not (await the.call("GET", "/v1/devices/d2"))["certificate_revoked"]


async def test_a_rejected_devices_id_may_be_given_to_a_new_key(the: Api) -> None:
    await the.enrol("d1")
    await the.call("POST", "/v1/devices/d1/admission", json={"admission": "rejected"})
    fresh = DeviceKit("d1")
    assert (await ask(the, fresh, await the.token())).admission == "accepted"
    async with the.services.store.read() as session:
        assert await operations.revoked_devices(session) == []
        assert len(await operations.revoked_serials(session)) == 1  # the old key's certificate


async def given_up(the: Api, device: str) -> None:
    await the.call("POST", f"/v1/devices/{device}/admission", json={"admission": "rejected"})


async def test_a_device_that_moves_runs_its_new_fleets_model(the: Api) -> None:
    await the.enrol("d1")
    await the.enrol("d2", fleet="other")
    theirs, ours = the.release("1"), the.release("2")
    await the.succeed((await the.deploy(theirs, fleet="other"))["id"])
    await the.succeed((await the.deploy(ours))["id"])
    await the.deploy(ours, device="d1")
    await given_up(the, "d1")
    await the.enrol("d1", fleet="other")
    signed = the.services.registry.assignment("d1")
    assert signed is not None
    assert (signed.fleet, signed.pipelines["main"].model) == ("other", theirs)


@pytest.mark.parametrize("at_once", [True, False], ids=["preauthorised", "accepted later"])
async def test_new_hardware_under_an_old_id_has_its_own_results(the: Api, at_once: bool) -> None:
    await the.enrol("d1")
    good, bad = the.release("1"), the.release("2")
    first = await the.deploy(good)
    await the.succeed(first["id"])
    await the.succeed((await the.deploy(bad))["id"], "failed_rolled_back")
    await given_up(the, "d1")
    await ask(the, DeviceKit("d1"), await the.token(preauthorised=at_once), 200 if at_once else 202)
    if not at_once:
        await the.call("POST", "/v1/devices/d1/admission", json={"admission": "accepted"})
    signed = the.services.registry.assignment("d1")
    assert signed is not None
    assert signed.pipelines["main"].model == good, "what failed on the old one is no place to begin"
    [target] = (await the.call("GET", f"/v1/rollouts/{first['id']}"))["targets"]
    assert (target["state"], target["result"]) == ("pending", None)
    await the.succeed(first["id"], "failed_no_change")
    [target] = (await the.call("GET", f"/v1/rollouts/{first['id']}"))["targets"]
    assert target["result"] == "failed_no_change"


async def test_what_former_hardware_committed_is_still_a_way_back_for_the_fleet(the: Api) -> None:
    await the.enrol("d1")
    old, new = the.release("1"), the.release("2")
    await the.succeed((await the.deploy(old))["id"])
    await the.succeed((await the.deploy(new))["id"])
    await given_up(the, "d1")
    await ask(the, DeviceKit("d1"), await the.token())
    back = await the.call("POST", "/v1/rollbacks", 201, json={"fleet": "edge"})
    assert back["model"] == old.model_dump()


async def test_a_device_renews_its_certificate_with_its_own_key(the: Api) -> None:
    kit, other = await the.enrol("d1", "d2")
    before = (await the.call("GET", "/v1/devices/d1"))["certificate_expires_at"]
    the.clock.ahead = 86_400.0
    path = "/v1/device/certificate"
    await the.problem("POST", path, 401, headers=kit.headers(), json={"csr_pem": kit.csr_pem})
    mine = {**kit.headers(now=the.clock())}
    answer = await the.call("POST", path, headers=mine, json={"csr_pem": kit.csr_pem})
    assert EnrolResponse.model_validate(answer).certificate_pem
    assert (await the.call("GET", "/v1/devices/d1"))["certificate_expires_at"] > before
    await the.problem(
        "POST", path, 409, headers=kit.headers(now=the.clock()), json={"csr_pem": other.csr_pem}
    )
    await the.problem("POST", path, 401, headers=the.operator, json={"csr_pem": kit.csr_pem})
    await the.problem("POST", path, 401, headers=mine, json={"csr_pem": kit.csr_pem})
    await the.problem(
        "POST", path, 401, headers=DeviceKit("d7").headers(now=the.clock()), json={"csr_pem": kit.csr_pem}
    )
