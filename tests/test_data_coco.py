"""Reading COCO JSON: what is read, and one line for each thing that is wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from small_coco import save, small_coco

from sim_m2f.cli import main
from sim_m2f.data import catalog
from sim_m2f.data.coco import inspect_coco, read_coco, read_mask
from sim_m2f.errors import UserError


def test_reads_boxes_classes_and_images(tmp_path):
    data = read_coco(save(tmp_path, small_coco(tmp_path)), read_masks=False)
    assert data.category_ids == [3, 7, 90]
    assert data.class_names == ["a", "b", "c"]
    assert [image.id for image in data.images] == [11, 12, 15]
    first, second, third = data.images
    assert first.annotation_ids == [101, 102]
    np.testing.assert_array_equal(first.boxes, [[10, 20, 40, 40], [10, 20, 12, 40]])
    np.testing.assert_array_equal(first.labels, [2, 0])
    assert second.annotation_ids == [103, 106], "the crowd 104 and the empty box 105 are no targets"
    np.testing.assert_array_equal(second.boxes[1], [8, 30, 48, 64], "clipped to the image")
    assert third.boxes.shape == (0, 4)
    assert first.segmentations is None
    assert data.zero_area == 1
    assert data.has_annotations


def test_masks_agree_with_pycocotools(tmp_path, capsys):
    source = save(tmp_path, small_coco(tmp_path))
    reference = COCO(source.annotations)
    data = read_coco(source, read_masks=True)
    for image in data.images:
        for index, number in enumerate(image.annotation_ids):
            expected = reference.annToMask(reference.anns[number])
            assert expected.any()
            np.testing.assert_array_equal(read_mask(data, image, index), expected)


def test_a_json_without_annotations_is_a_test_set(tmp_path):
    content = small_coco(tmp_path)
    del content["annotations"]
    data = read_coco(save(tmp_path, content), read_masks=False)
    assert not data.has_annotations
    assert all(len(image.labels) == 0 for image in data.images)


def broken_annotation(**changes):
    return lambda content, folder: content["annotations"][0].update(changes)


def append_copy(key):
    return lambda content, folder: content[key].append(dict(content[key][0]))


def remove(key, name):
    return lambda content, folder: content[key][0].pop(name)


def replace_file(data: bytes):
    return lambda content, folder: (folder / "images/11.png").write_bytes(data)


def truncate(content, folder):
    path = folder / "images/11.png"
    path.write_bytes(path.read_bytes()[:2000])


def replace_by_folder(content, folder):
    (folder / "images/11.png").unlink()
    (folder / "images/11.png").mkdir()


# What is done to the set -> words that its one line must have.
BROKEN = {
    "missing image": (
        lambda _, folder: (folder / "images/11.png").unlink(),
        ["image id 11", "11.png", "missing"],
    ),
    "truncated image": (truncate, ["images/11.png", "cannot be decoded"]),
    "empty image file": (replace_file(b""), ["images/11.png", "not an image"]),
    "text instead of an image": (replace_file(b"hello"), ["images/11.png", "not an image"]),
    "folder instead of an image": (replace_by_folder, ["image id 11", "11.png", "folder"]),
    "another size": (
        lambda c, _: c["images"][2].update(height=91),
        ["images/15.png", "90 x 90", "90 x 91"],
    ),
    "NaN in a box": (broken_annotation(bbox=[1, math.nan, 3, 4]), ["annotation id 101", "not finite"]),
    "infinity in a box": (broken_annotation(bbox=[1, 2, math.inf, 4]), ["annotation id 101", "not finite"]),
    "negative box": (broken_annotation(bbox=[10, 10, -3, 4]), ["annotation id 101", "negative"]),
    "box outside": (broken_annotation(bbox=[70, 10, 12, 4]), ["annotation id 101", "80 x 60"]),
    "box left of the image": (broken_annotation(bbox=[-2, 10, 12, 4]), ["annotation id 101", "80 x 60"]),
    "three numbers": (broken_annotation(bbox=[1, 2, 3]), ["annotation id 101", "four numbers"]),
    "text in a box": (broken_annotation(bbox=["1", 2, 3, 4]), ["annotation id 101", "four numbers"]),
    "huge integer in a box": (
        broken_annotation(bbox=[10**400, 2.5, 3, 4]),
        ["annotation id 101", "too large"],
    ),
    "null box": (broken_annotation(bbox=None), ["annotation id 101", "four numbers"]),
    "no box": (remove("annotations", "bbox"), ["annotation id 101", "no bbox"]),
    "unknown category": (broken_annotation(category_id=4), ["annotation id 101", "category_id 4"]),
    "unknown image": (broken_annotation(image_id=99), ["annotation id 101", "image_id 99"]),
    "crowd of crowds": (broken_annotation(iscrowd="no"), ["annotation id 101", "iscrowd"]),
    "duplicate annotation": (append_copy("annotations"), ["annotation id 101", "more than once"]),
    "duplicate image": (append_copy("images"), ["image id 11", "more than once"]),
    "duplicate category": (append_copy("categories"), ["category id 90", "more than once"]),
    "annotation without id": (remove("annotations", "id"), ["annotations[0]", "no id"]),
    "annotation id as text": (broken_annotation(id="101"), ["annotations[0]", "'101'"]),
    "annotation is a number": (lambda c, _: c["annotations"].append(5), ["annotations[6]", "5"]),
    "category without name": (
        lambda content, _: content["categories"].append({"id": 4}),
        ["category id 4", "no name"],
    ),
    "image of no height": (lambda c, _: c["images"][2].update(height=0), ["image id 15", "height"]),
    "image without a name": (
        lambda c, _: c["images"][2].update(file_name=""),
        ["image id 15", "file_name"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_line_and_status_2(case, tmp_path, capsys):
    content = small_coco(tmp_path)
    damage, words = BROKEN[case]
    damage(content, tmp_path)
    source = save(tmp_path, content)
    status = main(["check", "--annotations", str(source.annotations), "--images", str(source.image_root)])
    lines = capsys.readouterr().out.splitlines()
    assert status == 2
    assert len(lines) == 2, "the problem and the summary"
    assert all(word in lines[0] for word in [str(tmp_path), *words]), lines[0]
    assert ";" in lines[0], "says what to do"
    assert "1 problems" in lines[1]


NOT_A_SET = {
    "no such file": (None, "no such file"),
    "empty file": (b"", "not JSON"),
    "broken JSON": (b'{"images": [', "not JSON"),
    "an image": (b"\x89PNG\r\n\x1a\n\xff", "not JSON"),
    "a list (a results file)": (b"[]", "a JSON list"),
    "a number": (b"3", "a JSON int"),
    "no images": (b'{"annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no list 'images'"),
    "images is an object": (b'{"images": {}, "categories": [{"id": 1, "name": "a"}]}', "no list 'images'"),
    "no categories": (b'{"images": [{"id": 1}], "categories": []}', "'categories' is empty"),
    "annotations is a text": (
        b'{"images": [1], "categories": [1], "annotations": "x"}',
        "no list 'annotations'",
    ),
}


@pytest.mark.parametrize("case", NOT_A_SET)
def test_a_file_that_is_no_data_set_is_one_line(case, tmp_path, capsys):
    data, words = NOT_A_SET[case]
    if data is not None:
        (tmp_path / "set.json").write_bytes(data)
    assert main(["check", "--annotations", str(tmp_path / "set.json"), "--images", str(tmp_path)]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    assert str(tmp_path / "set.json") in line
    assert words in line


def test_a_folder_in_place_of_the_json(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_coco(catalog.DatasetSource("set", tmp_path, tmp_path), read_masks=False)


def test_a_missing_folder_of_images_is_one_line(tmp_path):
    source = save(tmp_path, small_coco(tmp_path))
    source = catalog.DatasetSource("set", source.annotations, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere: no such folder of images") as error:
        read_coco(source, read_masks=False)
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_are_told_at_once_but_at_most_20(tmp_path):
    content = small_coco(tmp_path)
    content["annotations"] = [
        {"id": number, "image_id": 11, "category_id": 3, "bbox": [1, 1, -1, 1]} for number in range(1, 36)
    ]
    source = save(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_coco(source, read_masks=False)
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert all(f"{source.annotations}: annotation id {k}: " in line for k, line in enumerate(lines[:20], 1))
    assert lines[20] == "... and 15 more"
    assert len(inspect_coco(source, read_masks=False)[1]) == 35


SEGMENTATIONS = {
    "missing": (None, "is missing"),
    "a text": ("abc", "neither"),
    "a number": (5, "neither"),
    "empty": ([], "not a list of polygons"),
    "two points": ([[1, 2, 3, 4]], "not a list of polygons"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "not a list of polygons"),
    "NaN": ([[1, 2, 3, 4, 5, math.nan]], "not a list of polygons"),
    "huge integer": ([[1, 2, 3, 4, 5, 10**400]], "not a list of polygons"),
    "far away": ([[1, 2, 3, 4, 1e8, 1e8]], "far outside"),
    "no counts": ({"size": [60, 80]}, "neither"),
    "another size": ({"size": [80, 60], "counts": [4800]}, "[60, 80]"),
    "short counts": ({"size": [60, 80], "counts": [100, 20]}, "add up"),
    "short compressed counts": ({"size": [60, 80], "counts": "abc"}, "add up"),
    "empty compressed counts": ({"size": [60, 80], "counts": ""}, "add up"),
    "counts of another type": ({"size": [60, 80], "counts": 5}, "neither a list nor a string"),
}


@pytest.mark.parametrize("case", SEGMENTATIONS)
def test_a_broken_segmentation_is_told_unless_boxes_alone_are_read(case, tmp_path, capsys):
    segmentation, words = SEGMENTATIONS[case]
    content = small_coco(tmp_path)
    content["annotations"][0]["segmentation"] = segmentation
    source = save(tmp_path, content)
    arguments = ["check", "--annotations", str(source.annotations), "--images", str(source.image_root)]
    for flags in ([], ["--masks"])[not segmentation :]:  # without --masks it may be missing
        assert main([*arguments, *flags]) == 2
        line, _ = capsys.readouterr().out.splitlines()
        assert f"{source.annotations}: annotation id 101: segmentation " in line
        assert words in line
    assert read_coco(source, read_masks=False).images[0].segmentations is None


def test_images_in_folders_below_are_found(tmp_path):
    content = small_coco(tmp_path)
    (tmp_path / "images/day").mkdir()
    (tmp_path / "images/11.png").rename(tmp_path / "images/day/11.png")
    content["images"][0]["file_name"] = "day/11.png"
    content["images"][1]["file_name"] = "night/12.png"
    with pytest.raises(UserError) as error:
        read_coco(save(tmp_path, content), read_masks=False)
    (line,) = str(error.value).splitlines()
    assert "image id 12" in line


def test_check_takes_a_name_or_two_paths(capsys):
    for arguments in ([], ["shapes_val", "--images", "x"], ["--annotations", "x"]):
        assert main(["check", *arguments]) == 2
        assert "name of a data set, or both" in capsys.readouterr().err


def test_unknown_names_get_the_nearest_known_one():
    with pytest.raises(UserError, match="did you mean coco_2017_train"):
        catalog.find_source("coco_2017_trian")


def test_coco_is_found_in_its_folder_or_the_one_above(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    expected = Path("datasets/coco/annotations/instances_val2017.json")
    assert catalog.find_source("coco_2017_val").annotations == expected
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert catalog.find_source("coco_2017_val").image_root == tmp_path / "coco/val2017"
    (tmp_path / "annotations").mkdir()
    assert catalog.find_source("coco_2017_val").image_root == tmp_path / "val2017"


@pytest.mark.usefixtures("coco_root")
@pytest.mark.parametrize("name", ["coco_2017_train", "coco_2017_val"])
@pytest.mark.slow
def test_real_coco_agrees_with_pycocotools(name, capsys):
    source = catalog.find_source(name)
    reference = COCO(source.annotations)
    data = read_coco(source, read_masks=True)
    assert [image.id for image in data.images] == list(reference.imgs)
    content = json.loads(source.annotations.read_text())
    targets = [item for item in content["annotations"] if not item["iscrowd"] and min(item["bbox"][2:]) > 0]
    assert sum(len(image.labels) for image in data.images) == len(targets)
    for image in data.images:
        for index, number in enumerate(image.annotation_ids):
            annotation = reference.anns[number]
            assert data.category_ids[image.labels[index]] == annotation["category_id"]
            x, y, w, h = annotation["bbox"]
            np.testing.assert_allclose(image.boxes[index], [x, y, x + w, y + h], atol=1)
            np.testing.assert_array_equal(read_mask(data, image, index), reference.annToMask(annotation))
