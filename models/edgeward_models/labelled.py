"""Labelled data: inputs of which the right answer is known.

Invariants: a name that the model does not have is an error, never a class of its own or a row left out;
what is listed is there (each file is looked for before the first one runs) and is decoded only when its
turn comes; the same data, count and seed give the same items in the same order.

- `folders`: a directory with one folder a class, of pictures or WAV files, named by label or index.
- `table`: a CSV or TSV `file,label`, with or without that heading; files are relative to the table.
- `coco`: COCO JSON of boxes, and the pictures' directory.
- `arrays`: an `.npz` with one array (N, ...) for each source input, and `labels` (N,).
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgeward_models import coco
from edgeward_models.class_names import MOST_NAMED, Names, and_more
from edgeward_models.items import Item, LabelledSet, Truth, read_bytes, suffixes
from edgeward_models.samples import rows_of
from edgeward_runtime import golden
from edgeward_runtime.ports import sources
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected, Unavailable

MAX_ITEMS = 200_000
MAX_TABLE_BYTES = 64 << 20
MAX_COCO_BYTES = 512 << 20
_HEADINGS = frozenset({"file", "filename", "path", "image", "picture"})


def open_labelled(
    path: Path, contract: Contract, labels: Sequence[str], classes: int | None, pictures: Path | None = None
) -> LabelledSet:
    """Look at labelled data for this model; its inputs are read when they are streamed.

    `labels` may be empty where `classes` is known (then data is labelled by index). `pictures`: where
    those of a COCO file are; None looks beside it.

    Raises:
        Rejected: it is in none of the formats, empty, incomplete, or names what the model does not have.
        Unavailable: it cannot be read.
    """
    names = Names(labels, classes)
    if not path.exists():
        raise Rejected(f"There is no labelled data at {path}.", "Check the path.")
    if contract.task == "detection":
        return _coco(path, contract, names, pictures)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folders(path, contract, names)
    if suffix in (".csv", ".tsv"):
        return _table(path, contract, names)
    if suffix == ".npz":
        return _npz(path, contract, names)
    if suffix == ".json":
        raise Rejected(
            f"{path.name} holds boxes, but the task is {contract.task}.",
            "Give a directory with one folder a class, or a CSV `file,label`.",
        )
    raise Rejected(
        f"{path.name} is no labelled data that is known.",
        "Give a directory with one folder a class, a CSV or TSV `file,label`, or an .npz with `labels`.",
    )


# --- folders


def _folders(root: Path, contract: Contract, names: Names) -> LabelledSet:
    what, endings = suffixes(contract)
    folders = {
        folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in endings)
        for folder in sorted(p for p in _listed(root) if p.is_dir() and not p.name.startswith("."))
    }
    filled = {name: pictures for name, pictures in folders.items() if pictures}
    if not filled:
        there = f"folders without {what}s" if folders else "no folders"
        raise Rejected(
            f"{root} holds {there}: labelled {what}s lie in one folder a class.",
            "Name each folder by its label or class index; or give a CSV `file,label`.",
        )
    indices = names.find_all(filled, str(root.name))
    items = [
        Item(f"{name}/{picture.name}", picture, label=indices[name])
        for name, pictures in filled.items()
        for picture in pictures
    ]
    return LabelledSet("folders", _origin(items, what, root), _bounded(items, root))


def _listed(root: Path) -> list[Path]:
    try:
        return list(root.iterdir())
    except OSError as error:
        raise Unavailable(f"{root} cannot be read: {error.strerror or error}.", "Check the path.") from error


# --- tables


def _table(path: Path, contract: Contract, names: Names) -> LabelledSet:
    what, _ = suffixes(contract)
    rows = read_table(read_bytes(path, MAX_TABLE_BYTES), path.name)
    labels = names.find_all(dict.fromkeys(label for _, label in rows), path.name)
    items: dict[str, Item] = {}
    for file, label in rows:
        known = items.setdefault(file, Item(file, path.parent / file, label=labels[label]))
        if known.label != labels[label]:
            raise Rejected(f"{path.name} lists {file} twice, with different labels.", "Keep one of them.")
    check_present(items.values(), path)
    return LabelledSet("table", _origin(list(items.values()), what, path), tuple(items.values()))


def read_table(raw: bytes, where: str) -> list[tuple[str, str]]:
    """The (file, label) rows of a CSV or TSV, without its heading. Raises Rejected with the line."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Rejected(f"{where} is not UTF-8 text.", "Save it as UTF-8.") from None
    first = text.partition("\n")[0]
    delimiter = next((d for d in "\t,;" if d in first), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[str, str]] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
                raise Rejected(
                    f"{where}, line {reader.line_num}: a row has a file and a label, not {len(cells)} cells.",
                    'Put a label that contains the separator in quotes: "tench, Tinca tinca".',
                )
            rows.append((cells[0].strip(), cells[1].strip()))
            if len(rows) > MAX_ITEMS + 1:
                raise Rejected(f"{where} has more than {MAX_ITEMS} rows.")
    except csv.Error as error:
        raise Rejected(f"{where}, line {reader.line_num}: {error}.", "Save it as CSV again.") from None
    if rows and rows[0][0].lower() in _HEADINGS:
        rows = rows[1:]
    if not rows:
        raise Rejected(f"{where} holds no rows.", "Write one `file,label` a line.")
    return rows


def check_present(items: Iterable[Item], where: Path) -> None:
    """Raises Rejected with the pictures that are not there."""
    everything = list(items)
    missing = [item.name for item in everything if not item.path.is_file()]
    if missing:
        base = os.path.commonpath([item.path.absolute().parent for item in everything])
        raise Rejected(
            f"{where.name} lists {len(missing)} of {len(everything)} files that are not there:"
            f" {', '.join(missing[:MOST_NAMED])}{and_more(missing)}.",
            f"They were looked for in {base}.",
        )


# --- boxes


def _coco(path: Path, contract: Contract, names: Names, pictures: Path | None) -> LabelledSet:
    suffixes(contract)
    file = _annotations(path)
    read = coco.parse(read_bytes(file, MAX_COCO_BYTES), file.name)
    classes = _categories(read, names, file.name)
    home = _home(file, read.pictures[0].file, pictures)
    items = [
        Item(picture.file, home / picture.file, truths=_truths(picture, classes), size=picture.size)
        for picture in read.pictures
    ]
    check_present(items, file)
    count = sum(len(item.truths) for item in items)
    origin = (
        f"{len(items)} picture{'s' * (len(items) != 1)} with {count} objects of"
        f" {len(set(classes.values()))} classes in {file.name}"
    )
    return LabelledSet("coco", origin, tuple(items))


def _annotations(path: Path) -> Path:
    """The JSON file itself, or the only one in a directory or its `annotations`."""
    if path.is_file():
        return path
    found = sorted([*path.glob("*.json"), *path.glob("annotations/*.json")])
    if len(found) != 1:
        what = "no" if not found else f"{len(found)} files of"
        raise Rejected(f"{path} holds {what} COCO JSON.", "Name the JSON file of the boxes.")
    return found[0]


def _categories(read: coco.Coco, names: Names, where: str) -> dict[int, int]:
    """Category id -> class index: by name, or in order of the ids where the model has no labels."""
    if names.labels:
        found = names.find_all(dict.fromkeys(read.categories.values()), where)
        return {identity: found[name] for identity, name in read.categories.items()}
    if names.classes is not None and len(read.categories) != names.classes:
        raise Rejected(
            f"{where} has {len(read.categories)} categories and the model {names.classes} classes, and no"
            " labels say which is which.",
            "Give the model's labels.",
        )
    return {identity: k for k, identity in enumerate(read.categories)}


def _home(file: Path, first: str, pictures: Path | None) -> Path:
    """The pictures' directory: what was said, or the first place beside the file that holds the first one."""
    if pictures is not None:
        return pictures
    split = file.stem.removeprefix("instances_")
    places = [
        file.parent,
        *(base / name for base in (file.parent, file.parent.parent) for name in ("images", split)),
    ]
    for place in places:
        if (place / first).is_file():
            return place
    raise Rejected(
        f"The pictures of {file.name} are not beside it: {first} was looked for in"
        f" {', '.join(map(str, places[:2]))} and {len(places) - 2} more places.",
        "Name their directory with --pictures DIR.",
    )


def _truths(picture: coco.Picture, classes: Mapping[int, int]) -> tuple[Truth, ...]:
    return tuple(
        Truth((o.x, o.y, o.x + o.width, o.y + o.height), classes[o.category], o.crowd, o.area)
        for o in picture.objects
    )


# --- arrays


def _npz(path: Path, contract: Contract, names: Names) -> LabelledSet:
    arrays = golden.read_npz(read_bytes(path, golden.MAX_UNPACKED_BYTES), f"labelled data {path.name}")
    ports = sources(contract)
    wanted = [*(port.name for port in ports), "labels"]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise Rejected(
            f"{path.name} must hold the arrays {', '.join(wanted)}; {missing[0]} is missing.",
            f"Write it with numpy.savez({path.name!r}, {wanted[0]}=..., labels=...).",
        )
    rows = {port.name: rows_of(contract, port, arrays[port.name], path.name) for port in ports}
    labels = _row_labels(arrays["labels"], names, path.name)
    counts = {**{name: len(values) for name, values in rows.items()}, "labels": len(labels)}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise Rejected(f"The arrays of {path.name} differ in their number of rows: {told}.")
    if not labels:
        raise Rejected(f"{path.name} holds no rows.")
    items = [Item(f"row {k}", row=k, label=label) for k, label in enumerate(labels)]
    return LabelledSet("arrays", _origin(items, "row", path), _bounded(items, path), rows)


def _row_labels(values: npt.NDArray[Any], names: Names, where: str) -> list[int]:
    if values.ndim != 1 or values.dtype.kind not in "iubU":
        raise Rejected(
            f"{where}: labels are {values.dtype} of shape {values.shape}; whole numbers or texts of shape"
            " (N,) are expected."
        )
    texts = [str(v) for v in values.tolist()] if values.dtype.kind == "U" else []
    if texts:
        found = names.find_all(dict.fromkeys(texts), where)
        return [found[text] for text in texts]
    indices = [int(v) for v in values]
    for extreme in (min(indices, default=0), max(indices, default=0)):
        names.index(str(extreme), where)
    return indices


# --- what they share


def _origin(items: Sequence[Item], what: str, path: Path) -> str:
    classes = len({item.label for item in items})
    return (
        f"{len(items)} {what}{'s' * (len(items) != 1)} of {classes} class{'es' * (classes != 1)}"
        f" in {path.name or path}"
    )


def _bounded(items: Sequence[Item], path: Path) -> tuple[Item, ...]:
    if len(items) > MAX_ITEMS:
        raise Rejected(f"{path} holds {len(items)} items; at most {MAX_ITEMS} are listed.")
    return tuple(items)
