"""Ranks, parts of a batch, and activation checkpointing change neither what is drawn nor what is learned."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from memory_peak import MemoryPeak
from torch import nn

import sim_m2f
from sim_m2f.data.loader import train_loader
from sim_m2f.distributed import share
from sim_m2f.draws import uniform
from sim_m2f.engine.trainer import Trainer
from sim_m2f.modeling.low_precision import lowered_weights

sys.path.insert(0, str(ROOT / "benchmarks"))
import ranks as benchmark

STEPS = 6
SOON = [  # all losses are at work within these steps
    *("MODEL.SIM.COPY_PASTE.START", "1", "MODEL.SIM.COPY_PASTE.PROBABILITY", "1.0"),
    *("MODEL.SIM.PSEUDO_MASKS.POSITIVE", "(0.2, 0.3)", "MODEL.SIM.PSEUDO_MASKS.NEGATIVE", "0.1"),
    *("MODEL.SIM.PSEUDO_SEMANTIC.START", "0", "MODEL.SIM.SELF_CORRECTION.START", "0"),
    *("MODEL.SIM.PROTOTYPES.CONFIDENT", "0.3"),
]


@pytest.mark.parametrize(("number", "ranks"), [(16, 1), (16, 3), (16, 6), (16, 8), (3, 3)])
def test_things_are_shared_as_evenly_as_can_be(number, ranks):
    shares = [share(number, rank, ranks) for rank in range(ranks)]
    assert list(itertools.chain(*shares)) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_image_draws_the_same_whatever_is_beside_it():
    seeds = [(0, step, slot) for step in range(3) for slot in range(4)]
    drawn = uniform(seeds, "some", 1000)
    assert torch.equal(drawn[5:7], uniform(seeds[5:7], "some", 1000))
    assert not torch.equal(drawn, uniform(seeds, "other", 1000))
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.15
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.fixture
def run(tmp_path):
    """Losses and last weights of a run of the benchmark's network and method in this process."""

    def trained(name: str, last: int, *overrides: str) -> tuple[list, dict]:
        file = tmp_path / f"{name}{last}.json"
        folder = str(tmp_path / name)
        with pytest.raises(SystemExit):
            benchmark.rank(["float32", str(last), str(file), folder, "4", *SOON, *overrides])
        return json.loads(file.read_text()), last_weights(tmp_path / name)

    return trained


def last_weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / (output / "last_checkpoint").read_text(), weights_only=True)["model"]


@pytest.mark.slow
def test_a_batch_in_parts_learns_what_it_does_at_once(run):
    whole, parts = run("whole", 3), run("parts", 3, "SOLVER.IMAGES_AT_ONCE", "3")
    result = benchmark.compared(whole, parts)
    assert result["largest"] < 1e-5, result
    assert result["weights"] < 1e-4, result


@pytest.mark.slow
def test_one_rank_then_two_then_one_learn_what_one_does(run, tmp_path):
    """The whole method, two steps each; boxes fill for so short a time that the guard has something to do."""
    guarded = "MODEL.SIM.BOX_FILL.STEPS", "4", "MODEL.SIM.FILL_GUARD.RANGE", "(0.2, 1.0)"
    settings = *guarded, *benchmark.EXACT
    alone = run("alone", STEPS, *settings)
    idle = {name for name in alone[0][0] if not any(step[name] > 0 for step in alone[0])}
    assert idle == set()
    losses, _ = run("moved", 2, *settings)
    own = ["float32", "4", str(tmp_path / "two.json"), str(tmp_path / "moved"), "4", *SOON]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "benchmarks/ranks.py"), "--rank", *own, *settings]
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(command, check=True, env=environment)
    losses += json.loads((tmp_path / "two.json").read_text())
    last, weights = run("moved", STEPS, *settings)
    result = benchmark.compared(alone, (losses + last, weights))
    assert result["largest"] < 1e-5, result
    assert result["weights"] < 1e-6, result


@pytest.mark.slow
@pytest.mark.parametrize("supervision", ["mask", "mixed"])
def test_parts_of_a_batch_add_up_from_masks_too(tmp_path, supervision):
    losses = []
    for number in (0, 1):
        own = ["MODEL.SIM.SUPERVISION", supervision, "SOLVER.IMAGES_AT_ONCE", str(number)]
        own += ["MODEL.SIM.COPY_PASTE.ENABLED", "False"]
        cfg = benchmark.configuration(str(tmp_path), 3, own)
        trainer = Trainer(cfg)
        batch = next(iter(train_loader(cfg)))
        losses.append({name: loss.item() for name, loss in trainer.step(batch).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def gradients(network: nn.Module, images: torch.Tensor) -> tuple[list, list, int]:
    """Gradients and buffers after a step in mixed precision, and bytes of maps kept for the backward pass."""
    torch.manual_seed(0)
    network.train()
    with MemoryPeak() as memory, torch.autocast("cpu", torch.bfloat16), lowered_weights(network):
        weights = memory.now
        features = network(images).values()
        kept = memory.now - weights
    sum(feature.float().square().mean() for feature in features).backward()
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    return [parameter.grad for parameter in network.parameters()], statistics, kept


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
        ["MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 24],
    ],
    ids=["frozen", "batch norm", "Swin"],
)
def test_recomputed_blocks_have_the_same_gradients_from_less_memory(overrides):
    results = []
    for recomputed in (False, True):
        cfg = sim_m2f.get_cfg()
        cfg.merge_from_list([str(value) for value in overrides])
        cfg.merge_from_list(["MODEL.SWIN.USE_CHECKPOINT", str(recomputed), "MODEL.RESNETS.DEPTH", "34"])
        images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        results.append(gradients(sim_m2f.build_model(cfg).backbone, images))
    (plain, buffers, kept), (again, other_buffers, less) = results
    assert less < 0.75 * kept
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-6)
    for one, other in zip(buffers, other_buffers, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_paths_are_dropped_by_the_images_seeds(small_cfg):
    small_cfg.MODEL.BACKBONE.NAME, small_cfg.MODEL.SWIN.EMBED_DIM = "D2SwinTransformer", 24
    small_cfg.MODEL.SWIN.DROP_PATH_RATE = 0.9
    backbone, images = sim_m2f.build_model(small_cfg).backbone.train(), torch.randn(3, 3, 64, 64)
    seeds = [(0, 5, slot) for slot in range(3)]

    def features(chosen: list[int]) -> torch.Tensor:
        backbone.draw_paths([seeds[i] for i in chosen])
        return backbone(images[chosen])["res5"]

    together = features([0, 1, 2])
    torch.testing.assert_close(features([2, 0]), together[[2, 0]])
    backbone.draw_paths([(0, 6, slot) for slot in range(3)])
    assert not torch.allclose(backbone(images)["res5"], together)
