"""A source as people name it becomes a model, and goes to the exporter that it needs.

    package.module:callable     what builds the model: a module, (module, example inputs), or an estimator
    model.pt, model.pt2 ...     a TorchScript archive, an exported program, a pickle, a YOLO checkpoint

Invariants: a framework is imported only for its own models; a file that runs code when it is read is
refused unless it is trusted; what somebody else's code raises becomes one line with its place.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeward_models.export import archives
from edgeward_models.export.archives import Kind, kind_of, refuse_untrusted
from edgeward_models.export.faults import code_fault
from edgeward_models.export.publish import check_out
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected

_CALLABLE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
EXTRAS = {
    "torch": "torch",
    "onnxscript": "torch",
    "sklearn": "sklearn",
    "skl2onnx": "sklearn",
    "joblib": "sklearn",
}


def export_source(
    source: str,
    out: Path,
    options: ExportOptions | None = None,
    *,
    trust: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Load what `source` names, and export it, verified.

    Raises:
        Rejected: it cannot be loaded or exported, it would run code and is not trusted, or a library
            that it needs is not installed.
        Unavailable: a file cannot be read or written.
    """
    options = options or ExportOptions()
    check_out(out)
    with _libraries():
        named = _CALLABLE.fullmatch(source)
        if named and not Path(source).exists():
            with _importing():
                progress(f"loading {source}", 0, 1)
                model = _built(*named.groups())
                return _export(model, out, options, source=source, progress=progress)
        path = Path(source)
        kind = kind_of(path)
        if kind is archives.ULTRALYTICS:
            from edgeward_models.export.ultralytics_models import export_ultralytics

            return export_ultralytics(path, out, options, trust=trust, progress=progress)
        progress(f"loading {path.name}", 0, 1)
        with _importing():
            return _export(_loaded(path, kind, trust), out, options, source=path.name, progress=progress)


def _export(
    model: Any, out: Path, options: ExportOptions, *, source: str, progress: Progress
) -> ExportReport:
    """With the exporter that suits what was loaded."""
    examples = None
    if isinstance(model, tuple) and len(model) == 2:
        model, examples = model
    if _is_torch(model):
        from edgeward_models.export.torch_models import export_torch

        return export_torch(model, examples, out, options, source=source, progress=progress)
    if _is_sklearn(model):
        from edgeward_models.export.sklearn_models import export_sklearn

        return export_sklearn(model, out, options, source=source, progress=progress)
    if isinstance(model, dict) and any(_is_torch_tensor(value) for value in model.values()):
        raise Rejected(
            f"{source} holds weights only, not the module that they belong to.", archives.WEIGHTS_ONLY
        )
    raise Rejected(
        f"{source} gives {type(model).__name__}, and no model that can be exported.",
        "It must be a torch.nn.Module, (module, example inputs), or a fitted scikit-learn estimator.",
    )


# --- what was loaded: asked without importing a framework that did not make it


def _is_torch(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def _is_torch_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_sklearn(model: Any) -> bool:
    base = sys.modules.get("sklearn.base")
    return base is not None and isinstance(model, base.BaseEstimator)


# --- callables


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """With the working directory importable, as `python -m` has it."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _built(module_name: str, name: str) -> Any:
    """What the callable returns, or the attribute itself where it is a model already. Raises Rejected."""
    try:
        with _others_code():
            made: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise Rejected(
                f"There is no module {error.name} here.", "Run it where the module is, or set PYTHONPATH."
            ) from error
        raise
    except Exception as error:  # somebody else's code raises what it likes
        raise Rejected(code_fault(f"{module_name} cannot be imported", error), "Repair it first.") from error
    for part in name.split("."):
        if not hasattr(made, part):
            raise Rejected(f"{module_name} has no {name}.", "Name a function that returns the model.")
        made = getattr(made, part)
    if _is_torch(made) or (_is_sklearn(made) and not isinstance(made, type)):
        return made
    if not callable(made):
        raise Rejected(f"{module_name}:{name} is neither a model nor callable, but {type(made).__name__}.")
    try:
        with _others_code():
            return made()
    except ModuleNotFoundError:
        raise
    except (Exception, SystemExit) as error:  # as above
        raise Rejected(code_fault(f"{module_name}:{name} failed", error), "Repair it first.") from error


@contextlib.contextmanager
def _others_code() -> Iterator[None]:
    """What it prints goes to stderr (stdout is for results), and its warnings are not ours to raise."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("default")
        yield


@contextlib.contextmanager
def _libraries() -> Iterator[None]:
    """A library that is not installed is named, with the extra that brings it. Raises Rejected."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            top = error.name.partition(".")[0]
            extra = EXTRAS.get(top)
            step = f"pip install 'edgeward[ctl,models,{extra}]'" if extra else f"pip install {top}"
            raise Rejected(f"This needs a library that is not installed: {top}.", step) from error
        raise Rejected(code_fault("A library cannot be imported", error), "Install it again.") from error


# --- files


def _loaded(path: Path, kind: Kind, trust: bool) -> Any:
    if kind is archives.PICKLE:
        refuse_untrusted(path, kind, trust)
        from edgeward_models.export.sklearn_models import load_pickle

        return load_pickle(path)
    from edgeward_models.export.torch_models import load_archive

    return load_archive(path, kind, trust)
