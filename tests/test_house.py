"""The floors of the house: imports run down and in no circle; a loss is added in one place."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import sim_m2f
from sim_m2f.cli import main
from sim_m2f.config import CfgNode
from sim_m2f.supervision import criterion as criterion_file
from sim_m2f.supervision.matched import MatchedBoxes, per_object

# From the ground up; rooms of one floor do not import each other.
FLOORS = (
    ("errors", "allocator", "distributed", "draws", "geometry", "progress", "structures"),
    ("files", "config"),
    ("pixels", "own_folder"),
    ("modeling", "supervision", "data"),
    ("weights", "detections"),
    ("segmenter", "engine"),
    ("report",),
    ("labelling", "training"),
    ("serving",),
    ("commands", "integrations"),
    ("cli", "__init__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(package: Path) -> dict[str, set[str]]:
    """The files of the package that each of its files imports, as dotted names below the package."""
    files = {
        file: ".".join(file.relative_to(package).with_suffix("").parts) for file in package.rglob("*.py")
    }
    names = {name.removesuffix(".__init__") for name in files.values()}
    graph = {}
    for file, name in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[name.removesuffix(".__init__")] = set(_imported(tree, names)) - {name.removesuffix(".__init__")}
    return graph


def _imported(tree: ast.Module, names: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in modules:
            if module.startswith("sim_m2f."):
                below = module.removeprefix("sim_m2f.")
                yield f"{below}.{name}" if f"{below}.{name}" in names else below


def faults(package: Path) -> list[str]:
    """Imports that run up or along a floor, and a circle of files."""
    graph = imports(package)
    found = []
    for file, others in graph.items():
        room = file.partition(".")[0]
        for other in others:
            below = other.partition(".")[0]
            if below != room and FLOOR_OF[below] >= FLOOR_OF[room]:
                found.append(f"{file} imports {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_run_down_and_in_no_circle():
    assert faults(ROOT / "sim_m2f") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        (
            "supervision/teacher.py",
            "from sim_m2f.engine.trainer import Trainer",
            "supervision.teacher imports",
        ),
        ("modeling/position.py", "import sim_m2f.data.coco", "modeling.position imports data.coco"),
        ("data/coco.py", "    from sim_m2f.data.loader import collate", "circle: "),
    ],
)
def test_the_guard_sees_what_is_added(tmp_path, file, line, fault):
    shutil.copytree(ROOT / "sim_m2f", tmp_path / "sim_m2f", ignore=shutil.ignore_patterns("__pycache__"))
    changed = tmp_path / "sim_m2f" / file
    changed.write_text(f"{changed.read_text()}\n\ndef added():\n    {line.strip()}\n")
    assert any(found.startswith(fault) for found in faults(tmp_path / "sim_m2f"))


def loss_area(matched: MatchedBoxes) -> torch.Tensor:
    """CONTRIBUTING.md's example: how far a mask's area is from half of its box's."""
    area = matched.masks.sigmoid().sum((-2, -1))
    box = matched.objects.box_masks.sum((-2, -1))
    return per_object((area / box - 0.5).abs(), matched.annotated, matched.objects)


def test_a_loss_is_a_function_a_line_and_its_keys(monkeypatch):
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.MODEL.SIM.AREA = CfgNode({"ENABLED": True, "WEIGHT": 3.0, "START": 0.0, "WARMUP": 4.0})
    monkeypatch.setitem(criterion_file.TERMS, "loss_area", ("AREA", loss_area))
    criterion = criterion_file.build_criterion(cfg)
    masks = torch.zeros(1, 2, 8, 8)
    outputs = {
        "pred_logits": torch.zeros(1, 2, 9),
        "pred_masks": masks.requires_grad_(),
        "mask_features": torch.zeros(1, 64, 8, 8),
        "aux_outputs": [],
    }
    target = {"labels": torch.tensor([3]), "boxes": torch.tensor([[0.0, 0.0, 16.0, 16.0]])}
    weights = []
    for _ in range(6):
        losses, matched = criterion(outputs, [target], torch.zeros(1, 3, 32, 32))
        weights.append(losses["loss_area"].item())
        criterion.update(matched)
    # all of 8 x 8 pixels at one half are 32, the box has 4 x 4: |32 / 16 - 0.5| = 1.5, times the weight
    assert weights == pytest.approx([1.5 * 3 * min(step / 4, 1) for step in range(6)])
    losses["loss_area"].backward()
    assert masks.grad.abs().sum() > 0


def test_the_command_line_names_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    for file in (ROOT / "sim_m2f/commands").glob("[a-z]*.py"):
        assert f"    {file.stem} " in text
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["tarin"])
    assert "invalid choice: 'tarin'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package"), [("check", "torch"), ("convert", "torch"), ("train", "timm")]
)
def test_a_command_begins_without_packages_that_it_may_not_need(command, package):
    """They take seconds: what reads annotations needs no tensors, whoever launches ranks no network."""
    script = f"import sys, sim_m2f.commands.{command}; sys.exit({package!r} in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops")])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": path})
