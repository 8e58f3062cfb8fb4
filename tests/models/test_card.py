"""The card says what the manifest says, and nothing in it breaks its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeward_models.bundle import Bundle, BundleRequest, make_bundle
from edgeward_models.card import About, card_text
from edgeward_wire.manifest import Manifest
from runtime import builders
from runtime.test_contract_guess import listener

ABOUT = About("int8: all of it", 1000, "3 pictures in pictures", ("red", "green"), ("it is assumed",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    home = tmp_path_factory.mktemp("model")
    builders.labels_file(home / "labels.txt")
    sidecar = builders.sidecar_file(home / "colours.toml", samples="pictures")
    builders.picture_directory(home / "pictures")
    builders.classifier(home / "colours-fp32.onnx")
    (home / "report.json").write_text("{}")
    text = sidecar.read_text().replace("\n[inputs", '\nreport = "report.json"\n\n[inputs', 1)
    sidecar.write_text(
        text + "\n[accuracy]\nagreement = 0.9\nagreement_low = 0.8\nagreement_high = 0.95\n"
        '[limits]\np99_ms = 25\n[annotations]\nlicence = "MIT"\nnote = "a | b"\n'
        '[variants.reference]\nfile = "colours-fp32.onnx"\narch = ["x86_64"]\n'
        "[variants.reference.accuracy]\nagreement = 1.0\n"
    )
    return make_bundle(BundleRequest(builders.int8_classifier(home / "colours.onnx")), home / "out")


def test_it_says_all_that_one_wants_to_know(made: Bundle) -> None:
    card = made.card
    for said in (
        "# colours",
        "a picture of 32 x 32, rgb, stretched",
        "3 labels: red, green, blue",
        "| reference | fp32 |",
        "| int8 | agreement | 0.9 | 0.8 to 0.95 |",
        "| reference | agreement | 1 |  |",
        "| p99 latency at most | 25 ms |",
        "| licence | MIT |",
        "a \\| b",
        "3 pictures in pictures",
        "agent-ctl deploy colours.bundle",
    ):
        assert said in card, said
    provenance = made.manifest.provenance
    assert {"file_sha256", "sidecar_sha256", "labels_sha256", "samples_sha256", "report_sha256"} <= set(
        provenance
    )
    assert {"onnxruntime", "onnx", "numpy", "made_by", "card_sha256"} <= set(provenance)
    assert provenance["file_sha256"] in card
    assert made.manifest.limits.p99_ms == 25
    assert made.manifest.variants["reference"].accuracy == {"agreement": 1.0}
    assert made.manifest.variants["reference"].targets.arch == ("x86_64",)


def test_every_row_has_as_many_cells_as_its_head(made: Bundle) -> None:
    spoilt = made.manifest.model_copy(update={"annotations": {"a|b": "x\n| y |\n# z", "c": "`d` <e>"}})
    columns = 0
    for line in card_text(spoilt, ABOUT).splitlines():
        if not line.startswith("|"):
            columns = 0
            continue
        cells = line.replace("\\|", "").count("|") - 1
        columns = columns or cells
        assert cells == columns, line


def test_weak_evidence_and_missing_int8_are_said(made: Bundle) -> None:
    variants = {
        name: one.model_copy(update={"evidence": "weak"}) for name, one in made.manifest.variants.items()
    }
    changed: dict[str, Any] = {"variants": variants, "float_reason": "a tree", "annotations": {}}
    card = card_text(made.manifest.model_copy(update=changed), ABOUT)
    assert "**weak evidence**" in card
    assert "**No INT8 variant**: a tree" in card
    assert "| licence | not declared |" in card
    assert "- it is assumed" in card


def test_sound_state_and_constants_are_described(tmp_path: Path) -> None:
    said = {
        "task": "vad",
        "inputs": {"input": {"rate": 16_000, "context": 64}, "sr": {"const": 16_000}},
    }
    made = make_bundle(BundleRequest(listener(tmp_path / "vad.onnx"), flags=said), tmp_path / "out")
    assert made.manifest.requires == ("vad", "audio", "state")
    assert made.float_reason is None  # there is nothing to quantise in it
    for text in (
        "sound of 16000 Hz, windows of 512 samples every 512, 64 samples of context",
        "state:state, from zero",
        "state:state, for the next run",
        "constant 16000",
    ):
        assert text in made.card
    assert isinstance(made.manifest, Manifest)
