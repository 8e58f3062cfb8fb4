"""The zoo: models to try the pipeline with, each made by a recipe of its own in models/zoo.

Invariants: a recipe writes the same bytes each time; a model with random weights says so in its name, in its
metadata and beside it. Recipes are loaded only when they are run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected, Unavailable

if TYPE_CHECKING:
    from edgeward_models.quantise_report import QuantiseReport

_PACKAGE = "edgeward_zoo"


@dataclass(frozen=True)
class Built:
    """What a recipe wrote."""

    model: Path
    sidecar: Path
    files: tuple[Path, ...]
    """All of them, these two included."""
    notes: tuple[str, ...] = ()
    """What whoever built it should know."""
    original: Path | None = None
    """The float file that an INT8 `model` was made from, where that was made as well."""


@dataclass(frozen=True)
class Entry:
    """A model that can be built."""

    name: str
    title: str
    task: str
    licence: str
    """Of what is built, as `build` makes it without `--weights`."""
    weights: Literal["random", "trained", "trained here"]
    """Without `--weights`."""
    takes: str
    """What `--weights` takes; empty: nothing."""
    recipe: str
    """The module in models/zoo."""


RECIPES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "resnet50",
            "ResNet-50, ImageNet, 224 x 224",
            "classification",
            "Apache-2.0",
            "random",
            "torchvision's state dict",
            "resnet50",
        ),
        Entry(
            "yolov8s",
            "YOLOv8-s, COCO, 640 x 640",
            "detection",
            "Apache-2.0",
            "random",
            "a state dict with the published names",
            "yolov8s",
        ),
        Entry(
            "distilhubert",
            "DistilHuBERT, 1 s of sound at 16 kHz",
            "tensor",
            "Apache-2.0",
            "random",
            "Hugging Face's state dict",
            "distilhubert",
        ),
        Entry(
            "efficientnet-lite0",
            "EfficientNet-Lite0, ImageNet, INT8",
            "classification",
            "Apache-2.0",
            "trained",
            "",
            "efficientnet_lite0",
        ),
        Entry(
            "silero-vad",
            "Silero VAD, 16 kHz",
            "vad",
            "MIT",
            "trained",
            "the package's wheel or its .onnx",
            "silero_vad",
        ),
        Entry(
            "digits-forest",
            "Handwritten digits, random forest",
            "classification",
            "Apache-2.0",
            "trained here",
            "",
            "digits_forest",
        ),
    )
}


def build(name: str, out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Path:
    """Build a model into the directory `out`; returns the ONNX file, with its sidecar beside it.

    Raises: as `build_files`.
    """
    return build_files(name, out, weights=weights, progress=progress).model


def build_files(name: str, out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Build a model into the directory `out`, from trained `weights` where the recipe takes them.

    Raises:
        Rejected: no such model, or weights that do not fit; or a library that the recipe needs is missing.
        Unavailable: a file cannot be read or written.
    """
    entry = RECIPES.get(name)
    if entry is None:
        raise Rejected(f"The zoo has no model {name!r}.", f"It has: {', '.join(RECIPES)}.")
    if weights is not None and not entry.takes:
        raise Rejected(f"{name} takes no weights.", "Build it without --weights.")
    make: Callable[..., Built] = recipe(entry.recipe).build
    try:
        out.mkdir(parents=True, exist_ok=True)
        return make(out, weights=weights, progress=progress)
    except OSError as error:
        where = error.filename or out
        raise Unavailable(f"{where} cannot be read or written: {error.strerror or error}.") from error


def quantised(
    name: str,
    out: Path,
    *,
    weights: Path | None = None,
    samples: Path | None = None,
    budget_s: float = 600.0,
    progress: Progress = silent,
) -> QuantiseReport:
    """Build a float model into `out`/float and quantise it for this machine into `out`.

    A second run goes on where the first one ended.

    Raises:
        Rejected: as `build_files`; or the model is INT8 already, or has nothing to quantise.
        Unavailable: as `build_files`.
    """
    from edgeward_models.quantise import QuantiseRequest, quantise_model

    built = build_files(name, out / "float", weights=weights, progress=progress)
    request = QuantiseRequest(
        built.original or built.model,
        sidecar=built.sidecar,
        flags={"precision": "fp32"},
        samples=samples,
        budget_s=budget_s,
    )
    return quantise_model(request, out, progress)


def directory() -> Path:
    """Where the recipes are: in the installed package, or in the checkout beside it.

    Raises:
        Unavailable: in neither.
    """
    here = Path(__file__).resolve().parent
    for place in (here / "zoo_recipes", here.parent / "zoo"):
        if (place / "graphs.py").is_file():
            return place
    raise Unavailable("The zoo's recipes are not installed.", "Install edgeward again, or use a checkout.")


def recipe(module: str) -> ModuleType:
    """The recipes import one another relatively, so they get a package's name wherever they lie."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(directory())]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{module}")
