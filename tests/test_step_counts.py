"""What a training step asks of a GPU: counted operator calls, casts, and waits of the host."""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, SMALL_FILE
from step_counts import StepCounts, on_gpu

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.data.loader import train_loader
from sim_m2f.engine import trainer as trainer_file
from sim_m2f.engine.accelerator import build_accelerator
from sim_m2f.engine.trainer import Trainer

# As many layers as the R-50 of configs/coco, few channels and pixels; something is pasted in every step.
R50_LAYERS = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50),
    *("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "INPUT.IMAGE_SIZE", 64),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 6, "MODEL.MASK_FORMER.DEC_LAYERS", 10),
    *("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64, "SOLVER.MAX_ITER", 4),
    *("MODEL.SIM.COPY_PASTE.SHIFT", 0.0, "MODEL.SIM.COPY_PASTE.SCALE", (1.0, 1.0)),
    *("MODEL.SIM.COPY_PASTE.PROBABILITY", 1.0),
]


@pytest.fixture
def bf16(monkeypatch):
    """Trainers compute in mixed precision, on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(
        trainer_file, "build_accelerator", lambda cfg: Accelerator(cpu=True, mixed_precision="bf16")
    )
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configuration(name: str, *changes: object) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / f"configs/shapes/{name}_R18.yaml")
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([str(value) for value in (*R50_LAYERS, *changes)])
    return cfg


def counted_step(cfg: CfgNode, steps: int = 2) -> StepCounts:
    """The counts of the step after so many others."""
    trainer = Trainer(cfg)
    for module in (trainer.model, trainer.criterion, trainer.teacher):
        on_gpu([*module.parameters(), *module.buffers()] if module else [])
    *before, batch = itertools.islice(train_loader(cfg), steps + 1)
    for earlier in before:
        trainer.step(earlier)
    with StepCounts() as counts:
        trainer.step(batch)
    return counts


@pytest.mark.slow
@pytest.mark.usefixtures("bf16")
@pytest.mark.parametrize(
    ("name", "calls", "casts", "waits"),
    # Of the whole method 4,642, 312 and 2, and from masks 2,681, 234 and 1, before layers were predicted and
    # frozen norms folded together, boxes read in one go, and what pasting leaves transferred with the costs.
    [("sim", 3600, 300, 1), ("mask", 2100, 200, 1)],
)
def test_a_step_casts_little_and_waits_once(tmp_path, name, calls, casts, waits):
    counts = counted_step(configuration(name, "OUTPUT_DIR", tmp_path))
    assert counts.waits == {"cpu": waits}
    assert counts.casts <= casts
    assert counts.calls <= calls


def test_waits_are_seen():
    """Each way to wait that a step had or may get."""
    with StepCounts() as counts:
        values = torch.arange(6.0).to(torch.device("cpu"), non_blocking=True)
        derived = values * 2
        derived[derived > 4]
        derived.nonzero()
        derived.sum().item()
        torch.ones(6).sum().item()  # of the host itself
        host = derived.cpu()
        host[host > 4]
        torch.repeat_interleave(derived, derived.long())
    assert counts.waits.total() == 5
    assert counts.waits["cpu"] == 1


def test_views_and_empty_tensors_are_no_calls():
    with StepCounts() as counts:
        torch.empty(4, 6).fill_(1.0).t()[1:].expand(2, 5, 4).unsqueeze(0).sum().detach()
    assert (counts.calls, counts.views) == (2, 6)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not list what its CPU can do")
@pytest.mark.usefixtures("bf16")
def test_a_cpu_computes_in_bf16_if_it_is_asked_to_and_can(small_cfg):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    able, small_cfg.MODEL.DEVICE = bool(flags & {"avx512_bf16", "amx_tile"}), "cpu"
    for asked in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        small_cfg.SOLVER.AMP.ON_CPU = asked
        assert build_accelerator(small_cfg).mixed_precision == ("bf16" if asked and able else "no")
