"""The ablation: its rows, real runs of a few steps, and what is written about them."""

import csv
import fcntl
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval
from test_training import as_data_set, few_images, weights

from sim_m2f.cli import main
from sim_m2f.commands import ablate
from sim_m2f.config import get_cfg
from sim_m2f.data.shapes import cached_shapes
from sim_m2f.engine import coco_metrics
from sim_m2f.errors import UserError
from sim_m2f.report.ablation import Result, Row, draw_plot, read_result, score_tags, write_tables
from sim_m2f.report.drawing import rendered

STEPS = 4
OVERRIDES = {
    "slow.yaml": "# a low learning rate\nSOLVER: {BASE_LR: 0.00001}\n",
    "mask.yaml": "MODEL: {SIM: {SUPERVISION: mask}}\n",
    "broken.yaml": "MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 3}}\n",
}
REAL_ROWS = [
    *("projection", "boxinst", "feature_affinity", "pseudo_semantic", "self_correction", "sim"),
    *("copy_paste", "level_set", "gate", "prompts", "colors", "best", "mask"),
]
SWITCHES = {  # the one that each row turns on
    "1_projection": None,
    "2_pairwise": "PAIRWISE.ENABLED",
    "3_feature_affinity": "PAIRWISE.FEATURE_AFFINITY",
    "4_pseudo_semantic": "PSEUDO_SEMANTIC.ENABLED",
    "5_self_correction": "SELF_CORRECTION.ENABLED",
    "6_mask_weighting": "POSITIVE_MASKS.WEIGHTING",
    "7_copy_paste": "COPY_PASTE.ENABLED",
}


def leaves(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with a base configuration of a few steps on a few shapes, and rows of its own."""
    folder = tmp_path_factory.mktemp("ablation")
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/sim_R18.yaml")
    settings = ["SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.KEEP_CHECKPOINTS", True]
    settings += ["TEST.EVAL_PERIOD", 2, "OUTPUT_DIR", folder / "output"]
    for split, name, count in (("train", "train", 12), ("test", "val", 3)):
        data = few_images(folder / "data", name, count)
        settings += as_data_set(data, folder / f"data/{split}.json", split)
    cfg.merge_from_list([*SMALL, *map(str, settings)])
    (folder / "base.yaml").write_text(cfg.dump())
    for name, overrides in OVERRIDES.items():
        (folder / name).write_text(overrides)
    return folder


def arguments(workshop: Path, rows: list[str], *more: str) -> list[str]:
    files = [str(workshop / f"{row}.yaml") for row in rows]
    return ["ablate", "--config-file", str(workshop / "base.yaml"), "--variants", *files, *more]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def done(workshop) -> tuple[Path, str, list[str]]:
    """The folder of an ablation of two rows and two seeds, made by two calls.

    In the first call, with one seed, a third row fails; its table is the second item. In the second call two
    runs go side by side; the third item says on which devices.
    """
    folder, processes, together = workshop / "output/ablation", [], []

    class Watched(subprocess.Popen):
        def __init__(self, *args, env, **kwargs):
            super().__init__(*args, env=env, **kwargs)
            processes.append((self, env["CUDA_VISIBLE_DEVICES"]))
            together.append([device for process, device in processes if process.poll() is None])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(arguments(workshop, ["broken", "slow", "mask"], "--seeds", "0")) == 1
        first = (folder / "ablation.md").read_text()
        patch.setattr(ablate, "devices", lambda cfg: ["5", "7"])
        patch.setattr(subprocess, "Popen", Watched)
        assert main(arguments(workshop, ["slow", "mask"], "--seeds", "0", "1")) == 0
    return folder, first, max(together, key=len)


def test_each_row_turns_one_switch_on_and_states_all():
    rows = {
        row.name: leaves(yaml.safe_load(row.file.read_text())["MODEL"]["SIM"]) for row in ablate.find_rows([])
    }
    assert list(rows) == [*SWITCHES, "mask"]
    assert all(row.keys() == rows["mask"].keys() for row in rows.values())
    expected = {**rows["mask"], "SUPERVISION": "box"}
    for name, switch in SWITCHES.items():
        expected |= {switch: True} if switch else {}
        assert rows[name] == expected
    assert not any(rows["mask"][switch] for switch in SWITCHES.values() if switch)


def test_rows_by_name_and_path(workshop):
    rows = ablate.find_rows(["copy_paste", "2_pairwise", str(workshop / "slow.yaml")])
    assert [row.name for row in rows] == ["7_copy_paste", "2_pairwise", "slow"]
    assert rows[2].title == "a low learning rate"
    with pytest.raises(UserError, match="did you mean 2_pairwise"):
        ablate.find_rows(["2_pairwize"])
    with pytest.raises(UserError, match=r"absent\.yaml"):
        ablate.find_rows(["absent.yaml"])
    with pytest.raises(UserError, match="two rows"):
        ablate.find_rows(["pairwise", "2_pairwise"])


def test_a_folder_stands_for_its_files(tmp_path):
    names = [row.name for row in ablate.find_rows(["configs/real/rows"])]
    assert [re.sub(r"^\d+_", "", name) for name in names] == REAL_ROWS
    for name in ("b", "a"):
        (tmp_path / f"{name}.yaml").write_text("SEED: 1\n")
    assert [row.name for row in ablate.find_rows([str(tmp_path), "pairwise"])] == ["a", "b", "2_pairwise"]


def test_a_folder_that_has_the_name_of_a_row_hides_it_not(tmp_path, monkeypatch):
    (tmp_path / "pairwise").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [row.name for row in ablate.find_rows(["pairwise"])] == ["2_pairwise"]
    with pytest.raises(UserError, match="other: no rows here"):
        ablate.find_rows(["pairwise", "other"])


def test_rows_of_real_images_add_up_to_their_configurations():
    """The rows best, sim, boxinst and mask are what the configurations of these names train.

    All rows are scored without colours at test time, which the best recipe uses.
    """
    for name, config in {"best": "boxes", "sim": "sim", "boxinst": "boxinst", "mask": "mask"}.items():
        (file,) = (ROOT / "configs/real/rows").glob(f"*_{name}.yaml")
        row, whole = get_cfg(), get_cfg()
        row.merge_from_file(ROOT / "configs/people/base.yaml")
        row.merge_from_file(file)
        whole.merge_from_file(ROOT / f"configs/people/{config}.yaml")
        row.OUTPUT_DIR = whole.OUTPUT_DIR
        assert not row.TEST.COLORS.ENABLED
        assert whole.TEST.COLORS.ENABLED is (name == "best")
        row.TEST.COLORS.ENABLED = whole.TEST.COLORS.ENABLED
        assert row == whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "one"], "whole numbers"),
        (["--seeds", "0", "SOLVER.MAX_ITR", "2"], "did you mean SOLVER.MAX_ITER"),
        (["DATASETS.TEST_ANNOTATIONS", "boxes.json"], "without segmentation, so masks cannot be compared"),
        (["DATASETS.TEST_ANNOTATIONS", "empty.json"], "no objects, so masks cannot be compared"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(workshop, tmp_path, capsys, more, message):
    data = few_images(workshop / "data", "val", 3)
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    (tmp_path / "empty.json").write_text(json.dumps({**data, "annotations": []}))
    more = [str(tmp_path / item) if item.endswith(".json") else item for item in more]
    assert main(arguments(workshop, ["slow"], "--output", str(tmp_path / "new"), *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_one_run_per_visible_gpu(monkeypatch):
    cfg = get_cfg()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-1,6")
    assert ablate.devices(cfg) == ["4", "GPU-1", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert ablate.devices(cfg) == ["0", "1", "2"]
    cfg.MODEL.DEVICE = "cpu"
    assert ablate.devices(cfg) == [None]


@pytest.mark.slow
def test_the_tables_say_what_the_runs_logged(done):
    folder, _, _ = done
    records = json.loads((folder / "ablation.json").read_text())
    table = {row["row"]: row for row in csv.DictReader((folder / "ablation.csv").open())}
    markdown = (folder / "ablation.md").read_text()
    assert [record["row"] for record in records] == ["slow", "mask"] == list(table)
    for record in records:
        runs = [folder / f"{record['row']}/seed{seed}" for seed in (0, 1)]
        assert (record["seeds"], record["steps"]) == ([0, 1], STEPS)
        for key, heading in (("segm/AP", "AP"), ("segm/AP50", "AP50"), ("boxfill/AP", "box fill AP")):
            logged = [lines(run)[-1][key] for run in runs]
            assert record[key] == pytest.approx(logged, abs=1e-3)
            shown = [float(table[record["row"]][f"{heading} {kind}"]) for kind in ("mean", "min", "max")]
            assert shown == pytest.approx([fmean(logged), min(logged), max(logged)], abs=1e-3)
        assert all(0 < minutes < 10 for minutes in record["minutes"])
        assert all(f"({run.relative_to(folder)}/index.html)" in markdown for run in runs)
    assert "| slow | a low learning rate | 4 |" in markdown
    assert Image.open(folder / "ap_over_steps.png").width > 1000


@pytest.mark.slow
def test_seeds_and_overrides_reach_the_runs(done):
    folder, _, _ = done
    for seed in (0, 1):
        cfg = get_cfg()
        cfg.merge_from_file(folder / f"slow/seed{seed}/config.yaml")
        assert (seed, 0.00001, STEPS) == (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER)
    assert lines(folder / "slow/seed0")[0]["total_loss"] != lines(folder / "slow/seed1")[0]["total_loss"]
    assert "loss_dice" in lines(folder / "mask/seed0")[0]


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_go_on(done):
    folder, markdown, _ = done
    last = (folder / "broken/seed0/log.txt").read_text().splitlines()[-1]
    assert "NUM_CLASSES" in last
    assert f"- broken/seed0 failed: {last} (exit status 2)" in markdown
    assert "| slow |" in markdown
    assert "| mask |" in markdown


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(done):
    folder, _, _ = done
    for run in ("slow/seed0", "mask/seed0", "slow/seed1", "mask/seed1"):
        assert (folder / run / "log.txt").read_text().count("Report: ") == 1


@pytest.mark.slow
def test_runs_go_side_by_side_each_on_its_device(done):
    assert sorted(done[2]) == ["5", "7"]


def copy_of_a_run(done, tmp_path: Path) -> Path:
    shutil.copytree(done[0] / "slow/seed0", tmp_path / "slow/seed0")
    return tmp_path / "slow/seed0"


@pytest.mark.slow
def test_an_interrupted_run_goes_on(workshop, done, tmp_path):
    run = copy_of_a_run(done, tmp_path)
    expected = weights(run)
    for name in ("model_final.pth", "index.html"):
        (run / name).unlink()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    kept = [{**line, "kept": 1} for line in lines(run) if line["iteration"] < 2]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert main(arguments(workshop, ["slow"], "--seeds", "0", "--output", str(tmp_path))) == 0
    assert lines(run)[: len(kept)] == kept
    assert lines(run)[-1]["iteration"] == STEPS - 1
    for name, weight in weights(run).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.slow
def test_a_run_of_another_configuration_is_set_aside(workshop, done, tmp_path):
    run = copy_of_a_run(done, tmp_path)
    more = ("--output", str(tmp_path), "--seeds", "0", "SOLVER.MAX_ITER", "2")
    assert main(arguments(workshop, ["slow"], *more)) == 0
    assert lines(run)[-1]["iteration"] == 1
    assert lines(run.with_name("seed0.old1"))[-1]["iteration"] == STEPS - 1
    assert json.loads((tmp_path / "ablation.json").read_text())[0]["steps"] == 2


def test_two_processes_do_not_train_in_one_folder(workshop, tmp_path):
    log = tmp_path / "slow/seed0/log.txt"
    log.parent.mkdir(parents=True)
    with log.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(arguments(workshop, ["slow"], "--seeds", "0", "--output", str(tmp_path))) == 1
    assert "another process trains here" in (tmp_path / "ablation.md").read_text()


@pytest.mark.slow
def test_sigterm_stops_the_runs_with_a_checkpoint(workshop, tmp_path):
    command = [sys.executable, "-m", "sim_m2f.cli", *arguments(workshop, ["slow"], "--output", str(tmp_path))]
    process = subprocess.Popen([*command, "SOLVER.MAX_ITER", "100000"], stderr=subprocess.DEVNULL)
    run = tmp_path / "slow/seed0"
    try:
        while not (run / "metrics.jsonl").exists() or len(lines(run)) < 2:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert (run / (run / "last_checkpoint").read_text()).exists()
    assert "stopped after step" in (run / "log.txt").read_text()
    with (run / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
def test_scores_on_tagged_images_are_pycocotools_own():
    truth = coco_metrics.load_truth(cached_shapes() / "annotations/val.json")
    rng = np.random.default_rng(0)
    results = []
    for item in truth.dataset["annotations"]:
        mask = np.roll(truth.annToMask(item), rng.integers(-6, 7), axis=1)
        rle = mask_utils.encode(np.asfortranarray(mask))
        entry = {"image_id": item["image_id"], "category_id": item["category_id"], "score": rng.random()}
        results.append({**entry, "segmentation": rle, "bbox": mask_utils.toBbox(rle).tolist()})
    scores = score_tags(truth, results)
    assert set(scores) == {"camouflage", "same_class_overlap", "same_colour"}
    for tag, value in scores.items():
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = [image["id"] for image in truth.dataset["images"] if tag in image["tags"]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert value == pytest.approx(100 * evaluation.stats[0], abs=1e-6)
        assert 5 < value < 95


def results_of(row: str, curves: list[list[float]]) -> list[Result]:
    return [
        Result(
            row=row,
            seed=seed,
            steps=1000 * len(curve),
            minutes=10.0 + seed,
            page=Path(f"{row}/seed{seed}/index.html"),
            scores={"segm/AP": curve[-1], "segm/AP50": 60.0, "segm/AP75": 30.0, "boxfill/AP": 20.0},
            tags={"camouflage": curve[-1] / 2},
            curve={1000 * (place + 1): value for place, value in enumerate(curve)},
        )
        for seed, curve in enumerate(curves)
    ]


def test_the_plot_has_a_distinct_line_of_means_per_row_in_a_band():
    rows = [Row(f"row{index}", "", Path()) for index in range(10)]
    curves = [[10.0, 20.0, 30.0], [14.0, 22.0, 31.0]]
    (axes,) = draw_plot([(row, results_of(row.name, curves)) for row in rows]).axes
    for line, band in zip(axes.lines, axes.collections, strict=True):
        np.testing.assert_allclose(line.get_xydata(), [[1000, 12], [2000, 21], [3000, 30.5]])
        assert band.get_paths()[0].get_extents().bounds == pytest.approx((1000, 10, 2000, 21))
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(rows)


def test_a_row_with_dollars_in_its_name_is_plotted():
    figure = draw_plot([(Row("a$_$b", "", Path()), results_of("a$_$b", [[10.0, 20.0]]))])
    assert rendered(figure).width == 1350


def test_a_result_is_the_last_evaluation_of_a_run(tmp_path):
    first = {"segm/AP": 10.0, "segm/AP50": 20.0, "segm/AP75": 5.0, "boxfill/AP": 4.0, "bbox/AP": 9.0}
    last = {"segm/AP": 11.0, "segm/AP50": 21.0, "segm/AP75": None, "boxfill/AP": 4.5, "bbox/AP": 8.0}
    logged = [{"iteration": 1, **first}, {"iteration": 3, "total_loss": 2.5}, {"iteration": 3, **last}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    (tmp_path / "inference").mkdir()
    (tmp_path / "inference/coco_instances_results.json").write_text("[]")
    truth = coco_metrics.load_truth(cached_shapes() / "annotations/val.json")
    result = read_result("row", 5, tmp_path, 1.5, truth)
    assert (result.steps, result.curve, result.page) == (4, {2: 10.0, 4: 11.0}, tmp_path / "index.html")
    assert result.scores == pytest.approx(
        {"segm/AP": 11.0, "segm/AP50": 21.0, "segm/AP75": math.nan, "boxfill/AP": 4.5}, nan_ok=True
    )
    assert result.tags == {"camouflage": 0.0, "same_class_overlap": 0.0, "same_colour": 0.0}


def test_mean_and_range_over_the_seeds(tmp_path):
    results = results_of("row", [[10.0, 31.0], [14.0, 34.0], [12.0, 28.0]])
    write_tables(
        tmp_path, "sim-m2f ablate", [Row("row", "", Path())], results[::-1], ["row/seed3 failed: why"]
    )
    (row,) = csv.DictReader((tmp_path / "ablation.csv").open())
    assert row["seeds"] == "0 1 2"
    assert [float(row[f"AP {kind}"]) for kind in ("mean", "min", "max")] == [31.0, 28.0, 34.0]
    assert [float(row[f"AP camouflage {kind}"]) for kind in ("mean", "min", "max")] == [15.5, 14.0, 17.0]
    (record,) = json.loads((tmp_path / "ablation.json").read_text())
    assert (record["segm/AP"], record["minutes"]) == ([31.0, 34.0, 28.0], [10.0, 11.0, 12.0])
    markdown = (tmp_path / "ablation.md").read_text()
    assert "| 31.0 (28.0..34.0) |" in markdown
    assert "- row/seed3 failed: why" in markdown


def test_rows_are_compared_with_mask_supervision(tmp_path):
    results = results_of("boxes", [[10.0, 30.0], [14.0, 33.0]]) + results_of("11_mask", [[10.0, 42.0]])
    results += results_of("nothing", [[0.0, 0.0]])
    rows = [Row(name, "", Path()) for name in ("boxes", "11_mask", "nothing")]
    write_tables(tmp_path, "sim-m2f ablate", rows, results, [])
    lines = [line.split("|") for line in (tmp_path / "ablation.md").read_text().splitlines() if "|" in line]
    place = lines[0].index(" AP / mask's ")
    assert [line[place].strip() for line in lines[2:]] == ["0.75", "1.00", "0.00"]
    assert lines[0][place + 1] == " AP75 / mask's "


def test_unknown_scores_and_single_seeds_are_shown_as_such(tmp_path):
    (known,) = results_of("known", [[10.0, 20.0]])
    unknown = replace(known, row="unknown", scores=dict.fromkeys(known.scores, math.nan), tags={})
    rows = [Row("known", "", Path()), Row("unknown", "a | b", Path()), Row("absent", "", Path())]
    write_tables(tmp_path, "sim-m2f ablate", rows, [known, unknown], [])
    table = [line for line in (tmp_path / "ablation.md").read_text().splitlines() if "known" in line]
    assert "| 20.0 |" in table[0]
    assert "| a / b | 2000 | – | – | – | – | – | 10.0 |" in table[1]
    records = json.loads((tmp_path / "ablation.json").read_text())
    assert [record["segm/AP"] for record in records] == [[20.0], [None]]
