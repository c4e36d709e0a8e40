"""A run can be stopped, killed and gone on with, never mixes with another, and its data are checked first."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SMALL, held
from test_broken_input import CONFIG, data, overrides, write_data  # noqa: F401 (a fixture)
from test_training import train_losses

from sim_m2f.cli import main
from sim_m2f.data.loader import collate
from sim_m2f.weights import checkpoint as checkpoints

SHORT = ["SOLVER.MAX_ITER", "2", "TRACKERS", "()", "MODEL.SIM.SHOW.PERIOD", "0"]


@pytest.fixture
def sets(tmp_path, data) -> list[str]:  # noqa: F811
    """Overrides for two images to train on and to test on."""
    return overrides(tmp_path, data)


def command(output: Path, *more: str) -> list[str]:
    flags = [word for word in more if word.startswith("--")]
    pairs = [word for word in more if not word.startswith("--")]
    return ["--config-file", CONFIG, *flags, *SMALL, "OUTPUT_DIR", str(output), *SHORT, *pairs]


def errors(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def train(output: Path, *more: str) -> int:
    return main(["train", *command(output, *more)])


def changed(state_of: Path, **values: object) -> None:
    """Give parts of the last checkpoint other values."""
    path = state_of / (state_of / "last_checkpoint").read_text()
    torch.save({**torch.load(path, weights_only=True), **values}, path)


@contextlib.contextmanager
def started(output: Path, *more: str, steps: int = 3):
    """A run in a process group of its own, once it has taken a few steps."""
    arguments = [sys.executable, "train_net.py", *command(output, *more, "SOLVER.MAX_ITER", "100000")]
    log = (output.parent / "log.txt").open("w")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=environment
    )
    try:
        deadline = time.time() + 120
        while not (output / "metrics.jsonl").exists() or len(train_losses(output)) < steps:
            assert process.poll() is None, (output.parent / "log.txt").read_text()
            assert time.time() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_state(output: Path) -> dict:
    return torch.load(output / (output / "last_checkpoint").read_text(), weights_only=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_all_processes_leaves_a_checkpoint(tmp_path, sets, number):
    """As timeout, SLURM and systemd send it: to data workers too, and twice. The run goes on from there."""
    output, workers = tmp_path / "output", ["DATALOADER.NUM_WORKERS", "2"]
    with started(output, *sets, *workers) as process:
        os.killpg(process.pid, number)
        os.killpg(process.pid, number)
        assert process.wait(10) == 128 + number
    taken = last_state(output)["iteration"]
    assert taken >= len(train_losses(output)) >= 3
    assert f"stopped after step {taken}" in (tmp_path / "log.txt").read_text()
    assert train(output, "--resume", *sets, *workers, "SOLVER.MAX_ITER", str(taken + 1)) == 0
    assert len(train_losses(output)) == last_state(output)["iteration"] == taken + 1


@pytest.mark.slow
def test_a_run_that_ends_while_it_saves_names_the_step_that_it_goes_on_after(
    tmp_path, sets, monkeypatch, capsys
):
    whole, saved = checkpoints.replace_checkpoint, []

    def interrupted(path, *arguments):
        if saved:
            raise SystemExit(130)  # as a second SIGINT does
        saved.append(whole(path, *arguments))

    monkeypatch.setattr(checkpoints, "replace_checkpoint", interrupted)
    with pytest.raises(SystemExit):
        train(tmp_path / "output", *sets, "SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "1")
    assert last_state(tmp_path / "output")["iteration"] == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "stopped after step 2; the same command with --resume goes on after step 1"


@contextlib.contextmanager
def forked(output: Path, *arguments: str) -> Iterator[multiprocessing.Process]:
    """A run in a session of its own that has what the test has patched, as its data worker has."""

    def run() -> None:
        os.setsid()
        try:
            status = main(["train", *command(output, *arguments, "DATALOADER.NUM_WORKERS", "1")])
        except SystemExit as ended:
            status = ended.code
        os._exit(status)  # else it would wait for its worker, which ``atexit`` ends in a process of its own

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.slow
def test_a_signal_stops_a_run_that_waits_for_its_data(tmp_path, sets, monkeypatch):
    """As for a disk that does not answer: from the fourth batch on the worker makes none."""
    whole, output = collate, tmp_path / "output"

    def stalled(samples, **sizes):
        counts.append(1)
        return whole(samples, **sizes) if len(counts) < 4 else time.sleep(1000)

    counts = []
    monkeypatch.setattr("sim_m2f.data.loader.collate", stalled)
    with forked(output, *sets, "SOLVER.LOG_PERIOD", "1", "SOLVER.MAX_ITER", "100") as process:
        deadline = time.time() + 120
        while not (output / "metrics.jsonl").exists() or len(train_losses(output)) < 3:
            assert process.is_alive()
            assert time.time() < deadline
            time.sleep(0.05)
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
        assert process.exitcode == 128 + signal.SIGTERM
    assert last_state(output)["iteration"] == 3


class Unshared:
    """What a worker cannot hand over, as where /dev/shm is full."""

    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")


@pytest.mark.slow
def test_a_worker_that_cannot_hand_over_a_batch_ends_the_run(tmp_path, sets, monkeypatch, capfd):
    monkeypatch.setattr("sim_m2f.data.loader.collate", lambda *_, **__: Unshared())
    with forked(tmp_path / "output", *sets) as process:
        process.join(60)
        assert process.exitcode == 2
    worker, run = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in worker
    assert "/dev/shm" in worker
    assert "DATALOADER.NUM_WORKERS" in run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_two_ranks_stop_together_whenever_losses_are_logged(tmp_path, sets, number):
    output = tmp_path / "output"
    ranks = ["--num-gpus=2", f"--dist-url=tcp://127.0.0.1:{29600 + number}", "SOLVER.LOG_PERIOD", "1000"]
    ranks += ["SOLVER.CHECKPOINT_PERIOD", "3"]
    arguments = [sys.executable, "train_net.py", *command(output, *sets, *ranks, "SOLVER.MAX_ITER", "100000")]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.time() + 120
        while not (output / "last_checkpoint").exists():  # of the third step
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)  # ranks have sessions of their own
            for each in (*family, process):
                each.kill()
    taken, said = last_state(output)["iteration"], (tmp_path / "log.txt").read_text()
    assert 3 <= taken < 1000
    assert f"stopped after step {taken}" in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.slow
def test_faults_of_the_test_set_are_told_before_the_first_step(capsys, tmp_path, data, sets):  # noqa: F811
    """Missing and broken images, other sizes, names and numbers of classes, a broken segmentation."""
    damages = {
        "none.png is missing": lambda: data["images"][1].update(file_name="none.png"),
        "id 3 'cat', not id 3 'class3'": lambda: data["categories"][2].update(name="cat"),
        "its categories differ": lambda: data["categories"].pop(),
        "annotation id 2: segmentation": lambda: data["annotations"][1].update(segmentation="nonsense"),
    }
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:-30])
    damages["cut.png: cannot be decoded"] = lambda: data["images"][0].update(file_name="cut.png")
    damages["pixels, but 63 x"] = lambda: data["images"][0].update(width=63)
    whole = json.dumps(data)
    for number, (said, damage) in enumerate(damages.items()):
        data.update(json.loads(whole))
        damage()
        (tmp_path / "test.json").write_text(json.dumps(data))
        more = ["DATASETS.TEST_ANNOTATIONS", str(tmp_path / "test.json")]
        assert train(tmp_path / f"out{number}", *sets, *more) == 2
        assert said in errors(capsys)
        assert not list((tmp_path / f"out{number}").glob("[!.]*"))


@pytest.mark.slow
def test_a_new_run_in_a_used_folder_is_refused_or_overwrites_it(capsys, tmp_path, sets):
    output = tmp_path / "output"
    assert train(output, *sets) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    (output / "notes.txt").write_text("of the user")
    capsys.readouterr()
    assert train(output, *sets) == 2
    said = errors(capsys)
    assert all(word in said for word in (str(output), "--resume", "--overwrite"))
    assert train(output, "--overwrite", *sets, "DATASETS.TEST_IMAGES", str(tmp_path / "none")) == 2
    assert {file: file.read_bytes() for file in before} == before  # a run that cannot begin removes nothing
    assert train(output, "--overwrite", *sets, "SOLVER.MAX_ITER", "1") == 0
    assert len(train_losses(output)) == last_state(output)["iteration"] == 1
    assert (output / "notes.txt").read_text() == "of the user"


@pytest.mark.slow
def test_a_new_run_leaves_nothing_to_go_on_with_before_its_first_checkpoint(tmp_path, sets, monkeypatch):
    output = tmp_path / "output"
    assert train(output, *sets) == 0
    monkeypatch.setattr("sim_m2f.engine.trainer.Trainer.step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(output, "--overwrite", *sets)
    assert not list(output.glob("*.pth"))
    assert not (output / "last_checkpoint").exists()


@pytest.mark.slow
def test_an_old_network_leaves_nothing_that_the_new_one_is_taken_for(tmp_path, finished, sets, monkeypatch):
    """But its masks stay where the new one learns from them."""
    annotations = Path(sets[sets.index("DATASETS.TRAIN_ANNOTATIONS") + 1])
    made = "classes.json", "quality.json", "reliability.png", "masks.json", "masks.progress.jsonl"
    monkeypatch.setattr("sim_m2f.engine.trainer.Trainer.step", lambda *_: 1 / 0)
    for read, left in ((annotations, set()), (finished / "masks.json", {"masks.json"})):
        for name in made:
            shutil.copy(annotations, finished / name)
        with pytest.raises(ZeroDivisionError):
            train(finished, "--overwrite", *sets, "DATASETS.TRAIN_ANNOTATIONS", str(read))
        assert {name for name in made if (finished / name).exists()} == left


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(capsys, tmp_path, sets):
    output = tmp_path / "output"
    output.mkdir()
    with held(output / ".lock"):
        assert train(output, *sets) == 2
        assert f"{output}: another process is at work here" in errors(capsys)
    assert train(output, *sets) == 0  # a killed process leaves no lock behind


@pytest.mark.slow
def test_a_running_training_keeps_others_out_until_it_is_killed(capsys, tmp_path, sets):
    output = tmp_path / "output"
    with started(output, *sets, "DATALOADER.NUM_WORKERS", "2", "SOLVER.CHECKPOINT_PERIOD", "1") as process:
        assert train(output, "--resume", *sets) == 2
        assert "another process is at work here" in errors(capsys)
        process.kill()
        process.wait()
        steps = last_state(output)["iteration"] + 1
        assert train(output, "--resume", *sets, "SOLVER.MAX_ITER", str(steps)) == 0  # workers may still live
    assert last_state(output)["iteration"] == steps


@pytest.mark.slow
def test_a_resumed_run_takes_other_rates_and_lengths(capsys, tmp_path, sets):
    output = tmp_path / "output"
    assert train(output, *sets, "SOLVER.MAX_ITER", "1") == 0
    capsys.readouterr()
    rates = ["SOLVER.BASE_LR", "0.003", "SOLVER.WEIGHT_DECAY", "0.07", "SOLVER.BACKBONE_MULTIPLIER", "0.5"]
    assert train(output, "--resume", *sets, *rates, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0") == 0
    assert "SOLVER.BASE_LR 0.001 -> 0.003" in capsys.readouterr().err
    groups = last_state(output)["optimizer"]["param_groups"]
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (0.003, 0.0015) for decay in (0.07, 0.0)
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", "7"),
        ("SOLVER.IMS_PER_BATCH", "1"),
        ("INPUT.IMAGE_SIZE", "96"),
        ("MODEL.SIM.PROJECTION.WEIGHT", "1.0"),
    ],
)
def test_a_resumed_run_refuses_what_it_cannot_change(capsys, tmp_path, finished, sets, key, value):
    config = (finished / "config.yaml").read_bytes()
    assert train(finished, "--resume", *sets, key, value) == 2
    assert f"cannot change {key} " in errors(capsys)
    assert (finished / "config.yaml").read_bytes() == config


def test_a_resumed_run_is_not_shorter_than_it_is(capsys, finished, sets):
    assert train(finished, "--resume", *sets, "SOLVER.MAX_ITER", "1") == 2
    assert "SOLVER.MAX_ITER is 1" in errors(capsys)


@pytest.mark.slow
def test_what_a_killed_run_left_half_written_is_removed(tmp_path, finished, sets):
    """And nothing that only looks alike."""
    leftovers = [finished / ".model_0000001.pth.abc_1234", finished / "inference/.metrics.json.01234567"]
    others = [finished / ".hidden", finished / ".notes.txt.abcdefgh"]
    for file in (*leftovers, *others):
        file.touch()
    assert train(finished, "--resume", *sets) == 0
    assert not any(file.exists() for file in leftovers)
    assert all(file.exists() for file in others)


IMPORTING = """import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = {arguments}
{start}
"""
ENTRIES = {
    "sim-m2f": ("['train', '--help']", "runpy.run_module('sim_m2f.cli', run_name='__main__')"),
    "train_net.py": ("['--help']", "runpy.run_path('train_net.py', run_name='__main__')"),
}
FORKING = """import os, signal, time
from sim_m2f.engine.stop_signal import StopSignal
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
with StopSignal() as stop, stop.at_once("last words"):
    if os.fork() == 0:
        os._exit(0)
    time.sleep(60)
"""

SILENCED = """import contextlib, os, signal, time
from sim_m2f.engine.stop_signal import StopSignal
print("before")
with StopSignal() as stop, stop.at_once("last words"), contextlib.redirect_stdout(None):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def silent(script: str) -> tuple[int, str]:
    """Status and output of a script of Python that says nothing on standard error."""
    command, pipes = [sys.executable, "-c", script], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True, **pipes)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", ENTRIES)
def test_an_interrupt_while_packages_are_imported_is_silent(name):
    arguments, start = ENTRIES[name]
    assert silent(IMPORTING.format(arguments=arguments, start=start)) == (-signal.SIGINT, "")


@pytest.mark.slow
def test_a_signal_ends_at_once_what_forks_just_then():
    """Python forgets an exception there."""
    assert silent(FORKING) == (128 + signal.SIGTERM, "\nlast words\n")


@pytest.mark.slow
def test_a_signal_while_output_is_silenced_has_its_last_words():
    """As it is while pycocotools computes scores; what was printed before comes first."""
    assert silent(SILENCED) == (128 + signal.SIGTERM, "before\n\nlast words\n")


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_is_made_up_for(tmp_path, sets, monkeypatch):
    """Its checkpoint was written before it."""
    output, periods = tmp_path / "output", ["TEST.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "3"]
    with monkeypatch.context() as patch:
        ended = "sim_m2f.engine.trainer.Trainer.evaluate"
        patch.setattr(ended, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=train, args=(output, *sets, *periods))
        process.start()
        process.join()
        assert process.exitcode == 128 + signal.SIGTERM
    assert last_state(output)["iteration"] == 1
    assert train(output, "--resume", *sets, *periods) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], "total_loss" in line) for line in lines] == [
        (step, losses) for step in range(3) for losses in (True, False)
    ]


@pytest.mark.slow
def test_a_finished_run_does_not_repeat_its_last_line(finished, sets):
    before = (finished / "metrics.jsonl").read_text()
    assert train(finished, "--resume", *sets) == 0
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.fixture(scope="module")
def _run(tmp_path_factory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    arguments = overrides(folder, write_data(folder))
    assert train(folder / "output", *arguments) == 0
    return folder / "output"


@pytest.fixture
def finished(_run, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(_run, tmp_path / "output"))
