"""Real training runs of a few steps: what they write, that they go on, and that boxes are all they read."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from conftest import ROOT, SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sim_m2f.cli import main
from sim_m2f.data.shapes import cached_shapes
from sim_m2f.engine import trainer as trainer_file
from sim_m2f.engine.accelerator import build_accelerator
from sim_m2f.engine.logging import MetricsLogger
from sim_m2f.engine.trainer import Hook, Trainer
from sim_m2f.modeling import build_model
from sim_m2f.report.hooks import RunPage
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.training import build_trainer


def train(cfg, *overrides: str, resume: bool = False, more: Sequence[Hook] = ()) -> Path:
    """Without the page, unless ``more`` makes it."""
    cfg = cfg.clone()
    cfg.merge_from_list([str(value) for value in overrides])
    build_trainer(cfg, resume, more=more).train()
    return Path(cfg.OUTPUT_DIR)


def train_losses(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "loss" in key} for line in lines if "total_loss" in line
    ]


def checkpoint(output: Path) -> dict:
    return torch.load(output / "model_final.pth", weights_only=True)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return checkpoint(output)["model"]


def few_images(folder: Path, split: str, count: int) -> dict:
    """The first images of the embedded set as a data set of its own."""
    source = cached_shapes()
    data = json.loads((source / f"annotations/{split}.json").read_text())
    data["images"] = data["images"][:count]
    kept = {image["id"] for image in data["images"]}
    data["annotations"] = [annotation for annotation in data["annotations"] if annotation["image_id"] in kept]
    folder.mkdir(exist_ok=True)
    return data


def as_data_set(data: dict, path: Path, split: str) -> list[str]:
    path.write_text(json.dumps(data))
    return [
        *(f"DATASETS.{split.upper()}_ANNOTATIONS", str(path)),
        *(
            f"DATASETS.{split.upper()}_IMAGES",
            str(cached_shapes() / ("train" if split == "train" else "val")),
        ),
    ]


@pytest.fixture
def few(small_cfg, tmp_path):
    """The small network on 12 training and 3 validation shapes."""
    for split, name, count in (("train", "train", 12), ("test", "val", 3)):
        data = few_images(tmp_path / "data", name, count)
        small_cfg.merge_from_list(as_data_set(data, tmp_path / f"data/{split}.json", split))
    return small_cfg


@pytest.mark.slow
def test_a_run_on_shapes_learns_and_writes_everything(few):
    keys = "SOLVER.MAX_ITER", 25, "TEST.EVAL_PERIOD", 20, "SOLVER.IMS_PER_BATCH", 4
    output = train(few, *keys, more=[RunPage()])
    losses = [line["total_loss"] for line in train_losses(output)]
    assert len(losses) == 25
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name in ("config.yaml", "model_final.pth", "last_checkpoint", "index.html"):
        assert (output / name).stat().st_size > 0
    assert (output / "inference/coco_instances_results.json").exists()
    assert list(output.glob("events.out.tfevents*"))
    evaluations = [line for line in map(json.loads, (output / "metrics.jsonl").open()) if "segm/AP" in line]
    assert [line["iteration"] for line in evaluations] == [19, 24]


@pytest.mark.slow
def test_evaluating_the_final_checkpoint_gives_the_printed_scores(few, tmp_path):
    output = train(few, "SOLVER.MAX_ITER", 12)
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    again = few.clone()
    again.merge_from_list(
        ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "again")]
    )
    scores = Trainer(again).evaluate()
    assert scores["bbox/AP"] == last["bbox/AP"]
    assert scores["segm/AP"] == last["segm/AP"]
    results = "inference/coco_instances_results.json"
    assert (output / results).read_text() == (tmp_path / "again" / results).read_text()


@pytest.mark.parametrize(("flags", "weights"), [([], "timm://none"), (["--resume"], "none.pth")])
@pytest.mark.slow
def test_evaluation_takes_the_last_checkpoint(few, tmp_path, flags, weights):
    output = train(few, "SOLVER.MAX_ITER", 2)
    results = output / "inference/coco_instances_results.json"
    expected = results.read_bytes()
    results.unlink()
    command = ["--config-file", str(output / "config.yaml"), "--eval-only", *flags]
    assert main(["train", *command, "MODEL.WEIGHTS", weights]) == 0
    assert results.read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("trained_as", [True, False])
def test_evaluation_takes_the_network_that_is_asked_for(small_cfg, tmp_path, monkeypatch, trained_as):
    network = build_model(small_cfg).state_dict()
    fours, twos = ({name: torch.full_like(value, n) for name, value in network.items()} for n in (4, 2))
    taught = {f"network.{name}": value for name, value in twos.items()}
    torch.save({"model": fours, "teacher": taught, "use_teacher": trained_as}, tmp_path / "model.pth")
    seen = []
    monkeypatch.setattr(trainer_file, "evaluate_all", lambda cfg, network, _: seen.append(network))
    monkeypatch.setattr(RunPage, "after_train", lambda *_: None)
    small_cfg.merge_from_list(["MODEL.WEIGHTS", str(tmp_path / "model.pth")])
    (tmp_path / "config.yaml").write_text(small_cfg.dump())
    for use_teacher in ("True", "False"):
        keys = ["MODEL.SIM.TEACHER.ENABLED", "True", "TEST.USE_TEACHER", use_teacher]
        assert main(["train", "--config-file", str(tmp_path / "config.yaml"), "--eval-only", *keys]) == 0
    assert [next(network.parameters()).mean().item() for network in seen] == [2, 4]


SUPERVISIONS = {
    "masks": ["MODEL.SIM.SUPERVISION", "mask"],
    "everything": [
        *("MODEL.SIM.TEACHER.ENABLED", True, "MODEL.SIM.PAIRWISE.FEATURE_AFFINITY", True),
        *("MODEL.SIM.PSEUDO_SEMANTIC.ENABLED", True, "MODEL.SIM.PSEUDO_SEMANTIC.START", 0),
        *("MODEL.SIM.SELF_CORRECTION.ENABLED", True, "MODEL.SIM.SELF_CORRECTION.START", 0),
        *("MODEL.SIM.POSITIVE_MASKS.WEIGHTING", True, "MODEL.SIM.PSEUDO_MASKS.POSITIVE", "(0.3, 0.4)"),
        *("MODEL.SIM.COPY_PASTE.ENABLED", True, "MODEL.SIM.COPY_PASTE.START", 0),
    ],
}


@pytest.mark.parametrize("supervision", SUPERVISIONS)
@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_interrupted(few, tmp_path, supervision):
    settings = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, *SUPERVISIONS[supervision])
    whole = train(few, *settings, "SOLVER.KEEP_CHECKPOINTS", "True", "OUTPUT_DIR", tmp_path / "whole")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (whole / "model_0000002.pth").rename(resumed / "model_0000002.pth")
    (resumed / "last_checkpoint").write_text("model_0000002.pth")
    train(few, *settings, "OUTPUT_DIR", resumed, "DATALOADER.NUM_WORKERS", 1, resume=True)
    assert train_losses(resumed) == train_losses(whole)[3:]
    ends = weights(resumed)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, ends[name]), name


@pytest.mark.slow
def test_a_resumed_run_logs_the_mean_of_all_steps(few, tmp_path):
    """It goes on after the third step, between the lines of the second and of the fourth."""
    settings = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.LOG_PERIOD", 2)
    whole = train(few, *settings, "SOLVER.KEEP_CHECKPOINTS", "True", "OUTPUT_DIR", tmp_path / "whole")
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (whole / "model_0000002.pth").rename(resumed / "model_0000002.pth")
    (resumed / "last_checkpoint").write_text("model_0000002.pth")
    train(few, *settings, "OUTPUT_DIR", resumed, resume=True)
    assert train_losses(resumed) == train_losses(whole)[1:]


@pytest.fixture
def _own_state():
    """accelerate's state of the process is that of the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_own_state")
@pytest.mark.slow
def test_a_process_trains_in_one_precision_after_another(small_cfg, monkeypatch):
    """As a notebook does; whatever the later run computes in, the earlier one keeps its own."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    trainers = []
    for asked in (False, True, False):
        small_cfg.SOLVER.AMP.ON_CPU = asked
        trainers.append(Trainer(small_cfg))
    precisions = [trainer.accelerator.mixed_precision for trainer in trainers]
    assert precisions == ["no", "bf16", "no"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small_cfg.merge_from_list(["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "False"])
    assert build_accelerator(small_cfg).device.type == "cuda"
    assert trainers[0].accelerator.device.type == "cpu"


@pytest.mark.slow
def test_copy_paste_may_begin_in_a_resumed_run(few):
    settings = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.KEEP_CHECKPOINTS", True)
    teacher = ("MODEL.SIM.TEACHER.ENABLED", True)
    output = train(few, *settings, *teacher)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    started = ("MODEL.SIM.COPY_PASTE.ENABLED", True, "MODEL.SIM.COPY_PASTE.START", 0)
    train(few, *settings, *teacher, *started, resume=True)
    assert "loss_copy_paste" in train_losses(output)[-1]


def test_scores_of_an_earlier_step_are_not_those_of_the_last(tmp_path):
    """An evaluation that was cut short is made up for, also where losses are logged more seldom."""
    accelerator = Accelerator(cpu=True)
    logger = MetricsLogger(tmp_path, 0, accelerator)
    for step in (99, 199):
        logger.write(step, {"segm/AP": 1.0})
        assert MetricsLogger(tmp_path, step + 1, accelerator).scored
        assert not MetricsLogger(tmp_path, step + 101, accelerator).scored


def test_mlflow_gets_an_experiment_and_names_that_it_takes(tmp_path, monkeypatch):
    """MLflow itself is not installed here: its two rules are those of its ``_validate_...`` functions."""

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker, logged = "mlflow", False, None, {}

        def store_init_configuration(self, values):
            pass

        def log(self, values, step):
            assert all(re.fullmatch(r"[/\w.\- :]+", name) for name in values)
            self.logged.update(values)

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    accelerator = Accelerator(cpu=True, log_with=[Tracker()])
    MetricsLogger(tmp_path, 0, accelerator).write(0, {"segm/AP-star & bar": 1.0, "lr": 2.0})
    assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "sim-m2f"
    assert Tracker.logged == {"segm/AP-star _ bar": 1.0, "lr": 2.0}
    assert "star & bar" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_run_that_begins_again_has_one_curve(tmp_path):
    """Killed before its first checkpoint, it goes on from step 0."""
    for steps in (5, 2):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        logger = MetricsLogger(tmp_path, 0, accelerator)
        for step in range(steps):
            logger.write(step, {"total_loss": float(steps)})
        accelerator.end_training()
        assert events(tmp_path, "total_loss") == [(step, float(steps)) for step in range(steps)]
        time.sleep(1.1)  # the name of an event file holds the second


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: steps and values."""
    accumulator = EventAccumulator(str(folder)).Reload()
    found = accumulator.Scalars(name) if name in accumulator.Tags()["scalars"] else []
    return [(event.step, event.value) for event in found]


def test_an_unfinished_line_of_a_killed_run_is_dropped(tmp_path):
    whole = '{"iteration": 0, "total_loss": 1.5}'
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"iteration": 1, "total_lo')
    MetricsLogger(tmp_path, 2, Accelerator(cpu=True)).write(2, {"total_loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [whole, '{"iteration": 2, "total_loss": 1.0}']


@pytest.mark.slow
def test_box_supervision_never_reads_a_segmentation(few, tmp_path):
    settings = ("SOLVER.MAX_ITER", 4)
    expected = train_losses(train(few, *settings))
    for damage in ("deleted", "nonsense"):
        data = few_images(tmp_path / "data", "train", 12)
        for annotation in data["annotations"]:
            del annotation["segmentation"]
            if damage == "nonsense":
                annotation["segmentation"] = "nonsense"
        damaged = as_data_set(data, tmp_path / f"data/{damage}.json", "train")
        assert train_losses(train(few, *settings, *damaged, "OUTPUT_DIR", tmp_path / damage)) == expected


@pytest.mark.slow
def test_two_processes_learn_what_one_does(few, tmp_path):
    few.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.NORM", "GN"])
    few.merge_from_list([str(value) for value in SUPERVISIONS["everything"]])
    few.merge_from_list(["MODEL.SIM.PROTOTYPES.MOMENTUM", "0.5", "MODEL.SIM.PROTOTYPES.CONFIDENT", "0.32"])
    few.merge_from_list(["SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path / "two")])
    (tmp_path / "few.yaml").write_text(few.dump())
    command = [sys.executable, "train_net.py", "--config-file", str(tmp_path / "few.yaml"), "--num-gpus", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, check=True, env=environment, stderr=subprocess.PIPE, text=True)
    assert "Warning" not in done.stderr
    train(few, "OUTPUT_DIR", tmp_path / "one")
    start = build_criterion(few).state_dict()
    one, two = (checkpoint(tmp_path / run) for run in ("one", "two"))
    for part in ("model", "criterion"):
        for name, value in one[part].items():
            torch.testing.assert_close(value, two[part][name], rtol=1e-3, atol=1e-4, msg=name)
    moved = one["criterion"]["pseudo_masks.prototypes.vectors"] != start["pseudo_masks.prototypes.vectors"]
    assert moved.any()
    for ours, theirs in zip(train_losses(tmp_path / "one"), train_losses(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    results = [
        json.loads((tmp_path / run / "inference/coco_instances_results.json").read_text())
        for run in ("one", "two")
    ]
    assert len(results[0]) == len(results[1])


@pytest.mark.slow
def test_a_short_run_of_the_coco_recipe_on_real_images(coco_root, tmp_path):
    overrides = [*SMALL, "MODEL.RESNETS.NORM", "BN", "INPUT.IMAGE_SIZE", "128", "INPUT.MIN_SIZE_TEST", "128"]
    overrides += ["MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", "3", "OUTPUT_DIR", str(tmp_path)]
    config = str(ROOT / "configs/coco/sim_R50_bs16_50ep.yaml")
    assert main(["train", "--config-file", config, *overrides]) == 0
    assert len(train_losses(tmp_path)) == 3
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"segm/AP", "bbox/AP", "boxfill/AP"} <= metrics.keys()
