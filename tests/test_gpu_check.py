"""What of the GPU check needs no GPU: limits, failures, counts of a trace, figures beside each other."""

import json
import sys
import time
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, SMALL_FILE

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
import gpu_trainings
import msda
import msda_agreement
import step
import step_trace
import synthetic_coco

from sim_m2f.config import get_cfg
from sim_m2f.data.loader import train_loader


def python(code: str) -> gpu_check.Command:
    return gpu_check.Command([sys.executable, "-c", code])


def check(tmp_path, monkeypatch, *arguments: str) -> tuple[int, dict]:
    """The exit status of a trial on the CPU, and its summary."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return int(ended.value.code), json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    codes = {
        "build": "print('wrong'); exit(3)",
        "kernels": child,
        "step": "import os; print(os.environ['PYTHONPATH'])",
    }
    for part, code in codes.items():
        monkeypatch.setitem(gpu_check.COMMANDS, part, lambda args, code=code: [python(code)])
    start = time.monotonic()
    status, summary = check(tmp_path, monkeypatch, "--limit", "3", "--parts", *codes)
    assert time.monotonic() - start < 30
    results = {part: outcome["result"] for part, outcome in summary["parts"].items()}
    assert results == {"build": "exit status 3", "kernels": "stopped at the time limit", "step": "ok"}
    assert status == 1
    assert summary["hardware"]["torch"] == torch.__version__
    assert "   | wrong" in capsys.readouterr().out
    assert f"{ROOT}:{ROOT / 'ops'}" in (tmp_path / "log.txt").read_text()


def test_what_is_missing_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.NEEDED, "step", ("torch", "no_such_package"))
    status, summary = check(tmp_path, monkeypatch, "--parts", "step")
    assert status == 1
    assert summary["parts"]["step"]["result"] == "left out: not installed: no_such_package"


def test_the_operator_is_built_for_the_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    settings = gpu_check.build_settings("cuda")
    assert settings == {"SIM_M2F_OPERATOR": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}


def test_the_sanitizer_lies_in_the_path_or_in_cuda_home(tmp_path, monkeypatch):
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    commands = gpu_check.sanitizer(Namespace(device="cuda"))
    assert [command.arguments[:3] for command in commands] == [
        [str(tool), "--tool", "memcheck"],
        [str(tool), "--tool", "racecheck"],
    ]
    assert all(command.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for command in commands)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_script_knows_the_flags_that_it_gets(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    args = Namespace(device=device, out=tmp_path, peer=["a"], original=tmp_path, weights=tmp_path)
    (step_command,) = gpu_check.step(args)
    monkeypatch.setattr(sys, "argv", step_command.arguments[1:])
    given = step.parse_arguments()
    images = step.rows(given, tmp_path)[0].cfg.SOLVER.IMS_PER_BATCH
    assert images == (2 if device == "cuda" else 1)
    (kernels_command,) = gpu_check.kernels(args)
    monkeypatch.setattr(sys, "argv", kernels_command.arguments[1:])
    assert msda.parse_arguments().peer == ["a"]


def test_agreement_finds_a_wrong_number(monkeypatch):
    form = msda_agreement.Form(((3, 4), (2, 2)), batch=1, heads=2, channels=8, points=2)
    rows = list(msda_agreement.check_form(form, "cpu"))
    assert len(rows) == 6 * 2 * 2
    assert all(row["ok"] for row in rows)
    right = msda.implementation

    def wrong(name, inputs):
        forward, backward = right(name, inputs)
        return (lambda: forward() * (1.01 if name == msda.FUSED else 1)), backward

    monkeypatch.setattr(msda, "implementation", wrong)
    rows = list(msda_agreement.check_form(form, "cpu", small=True))
    found = {row["implementation"] for row in rows if not row["ok"]}
    assert found == {msda.FUSED}


def test_counts_of_a_trace():
    def event(category, name, begin, duration, thread=1):
        return {"cat": category, "name": name, "ts": begin, "dur": duration, "tid": thread}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cpu_op", "aten::linear", 0, 10),
        event("cpu_op", "aten::addmm", 2, 5),
        event("cuda_runtime", "cudaLaunchKernel", 3, 1),
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 0, 50, 2),
        event("cpu_op", "aten::mul", 10, 5, 2),
        event("cuda_runtime", "cudaLaunchKernelExC", 11, 1, 2),
        event("cpu_op", "aten::item", 20, 5),
        event("cpu_op", "aten::_local_scalar_dense", 21, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 21, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 22, 1),
        event("cuda_runtime", "cudaDeviceSynchronize", 60, 1),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 22, 1),
        event("kernel", "gemm", 5, 2000, 7),
        event("kernel", "mul", 12, 500, 7),
    ]
    found = step_trace.counts(events)
    assert (found["operator_calls"], found["all_operator_calls"]) == (3, 5)
    assert (found["launches"], found["item_calls"]) == (2, 1)
    assert found["synchronisations"] == {"cudaStreamSynchronize": 1}
    assert found["copies"] == {"DtoH": 1}
    assert found["kernel_ms"] == 2.5
    assert found["top_kernels"][0] == {"name": "gemm", "ms": 2.0, "calls": 1}


def test_drawn_images_are_a_data_set(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_list(synthetic_coco.write(tmp_path, classes=5, objects=4, images=2))
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5", "DATALOADER.NUM_WORKERS", "0"])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", "2", "INPUT.IMAGE_SIZE", "64"])
    cfg.merge_from_list(["INPUT.MIN_SCALE", "1.0", "INPUT.MAX_SCALE", "1.0"])
    batch = next(iter(train_loader(cfg)))
    assert [len(target["labels"]) for target in batch["targets"]] == [4, 4]
    assert all(target["masks"].any(dim=(1, 2)).all() for target in batch["targets"])


@pytest.mark.slow
def test_a_step_is_the_sum_of_its_parts(tmp_path, monkeypatch):
    files = [f"{ROOT}/configs/shapes/{name}_R18.yaml+{SMALL_FILE}" for name in ("sim", "mask")]
    output = tmp_path / "step.json"
    options = ["--steps", "2", "--warmup", "1", "--case", "2:float32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["step.py", *files, "DATALOADER.NUM_WORKERS=0", *options])
    with pytest.raises(SystemExit) as ended:
        step.main()
    assert not ended.value.code
    boxes, masks = json.loads(output.read_text())["results"]
    assert all(boxes["parts_ms"][part] > 0 for part in step.PARTS)
    assert masks["parts_ms"]["teacher"] < boxes["parts_ms"]["teacher"]
    assert boxes["trace"]["operator_calls"] > masks["trace"]["operator_calls"] > 100


def test_trainings_are_compared_with_runs_of_the_same_length(tmp_path):
    for training in (*gpu_trainings.SHAPES, gpu_trainings.PEOPLE):
        assert len(training.on_cpu()["segm/AP"]) >= 2
        command = training.command(tmp_path, "cuda", None)
        assert (ROOT / command[command.index("--config-file") + 1]).exists()
        assert command[command.index("SOLVER.MAX_ITER") + 1] == str(training.steps)
    assert gpu_trainings.trainings(None) == gpu_trainings.SHAPES
