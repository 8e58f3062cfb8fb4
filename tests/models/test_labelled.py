"""Labelled data in its four forms, and what each says when it is wrong."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_models import coco
from edgeward_models.class_names import Names
from edgeward_models.items import LabelledSet
from edgeward_models.labelled import open_labelled, read_table
from edgeward_wire.contract import AudioSpec, Contract, ImageSpec, InputPort, OutputPort, Task
from edgeward_wire.errors import Rejected
from runtime import builders

LABELS = ("red", "green", "blue")


def contract(task: Task = "classification", size: int = 32) -> Contract:
    image = ImageSpec(width=size, height=size)
    return Contract(
        task=task,
        inputs=(
            InputPort(name="image", dtype="float32", shape=(1, 3, size, size), bind="source", image=image),
        ),
        outputs=(OutputPort(name="logits", dtype="float32", shape=(1, 3)),),
    )


ROWS = Contract(
    task="classification",
    inputs=(InputPort(name="x", dtype="float32", shape=(1, 4), bind="source"),),
    outputs=(OutputPort(name="y", dtype="float32", shape=(1, 3)),),
)


def open_(path: Path, labels: tuple[str, ...] = LABELS) -> LabelledSet:
    return open_labelled(path, contract(), labels, len(LABELS))


def folders(root: Path, *names: str) -> Path:
    for k, name in enumerate(names):
        builders.picture_file(root / name / "a.png", LABELS[k % 3])
        builders.picture_file(root / name / "b.png", LABELS[k % 3])
    return root


# --- folders


@pytest.mark.parametrize("names", [("red", "green", "blue"), ("0", "1", "2"), ("Red", "GREEN", "2")])
def test_a_folder_is_a_class_by_label_or_by_index(tmp_path: Path, names: tuple[str, ...]) -> None:
    found = open_(folders(tmp_path / "data", *names))
    assert found.kind == "folders"
    assert found.origin == "6 pictures of 3 classes in data"
    by_name = {item.name.partition("/")[0]: item.label for item in found.items}
    assert by_name == dict(zip(names, (0, 1, 2), strict=True))


def test_pictures_come_through_the_device_s_preprocessing(tmp_path: Path) -> None:
    for sample in open_(folders(tmp_path, "red", "green")).stream(contract()):
        assert sample.size == (64, 48)
        assert sample.feeds["image"].shape == (1, 3, 32, 32)
        assert sample.feeds["image"][0].mean(axis=(1, 2)).argmax() == sample.item.label


def test_some_of_them_are_the_same_ones_each_time(tmp_path: Path) -> None:
    whole = open_(folders(tmp_path / "data", "red", "green", "blue"))
    some = whole.choose(4, seed=3)
    assert some.items == whole.choose(4, seed=3).items != whole.choose(4, seed=4).items
    assert len(some.items) == len(set(some.items)) == 4
    assert some.origin == "4 of the 6 pictures of 3 classes in data, drawn with seed 3"
    assert whole.choose(99) is whole


def test_unknown_names_are_named_with_what_is_near(tmp_path: Path) -> None:
    root = folders(tmp_path / "data", "gren", "red", "mauve", "pink", "taupe")
    with pytest.raises(Rejected) as caught:
        open_(root)
    assert caught.value.what == (
        "data: the model has no label 'gren' (near: 'green'), nor 'mauve', 'pink' and 1 more."
    )
    assert caught.value.next_step == "Use its 3 labels as they are written, or indices 0 to 2."


def test_indices_are_held_against_the_number_of_classes(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="class 3 is out of range: the model has 0 to 2"):
        open_(folders(tmp_path, "3"))


def test_a_label_that_occurs_twice_needs_its_index(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="'red' 2 times, as classes 0 and 2") as caught:
        open_(folders(tmp_path, "red"), ("red", "green", "red"))
    assert "index" in caught.value.next_step


@pytest.mark.parametrize("inside", [(), ("empty",)])
def test_an_empty_directory_says_what_it_should_hold(tmp_path: Path, inside: tuple[str, ...]) -> None:
    for name in inside:
        (tmp_path / name).mkdir()
    with pytest.raises(Rejected, match="one folder a class"):
        open_(tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    root = folders(tmp_path, "red")
    (root / "red/b.png").write_bytes(b"no picture")
    with pytest.raises(Rejected, match=r"red/b\.png is not a picture"):
        list(open_(root).stream(contract()))


# --- tables


@pytest.mark.parametrize("text", ["file,label\na.png,red\nb.png,1\n", "a.png\tred\nb.png\tgreen\n\n"])
def test_a_table_of_files_and_labels(tmp_path: Path, text: str) -> None:
    for name in ("a.png", "b.png"):
        builders.picture_file(tmp_path / name, "red")
    table = tmp_path / ("t.tsv" if "\t" in text else "t.csv")
    table.write_text(text)
    assert [(i.name, i.label) for i in open_(table).items] == [("a.png", 0), ("b.png", 1)]


def test_a_table_s_faults_are_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    builders.picture_file(tmp_path / "a.png", "red")

    def why(text: str) -> str:
        table.write_text(text)
        with pytest.raises(Rejected) as caught:
            open_(table)
        return str(caught.value)

    assert "lists 5 of 6 files that are not there: 1.png, 2.png, 3.png and 2 more" in why(
        "a.png,red\n" + "".join(f"{k}.png,red\n" for k in range(1, 6))
    )
    assert "holds no rows" in why("file,label\n")
    assert "line 2: a row has a file and a label, not 3 cells" in why("a.png,red\na.png,tench, Tinca\n")
    assert "lists a.png twice" in why("a.png,red\na.png,blue\n")
    assert "no label 'purple'" in why("a.png,purple\n")
    assert "t.csv: class 7 is out of range" in why("a.png,7\n")
    table.write_bytes(b"\xff\xfe,a")
    with pytest.raises(Rejected, match="not UTF-8"):
        open_(table)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_rejected(raw: bytes) -> None:
    try:
        rows = read_table(raw, "t.csv")
    except Rejected:
        return
    assert rows
    assert all(file and label for file, label in rows)


# --- arrays


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_rows_with_labels(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    for labels in (np.array([2, 0, 1]), np.array(["blue", "red", "green"])):
        found = open_labelled(npz(tmp_path / "d.npz", x=x, labels=labels), ROWS, LABELS, 3)
        rows = list(found.stream(ROWS))
        assert [row.item.label for row in rows] == [2, 0, 1]
        assert np.array_equal(np.concatenate([row.feeds["x"] for row in rows]), x)


def test_the_faults_of_arrays_are_named(tmp_path: Path) -> None:
    x = np.zeros((3, 4), np.float32)

    def why(**arrays: Any) -> str:
        with pytest.raises(Rejected) as caught:
            open_labelled(npz(tmp_path / "d.npz", **arrays), ROWS, LABELS, 3)
        return str(caught.value)

    assert "labels is missing" in why(x=x)
    assert "x 3, labels 2" in why(x=x, labels=np.array([0, 1]))
    assert "class 3 is out of range" in why(x=x, labels=np.array([0, 1, 3]))
    assert "class -1 is out of range" in why(x=x, labels=np.array([0, 1, -1]))
    assert "labels are float64" in why(x=x, labels=np.array([0.5, 1, 2]))
    assert "(3, 5)" in why(x=np.zeros((3, 5), np.float32), labels=np.arange(3))
    assert "holds no rows" in why(x=x[:0], labels=np.zeros(0, np.int64))
    assert "not a readable .npz" in why(x=x, labels=np.array([{}, 1, 2], object))


# --- boxes


def coco_file(path: Path, **changes: Any) -> Path:
    document = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 64, "height": 48},
            {"id": 9, "file_name": "b.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 30, "bbox": [4, 5, 10, 20], "area": 150.5},
            {"id": 2, "image_id": 7, "category_id": 10, "bbox": [0, 0, 2, 2], "iscrowd": 1},
        ],
        "categories": [{"id": 30, "name": "blue"}, {"id": 10, "name": "red"}],
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def open_boxes(path: Path, labels: tuple[str, ...] = LABELS, **how: Any) -> LabelledSet:
    return open_labelled(path, contract("detection"), labels, len(labels) or None, **how)


@pytest.mark.parametrize("where", ["", "images", "../val", "../images"])
def test_boxes_belong_to_pictures_and_classes(tmp_path: Path, where: str) -> None:
    file = coco_file(tmp_path / "annotations/instances_val.json")
    for name in ("a.png", "b.png"):
        builders.picture_file((file.parent / where).resolve() / name, "red")
    found = open_boxes(file)
    assert found.origin == "2 pictures with 2 objects of 2 classes in instances_val.json"
    first, second = found.items
    assert [(t.box, t.class_index, t.crowd, t.area) for t in first.truths] == [
        ((4, 5, 14, 25), 2, False, 150.5),
        ((0, 0, 2, 2), 0, True, 4),
    ]
    assert second.truths == ()
    assert [s.size for s in found.stream(contract("detection"))] == [(64, 48)] * 2
    # Without labels, the categories in order of their ids are the classes.
    assert [t.class_index for t in open_boxes(file, ()).items[0].truths] == [1, 0]
    assert len(open_boxes(tmp_path).items) == 2


def test_pictures_elsewhere_are_named_or_asked_for(tmp_path: Path) -> None:
    file = coco_file(tmp_path / "ann.json")
    with pytest.raises(Rejected, match=r"not beside it: a\.png") as caught:
        open_boxes(file)
    assert "--pictures" in caught.value.next_step
    builders.picture_file(tmp_path / "far/a.png", "red")
    with pytest.raises(Rejected, match=r"1 of 2 files that are not there: b\.png"):
        open_boxes(file, pictures=tmp_path / "far")


def test_a_picture_of_another_size_is_not_the_one_that_was_annotated(tmp_path: Path) -> None:
    file = coco_file(tmp_path / "ann.json")
    builders.picture_file(tmp_path / "a.png", "red", width=48, height=64)
    builders.picture_file(tmp_path / "b.png", "red")
    with pytest.raises(Rejected, match=r"a\.png is 48 x 64, but its annotations are for 64 x 48"):
        list(open_boxes(file).stream(contract("detection")))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"images": None}, "no list 'images'"),
        ({"images": []}, "annotations\\[0\\] is on picture 7, which is not listed"),
        ({"annotations": []}, "holds no boxes"),
        ({"annotations": [{"image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "category 5, which"),
        ({"annotations": [{"image_id": 7, "category_id": 10, "bbox": [0, 0, 1]}]}, "bbox is not"),
        ({"annotations": [{"image_id": 7, "category_id": 10, "bbox": [0, 0, -1, 1]}]}, "negative side"),
        ({"annotations": [{"image_id": "7", "category_id": 10}]}, "image_id is not a whole number"),
        ({"categories": [{"id": 10, "name": "rad"}, {"id": 30, "name": "blue"}]}, "'rad' \\(near: 'red'\\)"),
        ({"images": [{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]}, "the same id"),
    ],
)
def test_the_faults_of_annotations_are_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(Rejected, match=why):
        open_boxes(coco_file(tmp_path / "ann.json", **changes))


def test_what_is_not_json_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", "[" * 100_000, ""):
        (tmp_path / "ann.json").write_text(text)
        with pytest.raises(Rejected, match=r"ann\.json is not (COCO )?JSON"):
            open_boxes(tmp_path / "ann.json")
    with pytest.raises(Rejected, match="holds no COCO JSON"):
        open_boxes(folders(tmp_path / "pictures", "red"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["images", "annotations", "categories", "id", "name", "file_name", "bbox"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["images", "annotations", "categories"]), json_values))
def test_any_json_is_coco_or_rejected(document: dict[str, Any]) -> None:
    try:
        read = coco.parse(json.dumps(document).encode(), "x.json")
    except Rejected:
        return
    known = {o.category for picture in read.pictures for o in picture.objects}
    assert known <= set(read.categories)


# --- what is none of them


def test_what_is_no_labelled_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="no labelled data at"):
        open_(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(Rejected, match="no labelled data that is known"):
        open_(tmp_path / "x.txt")
    with pytest.raises(Rejected, match="holds boxes, but the task is classification"):
        open_(coco_file(tmp_path / "x.json"))


@given(st.text(max_size=12), st.lists(st.text(max_size=6), max_size=5))
def test_a_name_is_one_class_or_refused(name: str, labels: list[str]) -> None:
    names = Names(labels, len(labels))
    try:
        found = names.find(name, "x")
    except Rejected:
        return
    assert found is None or 0 <= found < len(labels)
    if name in labels:
        assert found == labels.index(name)


# --- sounds


def wav(path: Path, hertz: float, seconds: float, rate: int = 8000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone * 20_000).astype("<i2").tobytes())
    return path


def test_sounds_lie_in_folders_too(tmp_path: Path) -> None:
    spec = AudioSpec(rate=16000, window=8000, hop=4000)
    heard = Contract(
        task="audio-classification",
        inputs=(InputPort(name="x", dtype="float32", shape=(1, 8000), bind="source", audio=spec),),
        outputs=(OutputPort(name="y", dtype="float32", shape=(1, 2)),),
    )
    wav(tmp_path / "data/low/long.wav", 200, 2.0)
    wav(tmp_path / "data/high/short.wav", 1000, 0.1)
    found = open_labelled(tmp_path / "data", heard, ("low", "high"), 2)
    assert found.origin == "2 sounds of 2 classes in data"
    for sample in found.stream(heard):
        window = sample.feeds["x"]
        assert window.shape == (1, 8000)
        loudest = int(np.abs(np.fft.rfft(window[0])).argmax()) * 2  # 2 Hz a bin at 16 kHz
        assert abs(loudest - (200, 1000)[sample.item.label]) < 20
        silent = not window[0, 4000:].any()
        assert silent == (sample.item.label == 1)
    with pytest.raises(Rejected, match="labelled sounds lie in one folder a class"):
        open_labelled(folders(tmp_path / "pictures", "low"), heard, ("low", "high"), 2)
