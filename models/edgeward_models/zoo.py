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
from typing import Literal

from edgeward_models.progress import Progress, silent
from edgeward_wire.errors import Rejected, Unavailable

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
            "silero-vad",
            "Silero VAD, 16 kHz",
            "vad",
            "MIT",
            "trained",
            "the package's wheel or its .onnx",
            "silero_vad",
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
    recipe: Callable[..., Built] = _recipe(entry.recipe).build
    try:
        out.mkdir(parents=True, exist_ok=True)
        return recipe(out, weights=weights, progress=progress)
    except OSError as error:
        where = error.filename or out
        raise Unavailable(f"{where} cannot be read or written: {error.strerror or error}.") from error


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


def _recipe(module: str) -> ModuleType:
    """The recipes import one another relatively, so they get a package's name wherever they lie."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(directory())]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.{module}")
