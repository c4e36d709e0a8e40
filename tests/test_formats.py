"""What is written for other tools is read back, by us and by another library, and nothing is lost."""

import csv
import json
import shutil
import time
import tracemalloc
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
import yaml
from coloured_coco import CATEGORIES, write_coloured
from conftest import half_written, held
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import gaussian_filter

from sim_m2f.cli import main
from sim_m2f.data.coco import clipped_xyxy
from sim_m2f.data.formats.registry import WRITERS
from sim_m2f.data.polygons import joined, mask_polygons
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.data.split import split_images


def rasterised(polygons: list, height: int, width: int) -> np.ndarray:
    flat = [np.ravel(polygon).tolist() for polygon in polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, height, width))).astype(bool)


@pytest.mark.parametrize("seed", range(30))
def test_polygons_are_exact(seed):
    generator = np.random.default_rng(seed)
    height, width = map(int, generator.integers(3, 120, 2))
    mask = gaussian_filter(generator.normal(size=(height, width)), generator.uniform(0, 5)) > 0
    mask[height // 2, width // 2] = True
    polygons = mask_polygons(mask)  # with holes, parts that touch at corners, and the border
    np.testing.assert_array_equal(rasterised(polygons, height, width), mask)
    np.testing.assert_array_equal(rasterised([joined(polygons)], height, width), mask)


def test_an_empty_mask_has_no_polygon():
    assert mask_polygons(np.zeros((5, 7), bool)) == []


@pytest.fixture
def data(tmp_path) -> tuple[Path, dict]:
    """A folder with images and set.json, whose rings have holes; its content."""
    folder = tmp_path / "set"
    return folder, write_coloured(folder)


def convert(folder: Path, output: Path, path: Path, *more: str) -> dict:
    """The COCO JSON that ``convert`` makes of annotations."""
    arguments = ["--annotations", str(path), "--images", str(folder), "--output", str(output)]
    assert main(["convert", *arguments, *more]) == 0
    return json.loads((output / "annotations.json").read_text())


def by_image(content: dict) -> dict[str, list[dict]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[dict]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        found[names[annotation["image_id"]]].append(annotation)
    return {name: own for name, own in found.items() if own}


def test_what_a_killed_call_left_half_written_goes_unless_one_is_at_work(data, tmp_path, capsys):
    folder, out = data[0], tmp_path / "out"
    written = "annotations.json", "val.json", "cvat.xml", "yolo/labels/5.txt", "labelme/a/5.json", "png/5.png"
    left = half_written(*(out / name for name in written))
    others = [out / ".annotations.json.kept", out / ".notes.txt.abcdefgh"]
    for file in others:
        file.touch()
    with held(out / ".lock"):
        given = ["--annotations", str(folder / "set.json"), "--images", str(folder), "--output", str(out)]
        assert main(["convert", *given]) == 2
        assert f"{out}: another process is at work here" in capsys.readouterr().err
        assert all(file.exists() for file in left)
    convert(folder, out, folder / "set.json")
    assert {file for file in out.rglob("*") if file.is_file()} == {
        *others,
        *(out / name for name in (".lock", "annotations.json")),
    }


def decoded(annotation: dict, height: int, width: int) -> np.ndarray:
    shape = annotation["segmentation"]
    return (
        coco_mask.decode(shape).astype(bool) if isinstance(shape, dict) else rasterised(shape, height, width)
    )


FILES = {"yolo": "yolo", "labelme": "labelme", "cvat": "cvat.xml", "labelstudio": "labelstudio.json"}


@pytest.mark.parametrize("name", FILES)
def test_masks_and_boxes_survive(data, tmp_path, name):
    folder, content = data
    convert(folder, tmp_path / "out", folder / "set.json", "--format", name)
    back = convert(folder, tmp_path / "back", tmp_path / "out" / FILES[name], "--from", name)
    sizes = {image["file_name"]: (image["height"], image["width"]) for image in content["images"]}
    names = {category["id"]: category["name"] for category in back["categories"]}
    ours, theirs = by_image(content), by_image(back)
    assert ours.keys() == theirs.keys()
    for file, annotations in ours.items():
        for one, other in zip(annotations, theirs[file], strict=True):
            assert names[other["category_id"]] == CATEGORIES[one["category_id"]]
            np.testing.assert_allclose(other["bbox"], one["bbox"], atol=0.01)
            np.testing.assert_array_equal(decoded(other, *sizes[file]), decoded(one, *sizes[file]))


@pytest.mark.parametrize("name", FILES)
def test_boxes_without_masks_survive(data, tmp_path, name):
    folder, content = data
    for annotation in content["annotations"]:
        del annotation["segmentation"]
        annotation["bbox"] = [value + 0.25 for value in annotation["bbox"]]
    first = content["annotations"][0]
    first["bbox"] = [-0.5, -0.5, first["bbox"][2], first["bbox"][3]]
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    (folder / "boxes.json").write_text(json.dumps(content))
    convert(folder, tmp_path / "out", folder / "boxes.json", "--format", name)
    back = by_image(convert(folder, tmp_path / "back", tmp_path / "out" / FILES[name], "--from", name))
    for file, annotations in by_image(content).items():
        for one, other in zip(annotations, back[file], strict=True):
            box = clipped_xyxy(other["bbox"], *sizes[one["image_id"]])  # as it is: nothing reaches out
            np.testing.assert_allclose(corners(other["bbox"]), box, rtol=0, atol=1e-4)
            np.testing.assert_allclose(box, clipped_xyxy(one["bbox"], *sizes[one["image_id"]]), atol=0.01)
            assert "segmentation" not in other


def corners(bbox: list[float]) -> list[float]:
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def read_by_ultralytics(text: str) -> np.ndarray:
    """(N, 4) boxes xyxy in shares of a text of YOLO: ``verify_image_label`` and ``segments2boxes`` of 8.3."""
    lines = [line.split() for line in text.strip().splitlines() if line]
    if any(len(line) > 6 for line in lines):
        segments = [np.array(line[1:], np.float32).reshape(-1, 2) for line in lines]
        found = np.array([[*points.min(0), *points.max(0)] for points in segments])
    else:
        numbers = np.array(lines, np.float32)
        assert numbers.shape == (len(lines), 5)
        found = np.concatenate(
            [numbers[:, 1:3] - numbers[:, 3:] / 2, numbers[:, 1:3] + numbers[:, 3:] / 2], 1
        )
        assert numbers[:, 1:].max() <= 1
    assert found.min() > -1e-6
    assert found.max() < 1 + 1e-6
    return found


@pytest.mark.parametrize("masks", [0, 1, 2])
def test_ultralytics_reads_boxes_beside_polygons(data, tmp_path, masks):
    folder, content = data
    for number, annotation in enumerate(content["annotations"]):
        if number % 2 >= masks:
            del annotation["segmentation"]
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x - 0.5, y - 0.5, width + 1, height + 1]
    (folder / "some.json").write_text(json.dumps(content))
    convert(folder, tmp_path / "out", folder / "some.json", "--format", "yolo")
    for image in content["images"]:
        own = [each["bbox"] for each in content["annotations"] if each["image_id"] == image["id"]]
        size = image["height"], image["width"]
        text = (tmp_path / f"out/yolo/labels/{image['id']}.txt").read_text()
        if own:
            found = read_by_ultralytics(text) * (size[::-1] * 2)
            np.testing.assert_allclose(found, [clipped_xyxy(box, *size) for box in own], atol=0.01)


def test_images_of_yolo_lie_beside_its_names(data, tmp_path):
    folder, _ = data
    convert(folder, tmp_path, folder / "set.json", "--format", "yolo")
    content = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())
    assert "path" not in content  # which Ultralytics takes from where it runs, not from the file's folder
    assert content["train"] == content["val"] == "images"


@pytest.mark.parametrize("name", ["labelme", "cvat", "labelstudio"])
def test_a_box_that_is_larger_than_its_mask_survives(tmp_path, name):
    mask = np.zeros((100, 100), np.uint8)
    mask[40:50, 30:35] = mask[40:60, 40:50] = 1  # two parts
    (tmp_path / "set/sub").mkdir(parents=True)
    Image.new("RGB", (100, 100)).save(tmp_path / "set/sub/1.png")
    (shape,) = encode_masks(mask[None])
    common = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9, "segmentation": shape}
    content = {
        "images": [{"id": 1, "file_name": "sub/1.png", "width": 100, "height": 100}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "bbox": [10.5, 20, 60, 60], **common},
            {"id": 2, "bbox": [30, 40, 20, 20], **common},
        ],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    convert(tmp_path / "set", tmp_path / "out", tmp_path / "set.json", "--format", name)
    back = convert(tmp_path / "set", tmp_path / "back", tmp_path / "out" / FILES[name], "--from", name)
    assert list(by_image(back)) == ["sub/1.png"]
    boxes = [annotation["bbox"] for annotation in back["annotations"]]
    np.testing.assert_allclose(boxes, [[10.5, 20, 60, 60], [30, 40, 20, 20]], atol=0.01)
    for annotation in back["annotations"]:
        np.testing.assert_array_equal(decoded(annotation, 100, 100), mask)


def test_a_score_that_is_not_known_is_written_for_label_studio(data, tmp_path):
    folder, content = data
    content["annotations"][0]["score"] = None
    content["annotations"][1]["score"] = 0.5
    (folder / "set.json").write_text(json.dumps(content))
    convert(folder, tmp_path / "out", folder / "set.json", "--format", "labelstudio")
    tasks = json.loads((tmp_path / "out/labelstudio.json").read_text())
    scores = [each["score"] for task in tasks for each in task["predictions"][0]["result"]]
    assert sorted(scores) == [0.0] * (len(scores) - 1) + [0.5]


def test_polygons_of_coco(data, tmp_path):
    folder, content = data
    convert(folder, tmp_path, folder / "set.json", "--format", "polygons")
    back = json.loads((tmp_path / "masks_polygons.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    assert back["images"] == content["images"]
    for one, other in zip(content["annotations"], back["annotations"], strict=True):
        assert (one["id"], one["bbox"]) == (other["id"], other["bbox"])
        size = sizes[one["image_id"]]
        np.testing.assert_array_equal(decoded(other, *size), decoded(one, *size))


def test_instance_maps(data, tmp_path):
    folder, content = data
    convert(folder, tmp_path, folder / "set.json", "--format", "png")
    owners = {each["file"]: each for each in json.loads((tmp_path / "png/instances.json").read_text())}
    for image in content["images"]:
        own = owners[f"{image['id']}.png"]
        numbers = np.asarray(Image.open(tmp_path / "png" / own["file"]))
        assert numbers.shape == (image["height"], image["width"])
        masks = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        assert own["annotation_ids"] == [each["id"] for each in masks]
        covered = np.zeros(numbers.shape, bool)
        for number, annotation in enumerate(masks, start=1):
            mask = decoded(annotation, *numbers.shape)
            covered |= mask
            assert (mask[numbers == number]).all()
        np.testing.assert_array_equal(numbers > 0, covered)


def test_instance_maps_hold_few_masks_at_a_time(tmp_path):
    side, shape = 400, [[5, 5, 25, 5, 25, 25, 5, 25]]
    image = {"id": 1, "file_name": "x.png", "width": side, "height": side}
    own = [{"id": i, "bbox": [5, 5, 20, 20], "segmentation": shape} for i in range(1, 201)]
    tracemalloc.start()
    WRITERS["png"].write(tmp_path, [{"id": 1, "name": "cat"}], [(image, own)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * side**2


def test_globox_reads_what_is_written(data, tmp_path):
    globox = pytest.importorskip("globox")
    folder, content = data
    convert(folder, tmp_path, folder / "set.json", "--format", "labelme,yolo")
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))
    convert(folder, tmp_path, folder / "boxes.json", "--format", "cvat")
    read = {
        "labelme": globox.AnnotationSet.from_labelme(tmp_path / "labelme", include_poly=True),
        "yolo": globox.AnnotationSet.from_yolo_seg(
            tmp_path / "yolo/labels", image_folder=folder, image_extension=".png"
        ),
        "cvat": globox.AnnotationSet.from_cvat(tmp_path / "cvat.xml"),
    }
    for name, found in read.items():
        for file, annotations in by_image(content).items():
            boxes = sorted(tuple(box.ltrb) for box in found[file].boxes)
            expected = sorted((x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in annotations))
            np.testing.assert_allclose(boxes, expected, atol=0.01, err_msg=name)


@pytest.fixture
def large(data, tmp_path) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """The set ten times as large, so that a line of pixels along an outline is little, and written in every
    format to tmp_path/out; its folder, and its masks by file and class.
    """
    folder, content = tmp_path / "large", data[1]
    folder.mkdir()
    masks: dict[str, dict[str, np.ndarray]] = {}
    for image in content["images"]:
        image["height"], image["width"] = 10 * image["height"], 10 * image["width"]
        Image.new("RGB", (image["width"], image["height"])).save(folder / image["file_name"])
        masks[image["file_name"]] = {}
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        mask = np.kron(coco_mask.decode(annotation["segmentation"]), np.ones((10, 10), np.uint8))
        (annotation["segmentation"],) = encode_masks(mask[None])
        annotation["bbox"] = [10 * value for value in annotation["bbox"]]
        label = CATEGORIES[annotation["category_id"]]
        masks[names[annotation["image_id"]]][label] = mask.astype(bool)
    (folder / "set.json").write_text(json.dumps(content))
    convert(folder, tmp_path / "out", folder / "set.json", "--format", ",".join(FILES))
    return folder, masks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labelme", "yolo"])
def test_supervision_reads_masks(large, tmp_path, name):
    dataset = pytest.importorskip("supervision").DetectionDataset
    (folder, masks), out = large, tmp_path / "out"
    if name == "labelme":
        read = dataset.from_labelme(str(folder), str(out / "labelme"))
    else:
        read = dataset.from_yolo(str(folder), str(out / "yolo/labels"), str(out / "yolo/data.yaml"), True)
    for path, _, found in read:
        expected = masks[Path(path).name]
        assert sorted(read.classes[label] for label in found.class_id) == sorted(expected)
        for label, mask in zip(found.class_id, found.mask if expected else [], strict=True):
            truth = expected[read.classes[label]]
            assert (mask & truth).sum() / (mask | truth).sum() > 0.98


@pytest.mark.slow
def test_datumaro_reads_masks_of_cvat(large, tmp_path):
    datumaro = pytest.importorskip("datumaro")
    folder, masks = large
    shutil.copytree(folder, tmp_path / "task/images")
    shutil.copy(tmp_path / "out/cvat.xml", tmp_path / "task")
    read = datumaro.Dataset.import_from(str(tmp_path / "task"), "cvat")
    names = [category.name for category in read.categories()[datumaro.AnnotationType.label]]
    for item in read:
        found = {names[each.label]: each.image.astype(bool) for each in item.annotations}
        expected = masks[f"{item.id}.png"]
        assert found.keys() == expected.keys()
        for label, mask in found.items():
            np.testing.assert_array_equal(mask, expected[label])


@pytest.mark.slow
def test_label_studio_converter_reads_masks(large, tmp_path):
    converter = pytest.importorskip("label_studio_converter")
    _, masks = large
    tasks = json.loads((tmp_path / "out/labelstudio.json").read_text())
    for number, task in enumerate(tasks):
        task["id"] = number
        task["annotations"] = [each | {"id": number} for each in task.pop("predictions")]  # all accepted
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in CATEGORIES.values())
    control = f'<PolygonLabels name="label" toName="image">{labels}</PolygonLabels>'
    interface = f'<View><Image name="image" value="$image"/>{control}</View>'
    export = converter.Converter(interface, str(tmp_path), download_resources=False)
    export.convert_to_coco(str(tmp_path / "tasks.json"), str(tmp_path / "export"), is_dir=False)
    read = json.loads((tmp_path / "export/result.json").read_text())
    names = {category["id"]: category["name"] for category in read["categories"]}
    files = {image["id"]: image["file_name"].rpartition("=")[2] for image in read["images"]}
    assert len(read["annotations"]) == sum(map(len, masks.values()))
    for annotation in read["annotations"]:
        truth = masks[files[annotation["image_id"]]][names[annotation["category_id"]]]
        np.testing.assert_array_equal(decoded(annotation, *truth.shape), truth)


def test_voc_and_csv(data, tmp_path):
    folder, content = data
    voc = tmp_path / "voc"
    voc.mkdir()
    sizes = {image["file_name"]: image for image in content["images"]}
    with (tmp_path / "boxes.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["FileName", "xmin", "ymin", "xmax", "ymax", "class"])
        for name, annotations in by_image(content).items():
            root = ElementTree.Element("annotation")
            ElementTree.SubElement(root, "filename").text = name
            size = ElementTree.SubElement(root, "size")
            for key in ("width", "height"):
                ElementTree.SubElement(size, key).text = str(sizes[name][key])
            for annotation in annotations:
                x, y, w, h = annotation["bbox"]
                label, corners = CATEGORIES[annotation["category_id"]], (x, y, x + w, y + h)
                table.writerow([name, *corners, label])
                item = ElementTree.SubElement(root, "object")
                ElementTree.SubElement(item, "name").text = label
                box = ElementTree.SubElement(item, "bndbox")
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                    ElementTree.SubElement(box, key).text = str(value)
            ElementTree.ElementTree(root).write(voc / f"{name}.xml")
    for kind, path in (("voc", voc), ("csv", tmp_path / "boxes.csv")):
        back = convert(folder, tmp_path / "out" / kind, path, "--from", kind)
        names = {category["id"]: category["name"] for category in back["categories"]}
        for file, annotations in by_image(back).items():
            for one, other in zip(by_image(content)[file], annotations, strict=True):
                assert CATEGORIES[one["category_id"]] == names[other["category_id"]]
                np.testing.assert_allclose(one["bbox"], other["bbox"])


HEAD = "image,label,xmin,ymin,xmax,ymax\n"
TABLES = {
    "semicolons": (HEAD.replace(",", ";") + "5.png;disc;1;2;3;4\n", "columns are separated by ';'; separate"),
    "tabs": (HEAD.replace(",", "\t") + "5.png\tdisc\t1\t2\t3\t4\n", "columns are separated by '\\t'"),
    "names alone": (HEAD, "has no box below the names of its columns"),
    "a fault below blank lines": (HEAD + "\n\n5.png,disc,1,2,3,x\n", "table.csv:4: is no box"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_a_fault_is_one_line(data, tmp_path, capsys, name):
    text, said = TABLES[name]
    (tmp_path / "table.csv").write_text(text)
    paths = ["--annotations", str(tmp_path / "table.csv"), "--images", str(data[0])]
    assert main(["convert", "--from", "csv", *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_blanks_behind_the_commas_of_a_table(data, tmp_path):
    rows = "5.png,disc,1,2,3,4\n5.png, disc, 5, 6, 7, 8\n 5.png , ring , 1 , 2 , 3 , 4\n"
    (tmp_path / "table.csv").write_text(HEAD.replace(",", ", ") + rows)
    back = convert(data[0], tmp_path / "out", tmp_path / "table.csv", "--from", "csv")
    assert [each["category_id"] for each in back["annotations"]] == [1, 1, 2]
    assert [each["name"] for each in back["categories"]] == ["disc", "ring"]
    assert len(back["images"]) == 1


@pytest.mark.parametrize("character", ["\1", "\x1b", "\x7f", "\uffff"])
def test_names_that_xml_does_not_take_are_refused(data, tmp_path, capsys, character):
    folder, content = data
    content["categories"][0]["name"] = f"a{character}b"
    (folder / "set.json").write_text(json.dumps(content))
    paths = ["--annotations", str(folder / "set.json"), "--images", str(folder)]
    assert main(["convert", *paths, "--format", "cvat", "--output", str(tmp_path / "out")]) == 2
    assert "not a text of one line" in capsys.readouterr().err
    content["categories"][0]["name"] = "a\tb"
    (folder / "set.json").write_text(json.dumps(content))
    assert main(["convert", *paths, "--format", "cvat", "--output", str(tmp_path / "out")]) == 0
    assert ElementTree.parse(tmp_path / "out/cvat.xml").getroot().tag == "annotations"


def test_a_turned_rectangle_of_label_studio(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a b.png")
    value = {"x": 50, "y": 20, "width": 20, "height": 20, "rotation": 90, "rectanglelabels": ["cat"]}
    result = {"type": "rectanglelabels", "original_width": 200, "original_height": 100, "value": value}
    task = {
        "id": 7,
        "data": {"image": "/data/upload/1/3f2a09bc-a%20b.png"},
        "annotations": [{"result": [result]}],
    }
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    back = convert(tmp_path, tmp_path / "out", tmp_path / "tasks.json", "--from", "labelstudio")
    assert back["images"][0]["file_name"] == "a b.png"
    # 40 x 20 pixels at (100, 20), turned clockwise about that corner: 20 x 40 to its left, downwards
    np.testing.assert_allclose(back["annotations"][0]["bbox"], [80, 20, 20, 40], atol=1e-9)


BROKEN = {
    "yolo": ("labels.txt", "0 0.5 x 0.1 0.1", ["5.txt:1", "line of YOLO"]),
    "voc": ("a.xml", "<annotation><filename>a</filename></annotation>", ["a.xml", "size/width"]),
    "labelme": ("a.json", '{"shapes": []}', ["a.json", "imagePath"]),
    "cvat": ("a.xml", "<annotations><image id='0' name='5.png'/></annotations>", ["a.xml", "width"]),
    "labelstudio": ("a.json", '[{"id": 3, "data": 5, "annotations": [{"result": 1}]}]', ["a.json", "task 3"]),
    "csv": ("a.csv", "image,label\n5.png,disc\n", ["a.csv", "xmin"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(data, tmp_path, capsys, name):
    folder, _ = data
    file, text, said = BROKEN[name]
    path = tmp_path / "broken" / ("5.txt" if name == "yolo" else file)
    path.parent.mkdir()
    path.write_text(text)
    given = path.parent if name in ("yolo", "voc", "labelme") else path
    arguments = ["--from", name, "--annotations", str(given), "--images", str(folder)]
    assert main(["convert", *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in said), line
    assert not (tmp_path / "out").exists()


def _annotation(**values):
    return lambda content: content["annotations"][0].update(values)


DAMAGED = {
    "no file": (lambda content: None, ["--annotations", "none.json"], ["none.json", "no such file"]),
    "cut": (lambda content: "cut", [], ["damaged.json", "not JSON"]),
    "no images": (lambda content: content.pop("images"), [], ["damaged.json", "has no list 'images'"]),
    "box outside": (_annotation(bbox=[90, 5, 30, 5]), [], ["annotation id 1", "out of its image"]),
    "no box": (lambda content: content["annotations"][0].pop("bbox"), [], ["annotation id 1", "no bbox"]),
    "unknown image": (_annotation(image_id=77), [], ["annotation id 1", "image_id 77"]),
    "unknown class": (_annotation(category_id=4), [], ["annotation id 1", "category_id 4"]),
    "half a polygon": (_annotation(segmentation=[[1, 2, 3]]), [], ["annotation id 1", "list of polygons"]),
    "half an RLE": (
        _annotation(segmentation={"size": [64, 96], "counts": "52"}),
        [],
        ["damaged.json", "annotation id 1", "runs do not add up"],
    ),
    "format": (lambda content: None, ["--format", "yolo,yaml"], ["'yaml'", "yolo"]),
    "share": (lambda content: None, ["--split", "2"], ["--split is 2"]),
    "too few to split": (
        lambda content: content.update(images=content["images"][:1], annotations=[]),
        ["--split", "0.2"],
        ["1 images are too few"],
    ),
    "no folder of images": (
        lambda content: None,
        ["--from", "yolo", "--images", "nowhere"],
        ["nowhere", "no such"],
    ),
    "a file in the way": (lambda content: None, ["--output", "damaged.json/out"], ["cannot be written"]),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_set_is_one_line_and_loses_nothing(data, tmp_path, capsys, monkeypatch, name):
    folder, content = data
    monkeypatch.chdir(tmp_path)
    change, flags, said = DAMAGED[name]
    cut = change(content) == "cut"
    (tmp_path / "damaged.json").write_text(json.dumps(content)[: 500 if cut else None])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    paths = ["--annotations", "damaged.json", "--images", str(folder), "--output", "out"]
    assert main(["convert", *paths, "--format", "cvat", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in said), line
    assert all(file.read_bytes() == content for file, content in before.items())


def test_formats_are_written_where_they_are_said_to_be(data, tmp_path):
    folder, _ = data
    convert(folder, tmp_path / "out", folder / "set.json", "--format", ",".join(WRITERS))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {".lock", "annotations.json", *(writer.place for writer in WRITERS.values())}


OVER_INPUTS = {
    "the file": ("annotations.json", "coco", "."),
    "a part": ("val.json", "coco", ". --split 0.2"),
    "the folder of a format": ("labelme", "labelme", ". --format labelme"),
    "a file of the folder of a format": ("labelme/5.json", "labelme", ". --format labelme"),
    "the same by a link": ("annotations.json", "coco", "link"),
    "the folder of the annotations": ("labelme", "labelme", "labelme"),
    "images": ("annotations.json", "coco", "out --images png --format png"),
}


@pytest.mark.parametrize("name", OVER_INPUTS)
def test_what_is_read_is_not_written_over(data, tmp_path, capsys, monkeypatch, name):
    folder, _ = data
    path, kind, output = OVER_INPUTS[name]
    convert(folder, tmp_path, folder / "set.json", "--format", "labelme", "--split", "0.2")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "out").mkdir()
    shutil.copytree(folder, tmp_path / "out/png")
    (tmp_path / "png").symlink_to(tmp_path / "out/png")
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    given = ["--annotations", path, "--from", kind, "--images", str(folder), "--output", *output.split()]
    assert main(["convert", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give another --output" in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before


def test_a_file_name_cannot_leave_the_folder(data, tmp_path):
    folder, content = data
    content["images"][0]["file_name"] = "../5.png"
    (folder / "set.json").write_text(json.dumps(content))
    shutil.copy(folder / "5.png", tmp_path)
    outside = "--set", "INPUT.LIMITS.OUTSIDE", "True"
    convert(folder, tmp_path / "a/b/out", folder / "set.json", "--format", "labelme,yolo,png", *outside)
    assert (tmp_path / "a/b/out/labelme/5.json").exists()
    assert not [file for file in (tmp_path / "a").rglob("*5*") if "out" not in file.parts]


def test_no_format_reads_an_image_by_a_link_out_of_the_folder(data, tmp_path, capsys):
    folder, _ = data
    convert(folder, tmp_path, folder / "set.json", "--format", "labelme,cvat")
    (folder / "5.png").rename(tmp_path / "elsewhere.png")
    (folder / "5.png").symlink_to(tmp_path / "elsewhere.png")
    for kind, source in (("labelme", "labelme"), ("cvat", "cvat.xml")):
        paths = ["--annotations", str(tmp_path / source), "--from", kind, "--images", str(folder)]
        assert main(["check", *paths]) == 2
        assert "INPUT.LIMITS.OUTSIDE" in capsys.readouterr().err
        assert main(["check", *paths, "--set", "INPUT.LIMITS.OUTSIDE", "True"]) == 0


@pytest.mark.parametrize("other", ["5.jpg", "../5.png"])
@pytest.mark.parametrize("name", ["yolo", "labelme", "png"])
def test_two_images_do_not_share_a_file(data, tmp_path, capsys, name, other):
    folder, content = data
    shutil.copy(folder / "2.png", folder / other)
    content["images"][1]["file_name"] = other
    (folder / "set.json").write_text(json.dumps(content))
    paths = ["--annotations", str(folder / "set.json"), "--images", str(folder), "--output"]
    arguments = ["convert", *paths, str(tmp_path / "out"), "--set", "INPUT.LIMITS.OUTSIDE", "True"]
    assert main([*arguments, "--format", f"cvat,{name}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"set.json: images '5.png' and {other!r} would share a file in the format {name}; rename" in line
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--format", "cvat,labelstudio,polygons"]) == 0


@pytest.mark.parametrize(
    ("images", "seed", "message"), [(9, "-1", "--seed is -1"), (1, "0", "1 images are too few")]
)
def test_a_split_that_cannot_be_made_is_told_before_anything_is_written(
    data, tmp_path, capsys, images, seed, message
):
    folder, content = data
    content["images"] = content["images"][:images]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
    (folder / "set.json").write_text(json.dumps(content))
    given = ["--annotations", str(folder / "set.json"), "--images", str(folder), "--format", "yolo"]
    wanted = ["--split", "0.2", f"--seed={seed}", "--output", str(tmp_path / "out")]
    assert main(["convert", *given, *wanted]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_keeps_classes_balanced(tmp_path):
    generator = np.random.default_rng(0)
    images = [{"id": 3 * n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in range(200)]
    for image in images:
        (tmp_path / image["file_name"]).touch()
    classes = generator.choice([5, 7, 9], 600, p=[0.8, 0.18, 0.02])
    annotations = [
        {"id": n, "image_id": int(generator.choice(150)) * 3, "category_id": int(label), "bbox": [1, 1, 2, 2]}
        for n, label in enumerate(classes)
    ]
    categories = [{"id": number, "name": str(number)} for number in (5, 7, 9)]
    (tmp_path / "set.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    parts = []
    for output in ("a", "b"):
        convert(tmp_path, tmp_path / output, tmp_path / "set.json", "--split", "0.2", "--seed", "4")
        texts = [(tmp_path / output / f"{part}.json").read_text() for part in ("train", "val")]
        parts.append(texts)
    assert parts[0] == parts[1]
    train, val = map(json.loads, parts[0])
    ids = [{image["id"] for image in part["images"]} for part in (train, val)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 200
    for category in (5, 7, 9):
        held = sum(each["category_id"] == category for each in val["annotations"])
        total = (classes == category).sum()
        assert abs(held / total - 0.2) <= max(0.05, 1.5 / total)
    empty = ids[1] - {each["image_id"] for each in annotations}
    assert len(empty) == pytest.approx(0.2 * (200 - len({each["image_id"] for each in annotations})), abs=1)


def random_boxes(seed: int, images: int, classes: int) -> dict:
    """A set whose images have 0 to 5 objects each, of classes of which some are rare, and a few crowds."""
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(images), generator.integers(0, 6, images))
    chances = generator.dirichlet(np.full(classes, 0.5))
    labels, crowds = generator.choice(classes, len(owners), p=chances), generator.random(len(owners)) < 0.05
    annotations = [
        {"image_id": 7 * int(owner), "category_id": 3 + int(label), "iscrowd": int(crowd)}
        for owner, label, crowd in zip(owners, labels, crowds, strict=True)
    ]
    categories = [{"id": 3 + label, "name": str(label)} for label in range(classes)]
    ids = generator.permutation(images).tolist()
    return {"images": [{"id": 7 * n} for n in ids], "annotations": annotations, "categories": categories}


def split_by_definition(content: dict, share: float, seed: int) -> set[int]:
    """An image with a class is taken where more than half of its objects of it are lacking still and each of
    its classes keeps an object elsewhere; everything is counted anew for each image.
    """
    ids = [image["id"] for image in content["images"]]
    counts = np.zeros((len(ids), len(content["categories"]) + 1), int)
    for each in content["annotations"]:
        if not each["iscrowd"]:
            counts[ids.index(each["image_id"]), each["category_id"] - 3] += 1
    counts[:, -1] = counts.sum(1) == 0
    order, taken = np.random.default_rng(seed).permutation(len(ids)), []
    for label in np.argsort(counts.sum(0), kind="stable"):
        for place in order[counts[order, label] > 0]:
            lacking = share * counts[:, label].sum() - counts[taken, label].sum()
            rest = np.delete(counts, [*taken, place], axis=0).sum(0)
            keeps = (rest[counts[place] > 0] > 0).all()
            if place not in taken and keeps and counts[place, label] < 2 * lacking:
                taken.append(place)
    return {ids[place] for place in taken}


@pytest.mark.parametrize("seed", range(8))
def test_a_split_is_its_definition(seed):
    content = random_boxes(seed, 120, 9)
    for share in (0.05, 0.2, 0.6):
        assert split_images(content, share, seed) == split_by_definition(content, share, seed)


def test_a_large_set_is_split_at_once():
    content = random_boxes(0, 30_000, 20)
    start = time.process_time()
    split_images(content, 0.2, 0)
    assert time.process_time() - start < 10  # seconds
