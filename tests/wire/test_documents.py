"""Documents: frozen, bounded, valid once constructed; signed ones refuse what they do not know."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from edgeward_wire.assignment import Assignment, PipelineAssignment
from edgeward_wire.contract import Contract, ImageSpec, InputPort, OutputPort
from edgeward_wire.document import parse
from edgeward_wire.enrolment import EnrolmentString
from edgeward_wire.errors import Rejected
from edgeward_wire.histogram import Recorder, merge
from edgeward_wire.identifiers import Count
from edgeward_wire.manifest import BlobRef, Manifest, ModelRef, Variant
from edgeward_wire.reported import Reported
from edgeward_wire.telemetry import (
    MAX_WINDOW_COUNT,
    MAX_WINDOW_SUM_MS,
    SHORTEST_S,
    Measures,
    Window,
    coarser,
)
from edgeward_wire.topics import DOWN, UP, down, parse_topic, up

HASH = "ab" * 32


def contract(**changes: object) -> Contract:
    image = ImageSpec(width=8, height=8)
    source = InputPort(name="image", dtype="float32", shape=("batch", 3, 8, 8), bind="source", image=image)
    fields: dict[str, object] = {
        "task": "classification",
        "inputs": (source,),
        "outputs": (OutputPort(name="logits", dtype="float32", shape=("batch", 3)),),
        "dimensions": {"batch": {"min": 1, "max": 4, "default": 1}},
    }
    return Contract.model_validate({**fields, **changes})


def manifest(**changes: object) -> Manifest:
    blob = BlobRef(sha256=HASH, length=10)
    fields: dict[str, object] = {
        "name": "cats",
        "version": "1",
        "created": "2026-01-01T00:00:00Z",
        "contract": contract(),
        "variants": {"int8": Variant(model=blob, precision="int8", golden=blob, evidence="strong", opset=17)},
        "labels": blob,
    }
    return Manifest.model_validate({**fields, **changes})


def test_a_signed_document_refuses_an_unknown_field() -> None:
    text = json.loads(manifest().to_bytes()) | {"surprise": 1}
    with pytest.raises(Rejected, match="surprise"):
        parse(Manifest, json.dumps(text))


def test_an_open_document_tolerates_one() -> None:
    reported = {
        "schema": "edgeward.reported/1",
        "device": "a",
        "boot_id": "0" * 32,
        "time": 1,
        "new_in_1_1": {},
    }
    assert parse(Reported, json.dumps(reported)).device == "a"


def test_documents_are_frozen_and_their_bytes_are_canonical() -> None:
    one = manifest()
    with pytest.raises(ValidationError):
        one.version = "2"  # type: ignore[misc]
    assert parse(Manifest, one.to_bytes()) == one
    assert parse(Manifest, one.to_bytes()).to_bytes() == one.to_bytes()


def test_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(Rejected, match="at most 10"):
        parse(Manifest, b" " * 11, limit=10)


@given(st.binary(max_size=200))
def test_garbage_is_rejected_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(Rejected):
        parse(Manifest, raw)


def test_the_content_digest_is_of_the_content_alone() -> None:
    same = manifest(version="7", created="later", provenance={"tool": "x"})
    assert same.content_digest() == manifest().content_digest()
    assert manifest(security_epoch=1).content_digest() != manifest().content_digest()


def test_a_float_model_must_say_why() -> None:
    blob = BlobRef(sha256=HASH, length=10)
    variants = {"fp32": Variant(model=blob, precision="fp32", golden=blob, evidence="weak", opset=17)}
    with pytest.raises(ValidationError, match="INT8"):
        manifest(variants=variants)
    assert manifest(variants=variants, float_reason="trees").float_reason == "trees"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dimensions": {}}, "batch"),
        ({"task": "dancing"}, "classification"),
        ({"outputs": ()}, "at least 1"),
    ],
)
def test_a_contract_that_does_not_hold_together_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        contract(**changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"resize": "shorter_side", "resize_to": 4, "crop": "center"}, "smaller than the crop"),
        ({"resize": "shorter_side", "resize_to": 16}, "crop = center"),
        ({"scale": (1.0,)}, "3 numbers"),
        ({"scale": (0.0, 1.0, 1.0)}, "must not be 0"),
        ({"width": 0}, "greater than or equal to 1"),
    ],
)
def test_an_impossible_preprocessing_is_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ImageSpec.model_validate({"width": 8, "height": 8, **changes})


@given(st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True))
def test_topics_are_parsed_as_they_were_built(device: str) -> None:
    for kind in UP:
        assert parse_topic(up(device, kind)).kind == kind
    for word in DOWN:
        assert parse_topic(down(device, word)).device == device


@given(st.text(max_size=80))
def test_a_strange_topic_is_rejected(topic: str) -> None:
    with pytest.raises(Rejected):
        parse_topic(topic)


def test_an_enrolment_string_survives_copy_and_paste_and_not_a_cut() -> None:
    one = EnrolmentString(url="https://cloud.example:8443", ca_sha256=HASH, root_sha256=HASH, token="t" * 43)
    text = one.encode()
    assert EnrolmentString.decode(f"  {text}\n") == one
    for broken in (text[:-9], text[1:], "", "edgeward1.%%%%"):
        with pytest.raises(Rejected):
            EnrolmentString.decode(broken)


def window(seq: int, *values: float) -> Window:
    recorder = Recorder()
    for value in values:
        recorder.record(value)
    return Window(
        pipeline="main",
        source="cam",
        model=ModelRef(path="models/cats/1.json", sha256=HASH),
        variant="int8",
        provider="CPUExecutionProvider",
        start=1000 + seq,
        duration_s=5,
        frames=len(values),
        stages={"inference": recorder.take()},
        labels={"cat": len(values)},
        boot_id="0" * 32,
        seq=seq,
        first_seq=seq,
    )


def test_a_coarser_window_stands_for_all_of_them() -> None:
    merged = coarser([window(1, 1.0, 2.0), window(2, 3.0), window(3, 100.0)])
    assert (merged.first_seq, merged.seq, merged.frames, merged.duration_s) == (1, 3, 4, 15)
    assert merged.stages["inference"].max == 100.0
    assert merged.labels == {"cat": 4}
    assert isinstance(merged, Measures)
    assert (merged.temperature_c, merged.throttled) == (None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"duration_s": 1e-310},
        {"frames": 1 << 53},
        {"dropped": 1 << 53},
        {"errors": 1 << 53},
        {"labels": {"cat": 1 << 53}},
        {"stages": {"inference": {"count": 1, "zero": 1, "sum": 1.7e308}}},
        {"stages": {"inference": {"count": 1, "zero": 1, "max": 1.7e308}}},
        {"stages": {"inference": {"count": 1 << 53, "zero": 1 << 53}}},
    ],
    ids=str,
)
def test_a_window_that_would_spoil_the_sums_of_many_is_none(change: dict[str, Any]) -> None:
    body = {**window(1, 1.0).model_dump(mode="json", exclude_none=True), **change}
    with pytest.raises(Rejected):
        parse(Window, json.dumps(body))


def test_ten_thousand_of_the_fullest_windows_add_up_to_counts_and_figures() -> None:
    full = {"count": MAX_WINDOW_COUNT, "zero": MAX_WINDOW_COUNT, "sum": MAX_WINDOW_SUM_MS, "max": 1e15}
    body = window(1).model_dump(mode="json", exclude_none=True)
    body = {**body, "frames": MAX_WINDOW_COUNT, "duration_s": SHORTEST_S, "stages": {"inference": full}}
    one = parse(Window, json.dumps(body))
    assert TypeAdapter(Count).validate_python(10_000 * one.frames)
    assert merge([one.stages["inference"]] * 10_000).count == 10_000 * MAX_WINDOW_COUNT
    assert math.isfinite(one.fps)


def test_a_coarser_window_keeps_the_worst_of_the_sensors() -> None:
    warm = window(1, 1.0).model_copy(update={"temperature_c": 70.0, "throttled": True})
    cool = window(2, 1.0).model_copy(update={"temperature_c": 50.0, "throttled": False})
    merged = coarser([warm, cool, window(3, 1.0)])
    assert (merged.temperature_c, merged.throttled) == (70.0, True)
    assert parse(Window, merged.to_bytes()) == merged


def test_an_assignment_names_its_model_by_path_and_digest() -> None:
    row = PipelineAssignment(model=ModelRef(path="models/cats/1.2.json", sha256=HASH), rollout="r1")
    assert (row.model.name, row.model.version, row.probation_s) == ("cats", "1.2", 300)
    one = Assignment(device="edge-01", fleet="edge", revision=5, pipelines={"main": row})
    assert parse(Assignment, one.to_bytes()) == one
    with pytest.raises(ValidationError):
        ModelRef(path="models/../etc.json", sha256=HASH)
