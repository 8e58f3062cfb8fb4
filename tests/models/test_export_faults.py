"""What the exporters' messages become: a sentence with the operator, the place, and the next step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models.export.faults import code_fault, sklearn_fault, torch_fault
from edgeward_models.export.report import NotExported

DATA_DEPENDENT = """Failed to export the model with torch.export. \x1b[96mThis is step 1/3\x1b[0m of it.

## Exception summary

<class 'torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode'>: Could not guard on \
data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).

The following call raised this error:
  File "/somewhere/of/mine/nets.py", line 9, in forward
    if x.sum() > 0:
"""
DISPATCH = """Failed to convert the exported program to an ONNX model.

## Exception summary

<class 'torch.onnx._internal.exporter._errors.DispatchError'>: No ONNX function found for \
<OpOverload(op='aten.linalg_eig', overload='default')>. Failure message: No decompositions registered
"""


@pytest.mark.parametrize(
    ("text", "exporter", "what", "step"),
    [
        (DISPATCH, "dynamo", "The operator aten.linalg_eig has no counterpart in ONNX.", "other operators"),
        (
            "Exporting the operator 'aten::linalg_eigvals' to ONNX opset version 18 is not supported",
            "torchscript",
            "The operator aten.linalg_eigvals has no counterpart in ONNX.",
            "--exporter dynamo",
        ),
        (
            "Exporting the operator 'aten::grid_sampler' to ONNX opset version 13 is not supported. Support "
            "for this operator was added in version 16, try exporting with this version",
            "torchscript",
            "The operator aten.grid_sampler has",
            "--opset 16",
        ),
        (
            DATA_DEPENDENT,
            "dynamo",
            "depends on the data (nets.py:9 in forward: if x.sum() > 0:).",
            "torch.where",
        ),
        (
            "Constraints violated (batch)! You marked batch as dynamic but your code specialized it",
            "dynamo",
            "fixes the length of a dimension",
            "without --dynamic-batch",
        ),
        ("CUDA out of memory. Tried to allocate", "dynamo", "not enough memory", "larger machine"),
        ("first line\nsecond line", "dynamo", "RuntimeError: first line.", "--exporter"),
        ("", "dynamo", "RuntimeError: no message.", "--exporter"),
    ],
)
def test_pytorch_s_messages_become_one_sentence(text: str, exporter: str, what: str, step: str) -> None:
    told = torch_fault(RuntimeError(text), exporter)
    assert what in told.what
    assert step in told.next_step
    assert "\n" not in told.what
    assert "/somewhere" not in told.what


def test_the_cause_of_an_error_is_read_as_well() -> None:
    error = RuntimeError("Failed to convert")
    error.__cause__ = RuntimeError(DISPATCH)
    assert "aten.linalg_eig" in torch_fault(error, "dynamo").what


def test_a_missing_library_is_named() -> None:
    told = torch_fault(ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript"), "dynamo")
    assert told.what == "The dynamo exporter needs onnxscript, which is not installed."
    assert "torch" in told.next_step


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "Unable to find a shape calculator for type '<class '__main__.Odd'>'.\nIt usually means",
            "Odd has no",
        ),
        ("FunctionTransformer is not supported unless the transform function is None", "runs Python code"),
        (
            "Unable to create node 'TreeEnsembleClassifier' with name='x' and",
            "operator TreeEnsembleClassifier",
        ),
        ("Unexpected input type StringTensorType", "takes text"),
        ("something else\nentirely", "cannot convert it: something else."),
    ],
)
def test_skl2onnx_s_messages_become_one_sentence(text: str, what: str) -> None:
    told = sklearn_fault(RuntimeError(text))
    assert what in told.what
    assert told.next_step


@given(st.text(max_size=400), st.sampled_from(["dynamo", "torchscript"]))
def test_whatever_is_said_one_bounded_line_comes_of_it(text: str, exporter: str) -> None:
    for told in (torch_fault(RuntimeError(text), exporter), sklearn_fault(ValueError(text))):
        assert isinstance(told, NotExported)
        assert "\n" not in told.what
        assert len(told.what) < 800


def test_an_error_of_somebody_else_s_code_has_its_place() -> None:
    try:
        raise ValueError("no weights\nat all")
    except ValueError as error:
        said = code_fault("app:build failed", error)
    assert said.startswith("app:build failed: ValueError: no weights (test_export_faults.py:")
