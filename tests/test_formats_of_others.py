"""What labelling tools write is read as they mean it, and what cannot be read is told."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_formats import by_image, convert, decoded

from sim_m2f.cli import main
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import read_coco
from sim_m2f.data.formats.boxes import around_ellipse


def write_yolo_set(folder: Path, labels: dict[str, float], images: tuple[str, ...]) -> None:
    """Images of 10 x 10 pixels, and labels of one box each, this many pixels wide."""
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10)).save(folder / name)
    for name, width in labels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"1 0.5 0.5 {width / 10} 0.5\n")


MIRRORED = {
    "beside": (
        "images",
        "labels",
        {"labels/a/1.txt": 2, "labels/b/1.txt": 4},
        ("images/a/1.jpg", "images/b/1.jpg"),
    ),
    "below": (".", ".", {"a/labels/1.txt": 2, "b/labels/1.txt": 4}, ("a/images/1.jpg", "b/images/1.jpg")),
    "flat": (
        "images",
        "labels",
        {"labels/1.txt": 2, "labels/2.txt": 4},
        ("images/a/1.jpg", "images/b/2.jpg"),
    ),
}


@pytest.mark.parametrize("name", MIRRORED)
def test_labels_of_yolo_are_those_of_the_same_path(tmp_path, name):
    images, labels, texts, files = MIRRORED[name]
    write_yolo_set(tmp_path, texts, files)
    back = convert(tmp_path / images, tmp_path / "out", tmp_path / labels, "--from", "yolo")
    widths = {file: own[0]["bbox"][2] for file, own in by_image(back).items()}
    below = [Path(file).relative_to(images).as_posix() for file in files]
    assert widths == pytest.approx(dict(zip(below, (2, 4), strict=True)))


UNCLEAR = {
    "two images": ({"labels/1.txt": 2}, ("images/a/1.jpg", "images/b/1.jpg"), ["labels/1.txt", "a/1.jpg"]),
    "two texts": ({"labels/a/1.txt": 2, "labels/c/1.txt": 2}, ("images/a/1.jpg",), ["c/1.txt", "a/1.txt"]),
    "two ends": ({"labels/1.txt": 2}, ("images/1.jpg", "images/1.png"), ["labels/1.txt", "1.png"]),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_label_of_yolo_for_several_images_is_refused(tmp_path, capsys, name):
    texts, files, said = UNCLEAR[name]
    write_yolo_set(tmp_path, texts, files)
    arguments = ["--annotations", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
    assert main(["convert", "--from", "yolo", *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in said), line


OUTSIDE = "--set", "INPUT.LIMITS.OUTSIDE", "True"


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_images_of_yolo_by_links_out_of_the_folder(tmp_path, capsys, linked):
    write_yolo_set(tmp_path, {"labels/a/1.txt": 2, "labels/2.txt": 4}, ("away/1.png", "images/2.png"))
    if linked == "file":
        (tmp_path / "images/a").mkdir()
        (tmp_path / "images/a/1.png").symlink_to(tmp_path / "away/1.png")
    else:
        (tmp_path / "images/a").symlink_to(tmp_path / "away")
        (tmp_path / "images/b").symlink_to(tmp_path / "images")  # circles
        (tmp_path / "away/c").symlink_to(tmp_path)
    paths = ["--annotations", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
    assert main(["convert", "--from", "yolo", *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("INPUT.LIMITS.OUTSIDE True" in line) == (linked == "file")
    back = convert(tmp_path / "images", tmp_path / "out", tmp_path / "labels", "--from", "yolo", *OUTSIDE)
    assert list(by_image(back)) == ["2.png", "a/1.png"]


@pytest.mark.parametrize("name", ["labelme", "voc"])
def test_images_beside_the_folder_are_found_where_that_is_allowed(tmp_path, capsys, name):
    for folder in ("images", "other"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "other/1.png")
    shape = {"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
    path = tmp_path / "notes/deep" / ("1.json" if name == "labelme" else "1.xml")
    path.parent.mkdir(parents=True)
    seen_from = {"labelme": "../../other/1.png", "voc": "../other/1.png"}  # the file, the folder of images
    path.write_text(
        labelme(shape, image=seen_from[name]) if name == "labelme" else VOC.format(seen_from[name])
    )
    back = convert(tmp_path / "images", tmp_path / "out", path, "--from", name, *OUTSIDE)
    assert list(by_image(back)) == ["../other/1.png"]


@pytest.mark.parametrize("names", ["data.yaml", "classes.txt"])
@pytest.mark.parametrize("labels", ["labels", "labels/train"])
def test_names_of_yolo_lie_above_the_labels(tmp_path, monkeypatch, names, labels):
    write_yolo_set(tmp_path, {f"{labels}/1.txt": 2}, ("images/1.jpg",))
    (tmp_path / names).write_text("names: [cat, dog]" if names == "data.yaml" else "cat\ndog\n")
    monkeypatch.chdir(tmp_path)
    back = convert(Path("images"), Path("out"), Path(labels), "--from", "yolo")
    (annotation,) = back["annotations"]
    assert {each["id"]: each["name"] for each in back["categories"]}[annotation["category_id"]] == "dog"


def read_names(tmp_path: Path, names: str, label: int) -> str:
    """The name that an object of a class gets where data.yaml has these names."""
    write_yolo_set(tmp_path, {"labels/1.txt": 2}, ("images/1.jpg",))
    (tmp_path / "labels/1.txt").write_text(f"{label} 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(f"names: {names}")
    back = convert(tmp_path / "images", tmp_path / "out", tmp_path / "labels", "--from", "yolo")
    (annotation,) = back["annotations"]
    return {each["id"]: each["name"] for each in back["categories"]}[annotation["category_id"]]


@pytest.mark.parametrize("label", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("quote", ["", "'"])
def test_names_of_yolo_count_by_their_numbers(tmp_path, quote, label):
    numbers = [*range(11, -1, -1)]
    names = ", ".join(f"{quote}{number}{quote}: class{number}" for number in numbers)
    assert read_names(tmp_path, f"{{{names}}}", label) == f"class{label}"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("{0: person, 2: car}", "2 names of classes have the numbers 0, 2; number them from 0 on"),
        ("{1: person, 2: car}", "2 names of classes have the numbers 1, 2;"),
        ("{0: person, '0': car}", "2 names of classes have the numbers 0, '0';"),
        ("{person: 0, car: 1}", "2 names of classes have the numbers 'person', 'car';"),
        ("person", "has no names of classes (they are no list); add them"),
        ("[2001-99-99]", "has no names of classes (month must be in 1..12); add them"),
        ("[person, 2001-02-03]", "has no names of classes (one of them is no text); add them"),
        ("[on, off]", "a class is named on, off, yes, no, true or false; put its name in quotes"),
        ("[cat, dog, cat]", "classes 0 and 2 are both named 'cat'; rename one of them"),
    ],
)
def test_names_of_yolo_with_a_fault_are_one_line(tmp_path, capsys, names, said):
    write_yolo_set(tmp_path, {"labels/1.txt": 2}, ("images/1.jpg",))
    (tmp_path / "data.yaml").write_text(f"names: {names}")
    paths = ["--annotations", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
    assert main(["convert", "--from", "yolo", *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"data.yaml: {said}" in line
    assert not (tmp_path / "out").exists()


def test_two_classes_of_one_name_in_a_list_of_yolo(tmp_path, capsys):
    write_yolo_set(tmp_path, {"labels/1.txt": 2}, ("images/1.jpg",))
    (tmp_path / "classes.txt").write_text("cat\ncat\ndog\n")
    paths = ["--annotations", str(tmp_path / "labels"), "--images", str(tmp_path / "images")]
    assert main(["convert", "--from", "yolo", *paths, "--output", str(tmp_path / "out")]) == 2
    assert "classes.txt: classes 0 and 1 are both named 'cat'" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["classes.txt", "data.yaml"])
def test_the_mark_of_windows_is_no_part_of_yolo(tmp_path, names):
    write_yolo_set(tmp_path, {}, ("images/1.jpg",))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/1.txt").write_text("0 0.5 0.5 0.5 0.5\n", encoding="utf-8-sig")
    text = "cat\ndog\n" if names == "classes.txt" else "names: [cat, dog]"
    (tmp_path / names).write_text(text, encoding="utf-8-sig")
    back = convert(tmp_path / "images", tmp_path / "out", tmp_path / "labels", "--from", "yolo")
    assert [each["name"] for each in back["categories"]] == ["cat", "dog"]
    assert len(back["annotations"]) == 1


def test_keypoints_of_yolo_are_left_out(tmp_path, capsys):
    write_yolo_set(tmp_path, {"labels/1.txt": 2}, ("images/1.jpg",))
    (tmp_path / "labels/1.txt").write_text("0 0.5 0.5 0.2 0.4 0.1 0.1 0.9 0.9\n" * 2 + "0 0.5 0.5 0.6 0.4\n")
    (tmp_path / "data.yaml").write_text("{names: [cat], kpt_shape: [2, 2]}")
    back = convert(tmp_path / "images", tmp_path / "out", tmp_path / "labels", "--from", "yolo")
    np.testing.assert_allclose(boxes(back), [[4, 3, 2, 4], [4, 3, 2, 4], [2, 3, 6, 4]])
    assert not any("segmentation" in each for each in back["annotations"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "note: " in line
    assert "2 shapes of the kind 'keypoints'" in line


def test_the_readme_of_an_export_is_no_label_of_yolo(tmp_path, capsys):
    write_yolo_set(tmp_path, {"train/labels/1.txt": 2}, ("train/images/1.jpg",))
    (tmp_path / "data.yaml").write_text("names: [cat, dog]")
    (tmp_path / "README.roboflow.txt").write_text("Exported on a Monday")
    back = convert(tmp_path, tmp_path / "out", tmp_path / "data.yaml", "--from", "yolo")
    assert list(by_image(back)) == ["train/images/1.jpg"]
    assert "README.roboflow.txt" in capsys.readouterr().err
    (tmp_path / "train/labels/2.txt").write_text("0 0.5 0.5 0.1 0.1")
    arguments = ["--annotations", str(tmp_path), "--images", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["convert", "--from", "yolo", *arguments]) == 2
    assert "labels/2.txt: no image of its name" in capsys.readouterr().err


SIDE = 100  # of the images below


def read_one(name: str, content: str, tmp_path: Path, images: tuple[str, ...] = ("1.png",)) -> dict:
    """The COCO JSON of one file in a format, with black images."""
    for image in images:
        (tmp_path / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / image)
    path = tmp_path / f"notes.{'xml' if name in ('voc', 'cvat') else 'json'}"
    path.write_text(content)
    return convert(tmp_path / "images", tmp_path / "out", path, "--from", name)


@pytest.mark.parametrize(
    ("name", "annotations", "images", "formats", "refused"),
    [
        ("labelme", ".", ".", "", True),
        ("labelme", "labels", "images", "", False),
        ("voc", ".", ".", "", False),
        ("voc", ".", "images", "cvat", True),
        ("yolo", "labels", ".", "png", True),
        ("yolo", ".", "images", "png", False),
        ("yolo", ".", "images", "yolo", True),
        ("yolo", "data.yaml", "images", "yolo", True),
        ("coco", "boxes.json", ".", "png", False),
    ],
)
def test_what_is_written_is_not_read_by_the_next_call(
    tmp_path, monkeypatch, capsys, name, annotations, images, formats, refused
):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data.yaml").write_text("names: [cat]")
    monkeypatch.chdir(tmp_path)
    given = ["--from", name, "--annotations", annotations, "--images", images, "--format", formats]
    for command in ("convert", "fit"):
        assert main([command, *given]) == 2
        assert ("which is read with all that lies below" in capsys.readouterr().err) == refused


def test_what_is_advised_in_its_place_is_taken(tmp_path, monkeypatch, capsys):
    notes = tmp_path / "set/notes"
    notes.mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE)).save(notes / "1.png")
    (notes / "1.json").write_text(
        labelme({"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}, image="1.png")
    )
    monkeypatch.chdir(notes)
    given = ["convert", "--from", "labelme", "--annotations", ".", "--images", ".", "--output"]
    assert main([*given, "sub/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sub/out: would lie in ., which is read with all that lies below; give an --output outside" in line
    advised = line.rpartition("such as ")[2]
    assert advised == str(tmp_path / "set/out")
    for _ in range(2):
        assert main([*given, advised]) == 0
    assert len(json.loads(Path(advised, "annotations.json").read_text())["annotations"]) == 1


def test_only_what_draws_is_refused_among_the_images_of_yolo(tmp_path, monkeypatch, capsys):
    write_yolo_set(tmp_path, {"labels/1.txt": 2}, ("1.jpg",))
    monkeypatch.chdir(tmp_path)
    given = ["--from", "yolo", "--annotations", "labels", "--images", "."]
    for _ in range(2):
        assert main(["convert", *given]) == 0
        assert capsys.readouterr().out.count("1 image") == 1
    assert main(["fit", *given]) == 2
    assert "which is read with all that lies below" in capsys.readouterr().err


def labelme(*shapes: dict, image: str = "images/1.png", size: int | None = SIDE) -> str:
    shapes_of = [{"label": "cat", "group_id": None, **shape} for shape in shapes]
    return json.dumps({"imagePath": image, "imageWidth": size, "imageHeight": size, "shapes": shapes_of})


def cvat(*shapes: str) -> str:
    return f'<a><image name="1.png" width="{SIDE}" height="{SIDE}">{"".join(shapes)}</image></a>'


def labelstudio(*results: dict, **fields: str) -> str:
    size = {"original_width": SIDE, "original_height": SIDE}
    return json.dumps([{"data": fields, "annotations": [{"result": [size | each for each in results]}]}])


def boxes(content: dict) -> list[list[float]]:
    return [annotation["bbox"] for annotation in content["annotations"]]


def test_rectangles_of_a_group_are_objects_and_polygons_parts(tmp_path):
    rectangles = [{"shape_type": "rectangle", "group_id": 1, "points": [[x, 0], [x + 5, 9]]} for x in (0, 20)]
    polygons = [{"group_id": 1, "points": [[x, 50], [x + 9, 50], [x, 60]]} for x in (0, 40)]
    back = read_one("labelme", labelme(*rectangles, *polygons), tmp_path)
    assert boxes(back) == [[0, 0, 5, 9], [20, 0, 5, 9], [0, 50, 49, 10]]


def test_masks_and_turned_rectangles_of_labelme(tmp_path):
    part = np.random.default_rng(0).random((20, 30)) > 0.5
    part[0], part[:, 0] = True, True
    part[-1, -1] = True
    buffer = io.BytesIO()
    Image.fromarray(part.astype(np.uint8)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    mask = {"shape_type": "mask", "points": [[60, 70], [89, 89]], "mask": text}
    turned = {"shape_type": "oriented_rectangle", "points": [[10, 0], [20, 10], [10, 20], [0, 10]]}
    back = read_one("labelme", labelme(mask, turned), tmp_path)
    assert boxes(back) == [[60, 70, 30, 20], [0, 0, 20, 20]]
    expected = np.zeros((SIDE, SIDE), bool)
    expected[70:90, 60:90] = part
    np.testing.assert_array_equal(decoded(back["annotations"][0], SIDE, SIDE), expected)


def test_a_mask_out_of_its_image_is_named(tmp_path, capsys):
    buffer = io.BytesIO()
    Image.new("L", (20, 20), 1).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "1.json").write_text(
        labelme({"shape_type": "mask", "points": [[90, 0], [0, 0]], "mask": text})
    )
    arguments = ["--annotations", str(tmp_path / "1.json"), "--images", str(tmp_path)]
    assert main(["convert", "--from", "labelme", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert "1.json: no LabelMe file (ValueError: mask of 'cat': reaches out" in capsys.readouterr().err


def test_turned_boxes_and_ellipses_of_cvat(tmp_path):
    turned = '<box label="cat" xtl="30" ytl="40" xbr="70" ybr="60" rotation="90"/>'  # about its centre
    ellipse = '<ellipse label="cat" cx="50" cy="50" rx="30" ry="10" rotation="{}"/>'
    back = read_one("cvat", cvat(turned, ellipse.format(0), ellipse.format(90)), tmp_path)
    expected = [[40, 30, 20, 40], [20, 40, 60, 20], [40, 20, 20, 60]]
    np.testing.assert_allclose(boxes(back), expected, atol=1e-9)


def test_shapes_that_are_not_upright_may_reach_out_of_the_image(tmp_path):
    turned = '<box label="cat" xtl="30" ytl="90" xbr="70" ybr="100" rotation="90"/>'
    ellipse = '<ellipse label="cat" cx="10" cy="50" rx="30" ry="10"/>'
    found = boxes(read_one("cvat", cvat(turned, ellipse), tmp_path / "a"))
    np.testing.assert_allclose(found, [[45, 75, 10, 25], [0, 40, 40, 20]], atol=1e-9)
    circle = {"shape_type": "circle", "points": [[95, 5], [95, 25]]}
    assert boxes(read_one("labelme", labelme(circle), tmp_path / "b")) == [[75, 0, 25, 25]]
    value = {"x": 90, "y": 50, "radiusX": 20, "radiusY": 5, "ellipselabels": ["cat"]}
    text = labelstudio({"type": "ellipselabels", "value": value}, image="1.png")
    np.testing.assert_allclose(boxes(read_one("labelstudio", text, tmp_path / "c")), [[70, 45, 30, 10]])


def test_a_box_out_of_its_image_is_told_with_its_file(tmp_path, capsys):
    texts = {
        "voc": ("a.xml", VOC.format("1.png").replace("<xmax>3<", "<xmax>105<")),
        "labelme": (
            "a.json",
            labelme({"shape_type": "rectangle", "points": [[0, 0], [9, 105]]}, image="1.png"),
        ),
        "csv": ("a.csv", "image,label,xmin,ymin,xmax,ymax\n1.png,cat,1,2,3,4\n1.png,cat,1,2,105,4\n"),
    }
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "1.png")
    for name, (file, text) in texts.items():
        (tmp_path / file).write_text(text)
        paths = ["--annotations", str(tmp_path / file), "--images", str(tmp_path)]
        assert main(["convert", "--from", name, *paths, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert file + (":3" if name == "csv" else "") in line
        assert "box of 'cat' reaches out of its image, 100 x 100" in line


@pytest.mark.parametrize("degrees", [0, 10, 45, 80, 200])
def test_the_box_around_a_turned_ellipse(degrees):
    turn = np.linspace(0, 2 * np.pi, 100_000)
    angle = np.deg2rad(degrees)
    x = 5 + 7 * np.cos(turn) * np.cos(angle) - 2 * np.sin(turn) * np.sin(angle)
    y = 3 + 7 * np.cos(turn) * np.sin(angle) + 2 * np.sin(turn) * np.cos(angle)
    expected = x.min(), y.min(), x.max(), y.max()
    np.testing.assert_allclose(around_ellipse(5, 3, (7, 2), degrees), expected, atol=1e-6)


def test_ellipses_and_plain_labels_of_label_studio(tmp_path):
    ellipse = {"x": 50, "y": 50, "radiusX": 10, "radiusY": 20, "rotation": 90, "ellipselabels": ["cat"]}
    place = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}
    results = (
        {"type": "ellipselabels", "id": "a", "value": ellipse},
        {"type": "rectangle", "id": "b", "value": place},
        {"type": "labels", "id": "b", "value": place | {"labels": ["dog"]}},
        {"type": "choices", "id": "b", "value": place | {"choices": ["old"]}},
    )
    back = read_one("labelstudio", labelstudio(*results, image="1.png"), tmp_path)
    np.testing.assert_allclose(boxes(back), [[30, 40, 40, 20], [10, 20, 30, 40]], atol=1e-9)
    assert [each["name"] for each in back["categories"]] == ["cat", "dog"]


LINE = {"shape_type": "line", "points": [[0, 0], [9, 9]]}
RECTANGLE = {"x": 10, "y": 20, "width": 30, "height": 40}
LEFT_OUT = {
    "labelme": (labelme(LINE, {"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}, LINE), "2", "'line'"),
    "cvat": (
        cvat('<polyline label="cat" points="1,1;2,2"/>', '<box label="a" xtl="0" ytl="0" xbr="9" ybr="9"/>'),
        "1",
        "'polyline'",
    ),
    "labelstudio": (
        labelstudio(
            {"type": "brushlabels", "value": {"format": "rle", "rle": [0], "brushlabels": ["cat"]}},
            {"type": "rectanglelabels", "value": RECTANGLE | {"rectanglelabels": ["cat"]}},
            image="1.png",
        ),
        "1",
        "'brushlabels'",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_shapes_that_are_left_out_are_counted(tmp_path, capsys, name):
    content, count, kind = LEFT_OUT[name]
    assert len(read_one(name, content, tmp_path)["annotations"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ")
    assert f"{count} shapes of the kind {kind}" in line


FIELDS = {
    "the control's": {"note": "2.png", "image": "1.png"},
    "the only file's": {"note": "http://[see " + "1" * 5000, "photo": "/data/upload/3/ab12cd34-1.png"},
}


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_of_label_studio_that_is_the_image(tmp_path, name):
    result = {
        "type": "rectanglelabels",
        "to_name": "image",
        "value": RECTANGLE | {"rectanglelabels": ["cat"]},
    }
    back = read_one("labelstudio", labelstudio(result, **FIELDS[name]), tmp_path, ("1.png", "2.png"))
    assert list(by_image(back)) == ["1.png"]


def on_image(control: str, name: str, **more) -> dict:
    value = RECTANGLE | {"rectanglelabels": [name]}
    return {"type": "rectanglelabels", "to_name": control, "value": value, **more}


@pytest.mark.parametrize("fields", [{"left": "1.png", "right": "2.png"}, {"both": ["1.png", "2.png"]}])
def test_a_task_of_label_studio_with_two_images(tmp_path, fields):
    controls = list(fields) if len(fields) == 2 else ["both", "both"]
    results = [on_image(control, f"on {n}", item_index=n) for n, control in enumerate(controls)]
    if len(fields) == 2:
        results = [{key: value for key, value in each.items() if key != "item_index"} for each in results]
    back = read_one("labelstudio", labelstudio(*results, *results, **fields), tmp_path, ("1.png", "2.png"))
    names = {each["id"]: each["name"] for each in back["categories"]}
    found = {file: {names[each["category_id"]] for each in own} for file, own in by_image(back).items()}
    assert found == {"1.png": {"on 0"}, "2.png": {"on 1"}}


@pytest.mark.parametrize(
    "fields", [{"image": "2.png"}, {"both": ["2.png", "3.png"]}, {"a": "2.png", "b": "3.png"}]
)
def test_images_of_label_studio_without_objects_count_where_somebody_has_looked(tmp_path, fields):
    tasks = json.loads(labelstudio(on_image("image", "cat"), image="1.png"))
    tasks.append({"data": fields, "annotations": [{"result": []}]})
    unseen = [{"annotations": []}, {"annotations": [{"result": [], "was_cancelled": True}]}]
    tasks += [{"data": {"image": "4.png"}, **each} for each in unseen]
    images = "1.png", "2.png", "3.png", "4.png"
    back = read_one("labelstudio", json.dumps(tasks), tmp_path, images)
    empty = ["2.png"] if "image" in fields else ["2.png", "3.png"]
    assert [image["file_name"] for image in back["images"]] == ["1.png", *empty]
    assert {(image["width"], image["height"]) for image in back["images"]} == {(SIDE, SIDE)}


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        (("img1", "img2"), "which of several images 'img1' is cannot be told"),
        (("img2",), "the image may be any of '1.png', '2.png'"),
    ],
)
def test_two_images_of_label_studio_that_cannot_be_told_apart(tmp_path, capsys, controls, said):
    for name in ("1.png", "2.png"):
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / name)
    results = [on_image(control, "cat") for control in controls]
    (tmp_path / "1.json").write_text(labelstudio(*results, left="1.png", right="2.png"))
    paths = ["--annotations", str(tmp_path / "1.json"), "--images", str(tmp_path)]
    assert main(["convert", "--from", "labelstudio", *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_only_the_prefix_of_label_studio_is_taken_from_a_name(tmp_path):
    images = "001.png", "deep/left-001.png"
    back = read_one(
        "labelstudio", labelstudio(on_image("image", "cat"), image="left-001.png"), tmp_path, images
    )
    assert list(by_image(back)) == ["deep/left-001.png"]


BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
VOC = "<a><filename>{}</filename><size><width>100</width><height>100</height></size><object><name>cat</name>"
VOC += f"{BOX}</object></a>"


@pytest.mark.parametrize("told", ["0001", "0001.jpg"])
def test_images_of_voc_are_found_below(tmp_path, told):
    back = read_one("voc", VOC.format(told), tmp_path, ("day/0001.jpg", "day/0002.jpg"))
    assert list(by_image(back)) == ["day/0001.jpg"]


@pytest.mark.parametrize("name", ["voc", "labelme"])
def test_two_files_about_one_image_are_refused(tmp_path, capsys, name):
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "1.png")
    (tmp_path / "notes").mkdir()
    shape = {"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
    for number in (1, 2):
        text = VOC.format("1.png") if name == "voc" else labelme(shape, image="1.png")
        (tmp_path / f"notes/{number}.{'xml' if name == 'voc' else 'json'}").write_text(text)
    paths = ["--annotations", str(tmp_path / "notes"), "--images", str(tmp_path)]
    assert main(["convert", "--from", name, *paths, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "notes/2." in line
    assert "'1.png' has other annotations already" in line


def test_two_images_of_voc_by_one_name(tmp_path, capsys):
    images = ("day/1.jpg", "night/1.jpg")
    for image in images:
        (tmp_path / "voc" / image).parent.mkdir(parents=True)
        (tmp_path / "voc" / image).with_suffix(".xml").write_text(VOC.format("1.jpg"))
        (tmp_path / "images" / image).parent.mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "images" / image)
    one = "--annotations", str(tmp_path / "voc/day/1.xml"), "--images", str(tmp_path / "images")
    assert main(["convert", "--from", "voc", *one, "--output", str(tmp_path / "out")]) == 2
    assert "may be 'day/1.jpg' or 'night/1.jpg'" in capsys.readouterr().err
    back = convert(tmp_path / "images", tmp_path / "out", tmp_path / "voc", "--from", "voc")
    assert list(by_image(back)) == list(images)


def test_labelme_without_a_size_takes_that_of_the_image(tmp_path):
    shape = {"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
    back = read_one("labelme", labelme(shape, size=None), tmp_path)
    assert [(image["width"], image["height"]) for image in back["images"]] == [(SIDE, SIDE)]


@pytest.mark.parametrize("absolute", ["images", "annotations"])
def test_folders_of_labelme_as_seen_from_anywhere(tmp_path, monkeypatch, absolute):
    for folder in ("a", "b"):
        (tmp_path / "im" / folder).mkdir(parents=True)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"im/{folder}/1.png")
        shape = {"shape_type": "rectangle", "points": [[0, 0], [9, 9]]}
        (tmp_path / f"im/{folder}/1.json").write_text(labelme(shape, image="1.png"))
    monkeypatch.chdir(tmp_path)
    here, there = Path("im"), tmp_path / "im"
    folders = (there, here) if absolute == "images" else (here, there)
    back = convert(folders[0], Path("out"), folders[1], "--from", "labelme")
    assert list(by_image(back)) == ["a/1.png", "b/1.png"]


def test_a_polygon_that_was_moved_out_of_its_box_has_its_own(tmp_path):
    polygon = {"points": [[50, 50], [70, 50], [50, 70]], "annotated_box": [0, 0, 60, 60]}
    assert boxes(read_one("labelme", labelme(polygon), tmp_path)) == [[50, 50, 20, 20]]


LYING = 6  # EXIF's orientation of a camera that was turned by a quarter
UPRIGHT = (60, 90)  # width and height as every tool shows the photo below
DISC = (10, 50, 30, 70)  # the box xyxy of what is drawn on it


def write_for_photo(name: str, folder: Path) -> Path:
    """The box ``DISC`` on photo.jpg in a format, as a tool that shows the photo upright writes it."""
    x0, y0, x1, y1 = DISC
    width, height = UPRIGHT
    percent = {"x": x0 / 0.6, "y": y0 / 0.9, "width": 20 / 0.6, "height": 20 / 0.9, "rotation": 0}
    region = {"type": "rectanglelabels", "original_width": width, "original_height": height}
    region |= {"value": percent | {"rectanglelabels": ["disc"]}}
    shape = {"label": "disc", "points": [[x0, y0], [x1, y1]], "shape_type": "rectangle"}
    photo = {"imagePath": "photo.jpg", "imageWidth": width, "imageHeight": height}
    box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), DISC, strict=True))
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    voc = f"<filename>photo.jpg</filename>{size}<object><name>disc</name><bndbox>{box}</bndbox></object>"
    cvat = f'<box label="disc" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}"/>'
    texts = {
        "yolo": f"0 {20 / 60} {60 / 90} {20 / 60} {20 / 90}",
        "csv": f"image,label,xmin,ymin,xmax,ymax\nphoto.jpg,disc,{x0},{y0},{x1},{y1}",
        "voc": f"<annotation>{voc}</annotation>",
        "cvat": f'<a><image name="photo.jpg" width="{width}" height="{height}">{cvat}</image></a>',
        "labelme": json.dumps(photo | {"shapes": [shape]}),
        "labelstudio": json.dumps([{"data": {"image": "photo.jpg"}, "annotations": [{"result": [region]}]}]),
    }
    ends = {"yolo": "txt", "csv": "csv", "voc": "xml", "cvat": "xml"}
    path = folder / name / f"photo.{ends.get(name, 'json')}"
    path.parent.mkdir()
    path.write_text(texts[name])
    return path.parent if name in ("yolo", "voc", "labelme") else path


@pytest.mark.parametrize("name", ["yolo", "csv", "voc", "cvat", "labelme", "labelstudio"])
def test_boxes_lie_upon_photos_that_were_stored_lying(tmp_path, name):
    pixels = np.zeros((UPRIGHT[1], UPRIGHT[0], 3), np.uint8)
    pixels[DISC[1] : DISC[3], DISC[0] : DISC[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = LYING
    (tmp_path / "images").mkdir()
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "images/photo.jpg", exif=exif, quality=95)
    path = write_for_photo(name, tmp_path)
    content = convert(tmp_path / "images", tmp_path / "out", path, "--from", name)
    source = DatasetSource("photo", tmp_path / "out/annotations.json", tmp_path / "images")
    data = read_coco(source, read_masks=False)
    bright = data.read_image(data.images[0])[..., 0] > 127
    x, y, w, h = (round(value) for value in content["annotations"][0]["bbox"])
    assert (w, h) == (20, 20)
    assert bright[y : y + h, x : x + w].all()
    assert bright.sum() == w * h
