"""PyTorch modules become ONNX files. The only importer of torch outside of the zoo's recipes.

Invariants: a module is exported in eval mode, on the CPU, and gets its own modes back; both exporters see
the same examples, names and opset; what the exporters print and warn about is kept from the terminal,
and what of it matters is in the report's notes. Nothing here unpickles: see dispatch.py.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
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
from edgeward_models.export.faults import code_fault, torch_fault
from edgeward_models.export.inputs import Array, Feeds, InputSpec
from edgeward_models.export.naming import states_of
from edgeward_models.export.publish import Candidate, Subject, check_labels, publish, read_labels
from edgeward_models.export.report import ExportOptions, ExportReport, NotExported
from edgeward_models.export.trials import Taken, make_trials, name_outputs, remarks, taken_of
from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected

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

Examples = Any
"""A tensor or array, a sequence of them, or a mapping by the names of the forward method's parameters."""


def export_torch(
    module: Any,
    example_inputs: Examples | None,
    out: Path,
    options: ExportOptions | None = None,
    *,
    source: str = "",
    progress: Progress = silent,
) -> ExportReport:
    """Export a torch.nn.Module, a ScriptModule or an ExportedProgram, verified.

    `example_inputs` may be None where `options.inputs` says the shapes. The report's `out` is None when
    the file's outputs differ from the module's; then nothing is written.

    Raises:
        Rejected: the module does not run on these inputs, or no exporter can write it.
        Unavailable: a file cannot be read or written.
    """
    options = options or ExportOptions()
    program = module if isinstance(module, torch.export.ExportedProgram) else None
    plain = program.module() if program is not None else module
    if not isinstance(plain, torch.nn.Module):
        raise Rejected(
            f"This is a {type(module).__name__}, not a torch.nn.Module.", "Pass the module itself."
        )
    source = source or type(plain).__name__
    with _evaluating(plain, fixed=program is not None) as notes:
        _check_device(plain)
        progress("running the model", 0, 1)
        taken = _taken(module, plain, example_inputs, options)
        probe = _Probe(plain, taken.specs, fixed=program is not None)
        names, shapes = name_outputs(probe, taken, options)
        trials, evidence = make_trials(probe, taken, names, options)
        labels = read_labels(options.labels)
        task = options.task or ("classification" if labels else None)
        if task == "classification":
            check_labels(labels, next(iter(trials[0].steps[0].expected.values())).shape)
        job = _Job(program or plain, taken, names, shapes, probe.nested, options)
        return publish(
            Subject(
                source=source,
                candidates=job.candidates(),
                trials=trials,
                evidence=evidence,
                classifier=task == "classification",
                labels=labels,
                declared={**({"task": task} if task else {}), **states_of(options), **options.declared},
                versions=_versions(),
                notes=(*notes, *remarks(taken, options)),
            ),
            out,
            options,
            progress,
        )


# --- what goes in


def _taken(module: Any, plain: torch.nn.Module, examples: Examples | None, options: ExportOptions) -> Taken:
    parameters = _parameters(module, plain)
    arrays = _arrays(_default_examples(module) if examples is None else examples, parameters)
    return taken_of(arrays, parameters, options)


def _parameters(module: Any, plain: torch.nn.Module) -> list[str]:
    """The names of what the forward method takes, as far as it names them."""
    if isinstance(module, torch.export.ExportedProgram):
        return [str(name) for name in module.graph_signature.user_inputs]
    if isinstance(plain, torch.jit.ScriptModule):
        return [argument.name for argument in plain.forward.schema.arguments[1:]]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        signature = inspect.signature(plain.forward)
    except (TypeError, ValueError):
        return []
    return [p.name for p in signature.parameters.values() if p.kind in kinds]


def _default_examples(module: Any) -> Examples | None:
    """An exported program brings the examples that it was made with."""
    if not isinstance(module, torch.export.ExportedProgram) or module.example_inputs is None:
        return None
    positional, named = module.example_inputs
    return (*positional, *named.values())


def _arrays(examples: Examples | None, parameters: Sequence[str]) -> dict[str, Array]:
    """Examples as arrays by name, in their order. Raises Rejected for what is no tensor."""
    if examples is None:
        return {}
    if isinstance(examples, Mapping):
        unknown = sorted(set(examples) - set(parameters)) if parameters else []
        if unknown:
            raise Rejected(
                f"The module takes no input {unknown[0]!r}.", f"It takes: {', '.join(parameters)}."
            )
        named = {str(name): examples[name] for name in parameters or examples if name in examples}
    else:
        several = list(examples) if isinstance(examples, (tuple, list)) else [examples]
        names = [*parameters, *(f"input_{k}" for k in range(len(parameters), len(several)))]
        named = dict(zip(names, several, strict=False))
    return {name: _array(name, value) for name, value in named.items()}


def _array(name: str, value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        try:
            return np.asarray(value.detach().cpu().numpy())
        except (TypeError, RuntimeError) as error:  # bfloat16, quantised and sparse tensors
            raise Rejected(
                f"Input {name} is {value.dtype}, {value.layout}: no device can feed it.", "Use float32."
            ) from error
    if isinstance(value, np.ndarray):
        return value
    raise Rejected(
        f"Input {name} is a {type(value).__name__}, and only tensors can be inputs of the graph.",
        "Wrap the module in one that takes tensors and fixes the rest.",
    )


# --- what comes out


class _Probe:
    """The module as a function of arrays."""

    def __init__(self, module: torch.nn.Module, specs: Sequence[InputSpec], *, fixed: bool) -> None:
        self.module, self.specs, self.fixed = module, specs, fixed
        self.nested = False

    def __call__(self, feeds: Feeds) -> list[tuple[str, Array]]:
        """Every output with the name that the module gives it ("" for none). Raises Rejected."""
        tensors = [torch.from_numpy(np.array(feeds[spec.name])) for spec in self.specs]
        shapes = ", ".join(f"{spec.name} {spec.dtype} {tuple(feeds[spec.name].shape)}" for spec in self.specs)
        try:
            with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")  # the module's own advice to whoever trains it
                result = self.module(*tensors)
        except Exception as error:  # somebody else's code raises what it likes
            raise Rejected(
                code_fault(f"The module does not run on {shapes}", error),
                "Its shapes were fixed when it was saved: save it again with dynamic_shapes."
                if self.fixed
                else "Say other shapes with --input (N where the batch is), or repair the module.",
            ) from error
        self.nested = not _is_flat(result)
        found = list(_flatten(result))
        if not found:
            raise Rejected(f"The module returns no tensor, but a {type(result).__name__}.")
        return [(name, _array(name or "output", tensor)) for name, tensor in found]


def _is_flat(result: Any) -> bool:
    """Whether both exporters keep such a result's tensors in their order."""
    if isinstance(result, torch.Tensor):
        return True
    return isinstance(result, (tuple, list)) and all(isinstance(r, torch.Tensor) for r in result)


def _flatten(result: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors within, with the keys of mappings as names."""
    if isinstance(result, torch.Tensor):
        yield name, result
    elif isinstance(result, Mapping):
        for key, value in result.items():
            yield from _flatten(value, f"{name}_{key}" if name else str(key))
    elif isinstance(result, (tuple, list)):
        for k, value in enumerate(result):
            yield from _flatten(value, f"{name}_{k}" if name else "")


class _Flat(torch.nn.Module):  # type: ignore[misc, unused-ignore]  # torch is not checked
    """A module whose result is a flat tuple of tensors."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors of the inner module's result."""
        return tuple(tensor for _, tensor in _flatten(self.inner(*tensors)))


# --- the exporters


@dataclass
class _Job:
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
    home = str(Path(torch.__file__).parent)
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


# --- the module itself


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module, *, fixed: bool) -> Iterator[list[str]]:
    """In eval mode, and afterwards as before; yields notes. An exported program's mode is `fixed`."""
    modes = {part: part.training for part in module.modules()}
    notes = []
    if not fixed:
        if any(modes.values()):
            notes.append("the module was in training mode: exported in eval mode.")
        module.eval()
    try:
        yield notes
    finally:
        if not fixed:
            for part, training in modes.items():
                part.training = training


def _check_device(module: torch.nn.Module) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    away = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if away is not None:
        raise Rejected(f"The module lies on {away}.", "Move it first: module.cpu().")
    document.size_limit(sum(t.numel() * t.element_size() for t in tensors))


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["onnxscript"] = importlib.metadata.version("onnxscript")
    return found
