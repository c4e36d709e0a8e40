"""The report: what it draws, what its page holds, and that it is made from the files of a run alone."""

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from coloured_coco import SIZES, ColourNetwork, coloured_cfg, write_coloured
from PIL import Image
from scipy import ndimage

from sim_m2f.cli import main
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, read_coco
from sim_m2f.data.loader import eval_loader as loader_of
from sim_m2f.engine.evaluator import RESULTS_FILE, evaluate
from sim_m2f.engine.logging import read_series
from sim_m2f.errors import UserError
from sim_m2f.report.curves import _running_mean, draw_curves
from sim_m2f.report.drawing import Shape, contact_sheet, draw
from sim_m2f.report.run_report import choose_images, match_boxes, write_report
from sim_m2f.weights.folder import METRICS_FILE


class Reader(HTMLParser):
    """Collects the text, the tags and everything that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def images(self) -> list[Image.Image]:
        assert all(address.startswith("data:image/") for address in self.loaded)
        contents = [base64.b64decode(address.split(",", 1)[1]) for address in self.loaded]
        return [Image.open(io.BytesIO(content)) for content in contents]


@pytest.fixture
def evaluated(tmp_path) -> tuple[Path, CocoData]:
    """A run's folder as training and evaluation leave it, and its test set."""
    write_coloured(tmp_path / "set")
    cfg = coloured_cfg(tmp_path / "set")
    source = DatasetSource("coloured", tmp_path / "set/set.json", tmp_path / "set")
    loader = loader_of(cfg, source)
    output = tmp_path / "output"
    metrics = evaluate(ColourNetwork(), loader, output, Accelerator(cpu=True), cfg)
    lines = [{"iteration": step, "total_loss": 9 - step, "loss_ce": 5 - step, "lr": 1} for step in range(5)]
    lines.append({"iteration": 4, **{name: None if math.isnan(v) else v for name, v in metrics.items()}})
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "config.yaml").write_text(cfg.dump())
    return output, loader.dataset.data


def page_of(output: Path, data: CocoData, **options) -> Reader:
    path = write_report(output, data, **options)
    assert path == output / "index.html"
    return Reader(path.read_text(encoding="utf-8"))


def test_a_shipped_configuration_is_found_from_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = "--config-file", "configs/shapes/sim_R18.yaml", "--set", "INPUT.LIMITS.PIXELS", "0"
    assert main(["report", "run", *given]) == 2
    assert "INPUT.LIMITS.PIXELS is 0" in capsys.readouterr().err


@pytest.mark.slow
def test_page_holds_everything_in_one_file(evaluated):
    output, data = evaluated
    page = page_of(output, data)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.images()) == 3 * len(SIZES) + 1  # and the curves
    assert {"annotated boxes", "predicted masks (score ≥ 0.5)", "true masks", "5.png"} <= set(page.text)
    metrics = json.loads((output / METRICS_FILE).read_text())
    for kind in ("segm", "bbox", "boxfill"):
        for name in ("AP", "AP50", "AP75", "AP-disc", "AP-ring", "AP-star & bar"):
            assert f"{metrics[f'{kind}/{name}']:.1f}" in page.text
    assert f"{metrics['segm/AP'] / metrics['boxfill/AP']:.2f}×" in page.text
    assert "star & bar" in page.text
    assert "Trained from bounding boxes alone." in " ".join(page.text)
    assert (output / "config.yaml").read_text() in page.text
    with (
        Image.open(output / "report/contact_sheet.png") as sheet,
        Image.open(output / "report/loss_curves.png") as curves,
    ):
        assert min(*sheet.size, *curves.size) > 300


@pytest.mark.slow
def test_report_is_made_from_files_and_always_the_same(evaluated):
    output, data = evaluated
    first = write_report(output, data).read_bytes()
    assert write_report(str(output), data).read_bytes() == first


@pytest.mark.slow
def test_markup_in_the_data_stays_text(evaluated, tmp_path):
    output, _ = evaluated
    content = json.loads((tmp_path / "set/set.json").read_text())
    content["categories"][0]["name"] = "<script>alert(1)</script>"
    (tmp_path / "set/set.json").write_text(json.dumps(content))
    data = read_coco(DatasetSource("<b>", tmp_path / "set/set.json", tmp_path / "set"), read_masks=False)
    page = page_of(output, data)
    assert not {"script", "b>"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.slow
def test_absent_parts_are_left_out(evaluated, tmp_path):
    output, _ = evaluated
    content = json.loads((tmp_path / "set/set.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "set/set.json").write_text(json.dumps(content))
    source = DatasetSource("boxes", tmp_path / "set/set.json", tmp_path / "set")
    (output / "metrics.jsonl").unlink()
    (output / "config.yaml").unlink()
    metrics = json.loads((output / METRICS_FILE).read_text())
    of_boxes = {name: value for name, value in metrics.items() if name.startswith("bbox/")}
    (output / METRICS_FILE).write_text(json.dumps(of_boxes))
    page = page_of(output, read_coco(source, read_masks=False))
    assert "true masks" not in page.text
    assert not {"masks", "box fill", "masks / box fill"} & set(page.text)
    assert "boxes" in page.text
    assert not {"Training", "Configuration"} & set(page.text)
    assert len(page.images()) == 2 * len(SIZES)

    del content["annotations"]
    (tmp_path / "set/set.json").write_text(json.dumps(content))
    (output / METRICS_FILE).unlink()
    page = page_of(output, read_coco(source, read_masks=False))
    assert "annotated boxes" not in page.text
    assert "Average precision" not in page.text
    assert len(page.images()) == len(SIZES)


@pytest.mark.slow
def test_score_from_which_predictions_are_drawn(evaluated):
    output, data = evaluated
    entries = json.loads((output / RESULTS_FILE).read_text())
    scores = sorted(f"{entry['score']:.2f}" for entry in entries if entry["image_id"] == 9)
    for least in (0.0, 0.75, 1.0):
        page = page_of(output, data, min_score=least, num_images=1)
        named = [text.split()[-1] for text in page.text if text[-5:-4] == " " and text[-4] == "0"]
        assert sorted(named) == [score for score in scores if float(score) >= least]


def test_results_of_another_test_set_are_refused(evaluated, tmp_path):
    output, _ = evaluated
    content = json.loads((tmp_path / "set/set.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 5]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != 5]
    (tmp_path / "set/set.json").write_text(json.dumps(content))
    source = DatasetSource("fewer", tmp_path / "set/set.json", tmp_path / "set")
    with pytest.raises(UserError, match="was not made from"):
        write_report(output, read_coco(source, read_masks=False))


@pytest.mark.slow
def test_command(evaluated, tmp_path, capsys):
    output, _ = evaluated
    assert main(["report", str(output)]) == 0
    from_config = (output / "index.html").read_text()
    paths = ["--annotations", str(tmp_path / "set/set.json"), "--images", str(tmp_path / "set")]
    (output / "index.html").unlink()
    assert main(["report", str(output), *paths]) == 0
    assert (output / "index.html").read_text() == from_config
    assert capsys.readouterr().out.splitlines() == 2 * [str(output / "index.html")]


def test_limits_hold_for_the_data_set_of_the_configuration(evaluated, capsys):
    output, _ = evaluated
    assert main(["report", str(output), "--set", "INPUT.LIMITS.PIXELS", "9"]) == 2
    assert "INPUT.LIMITS.PIXELS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--annotations", "set.json"], "--annotations and --images belong together"),
        (["--config-file", "missing.yaml"], "missing.yaml: no such file"),
        ([], "coco_instances_results.json: no such file"),
        (["--set", "INPUT.LIMITS.PIXEL", "9"], "INPUT.LIMITS.PIXEL"),
    ],
)
def test_mistakes_give_one_line(evaluated, capsys, arguments, message):
    output, _ = evaluated
    (output / RESULTS_FILE).unlink()
    assert main(["report", str(output), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_masks_are_drawn_where_they_are():
    y, x = np.mgrid[:64, :100]
    mask = (np.hypot(y - 30, x - 60) < 20) & (np.hypot(y - 30, x - 60) > 8)
    image = Image.new("RGB", (100, 64), "#808080")
    for side in (50, 100, 400):
        drawn = draw(image, [Shape("#ff0000", mask=mask)], side)
        assert max(drawn.size) == side
        changed = np.abs(np.asarray(drawn).astype(int) - 128).max(-1) > 8
        exact = np.asarray(Image.fromarray(mask).resize(drawn.size, Image.Resampling.NEAREST))
        around = ndimage.binary_dilation(exact, np.ones((3, 3)), iterations=3)
        assert (changed <= around).all()
        assert (ndimage.binary_erosion(exact) <= changed).all()


def test_boxes_are_drawn_as_outlines():
    drawn = np.asarray(draw(Image.new("RGB", (100, 100)), [Shape("#ffffff", box=[20, 30, 70, 90])], 200))
    bright = drawn.min(-1) > 128
    rows, columns = np.nonzero(bright)
    np.testing.assert_allclose(
        [columns.min(), rows.min(), columns.max(), rows.max()], [40, 60, 140, 180], atol=1
    )
    assert not bright[64:176, 44:136].any()


def test_texts_do_not_cover_each_other():
    shapes = [
        Shape("#ff0000", "first", box=[10, 40, 90, 90]),
        Shape("#00ff00", "second", box=[12, 42, 92, 92]),
    ]
    alone = [np.asarray(draw(Image.new("RGB", (100, 100)), [shape], 400)) for shape in shapes]
    labels = [_label(pixels, channel) for channel, pixels in enumerate(alone)]
    assert (labels[0] & labels[1]).any()  # each of them, drawn alone, would lie on the other
    both = np.asarray(draw(Image.new("RGB", (100, 100)), shapes, 400))
    assert (_label(both, 0) == labels[0]).mean() > 0.99
    assert _label(both, 1).sum() == pytest.approx(labels[1].sum(), rel=0.15)


def _label(pixels: np.ndarray, channel: int) -> np.ndarray:
    """The filled areas of one pure colour: outlines are too thin to stay."""
    pure = (pixels[..., channel] > 200) & (np.delete(pixels, channel, -1).max(-1) < 60)
    return ndimage.binary_opening(pure, np.ones((3, 3)))


def test_odd_shapes_are_drawn():
    image = Image.new("L", (300, 2))
    shapes = [
        Shape("#ff0000", "empty", mask=np.zeros((2, 300), bool)),
        Shape("#ff0000", "full", mask=np.ones((2, 300), bool)),
        Shape("#ff0000", "no area", box=[10, 1, 10, 1]),
    ]
    assert draw(image, shapes, 150).size == (150, 1)


def test_contact_sheet_shows_every_panel():
    panels = [Image.new("RGB", (40, 30 + number // 2), (number, 255, 0)) for number in range(10)]
    rows = [("row", dict(zip(("one", "two"), panels[i : i + 2], strict=True))) for i in range(0, 10, 2)]
    sheet = np.asarray(contact_sheet(rows))
    for number, panel in enumerate(panels):
        assert (sheet == (number, 255, 0)).all(-1).sum() == panel.width * panel.height


@pytest.mark.slow
def test_dollars_in_names_are_no_mathematics():
    """The name "a$_$b" is none that can be set as mathematics."""
    image = Image.new("RGB", (200, 200))
    named = draw(image, [Shape("#ff0000", "a$_$b 0.50", box=[20, 60, 180, 180])], 200)
    assert contact_sheet([("a$_$b.png", {"one": named})]).width > named.width
    assert not np.array_equal(named, draw(image, [Shape("#ff0000", "", box=[20, 60, 180, 180])], 200))


def test_colours_follow_the_annotated_boxes():
    annotated = [[0, 0, 10, 10], [20, 20, 10, 10], [21, 21, 10, 10]]
    predicted = [[20, 20, 10, 10], [50, 50, 5, 5], [20, 20, 10, 9], [1, 0, 10, 10], [0, 0, 10, 10]]
    assert match_boxes(predicted, annotated)[0] == 1
    assert match_boxes(predicted, annotated)[2:4] == [2, 0]  # box 1 is taken
    others = [match_boxes(predicted, annotated)[place] for place in (1, 4)]
    assert min(others) >= 3
    assert len(set(others)) == 2
    assert match_boxes([], annotated) == []
    assert match_boxes([[0, 0, 1, 1]] * 2, []) == [0, 1]


def test_images_with_objects_come_first(evaluated):
    _, data = evaluated
    assert [image.id for image in choose_images(data.images, 4)] == [5, 2, 9, 8]
    assert [image.id for image in choose_images(data.images, 99)] == [5, 2, 9, 8, 4]
    few = choose_images(data.images * 50, 10)
    assert len(few) == 10
    assert all(len(image.labels) for image in few)


def test_series_of_an_interrupted_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"iteration": 0, "a": 1}', '{"iteration": 20, "a": 2, "b": null}', '{"iteration": 10, "a": 3}']
    path.write_text("\n".join([*lines, '{"iteration": 20, "a": 4, "c": NaN}', '{"iteration": 30, "a"']))
    assert read_series(path)["a"] == {0: 1, 10: 3, 20: 4}
    assert set(read_series(path)) == {"iteration", "a"}
    assert draw_curves(read_series(path)) is None


@pytest.mark.parametrize("length", [1, 2, 30, 200])
def test_running_mean_against_its_definition(length):
    values = np.random.default_rng(length).normal(size=length).tolist()
    reach = length // 50
    windows = [values[max(0, place - reach) : place + reach + 1] for place in range(length)]
    np.testing.assert_allclose(_running_mean(values), [np.mean(window) for window in windows], atol=1e-12)
