"""A trained network as users want it: pictures in, instances out."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision import tv_tensors

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import test_augmentation
from sim_m2f.data.loader import pad_and_cat
from sim_m2f.data.picture import to_rgb
from sim_m2f.errors import UserError
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.modeling.postprocess import instances

Picture = str | Path | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Instances:
    """The K objects found in one picture, best first; boxes and masks are in pixels of that picture.

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
        columns = np.asfortranarray(self.masks.permute(1, 2, 0).to("cpu", torch.uint8).numpy())
        return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in coco_mask.encode(columns)]


class Segmenter(nn.Module):
    """A network with the configuration that says how it sees pictures, and the names of its classes.

    Args:
        network: ``sim_m2f.build_model(cfg)`` with its weights.
        cfg: INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
            TEST.DETECTIONS_PER_IMAGE are used.
        class_names: one name per label.
        metrics: what an evaluation gave, for the model card.
    """

    def __init__(
        self,
        network: Mask2Former,
        cfg: CfgNode,
        class_names: list[str],
        metrics: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network.eval()
        self.cfg = cfg
        self.class_names = class_names
        self.metrics = metrics or {}
        self.resize = test_augmentation(cfg)
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Any]:
        """The network's outputs for pictures that are normalised and padded already; see ``Mask2Former``."""
        return self.network(images)

    @torch.no_grad()
    def predict(
        self, pictures: Picture | Iterable[Picture], threshold: float = 0.0
    ) -> Instances | list[Instances]:
        """Find the objects in one picture, or in each of several.

        Args:
            pictures: a path, a Pillow image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8, RGB; or
                several of them. An orientation in the EXIF data of a path or a Pillow image is applied.
            threshold: least score.

        Returns:
            ``Instances``, or a list of them, on the device of the network.

        Raises:
            UserError: a file cannot be decoded, or an array has another shape or type.
        """
        if not isinstance(pictures, Picture):
            return [self.predict(picture, threshold) for picture in pictures]
        pixels = _pixels(pictures)
        original = tuple(pixels.shape[-2:])
        resized = self.resize(tv_tensors.Image(pixels)).as_subclass(Tensor).to(self.mean.device)
        size, divisor = tuple(resized.shape[-2:]), self.cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        padded = pad_and_cat(
            [(resized - self.mean) / self.std], *(-(-side // divisor) * divisor for side in size)
        )
        training = self.network.training
        outputs = self.network.eval()(padded[None], auxiliary=False)
        self.network.train(training)
        (found,) = instances(outputs, [size], [original], self.cfg.TEST.DETECTIONS_PER_IMAGE)
        kept = {key: value[found["scores"] >= threshold] for key, value in found.items()}
        return Instances(**kept, names=[self.class_names[label] for label in kept["labels"].tolist()])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that ``sim_m2f.from_pretrained`` reads and that can be uploaded as it is."""
        from sim_m2f.pretrained import write_folder

        write_folder(Path(folder), self)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload to the Hugging Face Hub; ``options`` are those of ``huggingface_hub.HfApi.create_repo``.

        Returns:
            the address of the repository.
        """
        from sim_m2f.pretrained import upload

        return upload(self, repository, **options)


def _pixels(picture: Picture) -> Tensor:
    """(3, H, W) uint8 RGB."""
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as stored:
                return _pixels(stored)
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            raise UserError(f"{picture}: cannot be decoded ({error}); give the path of a picture") from error
    if isinstance(picture, Image.Image):
        picture = to_rgb(ImageOps.exif_transpose(picture))
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3:
        picture = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
    if not isinstance(picture, Tensor) or picture.dtype != torch.uint8 or picture.shape[:-2] != (3,):
        raise UserError(
            "a picture is an array (H, W, 3) or a tensor (3, H, W) of RGB values, uint8, 0 to 255; convert it"
        )
    return picture
