"""COCO's JSON of boxes, read and checked: bytes in, plain values or one clear error out.

Invariant: every box of a `Coco` belongs to a picture and a category of the same file, and is finite.
Masks, keypoints and captions are skipped. The format: https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from edgeward_wire.errors import Rejected

MAX_ANNOTATIONS = 4_000_000
MAX_PICTURES = 200_000


class Annotation(NamedTuple):
    """One object."""

    x: float
    y: float
    width: float
    height: float
    category: int
    """The category's id, not a class index."""
    crowd: bool
    area: float


@dataclass(frozen=True)
class Picture:
    """One picture and what is on it."""

    file: str
    size: tuple[int, int] | None
    """(width, height), where the file says it."""
    objects: tuple[Annotation, ...]


@dataclass(frozen=True)
class Coco:
    """One file."""

    categories: dict[int, str]
    """Id -> name, in order of the ids."""
    pictures: tuple[Picture, ...]


def parse(raw: bytes, where: str) -> Coco:
    """COCO JSON, checked. Raises Rejected with the place of what is wrong."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Rejected(f"{where} is not JSON: {str(error)[:120]}.", "Is the file whole?") from None
    if not isinstance(document, dict):
        raise Rejected(f"{where} is not COCO JSON: it holds a {type(document).__name__}, not an object.")
    images, annotations, categories = (
        _list(document, key, where) for key in ("images", "annotations", "categories")
    )
    if len(images) > MAX_PICTURES or len(annotations) > MAX_ANNOTATIONS:
        raise Rejected(f"{where} lists more than {MAX_PICTURES} pictures or {MAX_ANNOTATIONS} objects.")
    named = {
        _whole(c, "id", f"{where}: categories[{k}]"): _text(c, "name", f"{where}: categories[{k}]")
        for k, c in enumerate(categories)
    }
    objects: dict[int, list[Annotation]] = {
        _whole(image, "id", f"{where}: images[{k}]"): [] for k, image in enumerate(images)
    }
    if len(objects) != len(images):
        raise Rejected(f"{where}: two pictures have the same id.")
    for k, annotation in enumerate(annotations):
        _place(annotation, objects, named, f"{where}: annotations[{k}]")
    if not images:
        raise Rejected(f"{where} lists no pictures.")
    if not annotations:
        raise Rejected(f"{where} holds no boxes: there is nothing to find.")
    pictures = tuple(
        Picture(_text(image, "file_name", f"{where}: images[{k}]"), _size(image), tuple(objects[image["id"]]))
        for k, image in enumerate(images)
    )
    return Coco(dict(sorted(named.items())), pictures)


def _place(
    annotation: Any, objects: dict[int, list[Annotation]], categories: dict[int, str], where: str
) -> None:
    """Put an annotation to its picture."""
    image = _whole(annotation, "image_id", where)
    category = _whole(annotation, "category_id", where)
    if image not in objects:
        raise Rejected(f"{where} is on picture {image}, which is not listed.")
    if category not in categories:
        raise Rejected(f"{where} has category {category}, which is not listed.")
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box)):
        raise Rejected(f"{where}: bbox is not [x, y, width, height].")
    x, y, width, height = (float(v) for v in box)
    if width < 0 or height < 0:
        raise Rejected(f"{where}: bbox has a negative side; it is [x, y, width, height].")
    area = annotation.get("area")
    objects[image].append(
        Annotation(
            x,
            y,
            width,
            height,
            category,
            bool(annotation.get("iscrowd", 0)),
            float(area) if _is_number(area) else width * height,
        )
    )


def _list(document: dict[str, Any], key: str, where: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise Rejected(f"{where} is not COCO JSON: it has no list {key!r}.")
    return value


def _whole(entry: Any, key: str, where: str) -> int:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise Rejected(f"{where}: {key} is not a whole number.")
    return value


def _text(entry: Any, key: str, where: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value:
        raise Rejected(f"{where}: {key} is not a text.")
    return value


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
