"""Folders of trained networks: read from wherever they come from, and written.

A folder of ours holds model.safetensors, config.yaml, classes.json and README.md, the model card.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save

from sim_m2f.config import CfgNode, get_cfg, validate
from sim_m2f.data.class_names import class_names, read_class_names
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write
from sim_m2f.modeling import build_model
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.weights.checkpoint import load_checkpoint
from sim_m2f.weights.hub import hub_folder
from sim_m2f.weights.sources import weights_in
from sim_m2f.weights.transformers import cfg_from_transformers

CONFIG, WEIGHTS, CLASSES, CARD = "config.yaml", "model.safetensors", "classes.json", "README.md"
METRICS = "inference/metrics.json"
CHECKPOINTS = (".pth", ".pkl", ".safetensors")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with its configuration, the names of its classes, and what an evaluation gave."""

    network: Mask2Former
    cfg: CfgNode
    class_names: list[str]
    metrics: dict[str, float | None]


class _Description(NamedTuple):
    """What a folder says of a network, and where its weights are."""

    cfg: CfgNode
    class_names: list[str]
    weights: Path
    metrics: dict[str, float | None]


def read_folder(source: str | Path, config: str | Path = "") -> TrainedNetwork:
    """A trained network, on the CPU; see ``sim_m2f.from_pretrained`` for the arguments.

    Raises:
        UserError: there is nothing of the kind, a file is damaged, or weights and configuration do not fit.
    """
    described = _described(source, config)
    network = build_model(described.cfg)
    load_checkpoint(network, described.weights, complete=True)
    return TrainedNetwork(network, described.cfg, described.class_names, described.metrics)


def _described(source: str | Path, config: str | Path) -> _Description:
    path = Path(source).expanduser()
    if not path.exists():
        if not re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+(@[\w./-]+)?", str(source)):
            raise UserError(f"{source}: no such folder or file, and no name on the Hub (owner/name)")
        path = hub_folder(str(source))
    if path.is_file():
        if not config:
            raise UserError(f"{path}: a checkpoint alone does not say what network it is of; give its config")
        return _of_config(config, path)
    if (path / "config.json").exists() and not (path / CONFIG).exists() and not config:
        return _of_transformers(path)
    if not config and not (path / CONFIG).exists():
        raise UserError(f"{path}: has neither {CONFIG} nor config.json; give the folder of a trained network")
    described = _of_config(config or path / CONFIG, _weights_in(path))
    names, metrics = path / CLASSES, path / METRICS
    if names.exists():
        described = described._replace(class_names=read_class_names(names))
    if metrics.exists():
        described = described._replace(metrics=_json(metrics))
    return described


def _of_config(config: str | Path, weights: Path) -> _Description:
    cfg = get_cfg()
    cfg.merge_from_file(config)
    validate(cfg)
    return _Description(cfg, class_names(cfg), weights, {})


def _of_transformers(folder: Path) -> _Description:
    files = (folder / "config.json", folder / "preprocessor_config.json")
    contents = [_json(file) for file in files if file.exists()]
    try:
        cfg, names = cfg_from_transformers(*contents)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return _Description(cfg, names or class_names(cfg), folder, {})


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); is the file complete?") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object of JSON; take another file")
    return content


def _weights_in(folder: Path) -> Path:
    """The folder's only checkpoint, else ours, else the last one of a run."""
    checkpoints = [file for file in folder.iterdir() if file.suffix in CHECKPOINTS]
    return checkpoints[0] if len(checkpoints) == 1 else weights_in(folder)


def write_folder(folder: Path, trained: TrainedNetwork) -> None:
    """Write a folder of ours; paths of the machine that trained it are left out of its configuration.

    Raises:
        UserError: the folder cannot be written to.
    """
    cfg, defaults = trained.cfg.clone(), get_cfg()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR = defaults.MODEL.WEIGHTS, defaults.OUTPUT_DIR
    cfg.DATASETS = defaults.DATASETS
    weights = {
        name: weight.detach().cpu().contiguous() for name, weight in trained.network.state_dict().items()
    }
    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(save(weights, metadata={"format": "pt"}))
    texts = {
        CONFIG: cfg.dump(),
        CLASSES: json.dumps({"class_names": trained.class_names}, indent=1),
        CARD: model_card(trained),
    }
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text)


_MODEL_CARD = """\
---
library_name: sim-m2f
pipeline_tag: image-segmentation
tags:
- instance-segmentation
- mask2former
- {tag}
---

# Instance segmentation with SIM-M2F

A Mask2Former of {parameters:.1f} million parameters ({backbone}) that learned from {learned_from}.

Classes: {classes}.
{measured}
## Use

```python
import sim_m2f

model = sim_m2f.from_pretrained("path/of/this/folder")  # or its name on the Hub, "owner/name"
found = model.predict("image.jpg", threshold=0.5)
print(found.names, found.scores, found.boxes, found.masks.shape, found.rles)
```
"""
_SHOWN_METRICS = ("segm/AP", "segm/AP50", "segm/AP75", "segm/APs", "segm/APm", "segm/APl")


def model_card(trained: TrainedNetwork) -> str:
    """README.md of the folder: what the network is, what it was measured to do, and how to use it."""
    boxes = trained.cfg.MODEL.SIM.SUPERVISION == "box"
    return _MODEL_CARD.format(
        tag="box-supervised" if boxes else "mask-supervised",
        parameters=sum(parameter.numel() for parameter in trained.network.parameters()) / 1e6,
        backbone=_backbone(trained.cfg),
        learned_from="bounding boxes alone, without a mask" if boxes else "masks",
        classes=", ".join(trained.class_names),
        measured=_measured(trained.metrics),
    )


def _measured(metrics: dict[str, float | None]) -> str:
    rows = [f"| {name} | {metrics[name]:.1f} |" for name in _SHOWN_METRICS if metrics.get(name) is not None]
    return "\n".join(["\n## Measured\n", "| metric | percent |", "|---|---|", *rows, ""]) if rows else ""


def _backbone(cfg: CfgNode) -> str:
    known = {
        "build_resnet_backbone": f"ResNet-{cfg.MODEL.RESNETS.DEPTH}",
        "D2SwinTransformer": f"Swin, {cfg.MODEL.SWIN.EMBED_DIM} channels",
    }
    return known.get(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NAME)
