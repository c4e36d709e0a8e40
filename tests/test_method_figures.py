"""Seeing the method: the maps and what is drawn of them, pixel by pixel; training does not notice it."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import Reader
from test_training import SUPERVISIONS, as_data_set, few_images, train
from torch import Tensor, nn

from sim_m2f.cli import main
from sim_m2f.commands import explain
from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.data.loader import train_loader
from sim_m2f.data.shapes import CLASSES
from sim_m2f.engine.method_maps import OUTSIDE, MethodMaps, MethodView
from sim_m2f.errors import UserError
from sim_m2f.report import method_figures
from sim_m2f.report.drawing import rendered
from sim_m2f.report.hooks import RunPage
from sim_m2f.report.method_figures import (
    IGNORED_COLOUR,
    NEGATIVE_COLOUR,
    drop_later_steps,
    heat_cells,
    label_cells,
    read_method,
    whole_figure,
    write_method,
)
from sim_m2f.report.page import Page, render
from sim_m2f.supervision.criterion import SIMCriterion, build_criterion
from sim_m2f.supervision.pseudo_masks import IGNORED
from sim_m2f.supervision.targets import flatten_targets

LAYERS, QUERIES, SIDE = 3, 8, 32  # of the network of SMALL on shapes, maps at stride 4


class FixedNetwork(nn.Module):
    """Gives the same random outputs for every image."""

    def __init__(self, seed: int, classes: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(LAYERS, 1, QUERIES, classes + 1, generator=generator)
        coarse = torch.randn(LAYERS, QUERIES, 4, 4, generator=generator) * 4
        self.masks = nn.functional.interpolate(coarse, SIDE, mode="bilinear")[:, None]
        self.features = torch.randn(1, width, SIDE, SIDE, generator=generator)

    def forward(self, images: Tensor, prompts: None = None) -> dict:
        layers = [
            {"pred_logits": logits, "pred_masks": masks}
            for logits, masks in zip(self.logits, self.masks, strict=True)
        ]
        return {**layers[-1], "mask_features": self.features, "aux_outputs": layers[:-1]}


def everything(folder: Path, *overrides: str) -> CfgNode:
    """The small network with every term on, on 6 training and 2 test shapes."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/sim_R18.yaml")
    cfg.merge_from_list([*SMALL, *SUPERVISIONS["everything"]])
    for split, name, count in (("train", "train", 6), ("test", "val", 2)):
        data = few_images(folder, name, count)
        cfg.merge_from_list(as_data_set(data, folder / f"{split}.json", split))
    cfg.merge_from_list(["OUTPUT_DIR", str(folder / "output"), *overrides])
    return cfg


@pytest.fixture
def explained(tmp_path) -> tuple[MethodMaps, SIMCriterion, FixedNetwork, FixedNetwork]:
    """The maps of an image with several objects, and what they come from."""
    cfg = everything(tmp_path, "MODEL.SIM.PSEUDO_MASKS.POSITIVE", "(0.5, 0.6)")
    cfg.merge_from_list(["MODEL.SIM.POSITIVE_MASKS.MIN_IOU", "0.1"])
    criterion = build_criterion(cfg)
    networks = [FixedNetwork(seed, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 32) for seed in (1, 2)]
    view = MethodView(cfg, train_loader(cfg).dataset, 6, Accelerator(cpu=True))
    maps = max(view.maps(*networks, criterion), key=lambda maps: len(maps.boxes))
    assert len(maps.boxes) > 1
    return maps, criterion, *networks


def cells(maps: MethodMaps, index: int) -> list[tuple[int, int]]:
    """The cells whose centres lie in the object's box."""
    x1, y1, x2, y2 = maps.boxes[index]
    centres = [4 * (place + 0.5) for place in range(SIDE)]
    return [
        (y, x) for y in range(SIDE) for x in range(SIDE) if x1 <= centres[x] < x2 and y1 <= centres[y] < y2
    ]


def test_maps_hold_the_modules_values_in_every_pixel(explained):
    maps, criterion, _, teacher = explained
    labels = torch.tensor([CLASSES.index(name) for name in maps.classes])
    targets = [{"boxes": torch.from_numpy(maps.boxes), "labels": labels}]
    objects = flatten_targets(targets, (SIDE, SIDE), torch.device("cpu"))
    taught = teacher(torch.zeros(1, 3, 4 * SIDE, 4 * SIDE))
    pseudo = criterion.pseudo_masks
    layers, matcher = criterion.teacher_layers(taught)
    evidence = pseudo.evidence(layers, taught["mask_features"], objects, matcher(layers, objects))
    made = pseudo.labels(evidence)
    wanted = (evidence.semantic, evidence.instance, made.blend, made.final)
    place = 0
    for index in range(len(labels)):
        inside = cells(maps, index)
        for y, x in inside:
            for each, values in zip(
                (maps.semantic, maps.instance, maps.blend, maps.labels), wanted, strict=True
            ):
                assert each[index, y, x] == values[place].item()
            weights, positives = maps.weights[index], maps.positives[index, :, y, x]
            mean = sum(w * p for w, p in zip(weights, positives, strict=True)) / sum(weights)
            assert maps.instance[index, y, x] == pytest.approx(mean, abs=1e-5)
            place += 1
        outside = np.ones((SIDE, SIDE), bool)
        outside[tuple(np.transpose(inside))] = False
        for each in (maps.semantic, maps.instance, maps.blend, *maps.positives.swapaxes(0, 1)):
            assert (np.isnan(each[index]) == outside).all()
        assert ((maps.labels[index] == OUTSIDE) == outside).all()
    assert place == len(made.final)


def test_positive_masks_are_those_of_the_layers_they_are_named_after(explained):
    maps, _, _, teacher = explained
    assert maps.sources == ["L0", "L1", "L2", "+1", "+2", "+3"]
    for place, layer in enumerate([0, 1, 2, 2, 2, 2]):
        for index in range(len(maps.boxes)):
            inside = tuple(np.transpose(cells(maps, index)))
            offered = teacher.masks[layer, 0].sigmoid().numpy()
            assert any(np.allclose(maps.positives[index, place][inside], mask[inside]) for mask in offered)
    assert (maps.weights[:, :3] > 0).all()
    assert (maps.weights <= 1).all()


def test_student_masks_are_different_queries_of_the_last_layer(explained):
    maps, _, student, _ = explained
    full = nn.functional.interpolate(student.masks[-1], scale_factor=4, mode="bilinear")[0] > 0
    queries = [[q for q in range(QUERIES) if np.array_equal(full[q].numpy(), own)] for own in maps.student]
    assert all(len(found) == 1 for found in queries)
    assert len({found[0] for found in queries}) == len(maps.boxes)


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_drawn_colours_cell_by_cell(explained):
    maps, *_ = explained
    colours = [f"#{40 * index:02x}80ff" for index in range(len(maps.boxes))]
    heat = 255 * heat_cells(maps.blend)
    labels = 255 * label_cells(maps.labels, colours)
    viridis = matplotlib.colormaps["viridis"]
    owners = [set(cells(maps, index)) for index in range(len(maps.boxes))]
    for y, x in np.ndindex(SIDE, SIDE):
        owning = [index for index, own in enumerate(owners) if (y, x) in own]
        if not owning:
            assert heat[y, x, 3] == labels[y, x, 3] == 0
            continue
        largest = max(maps.blend[index, y, x] for index in owning)
        assert np.abs(heat[y, x] - 255 * np.array(viridis(float(largest)))).max() <= 1
        found = {int(maps.labels[index, y, x]): colours[index] for index in owning}
        colour = found.get(1) or (IGNORED_COLOUR if IGNORED in found else NEGATIVE_COLOUR)
        np.testing.assert_allclose(labels[y, x], [*rgb(colour), 255])


@pytest.mark.slow
def test_cells_are_drawn_where_they_are_on_the_pale_image(explained):
    maps, *_ = explained
    maps = replace(maps, boxes=np.full_like(maps.boxes, 2), classes=np.full_like(maps.classes, ""))
    figure = whole_figure(maps, 0)
    pixels = np.asarray(rendered(figure)).astype(int)
    blend = heat_cells(maps.blend)
    grey = 0.7 * 255 + 0.3 * maps.image.mean(-1)
    for y, x in list(np.ndindex(SIDE, SIDE))[2 * SIDE :]:  # below the boxes' outlines
        column, row = figure.axes[3].transData.transform((4 * x + 2, 4 * y + 2))
        drawn = pixels[int(len(pixels) - row), int(column)]
        if blend[y, x, 3]:
            assert np.abs(drawn - 255 * blend[y, x, :3]).max() <= 1
        else:
            around = grey[max(4 * y - 2, 0) : 4 * y + 6, max(4 * x - 2, 0) : 4 * x + 6]
            assert around.min() - 9 <= drawn.min() <= drawn.max() <= around.max() + 9


@pytest.mark.slow
def test_figures_come_back_in_order_and_few_enough(explained, tmp_path, monkeypatch):
    maps, *_ = explained
    folder = tmp_path / "method"
    monkeypatch.setattr(method_figures, "MOST_STEPS", 3)
    for step in range(0, 1000, 250):
        names = [name for name, _ in write_method(folder, step, [maps])]
    stem = Path(maps.name).stem
    assert names == [f"01_{stem}/objects", f"01_{stem}/whole"]
    (evolution,) = read_method(folder)
    assert evolution.caption == stem
    steps = [text for text, _ in evolution.rows]
    assert len(steps) == 3
    assert (steps[0], steps[-1]) == ("step 0", "step 750")
    drop_later_steps(folder, 250)
    assert sorted(path.name for path in folder.iterdir()) == ["0000000", "0000250"]


def test_images_are_those_of_the_step_that_is_asked_for(tmp_path):
    figures = {1000: ["01_late"], 500: ["01_early", "02_b", "100_c_d", "11_e"], 200: ["01_early"]}
    for step, names in figures.items():
        for name in names:
            (tmp_path / f"{step:07d}").mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / f"{step:07d}/{name}.whole.png")
    assert [evolution.caption for evolution in read_method(tmp_path)] == ["late"]
    found = read_method(tmp_path, 500)
    assert [evolution.caption for evolution in found] == ["early", "b", "e", "c_d"]
    assert [step for step, _ in found[0].rows] == ["step 200", "step 500"]


@pytest.mark.slow
def test_names_with_dollars_are_drawn(explained, tmp_path):
    maps, *_ = explained
    maps = replace(maps, name="a$_$b.png", classes=["a$_$b"] * len(maps.classes))
    assert [name for name, _ in write_method(tmp_path, 0, [maps])] == ["01_a$_$b/objects", "01_a$_$b/whole"]


@pytest.mark.slow
def test_long_names_are_cut(explained, tmp_path):
    """At 255 bytes a name has no room for what figures and temporary files append."""
    maps, *_ = explained
    (name, _), _ = write_method(tmp_path, 0, [replace(maps, name=f"{'é' * 125}x.png")])
    assert name == f"01_{'é' * 100}/objects"
    assert [evolution.caption for evolution in read_method(tmp_path)] == ["é" * 100]


@pytest.mark.slow
def test_a_damaged_figure_is_left_out_and_told(explained, tmp_path, capsys):
    maps, *_ = explained
    for step in (0, 5, 10):
        list(write_method(tmp_path, step, [replace(maps, name="a.png")]))
    (tmp_path / "0000005/01_a.whole.png").write_bytes(b"no image")
    objects = tmp_path / "0000010/01_a.objects.png"
    objects.write_bytes(objects.read_bytes()[:200])
    (evolution,) = read_method(tmp_path)
    assert [step for step, _ in evolution.rows] == ["step 0", "step 10"]
    assert evolution.objects is None
    assert render(Page("title", "subtitle", evolutions=[evolution])).count("<img") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert f"note: {tmp_path / '0000005/01_a.whole.png'}: cannot be decoded (not an image)" in told[0]
    for file in tmp_path.rglob("*.whole.png"):
        file.write_bytes(b"")
    assert read_method(tmp_path) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[CfgNode, Path, Path]:
    """Configuration and folder of a run that shows the method every second step; folder of a silent one."""
    folder = tmp_path_factory.mktemp("runs")
    cfg = everything(folder, "SOLVER.MAX_ITER", "4", "MODEL.SIM.SHOW.PERIOD", "2")
    cfg.merge_from_list(["MODEL.SIM.SHOW.PICTURES", "2"])
    page = [RunPage()]
    silent = train(cfg, "MODEL.SIM.SHOW.PERIOD", 0, "OUTPUT_DIR", folder / "silent", more=page)
    return cfg, train(cfg, more=page), silent


def state_of(output: Path) -> dict:
    return torch.load(output / "model_final.pth", weights_only=True)


def assert_same(one, other, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where


@pytest.mark.slow
def test_training_does_not_notice_that_it_is_watched(runs):
    _, shown, silent = runs
    assert len(list((shown / "method").rglob("*.png"))) == 2 * 2 * 2
    assert not (silent / "method").exists()
    assert_same(state_of(shown), state_of(silent), "checkpoint")


@pytest.mark.slow
def test_page_and_tensorboard_show_the_method(runs):
    _, shown, silent = runs
    page = Reader((shown / "index.html").read_text())
    assert {"The method", "Training"} <= set(page.text)
    assert len(page.images()) - len(Reader((silent / "index.html").read_text()).images()) == 2 * (2 + 1)
    assert "The method" not in Reader((silent / "index.html").read_text()).text
    events = EventAccumulator(str(shown), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert len(tags) == 2 * 2
    assert all([event.step for event in events.Images(tag)] == [1, 3] for tag in tags)


@pytest.mark.slow
def test_command_draws_from_a_checkpoint_what_training_drew(runs, capsys, tmp_path):
    _, shown, _ = runs
    command = ["explain", "--config-file", str(shown / "config.yaml"), "--num-images", "2"]
    assert main([*command, "--folder", str(tmp_path / "look")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "look/index.html")
    drawn = sorted((shown / "method/0000004").iterdir())
    again = sorted((tmp_path / "look/0000004").iterdir())
    assert [file.name for file in drawn] == [file.name for file in again]
    for one, other in zip(drawn, again, strict=True):
        with Image.open(one) as first, Image.open(other) as second:
            assert np.array_equal(np.asarray(first), np.asarray(second))
    assert len(Reader((tmp_path / "look/index.html").read_text()).images()) == 2 * 2


def test_the_checkpoint_that_is_explained(small_cfg, tmp_path, monkeypatch, capsys):
    """The run's last one, not the one that it began with, unless the command line names another."""

    def read(path):
        raise UserError(f"reads {path}")

    monkeypatch.setattr(explain, "read_checkpoint", read)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("start.pth", "folder/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    small_cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    (tmp_path / "config.yaml").write_text(small_cfg.dump())
    command = ["explain", "--config-file", str(tmp_path / "config.yaml")]

    def explained_file(*overrides: str) -> str:
        assert main([*command, *overrides]) == 2
        return capsys.readouterr().err.strip().removeprefix(f"error: reads {tmp_path}/")

    assert explained_file() == "start.pth"
    output = Path(small_cfg.OUTPUT_DIR)
    output.mkdir()
    (output / "last_checkpoint").write_text("model_final.pth")
    assert explained_file() == "output/model_final.pth"
    assert explained_file("MODEL.WEIGHTS", "timm://resnet18") == "output/model_final.pth"
    assert explained_file("MODEL.WEIGHTS", "~/start.pth") == "start.pth"
    assert explained_file("MODEL.WEIGHTS", "~/folder") == "folder/model.safetensors"


def with_prototypes(state: dict, prototypes: Tensor) -> dict:
    return {**state, "criterion": {**state["criterion"], "pseudo_masks.prototypes.vectors": prototypes}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-images", "0"], "give a number of at least 1"),
        (["MODEL.SIM.SUPERVISION", "mask"], "no pseudo masks to explain"),
        (["OUTPUT_DIR", "empty"], "holds no checkpoint"),
        (["MODEL.WEIGHTS", "missing.pth"], "missing.pth: No such file"),
        (["MODEL.WEIGHTS", "foreign.pth"], "holds no prototypes"),
        (["MODEL.WEIGHTS", "untrained.pth"], "prototypes never learned"),
        (["MODEL.SIM.PROTOTYPES.COUNT", "7"], "prototypes of shape (8, 10, 32)"),
        (["DATASETS.TRAIN_ANNOTATIONS", "missing.json"], "missing.json: no such file"),
    ],
)
@pytest.mark.slow
def test_mistakes_give_one_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    cfg, shown, _ = runs
    monkeypatch.chdir(tmp_path)
    state = state_of(shown)
    torch.save(state["model"], "foreign.pth")
    untrained = build_criterion(cfg).state_dict()["pseudo_masks.prototypes.vectors"]
    torch.save(with_prototypes(state, untrained), "untrained.pth")
    assert main(["explain", "--config-file", str(shown / "config.yaml"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
