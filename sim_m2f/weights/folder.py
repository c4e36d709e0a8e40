"""Folders of trained networks: read from wherever they come from, and written.

A folder of ours holds model.safetensors, config.yaml, classes.json and README.md, the model card.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template
from safetensors.torch import save

from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.data.class_names import class_names, read_class_names
from sim_m2f.errors import UserError
from sim_m2f.files import expanded, read_json, write_file
from sim_m2f.modeling import build_model
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.sources import hub_folder, weights_in
from sim_m2f.weights.transformers import cfg_from_transformers

CONFIG, WEIGHTS, CLASSES, CARD = "config.yaml", "model.safetensors", "classes.json", "README.md"
OURS = b"library_name: sim-m2f"  # on the model card
METRICS_FILE = "inference/metrics.json"
SHOWN = ("segm/AP", "segm/AP50", "segm/AP75", "segm/APs", "segm/APm", "segm/APl")  # on the model card


MARKUP = re.compile(r"[\\`*_\[\]<>|#]")  # what means something in Markdown
Metrics = dict[str, float | None]  # in percent; None where there is nothing to measure


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its configuration, the names of its classes, and what an evaluation gave."""

    network: Mask2Former
    cfg: CfgNode
    class_names: list[str]
    metrics: Metrics


def read_folder(source: str | Path, config: str | Path = "") -> TrainedNetwork:
    """A trained network, on the CPU; see ``sim_m2f.from_pretrained`` for the arguments.

    Raises:
        UserError: there is nothing of the kind, a file is damaged, or weights and configuration do not fit.
    """
    path = expanded(source)
    folder = path if path.exists() else hub_folder(str(source))
    names: list[str] = []
    metrics: Metrics = {}
    if folder.is_file() and not config:
        raise UserError(f"{folder}: a checkpoint alone does not say what network it is of; give its config")
    if not config and not (folder / CONFIG).exists():
        cfg, names = _from_transformers(folder)
        weights = folder
    else:
        weights = folder if folder.is_file() else weights_in(folder)
        cfg = get_cfg()
        cfg.merge_from_file(config or folder / CONFIG)
        validate(cfg)
        if (folder / CLASSES).exists():
            names = read_class_names(folder / CLASSES)
        if (folder / METRICS_FILE).exists():
            metrics = read_metrics(folder / METRICS_FILE)
    if names and len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        fault = f"has {len(names)} names, the network {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} classes"
        raise UserError(f"{folder / CLASSES}: {fault}; correct it")
    network = build_model(cfg)
    load_checkpoint(network, weights, complete=True)
    return TrainedNetwork(network, cfg, names or class_names(cfg), metrics)


def read_metrics(path: Path) -> Metrics:
    """What an evaluation gave.

    Raises:
        UserError: the file cannot be read, or holds more than percentages and null.
    """
    metrics = read_json(path)
    known = [value for value in metrics.values() if value is not None]
    if not all(type(value) in (int, float) and abs(value) <= 100 for value in known):
        raise UserError(f"{path}: holds more than percentages; remove it")
    return metrics


def _from_transformers(folder: Path) -> tuple[CfgNode, list[str]]:
    """The configuration and the names of the classes in a folder of transformers."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: has neither {CONFIG} nor config.json; give a trained network's folder")
    files = (folder / "config.json", folder / "preprocessor_config.json")
    contents = [read_json(file) for file in files if file.exists()]
    try:
        return cfg_from_transformers(*contents)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def write_folder(folder: Path, trained: TrainedNetwork) -> None:
    """Write a folder of ours; paths of the machine that trained it are left out of its configuration.

    Raises:
        UserError: the folder cannot be written to, or has a README.md that is no model card of ours.
    """
    card = folder / CARD
    if card.is_file() and OURS not in card.read_bytes():
        raise UserError(f"{card}: is of something else and would be replaced; give another folder")
    cfg, defaults = trained.cfg.clone(), get_cfg()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = defaults.MODEL.WEIGHTS, defaults.OUTPUT_DIR
    cfg.DATASETS = defaults.DATASETS
    weights = {name: weight.cpu().contiguous() for name, weight in trained.network.state_dict().items()}
    write_file(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    write_file(folder / CONFIG, cfg.dump())
    write_file(folder / CLASSES, json.dumps({"class_names": trained.class_names}, indent=1))
    write_file(card, model_card(trained))


def model_card(trained: TrainedNetwork) -> str:
    """README.md of the folder: what the network is, what it was measured to do, and how to use it."""
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    return Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        model=trained.cfg.MODEL,
        millions=sum(parameter.numel() for parameter in trained.network.parameters()) / 1e6,
        class_names=[MARKUP.sub(r"\\\g<0>", name) for name in trained.class_names],
        metrics={name: trained.metrics[name] for name in SHOWN if trained.metrics.get(name) is not None},
    )
