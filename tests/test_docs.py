"""The documents: links and paths exist, the reference is complete, figures are those of the output files."""

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import sim_m2f
from sim_m2f.config import CfgNode
from sim_m2f.config.node import leaf_keys, value_of

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(r"(?<![\w/.-])(?:sim_m2f|configs|benchmarks|examples|tests|docs|ops)/[\w./-]*\w(?![\w*])")
ROW = re.compile(r"^\|.*\[(?:configs/\w+/)?(\w+?)(?:\.yaml)?\].*\|$", re.MULTILINE)
RESULTS = ROOT / "benchmarks/results"


def anchors(page: Path) -> set[str]:
    headings = HEADING.findall(page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_exists(page):
    new = {"sim_m2f/supervision/area.py"}  # what CONTRIBUTING.md adds
    original = {"configs/coco/instance-segmentation"}  # of the original's repository
    for path in set(PATH.findall(page.read_text())) - new:
        if not any(path.startswith(other) for other in original):
            assert (ROOT / path).exists(), path


def test_the_reference_has_every_key_with_its_default_and_meaning():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/hooks/configuration.py")
    hook = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = hook
    spec.loader.exec_module(hook)
    found, group = {}, ""
    for line in hook.reference().splitlines():
        if line.startswith("### "):
            group = "" if line == "### Without a group" else f"{line[4:]}."
        elif line.startswith("| `"):
            key, default, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            assert len(meaning) > 7, line
            found[group + key.strip("`")] = CfgNode._decode_cfg_value(yaml.safe_load(default.strip("`")))
    cfg = sim_m2f.get_cfg()
    keys = [key for key in leaf_keys(cfg) if not isinstance(value_of(cfg, key), CfgNode)]
    assert set(found) == set(keys)
    assert found == {key: value_of(cfg, key) for key in keys}


def measured() -> dict[tuple[str, str], float]:
    """Mask AP by output file and configuration or row."""
    shapes = json.loads((RESULTS / "shapes.json").read_text())
    found = {
        ("shapes.json", f"{name}_R18"): shapes[key]["segm/AP"]
        for name, key in (("sim", "box"), ("mask", "mask"))
    }
    for file in ("ablation_shapes.json", "ablation_nuclei.json"):
        rows = json.loads((RESULTS / file).read_text())
        found |= {(file, row["row"]): statistics.fmean(row["segm/AP"]) for row in rows}
    for name in ("people", "pennfudan", "nuclei"):
        rows = json.loads((RESULTS / f"real_{name}.json").read_text())
        configs = {"boxinst": "boxinst", "sim": "sim", "best": "boxes", "mask": "mask"}
        for row, config in configs.items():
            usual = [entry for entry in rows if entry["row"] == row and "settings" not in entry]
            lengths = [entry["steps"] for entry in usual]
            most = max(lengths, key=lambda steps: (lengths.count(steps), steps), default=0)  # has most seeds
            scores = [entry["segm/AP"] for entry in usual if entry["steps"] == most]
            found |= {(f"real_{name}.json", config): statistics.fmean(scores)} if scores else {}
    return found


def test_the_models_scores_are_those_of_their_output_files():
    text = (ROOT / "docs/models.md").read_text()
    known, told = measured(), {}
    for row in ROW.finditer(text):
        if "not trained yet" in row[0]:
            continue
        file = re.search(r"/results/([\w.]+)\)", row[0])[1]
        scores = [float(cell) for cell in row[0].split("|") if re.fullmatch(r" \d+\.\d ", cell)]
        told[file, row[1]] = scores[0]
    assert told == {key: round(value, 1) for key, value in known.items()}
    minutes = json.loads((RESULTS / "shapes.json").read_text())
    for run in ("box", "mask"):
        assert f"| {minutes[run]['segm/AP']:.1f} | {minutes[run]['minutes']} |" in text


def test_every_configuration_is_on_the_page_of_the_models():
    text = (ROOT / "docs/models.md").read_text()
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert file.stem == "base" or f"({Path('..') / file.relative_to(ROOT)})" in text, file


@pytest.mark.slow
def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == changes[0] == sim_m2f.__version__


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads((ROOT / "examples/boxes_to_masks.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_notebook_imports_what_there_is():
    notebook = json.loads((ROOT / "examples/boxes_to_masks.ipynb").read_text())
    lines = [line for cell in notebook["cells"] if cell["cell_type"] == "code" for line in cell["source"]]
    imports = [line for line in lines if re.match(r"(from|import) sim_m2f", line)]
    assert len(imports) >= 3
    exec("".join(imports), {})


USE_AREA = """
import torch, sim_m2f
from sim_m2f.supervision.criterion import build_criterion
cfg = sim_m2f.get_cfg()
cfg.merge_from_list(["MODEL.SIM.SUPERVISION", "box", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"])
cfg.merge_from_list(["MODEL.SIM.AREA.ENABLED", "True", "MODEL.SIM.AREA.WEIGHT", "2"])
cfg.merge_from_list(["MODEL.SIM.AREA.SHARE", "0.9"])
torch.manual_seed(0)
outputs = {"pred_logits": torch.randn(1, 5, 4), "pred_masks": torch.randn(1, 5, 16, 16), "aux_outputs": []}
target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[8.0, 16.0, 40.0, 60.0]])}
losses, matched = build_criterion(cfg)(outputs, [target], torch.zeros(1, 3, 64, 64))
area = outputs["pred_masks"][0, matched.match.query[0, 0]].sigmoid().sum()
torch.testing.assert_close(losses["loss_area"], 2 * (area / (8 * 11) - 0.9).abs())
"""


@pytest.mark.slow
def test_the_loss_of_contributing_works_as_it_is_printed(tmp_path):
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    file, import_line, term, keys = blocks
    shutil.copytree(ROOT / "sim_m2f", tmp_path / "sim_m2f")
    (tmp_path / "sim_m2f/supervision/area.py").write_text(file)
    insert(tmp_path / "sim_m2f/supervision/criterion.py", "from sim_m2f.supervision.base", import_line)
    insert(tmp_path / "sim_m2f/supervision/criterion.py", '    "loss_box_fill"', term)
    insert(tmp_path / "sim_m2f/config/defaults.yaml", "  SIM:", keys)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'ops'}"}
    run = subprocess.run(
        [sys.executable, "-c", USE_AREA], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def insert(file: Path, after: str, text: str) -> None:
    """Put lines below the line that begins with ``after``."""
    lines = file.read_text().splitlines(keepends=True)
    (index,) = (index for index, line in enumerate(lines) if line.startswith(after))
    file.write_text("".join([*lines[: index + 1], text, *lines[index + 1 :]]))
