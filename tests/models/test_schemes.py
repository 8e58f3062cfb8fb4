"""Schemes are data that says what it is; targets know what they lack."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgeward_models.schemes import TARGETS, Scheme, unsupported


def test_a_title_says_what_differs() -> None:
    assert Scheme("static").title == "u8 x pair, minmax"
    assert Scheme("static", keep_float=("a",)).title == "u8 x pair, minmax, 1 layer float"
    kept = Scheme("static", weights="s7", calibration="percentile", keep_float=tuple("abcdef"))
    assert kept.title == "u8 x s7, percentile, 6 layers float"
    assert Scheme("fp16").title == "fp16"
    assert Scheme("dynamic").title == "dynamic x s7"
    assert Scheme("dynamic", weights="s8", operators=("MatMul",)).title == "dynamic x s8, MatMul"
    assert TARGETS["tensorrt"].schemes[0].title == "s8 x s8, minmax, symmetric, float outputs"


def test_a_key_is_json_and_tells_schemes_apart() -> None:
    schemes = [scheme for target in TARGETS.values() for scheme in target.schemes]
    schemes += [replace(schemes[0], keep_float=("a", "b")), replace(schemes[0], per_channel=False)]
    keys = {json.dumps(scheme.key(), sort_keys=True) for scheme in schemes}
    assert len(keys) == len(set(schemes))
    assert Scheme("static").keeping("b", "a").key() == Scheme("static").keeping("a", "b").key()


@pytest.mark.parametrize(
    ("target", "machine", "provider", "measurable"),
    [
        ("x86-64", "x86_64", "CPUExecutionProvider", True),
        ("x86-64", "aarch64", "CPUExecutionProvider", False),
        ("arm64", "aarch64", "CPUExecutionProvider", True),
        ("tensorrt", "aarch64", "CPUExecutionProvider", False),
        ("tensorrt", "x86_64", "TensorrtExecutionProvider", True),
        ("cuda", "x86_64", "CUDAExecutionProvider", True),
    ],
)
def test_what_a_machine_can_measure(target: str, machine: str, provider: str, measurable: bool) -> None:
    assert TARGETS[target].measurable(machine, (provider, "AzureExecutionProvider")) is measurable


def test_the_targets_want_what_the_field_notes_say() -> None:
    x86, arm, tensorrt, cuda = (TARGETS[name].schemes[0] for name in ("x86-64", "arm64", "tensorrt", "cuda"))
    assert (x86.activations, x86.weights, x86.per_channel) == ("u8", "pair", True)
    assert (arm.activations, arm.weights, arm.symmetric_activations) == ("s8", "s8", False)
    assert (tensorrt.activations, tensorrt.symmetric_activations, tensorrt.outputs) == ("s8", True, False)
    assert cuda.method == "fp16"


def test_what_a_target_lacks_is_named() -> None:
    found = {"Conv": 3, "LayerNormalization": 2, "Reshape": 9, "Erf": 1, "LSTM": 1, "Tanh": 0, "Softmax": 1}
    assert unsupported(TARGETS["x86-64"], found) == ["Erf", "LSTM", "LayerNormalization"]
    assert unsupported(TARGETS["tensorrt"], found) == ["Erf", "LSTM", "LayerNormalization", "Softmax"]
    assert unsupported(TARGETS["cuda"], {"Conv": 1, "Reshape": 1}) == ["Conv"]
    assert unsupported(TARGETS["arm64"], {}) == []
