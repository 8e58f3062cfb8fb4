"""`agent-ctl model bundle`, and `deploy` of what it made: the same content and version, clear errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ctl.conftest import FLEET, Office
from edgeward_ctl.deploying import check_pipeline
from edgeward_wire.api import Device
from edgeward_wire.errors import Rejected
from edgeward_wire.status import Birth


@pytest.fixture(scope="module")
def pristine(office: Office, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("bundles") / "x.bundle"
    assert office.ctl("model", "bundle", str(office.model("x", 0)), "--out", str(bundle)).code == 0
    return bundle


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def test_a_bundle_and_its_file_are_the_same_release(office: Office, tmp_path: Path) -> None:
    model, bundle = office.model("boxed", 0), tmp_path / "boxed.bundle"
    made = office.ctl("model", "bundle", str(model), "--out", str(bundle), "--json")
    assert made.code == 0, made.err
    assert made.json["weak"] is False
    boxed = office.ctl("deploy", str(bundle), "--fleet", FLEET, "--detach", "--json")
    assert boxed.code == 0, boxed.err
    bare = office.ctl("deploy", str(model), "--fleet", FLEET, "--detach", "--json")
    assert bare.json["rollout"]["model"] == boxed.json["rollout"]["model"]
    # The directory of a model and its sidecar is that model.
    plan = office.ctl("deploy", str(model.parent), "--fleet", FLEET, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    assert plan.json["released_before"] is True
    assert plan.json["content"] == made.json["content"]


def test_bundle_says_what_it_made_and_how_to_go_on(office: Office, tmp_path: Path) -> None:
    done = office.ctl(
        "model", "bundle", str(office.model("told", 0)), "--out", str(tmp_path / "b"), "--p99-ms", "50"
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "int8" in done.out
    assert f"agent-ctl deploy {tmp_path / 'b'}" in done.err
    assert "50 ms" in (tmp_path / "b" / "card.md").read_text()
    again = office.ctl("model", "bundle", str(office.model("told", 0)), "--out", str(tmp_path))
    assert again.code == 2
    assert "is no bundle" in again.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--labels", "x.txt"], "--labels cannot change a bundle"),
        (["--set", "limits.p99_ms=3"], "--set limits cannot change a bundle"),
        (["--allow-float", "why"], "--allow-float cannot change a bundle"),
    ],
)
def test_nothing_can_be_declared_about_a_bundle(
    office: Office, bundle: Path, more: list[str], says: str
) -> None:
    done = office.ctl("deploy", str(bundle), "--fleet", FLEET, "--dry-run", *more)
    assert done.code == 2
    assert says in done.err
    assert "next:" in done.err


def test_a_damaged_bundle_is_refused_before_anything_is_sent(office: Office, bundle: Path) -> None:
    blob = next((bundle / "blobs").iterdir())
    blob.write_bytes(blob.read_bytes() + b"x")
    done = office.ctl("deploy", str(bundle), "--fleet", FLEET)
    assert done.code == 2
    assert "is damaged" in done.err
    assert "upload" not in done.err


# --- the pipeline


def device(name: str, *pipelines: str, born: bool = True) -> Device:
    birth = Birth.model_construct(pipelines=dict.fromkeys(pipelines, ("cam",))) if born else None
    return Device.model_construct(id=name, fleet="f", admission="accepted", birth=birth)


def test_a_pipeline_that_no_device_has_is_refused_before_signing() -> None:
    check_pipeline([device("a", "main")], "main")
    check_pipeline([device("a", "main"), device("b", "door")], "door")
    check_pipeline([device("a", "main"), device("b", born=False)], "door")  # b may have any
    check_pipeline([], "door")
    with pytest.raises(Rejected, match="Device a has no pipeline 'dor'; it has: door, main"):
        check_pipeline([device("a", "main", "door")], "dor")
    with pytest.raises(
        Rejected, match="None of the 2 devices there has a pipeline 'x'; they have: door, main"
    ):
        check_pipeline([device("a", "main"), device("b", "door")], "x")
