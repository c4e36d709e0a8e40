"""Pictures as samples for the network: read, augmented, normalised."""

from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sim_m2f.data.augmentation import test_augmentation, train_augmentation
from sim_m2f.data.coco import CocoData, Picture
from sim_m2f.data.picture import read_picture
from sim_m2f.data.segmentation import decode_segmentation
from sim_m2f.errors import UserError

Sample = dict[str, Any]


class TrainDataset(Dataset):
    """An endless, reproducible sequence of augmented training samples.

    Item ``n`` is sample n of the sequence: epochs follow each other, each a permutation of the pictures that
    have an object (the others are left out, as in detectron2). Picture and augmentation depend on (SEED, n)
    alone, so that neither workers nor ranks nor resuming change what is seen. Items are ``network_input``'s.

    Raises:
        UserError: no picture has an object.
    """

    def __init__(self, cfg: CfgNode, data: list[CocoData]) -> None:
        self.pictures = [(part, picture) for part in data for picture in part.pictures if len(picture.labels)]
        if not self.pictures:
            files = ", ".join(str(part.annotations_file) for part in data)
            raise UserError(
                f"{files}: no object to train on (crowds and empty boxes do not count); give another JSON"
            )
        self.cfg = cfg
        self.augment = train_augmentation(cfg)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Sample:
        epoch, position = divmod(number, len(self.pictures))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.cfg.SEED, epoch]).permutation(len(self.pictures))
            self.epoch = epoch
        data, picture = self.pictures[self.order[position]]
        sample = read_sample(data, picture, self.cfg.INPUT.BOTTOM_ROWS)
        seed = int(np.random.SeedSequence([self.cfg.SEED, number]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for good
            sample = self.augment(sample)
        return network_input(self.cfg, picture, sample)


class TestDataset(Dataset):
    """The pictures of one data set in the order of its JSON, resized for testing. Masks are never read."""

    __test__ = False  # not a test class of pytest

    def __init__(self, cfg: CfgNode, data: CocoData) -> None:
        self.cfg = cfg
        self.data = data
        self.augment = test_augmentation(cfg)

    def __len__(self) -> int:
        return len(self.data.pictures)

    def __getitem__(self, index: int) -> Sample:
        picture = self.data.pictures[index]
        sample = self.augment(read_sample(self.data, picture, self.cfg.INPUT.BOTTOM_ROWS))
        return network_input(self.cfg, picture, sample)


def read_sample(data: CocoData, picture: Picture, bottom_rows: int) -> Sample:
    """A picture and its objects as augmentation.py describes a sample, with masks if they were read.

    Raises:
        UserError: the picture or a segmentation cannot be decoded.
    """
    size = (picture.height, picture.width)
    pixels = torch.from_numpy(read_picture(data.images / picture.file_name, *size))
    valid = torch.ones(size, dtype=torch.uint8)
    valid[max(picture.height - bottom_rows, 0) :] = 0
    boxes = torch.from_numpy(picture.boxes).float()
    sample = {
        "image": tv_tensors.Image(pixels.permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.from_numpy(picture.labels),
        "valid": tv_tensors.Mask(valid),
    }
    if picture.segmentations is not None:
        masks = np.empty((len(picture.labels), *size), np.uint8)
        for index in range(len(masks)):
            masks[index] = read_mask(data, picture, index)
        sample["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
    return sample


def read_mask(data: CocoData, picture: Picture, index: int) -> np.ndarray:
    """The mask (H, W) uint8 of one object of a picture.

    Raises:
        UserError: the segmentation cannot be decoded.
    """
    try:
        return decode_segmentation(picture.segmentations[index], picture.height, picture.width)
    except ValueError as error:
        where = f"{data.annotations_file}: annotation id {picture.annotation_ids[index]}"
        raise UserError(f"{where}: segmentation cannot be decoded ({error}); correct it") from error


def network_input(cfg: CfgNode, picture: Picture, sample: Sample) -> Sample:
    """What ``loader.collate`` takes: plain tensors, the image normalised (MODEL.PIXEL_MEAN, PIXEL_STD)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    return {
        "image": (sample["image"].as_subclass(torch.Tensor) - mean) / std,
        "boxes": sample["boxes"].as_subclass(torch.Tensor),
        "labels": sample["labels"],
        **{key: sample[key].as_subclass(torch.Tensor).bool() for key in ("valid", "masks") if key in sample},
        "image_id": picture.id,
        "original_size": (picture.height, picture.width),
    }
