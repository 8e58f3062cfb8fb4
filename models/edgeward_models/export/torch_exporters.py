"""PyTorch's two exporters, with one face. With torch_models.py the only importer of torch in this package.

Invariants: both see the same examples, names and opset; what they print and warn about is kept from the
terminal, and what of it matters comes back as a note; whatever they raise becomes `NotExported`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeward_models.export import document, inputs
from edgeward_models.export.faults import torch_fault
from edgeward_models.export.publish import Candidate
from edgeward_models.export.report import ExportOptions, NotExported
from edgeward_models.export.trials import Taken

_DYNAMO_OPSET = 18
"""Below it PyTorch's dynamo exporter only tries, and leaves the file at 18 when that fails."""
_TRACED_BATCH = 2
"""torch.export takes a length of one for a constant."""
# Their own talk about themselves: operators of libraries that are not installed, opsets, unbacked symbols.
_CHATTER = (
    "torch.onnx",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "torch._export",
    "torch._dynamo",
    "onnxscript",
    "onnx_ir",
)


@dataclass
class TorchJob:
    """One module for either exporter."""

    subject: Any
    taken: Taken
    names: tuple[str, ...]
    shapes: Mapping[str, tuple[int | None, ...]]
    nested: bool
    options: ExportOptions
    compiled: bool = False
    """Whether the last TorchScript file was compiled because its trace lost a branch."""

    def candidates(self) -> Iterator[Candidate]:
        """What to try, in order; asked for the next one when the last did not do."""
        programmed = isinstance(self.subject, torch.export.ExportedProgram)
        scripted = isinstance(self.subject, torch.jit.ScriptModule)
        order = ["dynamo", "torchscript"]
        if programmed or scripted:
            order = order[:1] if programmed else order[1:]
        elif self.options.exporter != "auto":
            order = [self.options.exporter]
        elif self.options.target_opset < _DYNAMO_OPSET:
            order.reverse()
        for exporter in order:
            yield Candidate(exporter, self.dynamo if exporter == "dynamo" else self.torchscript)
            if self.compiled:
                self.compiled = False
                yield Candidate("torchscript, traced", self.traced)

    def dynamo(self, raw: Path) -> list[str]:
        """torch.export, then ONNX operators. Raises NotExported."""
        shapes: Any = None
        if self._open and not isinstance(self.subject, torch.export.ExportedProgram):
            batch = torch.export.Dim("batch")
            shapes = tuple(None if s.open_axis is None else {s.open_axis: batch} for s in self.taken.specs)
            shapes = (shapes,) if self.nested else shapes  # `_Flat` takes them as one
        self._export(raw, self._module, dynamo=True, external_data=False, dynamic_shapes=shapes)
        self._check_opset(raw, "dynamo")
        return []

    def torchscript(self, raw: Path) -> list[str]:
        """A trace; where it lost a branch, the compiled module if it compiles. Raises NotExported."""
        notes = self.traced(raw)
        if notes and not self.nested:
            with contextlib.suppress(NotExported):
                self._export(raw, _compiled(self.subject), dynamo=False, dynamic_axes=self._axes)
                self.compiled = True
                return ["torchscript: the module was compiled, not traced: its way depends on the data."]
            return self.traced(raw)  # what failed may have written a part
        return notes

    def traced(self, raw: Path) -> list[str]:
        """A trace, whatever branches it loses. Raises NotExported."""
        caught = self._export(raw, self._module, dynamo=False, dynamic_axes=self._axes)
        lost = _lost_branches(caught)
        return [f"torchscript: only the way that the examples took at {', '.join(lost)}."] if lost else []

    @property
    def _axes(self) -> dict[str, dict[int, str]]:
        axes: dict[str, dict[int, str]] = {}
        for name, shape in [(s.name, s.shape) for s in self.taken.specs] + list(self.shapes.items()):
            axes[name] = {k: "batch" for k, length in enumerate(shape) if length is None}
        return axes

    @property
    def _open(self) -> bool:
        return any(spec.open_axis is not None for spec in self.taken.specs)

    @property
    def _module(self) -> Any:
        return _Flat(self.subject) if self.nested else self.subject

    def _export(self, raw: Path, module: Any, **how: Any) -> list[warnings.WarningMessage]:
        batch = _TRACED_BATCH if self._open else 1
        examples = tuple(
            torch.from_numpy(np.array(inputs.join(s, [self.taken.examples[s.name]] * batch)))
            for s in self.taken.specs
        )
        try:
            with _quiet() as caught, torch.no_grad(), _written_out(how["dynamo"]):
                torch.onnx.export(
                    module,
                    () if isinstance(module, torch.export.ExportedProgram) else examples,
                    str(raw),
                    input_names=[spec.name for spec in self.taken.specs],
                    output_names=list(self.names),
                    opset_version=self.options.target_opset,
                    verbose=False,
                    **how,
                )
        except Exception as error:  # exporters let through what their passes raise: no base
            raise torch_fault(error, "dynamo" if how["dynamo"] else "torchscript") from error
        return caught

    def _check_opset(self, raw: Path, exporter: str) -> None:
        written = document.opset_of(raw)
        if written != self.options.target_opset:
            raise NotExported(
                f"The {exporter} exporter writes opset {written} and cannot convert this module"
                f" to {self.options.target_opset}.",
                f"Leave out --opset, or use --exporter torchscript (opsets below {_DYNAMO_OPSET}).",
            )


@contextlib.contextmanager
def _written_out(dynamo: bool) -> Iterator[None]:
    """TorchScript would record the fused attention of eval mode, which ONNX lacks, instead of its parts."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused and dynamo)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _compiled(module: torch.nn.Module) -> Any:
    try:
        with _quiet():
            return torch.jit.script(module)
    except Exception as error:  # the compiler raises RuntimeError, NotSupportedError, OSError...
        raise torch_fault(error, "torchscript") from error


def _lost_branches(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Where tracing took one way of several, outside of PyTorch itself."""
    home = str(Path(str(torch.__file__)).parent)
    found = {
        f"{Path(one.filename).name}:{one.lineno}": None
        for one in caught
        if issubclass(one.category, torch.jit.TracerWarning) and not one.filename.startswith(home)
    }
    return list(found)[:5]


@contextlib.contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep the exporters' talk from the terminal: stdout is for results, and errors are told in one line.

    Their warnings are about their own future (deprecated TorchScript, pytree internals), but for those that
    `_lost_branches` reads. TorchScript prints the graph of a failure from C++, past `sys.stdout`.
    """
    levels = {name: logging.getLogger(name).level for name in _CHATTER}
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        for name in _CHATTER:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        os.dup2(nowhere, 1)
        with (
            warnings.catch_warnings(record=True) as seen,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("always")
            yield seen
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Flat(torch.nn.Module):  # type: ignore[misc, unused-ignore]  # torch is not checked
    """A module whose result is a flat tuple of tensors."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors of the inner module's result."""
        return tuple(tensor for _, tensor in flatten(self.inner(*tensors)))


def flatten(result: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors within, with the keys of mappings as names."""
    if isinstance(result, torch.Tensor):
        yield name, result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from flatten(value, f"{name}_{key}" if name else str(key))
    elif isinstance(result, (tuple, list)):
        for k, value in enumerate(result):
            yield from flatten(value, f"{name}_{k}" if name else "")
