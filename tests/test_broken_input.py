"""What a user can get wrong: one clear line that names the place, exit status 2, and no traceback."""

import errno
import functools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL
from PIL import Image

import sim_m2f
from sim_m2f.cli import guarded, main
from sim_m2f.commands.train import configuration
from sim_m2f.config import frozen_warning
from sim_m2f.data.image import read_image
from sim_m2f.engine.logging import MetricsLogger
from sim_m2f.errors import UserError, memory_problem, rank_problem
from sim_m2f.files import cache_folder, read_json, write_file
from sim_m2f.weights.checkpoint import save_checkpoint
from sim_m2f.weights.sources import local_weights
from sim_m2f.weights.weight_files import read_weight_file

CONFIG = str(ROOT / "configs/shapes/sim_R18.yaml")


@pytest.fixture
def data(tmp_path) -> dict:
    """A sound data set of two images; ``overrides`` stores it, damaged or not."""
    return write_data(tmp_path)


def write_data(folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    for number in (1, 2):
        Image.new("RGB", (64, 48), (number * 90, 80, 40)).save(folder / f"{number}.png")
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2)],
        "categories": [{"id": n, "name": f"class{n}"} for n in range(1, 9)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": n, "bbox": [8, 8, 30, 20], "area": 600, "iscrowd": 0}
            for n in (1, 2)
        ],
    }


def overrides(folder: Path, data: object) -> list[str]:
    (folder / "train.json").write_text(data if isinstance(data, str) else json.dumps(data))
    keys = ("TRAIN_ANNOTATIONS", "TEST_ANNOTATIONS"), ("TRAIN_IMAGES", "TEST_IMAGES")
    values = str(folder / "train.json"), str(folder)
    return [
        text
        for names, value in zip(keys, values, strict=True)
        for name in names
        for text in (f"DATASETS.{name}", value)
    ]


def fails(capsys, arguments: list[str], *said: str) -> None:
    """The command ends with status 2 and one line that contains everything in ``said``."""
    assert main(["train", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    for text in said:
        assert text in lines[0]


def train_fails(capsys, tmp_path, changes: list[str], *said: str) -> None:
    fails(
        capsys,
        [
            "--config-file",
            CONFIG,
            *SMALL,
            "SOLVER.MAX_ITER",
            "2",
            "OUTPUT_DIR",
            str(tmp_path / "out"),
            *changes,
        ],
        *said,
    )


CONFIGURATIONS = {
    "unknown key": (["SOLVER.BASE_LRR", "1"], ["SOLVER.BASE_LRR", "SOLVER.BASE_LR"]),
    "wrong type": (["SOLVER.MAX_ITER", "many"], ["SOLVER.MAX_ITER", "int", "many"]),
    "key without value": (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "no value"]),
    "group as value": (["SOLVER", "3"], ["SOLVER is a group"]),
    "unknown data set": (["DATASETS.TRAIN", "shapes_trian"], ["shapes_trian", "shapes_train"]),
    "missing annotations": (
        ["DATASETS.TRAIN_ANNOTATIONS", "no.json", "DATASETS.TRAIN_IMAGES", "."],
        ["no.json"],
    ),
    "images without annotations": (["DATASETS.TRAIN_IMAGES", "."], ["DATASETS.TRAIN"]),
    "wrong number of classes": (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"], ["NUM_CLASSES", "8"]),
    "unknown backbone": (["MODEL.BACKBONE.NAME", "resnet5000"], ["resnet5000"]),
    "backbone without strides": (
        ["MODEL.BACKBONE.NAME", "vit_tiny_patch16_224"],
        ["vit_tiny_patch16_224", "stride"],
    ),
    "unknown norm": (
        ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.NORM", "LN"],
        ["LN", "GN"],
    ),
    "unknown supervision": (["MODEL.SIM.SUPERVISION", "points"], ["points", "box"]),
    "unknown device": (["MODEL.DEVICE", "tpu"], ["tpu"]),
    "unknown precision": (["SOLVER.AMP.DTYPE", "fp8"], ["fp8", "bf16"]),
    "unknown schedule": (["SOLVER.LR_SCHEDULER_NAME", "Step"], ["Step", "WarmupPolyLR"]),
    "unknown optimizer": (["SOLVER.OPTIMIZER", "SGD"], ["SGD", "ADAMW"]),
    "no step": (["SOLVER.MAX_ITER", "0"], ["SOLVER.MAX_ITER is 0", "at least 1"]),
    "no log period": (["SOLVER.LOG_PERIOD", "0"], ["SOLVER.LOG_PERIOD is 0", "at least 1"]),
    "no divisibility": (["MODEL.MASK_FORMER.SIZE_DIVISIBILITY", "0"], ["SIZE_DIVISIBILITY is 0"]),
    "negative size": (["INPUT.MIN_SIZE_TEST", "-5"], ["INPUT.MIN_SIZE_TEST is -5", "at least 0"]),
    "texts for numbers": (["SOLVER.STEPS", "('a', 'b')"], ["SOLVER.STEPS[0] takes a float", "'a'"]),
    "heads of the decoder": (["MODEL.MASK_FORMER.NHEADS", "7"], ["HIDDEN_DIM is 32", "NHEADS (7)"]),
    "heads of the encoder": (
        ["MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", "5"],
        ["CONVS_DIM is 32", "ENCODER_N_HEADS (5)"],
    ),
    "width without groups": (["MODEL.SEM_SEG_HEAD.CONVS_DIM", "50"], ["CONVS_DIM is 50", "multiple of 32"]),
    "negative rate": (["SOLVER.BASE_LR", "-0.1"], ["SOLVER.BASE_LR is -0.1", "at least 0"]),
    "mean of one value": (["MODEL.PIXEL_MEAN", "[1.0]"], ["MODEL.PIXEL_MEAN", "3 values"]),
    "huge seed": (["SEED", str(2**80)], ["SEED is", "at most"]),
    "dropout of five": (["MODEL.MASK_FORMER.DROPOUT", "5"], ["DROPOUT is 5", "at most"]),
    "momentum above one": (["MODEL.SIM.TEACHER.MOMENTUM", "2"], ["MOMENTUM is 2", "at most 1"]),
    "no temperature": (["MODEL.SIM.PROTOTYPES.TEMPERATURE", "0"], ["TEMPERATURE is 0", "at least"]),
    "flag behind overrides": (["SEED", "1", "--resume"], ["--resume", "before the overrides"]),
    "key=value": (["SOLVER.BASE_LR=0.1", "SEED"], ["SOLVER.BASE_LR 0.1"]),
    "missing checkpoint": (["MODEL.WEIGHTS", "none.pth"], ["none.pth"]),
    "unknown pretrained weights": (["MODEL.WEIGHTS", "timm://resnet5000"], ["resnet5000"]),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(capsys, tmp_path, name):
    changes, said = CONFIGURATIONS[name]
    train_fails(capsys, tmp_path, changes, *said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("A: [1", "not a YAML file"),
        ("- 1", "mapping"),
        ("_BASE_: none.yaml", "none.yaml"),
        ("SEEED: 1", "SEED"),
        ("", "mapping"),
        ("_BASE_: 5", "mapping"),
        ("SEED: 1\nINPUT: {IMAGE_SIZE: 64, IMAGE_SIZE: 96}", "the key IMAGE_SIZE stands twice"),
        pytest.param("SEED: " + 1500 * "[", "nested too deeply", marks=pytest.mark.slow),
        ("SOLVER: {STEPS: &own [*own]}", "SOLVER.STEPS[0] takes a float"),
        ("SOLVER: {BASE_LR: .nan}", "SOLVER.BASE_LR is nan"),
        ("INPUT: {MAX_SCALE: .inf}", "INPUT.MAX_SCALE is inf; use a finite number"),
    ],
)
def test_configuration_file(capsys, tmp_path, content, said):
    (tmp_path / "broken.yaml").write_text(content)
    fails(capsys, ["--config-file", str(tmp_path / "broken.yaml")], said)


@pytest.mark.parametrize("bases", ["second.yaml", "[third.yaml, second.yaml]"])
def test_bases_in_a_circle_are_named(capsys, tmp_path, bases):
    (tmp_path / "first.yaml").write_text(f"_BASE_: {bases}")
    (tmp_path / "second.yaml").write_text("_BASE_: first.yaml")
    (tmp_path / "third.yaml").write_text("SEED: 1")
    circle = " -> ".join(str(tmp_path / f"{name}.yaml") for name in ("first", "second", "first"))
    fails(capsys, ["--config-file", str(tmp_path / "first.yaml")], f"in a circle: {circle}")


def test_missing_configuration_file(capsys):
    fails(capsys, ["--config-file", "nowhere.yaml"], "nowhere.yaml")


JSON_DAMAGE = {
    "nan": ("annotations", "bbox", [float("nan"), 1, 5, 5], ["annotation id 2"]),
    "negative size": ("annotations", "bbox", [5, 5, -3, 5], ["annotation id 2"]),
    "outside": ("annotations", "bbox", [50, 5, 30, 5], ["annotation id 2"]),
    "three numbers": ("annotations", "bbox", [5, 5, 3], ["annotation id 2"]),
    "unknown category": ("annotations", "category_id", 77, ["annotation id 2", "77"]),
    "unknown image": ("annotations", "image_id", 77, ["annotation id 2", "77"]),
    "duplicate annotation": ("annotations", "id", 1, ["annotation id 1"]),
    "duplicate image": ("images", "id", 1, ["1"]),
    "missing image": ("images", "file_name", "none.png", ["none.png"]),
    "another size": ("images", "width", 60, ["2.png", "60"]),
    "newline in a name": ("categories", "name", "two\nlines", ["category id 2", "one line"]),
    "two classes of one name": ("categories", "name", "class1", ["category id 2", "'class1'"]),
    "duplicate category": ("categories", "id", 1, ["1"]),
}


@pytest.mark.parametrize("name", JSON_DAMAGE)
def test_annotations(capsys, tmp_path, data, name):
    what, key, value, said = JSON_DAMAGE[name]
    data[what][1][key] = value
    if name in ("duplicate image", "duplicate category", "newline in a name"):
        data["annotations"].pop()
    train_fails(
        capsys,
        tmp_path,
        overrides(tmp_path, data),
        "train.json" if name != "another size" else "2.png",
        *said,
    )


@pytest.mark.parametrize("content", ['{"images": [', "[]", "{}", ""])
def test_annotation_file(capsys, tmp_path, content):
    train_fails(capsys, tmp_path, overrides(tmp_path, content), "train.json")


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_image(capsys, tmp_path, data, content, workers):
    whole = (tmp_path / "1.png").read_bytes()
    write_data(tmp_path / "test")
    for number in (1, 2):
        damaged = {"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[content]
        (tmp_path / f"{number}.png").write_bytes(damaged)
    changes = [*overrides(tmp_path, data), "DATASETS.TEST_IMAGES", str(tmp_path / "test")]
    train_fails(capsys, tmp_path, [*changes, "DATALOADER.NUM_WORKERS", workers], ".png")


class Payload:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.slow
def test_checkpoints(capsys, tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").touch()
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    payload = tmp_path / "payload_ran"
    torch.save({"model": Payload(payload)}, tmp_path / "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(payload)))
    for name in ("text.pth", "empty.pth", "other.pth", "list.pth", "cut.pth", "evil.pth", "evil.pkl"):
        train_fails(capsys, tmp_path, ["MODEL.WEIGHTS", str(tmp_path / name)], name)
    train_fails(capsys, tmp_path, ["MODEL.WEIGHTS", str(tmp_path)], str(tmp_path))
    assert not payload.exists()


@pytest.mark.parametrize(
    ("flags", "weights"), [([], ""), ([], "timm://resnet10t.c3_in1k"), (["--resume"], "model.pth")]
)
def test_evaluation_without_a_checkpoint(capsys, tmp_path, flags, weights):
    changes = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path)]
    fails(
        capsys,
        ["--config-file", CONFIG, "--eval-only", *flags, *SMALL, *changes],
        "--eval-only",
        str(tmp_path),
    )


def test_resuming_another_network(capsys, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    torch.save({"model": {}}, output / "model_0000001.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    fails(
        capsys, ["--config-file", CONFIG, "--resume", *SMALL, "OUTPUT_DIR", str(output)], "model_0000001.pth"
    )


def test_output_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "out").write_text("in the way")
    train_fails(capsys, tmp_path, [], str(tmp_path / "out"))


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_files_are_for_whom_the_umask_lets(tmp_path, umask, mode):
    code = "import sys; from sim_m2f.files import write_file; write_file(sys.argv[1], 'text')"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], umask=umask, check=True, cwd=ROOT)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_files_without_modes_and_of_long_names_are_written(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    for name in ("a.txt", "é" * 127, "a" * 255):
        write_file(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 3


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    path = tmp_path / "model.pth"
    save_checkpoint(path, {"weight": torch.zeros(10)})
    before = path.read_bytes()
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model\.pth: cannot be written \(File too large\)") as error:
            save_checkpoint(path, {"weight": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "torch" not in str(error.value)
    assert "enforce" not in str(error.value)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "events.out"), MemoryError(), OSError(12, "no memory")]
)
def test_full_disk_and_memory_are_one_line_wherever_they_run_out(capsys, error):
    class Command:
        @staticmethod
        def run(_):
            raise error

    assert guarded(Command, None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line or "SOLVER.IMS_PER_BATCH, INPUT.IMAGE_SIZE" in line


def test_threads_of_trackers_leave_a_full_disk_to_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # to be put back
    MetricsLogger(tmp_path, 0, Accelerator(cpu=True))
    for error in (OSError(28, "No space left on device"), ValueError("another")):
        thread = threading.Thread(target=functools.partial(failing, error))
        thread.start()
        thread.join()
    said = capsys.readouterr().err
    assert "No space left" not in said
    assert "ValueError: another" in said


def failing(error: Exception) -> None:
    raise error


def test_metrics_on_a_full_disk(tmp_path):
    logger = MetricsLogger(tmp_path, 0, Accelerator(cpu=True))
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        logger.write(0, {"loss": 1.0})


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 4096 bytes from file </torch_7>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_of_gpu_and_workers(error):
    assert "SOLVER.IMS_PER_BATCH, INPUT.IMAGE_SIZE" in memory_problem(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        FileNotFoundError(2, "No such file or directory", "out of memory/boxes.json"),
        UserError("MemoryError.json: no such file; check the path"),
    ],
)
def test_other_errors_are_not_of_memory(error):
    assert memory_problem(error) is None


@pytest.mark.parametrize(
    "said",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
        "NCCL communicator was aborted on rank 0.",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600000 ms",
    ],
)
def test_a_rank_that_does_not_answer(said):
    assert "another rank has ended" in rank_problem(RuntimeError(said))
    assert rank_problem(UserError(f"{said}: no such file")) is None


def test_a_step_that_does_not_fit_in_memory_names_the_keys(capsys, tmp_path, data):
    huge = ["INPUT.IMAGE_SIZE", "10000000"]
    train_fails(capsys, tmp_path, [*overrides(tmp_path, data), *huge], "out of memory", "INPUT.IMAGE_SIZE")


def test_the_tilde_of_a_flag_is_the_home(capsys, tmp_path, data, monkeypatch):
    """Shells leave that of --output=~/x alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    overrides(tmp_path, data)
    given = ["--annotations=~/train.json", "--images=~"]
    assert main(["convert", *given, "--output=~/converted"]) == 0
    assert (tmp_path / "converted/annotations.json").exists()
    assert not (tmp_path / "~").exists()
    with pytest.raises(SystemExit):
        main(["convert", *given, "--output=~nobody.of.this.name/converted"])
    assert "write the whole path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key",
    [
        *("OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.TRAIN_ANNOTATIONS", "DATASETS.TRAIN_IMAGES"),
        *("DATASETS.TEST_ANNOTATIONS", "DATASETS.TRAIN_PROPOSALS"),
    ],
)
def test_the_tilde_of_nobody_is_one_line(capsys, tmp_path, data, key):
    given = [*overrides(tmp_path, data), key, "~nobody.of.this.name/x"]
    train_fails(capsys, tmp_path, given, "~nobody.of.this.name/x", "write the whole path")


def test_the_tilde_of_nobody_in_a_network_or_the_environment(monkeypatch):
    for read in (sim_m2f.from_pretrained, local_weights):
        with pytest.raises(UserError, match="write the whole path"):
            read("~nobody.of.this.name/x")
    monkeypatch.setenv("SIM_M2F_CACHE", "~nobody.of.this.name/x")
    with pytest.raises(UserError, match="write the whole path"):
        cache_folder()


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_image, read_weight_file, read_json, sim_m2f.get_cfg().merge_from_file):
        with pytest.raises(UserError, match=r"pipe: (is )?not a"):
            read(tmp_path / "pipe")


@pytest.mark.parametrize("address", ["tcp://host:99999", "tcp://host", "nonsense"])
def test_address_of_the_first_machine(capsys, address):
    fails(capsys, ["--num-gpus", "2", "--dist-url", address], "--dist-url", address)


def test_pointer_that_is_no_text(tmp_path, capsys):
    (tmp_path / "last_checkpoint").write_bytes(b"\xff\xfe\0")
    fails(capsys, ["--config-file", CONFIG, "--resume", *SMALL, "OUTPUT_DIR", str(tmp_path)], str(tmp_path))


ODD = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse or"),
    "meta": (lambda: torch.ones(3, device="meta"), "sparse or"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "quantized;"),
}


@pytest.mark.parametrize("kind", ODD)
def test_weights_without_values(capsys, tmp_path, kind):
    make, said = ODD[kind]
    torch.save({"model": {"backbone.body.conv1.weight": make()}}, tmp_path / "odd.pth")
    train_fails(capsys, tmp_path, ["MODEL.WEIGHTS", str(tmp_path / "odd.pth")], f"conv1.weight is {said}")


def test_home_in_the_output_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = configuration(CONFIG, ["OUTPUT_DIR", "~/run"])
    assert Path(cfg.OUTPUT_DIR) == tmp_path / "run"


def test_random_weights_under_frozen_norms_are_told():
    cfg = configuration(str(ROOT / "configs/coco/sim_R50_bs16_50ep.yaml"), ["MODEL.WEIGHTS", ""])
    assert "FrozenBN" in frozen_warning(cfg)
    assert not frozen_warning(configuration("", ["MODEL.WEIGHTS", "some.pth"]))


def test_diverged_network_is_named():
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(CONFIG)
    cfg.merge_from_list(SMALL)
    from sim_m2f.supervision.criterion import build_criterion

    outputs = {
        "pred_logits": torch.full((1, 8, 9), torch.nan),
        "pred_masks": torch.zeros(1, 8, 8, 8),
        "aux_outputs": [],
    }
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[1.0, 1, 20, 20]])}]
    with pytest.raises(UserError, match="not finite"):
        build_criterion(cfg)(outputs, targets, torch.zeros(1, 3, 32, 32))
