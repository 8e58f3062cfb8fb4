"""What lies beside a built model: the sidecar TOML, and the labels and pictures that it names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from edgeward_models.zoo import Built

HERE = Path(__file__).resolve().parent
IMAGENET_LABELS = HERE / "imagenet-labels.txt"
COCO_LABELS = HERE / "coco-labels.txt"
PICTURES = HERE / "pictures"
IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN_LICENCE, TRAINED_LICENCE = "Apache-2.0", "of the weights"
MEANS_NOTHING = "The weights are random: what it answers means nothing. It is for measurements of speed."


def classifier(model: Path, about: str, *, trained: bool) -> Built:
    """Of an ImageNet classifier that takes `image` as torchvision prepares it, and gives `logits`."""
    image = {
        "colour": "rgb",
        "width": 224,
        "height": 224,
        "resize": "shorter_side",
        "resize_to": 256,
        "interpolation": "linear",
        "crop": "center",
        "scale": [1 / (255 * spread) for spread in IMAGENET_SPREAD],
        "bias": [-mean / spread for mean, spread in zip(IMAGENET_MEAN, IMAGENET_SPREAD, strict=True)],
        "layout": "nchw",
    }
    table = {"inputs": {"image": image}, "outputs": {"logits": {"activation": "softmax"}}}
    return write(
        model,
        about,
        {"task": "classification", **table},
        labels=IMAGENET_LABELS,
        pictures=True,
        licence=TRAINED_LICENCE if trained else OWN_LICENCE,
        notes=() if trained else (MEANS_NOTHING,),
    )


def detector(model: Path, about: str, *, size: int, trained: bool) -> Built:
    """Of a detector of COCO's classes that takes `images`, letterboxed, and gives `output0`."""
    images = {"colour": "rgb", "width": size, "height": size, "resize": "letterbox", "pad": 114}
    scaled = {"scale": [1 / 255] * 3, "bias": [0.0] * 3, "layout": "nchw"}
    return write(
        model,
        about,
        {
            "task": "detection",
            "inputs": {"images": {**images, **scaled}},
            "outputs": {"output0": {"activation": "none"}},
        },
        labels=COCO_LABELS,
        pictures=True,
        licence=TRAINED_LICENCE if trained else OWN_LICENCE,
        notes=() if trained else (MEANS_NOTHING,),
    )


def listener(model: Path, about: str, *, rate: int, window: int, trained: bool) -> Built:
    """Of a model that takes `audio` and gives `features`."""
    audio = {"rate": rate, "window": window, "hop": window, "context": 0}
    return write(
        model,
        about,
        {"task": "tensor", "inputs": {"audio": audio}, "outputs": {"features": {"activation": "none"}}},
        licence=TRAINED_LICENCE if trained else OWN_LICENCE,
        notes=() if trained else (MEANS_NOTHING,),
    )


def write(
    model: Path,
    about: str,
    table: Mapping[str, Any],
    *,
    labels: Path | None = None,
    pictures: bool = False,
    licence: str = "",
    notes: tuple[str, ...] = (),
) -> Built:
    """Write `model`.toml, and copy the labels and pictures that it names beside it."""
    out = model.parent
    head: dict[str, Any] = {"name": model.stem, "task": table["task"]}
    if licence:
        table = {**table, "annotations": {"licence": licence}}
    files = [model]
    if labels is not None:
        files.append(Path(shutil.copyfile(labels, out / labels.name)))
        head["labels"] = labels.name
    if pictures:
        files += copy_pictures(out)
        head["samples"] = PICTURES.name
    sidecar = model.with_suffix(".toml")
    lines = [f"# {about}.", *(f"# {note}" for note in notes)]
    sidecar.write_text("\n".join(lines) + "\n" + tomli_w.dumps({**head, **table}), encoding="utf-8")
    return Built(model, sidecar, (*files, sidecar), notes)


def copy_pictures(out: Path) -> list[Path]:
    """The zoo's photographs (0.6 MB) with their README, which says where they come from."""
    (out / PICTURES.name).mkdir(exist_ok=True)
    found = sorted([*PICTURES.glob("*.jpg"), PICTURES / "README.md"])
    return [Path(shutil.copyfile(file, out / PICTURES.name / file.name)) for file in found]
