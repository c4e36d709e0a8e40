"""detectron2: importing this registers the meta-architecture SIMMask2Former; add_sim_config adds its keys.

detectron2's trainer, data loaders and evaluators then drive the network and the criterion of this project.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

try:
    from detectron2.config import CfgNode as Detectron2Cfg
    from detectron2.data import DatasetMapper, build_detection_train_loader, transforms
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator
    from detectron2.modeling import META_ARCH_REGISTRY
    from detectron2.structures import Boxes, ImageList
    from detectron2.structures import Instances as Detectron2Instances
except ImportError as error:
    source = "https://github.com/facebookresearch/detectron2"
    raise ImportError(f"{__name__} needs detectron2; install it from {source}") from error

from sim_m2f.config import check_choices, get_cfg, value_of
from sim_m2f.config.defaults import add_keys
from sim_m2f.data.student_colors import student_colors
from sim_m2f.detections import detections
from sim_m2f.engine.optimizer import build_scheduler, parameter_groups
from sim_m2f.errors import UserError
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.modeling.tiles import tiled
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Detections, Outputs, Size, Target
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.teacher import build_teacher, teacher_terms
from sim_m2f.weights.checkpoint import load_checkpoint

# Keys that this project's own trainer and loaders alone heed; docs/COMPATIBILITY.md names them too.
IGNORED = (
    "DATASETS.TEST_ANNOTATIONS",
    "DATASETS.TEST_IMAGES",
    "DATASETS.TRAIN_ANNOTATIONS",
    "DATASETS.TRAIN_IMAGES",
    "DATASETS.TRAIN_PROPOSALS",
    "INPUT.BOTTOM_ROWS",
    "MODEL.COMPILE",
    "SOLVER.EXACT_SUMS",
    "SOLVER.IMAGES_AT_ONCE",
)


def add_sim_config(cfg: Detectron2Cfg) -> None:
    """Add every key of this project to a configuration of detectron2.

    Keys that both have get this project's default, as in Mask2Former's own files; MODEL.DEVICE stays.
    """
    device = cfg.MODEL.DEVICE
    add_keys(cfg, get_cfg())
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = device, "SIMMask2Former"


@META_ARCH_REGISTRY.register()
class SIMMask2Former(nn.Module):
    """The network and its criterion behind detectron2's interface.

    In training it takes detectron2's list of {"image" (3, H, W), "instances"} and returns losses; Instances
    need ``gt_classes``, ``gt_boxes`` and, unless MODEL.SIM.SUPERVISION is box, ``gt_masks``; if mixed, they
    are empty where they are not known. Otherwise it returns detectron2's list of {"instances"}. Keys that
    are IGNORED are named in one line if they are not at their defaults.

    Raises:
        UserError: copy-paste is asked for, whose bank of images only this project's own trainer keeps, or a
            loss needs a teacher and there is none.
    """

    def __init__(self, cfg: Detectron2Cfg) -> None:
        super().__init__()
        if cfg.MODEL.SIM.COPY_PASTE.ENABLED:
            raise UserError("MODEL.SIM.COPY_PASTE.ENABLED: train_net.py only; under detectron2 set it False")
        check_choices(cfg)
        defaults = get_cfg()
        if unheeded := [key for key in IGNORED if value_of(cfg, key) != value_of(defaults, key)]:
            logging.getLogger(__name__).warning("without effect under detectron2: %s", ", ".join(unheeded))
        self.cfg = cfg
        self.network = Mask2Former(cfg)
        self.criterion = build_criterion(cfg)
        self.teacher = build_teacher(cfg, self.network, torch.device(cfg.MODEL.DEVICE))
        self.needs_teacher = bool(teacher_terms(cfg))
        self.pixels = Pixels(cfg)
        self.register_state_dict_post_hook(_numbers_as_tensors)
        self.register_load_state_dict_pre_hook(_tensors_as_numbers)
        self.to(cfg.MODEL.DEVICE)

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        normalised = [self.pixels.normalise(item["image"].to(self.pixels.mean.device)) for item in batch]
        images = ImageList.from_tensors(normalised, self.cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY)
        sizes = [(height, width) for height, width in images.image_sizes]
        if self.training:
            targets = [self._target(item["instances"], images.tensor.shape[-2:]) for item in batch]
            teacher_outputs = self._teacher_outputs(targets, images.tensor)
            prompts = self.criterion.student_prompts(targets, images.tensor)
            share, seeds = self.cfg.INPUT.STUDENT_COLORS, [None] * len(batch)
            seen = student_colors(images.tensor, self.pixels, share, seeds, sizes) if share else images.tensor
            outputs = self.network(seen, prompts=prompts)
            losses, matched = self.criterion(outputs, targets, images.tensor, teacher_outputs)
            self.criterion.update(matched)
            return losses
        asked = [{"height": h, "width": w, **item} for item, (h, w) in zip(batch, sizes, strict=True)]
        originals = [(item["height"], item["width"]) for item in asked]
        found = [self._detected(*each) for each in zip(images.tensor, sizes, originals, strict=True)]
        return [{"instances": _as_instances(*each)} for each in zip(found, originals, strict=True)]

    def _detected(self, image: Tensor, size: Size, original: Size) -> Detections:
        """What the network that TEST.USE_TEACHER names finds in one image, as TEST.* says."""
        test = self.cfg.TEST
        network = self.teacher.network if self.teacher and test.USE_TEACHER else self.network
        outputs = tiled(network, image[None], test.TILE, objects=test.DETECTIONS_PER_IMAGE)
        pixels = self.pixels.undo(image[None])
        return detections(outputs, pixels, [size], [original], self.cfg, test.COLORS.ENABLED)[0]

    def _teacher_outputs(self, targets: list[Target], images: Tensor) -> Outputs | None:
        """The teacher's outputs, where a loss needs them; it follows the weights that the last step left."""
        if self.teacher is None:
            return None
        self.teacher.update(self.network)
        if not self.needs_teacher:
            return None
        return self.teacher(images, self.criterion.teacher_prompts(targets, images))

    def _target(self, annotated: Detectron2Instances, size: tuple[int, int]) -> Target:
        height, width = annotated.image_size
        padding = (0, size[1] - width, 0, size[0] - height)
        valid = F.pad(torch.ones(height, width, dtype=torch.bool), padding)
        target: Target = {"labels": annotated.gt_classes, "boxes": annotated.gt_boxes.tensor, "valid": valid}
        if self.cfg.MODEL.SIM.SUPERVISION != "box":
            target["masks"] = F.pad(annotated.gt_masks.tensor, padding)
            target["known"] = target["masks"].flatten(1).any(1)
        return target


def _as_instances(detections: Detections, size: tuple[int, int]) -> Detectron2Instances:
    masks, boxes = detections["masks"].float(), Boxes(detections["boxes"])
    scored = {"scores": detections["scores"], "pred_classes": detections["labels"]}
    return Detectron2Instances(size, pred_masks=masks, pred_boxes=boxes, **scored)


def _numbers_as_tensors(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    """Steps and updates as tensors, because detectron2's checkpoints hold nothing else."""
    for key in [key for key in state if key.endswith("_extra_state")]:
        for name, value in state.pop(key).items():
            state[f"{key}.{name}"] = torch.tensor(value)


def _tensors_as_numbers(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    for key in [key for key in state if "_extra_state." in key]:
        owner, name = key.rsplit(".", 1)
        state.setdefault(owner, {})[name] = state.pop(key).item()


class SIMTrainer(DefaultTrainer):
    """detectron2's trainer with Mask2Former's recipe: AdamW, full-model clipping, large-scale jitter."""

    @classmethod
    def build_optimizer(cls, cfg: Detectron2Cfg, model: SIMMask2Former) -> Optimizer:
        """Not fused: the clipping must see gradients that mixed precision no longer scales."""
        optimizer = torch.optim.AdamW(parameter_groups(model.network, cfg), lr=cfg.SOLVER.BASE_LR)
        clip = cfg.SOLVER.CLIP_GRADIENTS

        def clip_gradient(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), clip.CLIP_VALUE, clip.NORM_TYPE)

        if clip.ENABLED:
            optimizer.register_step_pre_hook(clip_gradient)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: Detectron2Cfg, optimizer: Optimizer) -> LRScheduler:
        return build_scheduler(optimizer, cfg)

    @classmethod
    def build_train_loader(cls, cfg: Detectron2Cfg) -> Any:
        size, flip = cfg.INPUT.IMAGE_SIZE, cfg.INPUT.RANDOM_FLIP
        jitter = transforms.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size)
        crop = transforms.FixedSizeCrop((size, size), pad=False)
        flips = {"horizontal": flip == "horizontal", "vertical": flip == "vertical"}
        mapper = DatasetMapper(
            is_train=True,
            augmentations=[*([transforms.RandomFlip(**flips)] if any(flips.values()) else []), jitter, crop],
            image_format=cfg.INPUT.FORMAT,
            use_instance_mask=cfg.MODEL.SIM.SUPERVISION != "box",
            instance_mask_format="bitmask",
        )
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: Detectron2Cfg, name: str) -> COCOEvaluator:
        return COCOEvaluator(name, tasks=("segm",), output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from OUTPUT_DIR's last checkpoint, or start from MODEL.WEIGHTS, whatever wrote it."""
        if (resume and self.checkpointer.has_checkpoint()) or not self.cfg.MODEL.WEIGHTS:
            super().resume_or_load(resume)
        else:
            load_checkpoint(self.checkpointer.model.network, self.cfg.MODEL.WEIGHTS)
