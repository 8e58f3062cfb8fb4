"""PyTorch modules become ONNX files. With torch_exporters.py the only importer of torch in this package.

Invariants: a module is exported in eval mode, on the CPU, and gets its own modes back; nothing is
unpickled that is not trusted.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeward_models.export import document
from edgeward_models.export.archives import (
    PROGRAM,
    TORCH_PICKLE,
    TORCHSCRIPT,
    WEIGHTS_ONLY,
    Kind,
    refuse_untrusted,
)
from edgeward_models.export.faults import code_fault
from edgeward_models.export.inputs import Array, Feeds, InputSpec
from edgeward_models.export.naming import states_of
from edgeward_models.export.publish import Subject, check_labels, publish, read_labels
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.export.torch_exporters import TorchJob, flatten
from edgeward_models.export.trials import Taken, make_trials, name_outputs, remarks, taken_of
from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected

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
        job = TorchJob(program or plain, taken, names, shapes, probe.nested, options)
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
        found = list(flatten(result))
        if not found:
            raise Rejected(f"The module returns no tensor, but a {type(result).__name__}.")
        return [(name, _array(name or "output", tensor)) for name, tensor in found]


def _is_flat(result: Any) -> bool:
    """Whether both exporters keep such a result's tensors in their order."""
    if isinstance(result, torch.Tensor):
        return True
    return isinstance(result, (tuple, list)) and all(isinstance(r, torch.Tensor) for r in result)


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


def load_archive(path: Path, kind: Kind, trust: bool) -> Any:
    """A module or program from a file of PyTorch's own. Raises Rejected, also for weights alone."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # TorchScript is deprecated, not gone
            if kind is TORCHSCRIPT:
                return torch.jit.load(str(path), map_location="cpu")
            if kind is TORCH_PICKLE and _is_plain(path):
                raise Rejected(
                    f"{path.name} holds weights only, not the module they belong to.", WEIGHTS_ONLY
                )
            refuse_untrusted(path, kind, trust)
            if kind is PROGRAM:
                return torch.export.load(str(path))
            return torch.load(str(path), map_location="cpu", weights_only=False)
    except Rejected:
        raise
    except ModuleNotFoundError as error:
        raise Rejected(
            f"{path.name} needs the module {error.name}, in which its classes are defined.",
            "Run it where that module can be imported.",
        ) from error
    except Exception as error:  # unpickling runs somebody else's code; the loaders have no base either
        raise Rejected(
            code_fault(f"{path.name} cannot be read", error), "Save it again with the installed PyTorch."
        ) from error


def _is_plain(path: Path) -> bool:
    """Whether a pickle holds tensors and plain values only, which needs no code."""
    try:
        torch.load(str(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True
