"""A trained network as users want it: images in, instances out."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import huggingface_hub
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import tv_tensors

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import eval_augmentation
from sim_m2f.data.image import read_image, to_rgb
from sim_m2f.data.loader import pad_and_cat
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.detections import detections
from sim_m2f.errors import UserError, first_line
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.modeling.postprocess import masks_in_boxes
from sim_m2f.modeling.specks import without_specks
from sim_m2f.modeling.tiles import tiled
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Predictions, Prompts, Size
from sim_m2f.supervision.color_model import FINER, corrected_masks
from sim_m2f.weights.folder import Metrics, TrainedNetwork, read_folder, write_folder

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Instances:
    """The K objects found in one image, best first; boxes and masks are in pixels of that image.

    Attributes:
        labels: (K,) int64, 0 to C-1.
        scores: (K,) float, 0 to 1: class probability times the mean probability of the mask's pixels.
        boxes: (K, 4) float xyxy around the masks; zeros for an empty mask.
        masks: (K, H, W) bool.
        names: K names of classes.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def rles(self) -> list[dict[str, Any]]:
        """The masks as COCO's compressed RLE: {"size": [H, W], "counts": text}."""
        return encode_masks(self.masks.cpu().numpy())


class Segmenter(nn.Module):
    """A network with the configuration that says how it sees images, and the names of its classes.

    Args:
        network: ``sim_m2f.build_model(cfg)`` with its weights.
        cfg: INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
            TEST.DETECTIONS_PER_IMAGE are used.
        class_names: one name per label.
        metrics: what an evaluation gave, for the model card.
    """

    def __init__(
        self, network: Mask2Former, cfg: CfgNode, class_names: list[str], metrics: Metrics | None = None
    ) -> None:
        super().__init__()
        self.network, self.cfg = network.eval(), cfg
        self.class_names, self.metrics = class_names, metrics or {}
        self.resize, self.pixels = eval_augmentation(cfg), Pixels(cfg)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """The network's outputs for images that are normalised and padded already; see ``Mask2Former``."""
        return self.network(images)

    # A text is one path, not several texts.
    @overload
    def predict(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        threshold: float = 0.0,
        boxes: Any = None,
        labels: Any = None,
        colors: bool | None = None,
    ) -> Instances: ...

    @overload
    def predict(
        self, images: Iterable[ImageLike], threshold: float = 0.0, *, colors: bool | None = None
    ) -> list[Instances]: ...

    @torch.no_grad()
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        threshold: float = 0.0,
        boxes: Any = None,
        labels: Any = None,
        colors: bool | None = None,
    ) -> Instances | list[Instances]:
        """Find the objects in one image, or in each of several; or the masks of given boxes in one image.

        Args:
            images: a path, a Pillow image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8, RGB; or
                several of them. An orientation in the EXIF data of a path or a Pillow image is applied.
            threshold: least score; of given boxes all are kept.
            boxes: (N, 4) numbers, xyxy in pixels of the image, whose masks are asked for; for one image only.
            labels: (N,) their classes, 0 to C-1; all 0 if they are not given.
            colors: correct masks by the colours in and around their boxes (``supervision.color_model``).
                Unless told, those that are found as TEST.COLORS.ENABLED says, and those of given boxes not.

        Returns:
            ``Instances``, or a list of them, on the device of the network. Those of given boxes are in the
            order of the boxes, with these boxes; the masks lie inside of them.

        Raises:
            UserError: a file cannot be decoded, an array has another shape or type, an image has no pixels,
                boxes or labels are not as they should be, or boxes are given to a network that did not learn
                from prompts (MODEL.SIM.PROMPTS.ENABLED).
        """
        if not isinstance(images, ImageLike):
            if boxes is not None:
                raise UserError("boxes belong to one image; call predict once for each image")
            return [self.predict(image, threshold, colors=colors) for image in images]
        padded, size, original = self._input(images)
        if boxes is not None:
            return self._masks_of(padded, boxes, labels, size, original, bool(colors))[0]
        colors = self.cfg.TEST.COLORS.ENABLED if colors is None else colors
        return self._found(self._outputs(padded), padded, size, original, colors, threshold)

    @torch.no_grad()
    def predict_both(
        self, image: ImageLike, boxes: Any, labels: Any, colors: bool
    ) -> tuple[Instances, Instances]:
        """In one pass of the network, the masks of given boxes and all that it finds; see ``predict``.

        Colours never correct what it finds: how well both agree tells how sure the network is.
        """
        padded, size, original = self._input(image)
        given, outputs = self._masks_of(padded, boxes, labels, size, original, colors)
        return given, self._found(outputs, padded, size, original, colors=False)

    def _input(self, image: ImageLike) -> tuple[Tensor, Size, Size]:
        """The network's input (1, 3, H, W), the size of the image in it, and the image's own."""
        pixels = _pixels(image, self.cfg.INPUT.LIMITS)
        resized = self.resize(tv_tensors.Image(pixels)).as_subclass(Tensor).to(self.pixels.mean.device)
        size = resized.shape[-2], resized.shape[-1]
        divisor = self.cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        padded_size = (-(-side // divisor) * divisor for side in size)
        padded = pad_and_cat([self.pixels.normalise(resized)], *padded_size)[None]
        return padded, size, (pixels.shape[-2], pixels.shape[-1])

    def _found(
        self,
        outputs: Predictions,
        images: Tensor,
        size: Size,
        original: Size,
        colors: bool,
        threshold: float = 0.0,
    ) -> Instances:
        """The objects that the network finds by itself in its input (1, 3, H, W)."""
        pixels = self.pixels.undo(images)
        (found,) = detections(outputs, pixels, [size], [original], self.cfg, colors)
        kept = found["scores"] >= threshold
        return self._named(
            found["labels"][kept], found["scores"][kept], found["boxes"][kept], found["masks"][kept]
        )

    def _outputs(self, images: Tensor, prompts: Prompts | None = None) -> Predictions:
        training = self.network.training
        if training:  # asking all modules takes as long as a small image does
            self.network.eval()
        test = self.cfg.TEST
        outputs = tiled(self.network, images, test.TILE, prompts, test.DETECTIONS_PER_IMAGE)
        if training:
            self.network.train()
        return outputs

    def _named(self, labels: Tensor, scores: Tensor, boxes: Tensor, masks: Tensor) -> Instances:
        names = [self.class_names[label] for label in labels.tolist()]
        return Instances(labels, scores, boxes, masks, names)

    def _masks_of(
        self, images: Tensor, boxes: Any, labels: Any, size: Size, original: Size, colors: bool
    ) -> tuple[Instances, Predictions]:
        """The masks of boxes in pixels of the image, from its input (1, 3, H, W), and all outputs."""
        self.require_prompts()
        boxes = _numbers(boxes, "boxes").float()
        if boxes.numel() and boxes.shape[-1:] != (4,):
            raise UserError(f"boxes are (N, 4) numbers, xyxy, not {tuple(boxes.shape)}; correct them")
        boxes = boxes.reshape(-1, 4)
        if not boxes.isfinite().all() or (boxes[:, 2:] < boxes[:, :2]).any():
            form = "finite numbers x0, y0, x1, y1 with x0 <= x1 and y0 <= y1"
            raise UserError(f"boxes are {form}; correct them")
        labels = _numbers([0] * len(boxes) if labels is None else labels, "labels").reshape(-1)
        classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        known = (labels >= 0) & (labels < classes) & (labels == labels.long())
        if len(labels) != len(boxes) or not known.all():
            raise UserError(f"{len(boxes)} boxes need as many labels, whole numbers from 0 to {classes - 1}")
        boxes, labels = boxes.to(images.device), labels.long().to(images.device)
        scale = [new / old for old, new in zip(original[::-1], size[::-1], strict=True)]
        resized = boxes * boxes.new_tensor([*scale, *scale])
        shares = (resized / boxes.new_tensor([*images.shape[:1:-1]] * 2)).clamp(0, 1)
        outputs = self._outputs(images, Prompts(shares[None], labels[None]))
        logits = outputs["prompted"]["pred_masks"][0]
        keys = self.cfg.MODEL.SIM.PROMPTS
        span, ellipse = keys.SPAN, keys.ELLIPSE
        if colors:
            pixels = self.pixels.undo(images[0])
            logits = corrected_masks(logits, pixels, resized, size, self.cfg.MODEL.SIM.COLOR_MODEL)
            size, span, ellipse = (FINER * size[0], FINER * size[1]), 0.0, 0.0  # they span their boxes
        masks, scores = masks_in_boxes(logits, boxes, size, original, span, ellipse)
        masks = without_specks(masks) if colors else masks
        return self._named(labels, scores, boxes, masks), outputs

    @property
    def colors_by_default(self) -> bool:
        """Whether colours correct the masks of given boxes where no true masks say what is better.

        Unless the network sees tiles (TEST.TILE): those are for objects of a few pixels, whose blurred
        outlines look like their surroundings, so that colours make masks worse (docs/REAL_IMAGES.md).
        """
        return not self.cfg.TEST.TILE

    def require_prompts(self) -> None:
        """Raises UserError unless the network has learned to answer boxes."""
        if not self.cfg.MODEL.SIM.PROMPTS.ENABLED:
            advice = "leave them out, or train with MODEL.SIM.PROMPTS.ENABLED True"
            raise UserError(f"this network knows no boxes; {advice}")

    @property
    def trained(self) -> TrainedNetwork:
        """What is written and exported."""
        return TrainedNetwork(self.network, self.cfg, self.class_names, self.metrics)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``sim_m2f.from_pretrained`` reads and that can be uploaded as it is."""
        write_folder(Path(folder), self.trained)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload to the Hugging Face Hub; ``options`` are those of ``huggingface_hub.HfApi.create_repo``.

        Returns:
            the address of the repository.
        """
        hub = huggingface_hub.HfApi()
        address = hub.create_repo(repository, exist_ok=True, **options)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.upload_folder(repo_id=address.repo_id, folder_path=folder)
        return str(address)


def from_pretrained(source: str | Path, config: str | Path = "", device: str = "auto") -> Segmenter:
    """A trained network, ready for ``predict``.

    Args:
        source: a folder that ``save_pretrained`` wrote, the OUTPUT_DIR of a run, a folder with one checkpoint
            and ``config.yaml``, a folder of transformers' Mask2Former, "owner/name" (or "hf://owner/name") of
            one of these on the Hugging Face Hub, or a checkpoint.
        config: YAML file; needed for a checkpoint, replaces the folder's otherwise.
        device: "auto" (the GPU when there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: there is nothing of the kind, a file is damaged, weights and configuration do not fit, or
            the device is not there.
    """
    trained = read_folder(source, config)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
        return Segmenter(trained.network, trained.cfg, trained.class_names, trained.metrics).to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: cannot be used ({first_line(error)}); take auto or cpu") from error


def _numbers(values: Any, name: str) -> Tensor:
    """Raises UserError for what is no array of numbers."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} are no array of numbers ({first_line(error)}); correct them") from error


def _pixels(image: ImageLike, limits: CfgNode) -> Tensor:
    """(3, H, W) uint8 RGB; UserError for what is no image."""
    if isinstance(image, (str, Path)):
        image = read_image(Path(image), limits=limits)
    if isinstance(image, Image.Image):
        try:
            image = to_rgb(ImageOps.exif_transpose(image))
        except ValueError as error:
            raise UserError(f"the image cannot be turned into RGB: {first_line(error)}") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3:
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.shape[:-2] != (3,):
        raise UserError("an image is an array (H, W, 3) or a tensor (3, H, W) of RGB, uint8; convert it")
    if not image.numel():
        raise UserError(f"the image has no pixels ({image.shape[-2]} x {image.shape[-1]}); take another one")
    return image
