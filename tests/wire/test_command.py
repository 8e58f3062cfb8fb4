"""Commands and the answers to them: bounded, valid once constructed, and on topics of their own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeward_wire import topics
from edgeward_wire.command import (
    FINAL,
    MAX_COMMAND_BYTES,
    MAX_RESPONSE_BYTES,
    Bench,
    Command,
    CommandResponse,
    fitted,
)
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.schemas import asyncapi
from edgeward_wire.verdict import MAX_PLANS, Plan, PlanOutcome, Verdict

HASH = "ab" * 32
BOOT = "0" * 32
MODEL = ModelRef(path="models/cats/1.json", sha256=HASH)
NUMBERS = st.integers(1, 10**15 - 1)


def command(**changes: Any) -> Command:
    fields: dict[str, Any] = {
        "n": 7,
        "boot_id": BOOT,
        "issued_at": 100.0,
        "expires_at": 160.0,
        "what": Bench(model=MODEL),
    }
    return Command.model_validate({**fields, **changes})


def test_a_command_survives_the_wire() -> None:
    assert parse(Command, command().to_bytes(), limit=MAX_COMMAND_BYTES) == command()
    assert command().what.seconds == 900
    assert command().what.threads is None


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0},
        {"n": 10**15},
        {"boot_id": "x"},
        {"expires_at": 100.0},
        {"expires_at": 100.0 + 3601},
        {"expires_at": float("nan")},
        {"what": {"kind": "shell", "model": MODEL}},
        {"what": {"kind": "bench"}},
        {"what": {"kind": "bench", "model": {"path": "models/../x.json", "sha256": HASH}}},
        {"what": {"kind": "bench", "model": MODEL, "threads": 0}},
        {"what": {"kind": "bench", "model": MODEL, "seconds": 1e9}},
        {"schema": "edgeward.command/2"},
    ],
)
def test_a_command_that_is_not_right_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        command(**changes)


@given(
    st.binary(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps)
)
def test_garbage_is_rejected_and_nothing_else(raw: bytes | str) -> None:
    with pytest.raises(Rejected):
        parse(Command, raw, limit=MAX_COMMAND_BYTES)


@given(st.data())
def test_a_command_with_a_spoilt_field_is_a_command_or_rejected(data: st.DataObject) -> None:
    plain = json.loads(command().to_bytes())
    field = data.draw(st.sampled_from(sorted(plain)))
    plain[field] = data.draw(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40))
    try:
        found = parse(Command, json.dumps(plain), limit=MAX_COMMAND_BYTES)
    except Rejected:
        return
    assert 0 < found.expires_at - found.issued_at <= 3600
    assert 1 <= found.n < 10**15


def test_an_over_long_command_is_not_read() -> None:
    long = command().to_bytes()[:-1] + b', "note": "' + b"x" * MAX_COMMAND_BYTES + b'"}'
    with pytest.raises(Rejected, match="at most"):
        parse(Command, long, limit=MAX_COMMAND_BYTES)


def response(*plans: PlanOutcome, **changes: Any) -> CommandResponse:
    verdict = Verdict(model_sha256=HASH, key=HASH, plans=plans) if plans else None
    return CommandResponse(**{"n": 7, "boot_id": BOOT, "state": "done", "verdict": verdict, **changes})


@given(st.integers(0, MAX_PLANS), st.integers(0, 2000))
def test_every_response_fits_the_wire(count: int, length: int) -> None:
    options = {f"option-{k:02d}" + "k" * 40: "v" * 200 for k in range(32)}
    plan = Plan(provider="CPUExecutionProvider", variant="int8", options=options, session=options)
    outcome = PlanOutcome(plan=plan, outcome="not_loaded", reason="é" * length)
    short = fitted(response(*[outcome] * count))
    assert len(short.to_bytes()) <= MAX_RESPONSE_BYTES <= topics.MAX_PAYLOAD_BYTES
    assert parse(CommandResponse, short.to_bytes(), limit=MAX_RESPONSE_BYTES) == short


def test_a_short_response_is_left_alone() -> None:
    plan = Plan(provider="CPUExecutionProvider", variant="int8")
    one = response(PlanOutcome(plan=plan, outcome="passed", reason="r" * 2000))
    assert fitted(one) is one


def test_what_is_final() -> None:
    states = ("accepted", "running", "done", "refused", "failed", "expired")
    assert [response(state=s).final for s in states] == [s in FINAL for s in states]
    assert [s for s in states if s not in FINAL] == ["accepted", "running"]


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True), NUMBERS)
def test_numbered_topics_are_parsed_as_they_were_built(device: str, n: int) -> None:
    asked = topics.parse_topic(topics.command(device, n))
    assert asked == topics.Topic(device, "down", "cmd", n)
    answered = topics.parse_topic(topics.response(device, n))
    assert answered == topics.Topic(device, "up", "response", n)


@pytest.mark.parametrize(
    "topic",
    [
        "edgeward/v1/d1/down/cmd",
        "edgeward/v1/d1/down/cmd/",
        "edgeward/v1/d1/down/cmd/0",
        "edgeward/v1/d1/down/cmd/01",
        "edgeward/v1/d1/down/cmd/-1",
        "edgeward/v1/d1/down/cmd/1e3",
        "edgeward/v1/d1/down/cmd/٣",
        "edgeward/v1/d1/down/cmd/1000000000000000",
        "edgeward/v1/d1/down/cmd/1/2",
        "edgeward/v1/d1/up/cmd/1",
        "edgeward/v1/d1/down/response/1",
        "edgeward/v1/d1/up/event/1",
        "edgeward/v1/D1/up/response/1",
    ],
)
def test_a_topic_that_is_nearly_ours_is_rejected(topic: str) -> None:
    with pytest.raises(Rejected):
        topics.parse_topic(topic)


def test_a_devices_subscription_and_the_clouds_cover_both() -> None:
    assert topics.command("d1", 3).startswith(topics.all_down("d1").removesuffix("#"))
    parts = zip(topics.all_responses().split("/"), topics.response("d1", 3).split("/"), strict=True)
    assert all(pattern in ("+", part) for pattern, part in parts)


def test_correlation_tells_runs_and_numbers_apart() -> None:
    assert len({topics.correlation(b * 32, n) for b in "ab" for n in (1, 2)}) == 4


def test_the_asyncapi_document_names_the_reply() -> None:
    document = asyncapi()
    assert document["operations"]["receive-cmd"]["reply"]["channel"] == {"$ref": "#/channels/response"}
    assert document["channels"]["cmd"]["address"] == "edgeward/v1/{device}/down/cmd/{n}"
    assert document["channels"]["response"]["messages"]["response"]["correlationId"]
