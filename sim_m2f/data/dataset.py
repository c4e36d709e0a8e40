"""Images as samples for the network: read, augmented, normalised."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import eval_augmentation, train_augmentation
from sim_m2f.data.coco import CocoData, ImageRecord
from sim_m2f.data.image import read_image
from sim_m2f.data.segmentation import decode_segmentation
from sim_m2f.errors import UserError
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Annotated, Sample


class TrainDataset(Dataset[Sample]):
    """An endless, reproducible sequence of augmented training samples.

    Item ``n`` is sample n of the sequence: epochs follow each other, each a permutation of the images that
    have an object (the others are left out, as in detectron2). Image and augmentation depend on (SEED, n)
    alone, so that neither workers nor ranks nor resuming change what is seen. Items are ``network_input``'s.

    Raises:
        UserError: no image has an object.
    """

    def __init__(self, cfg: CfgNode, data: list[CocoData]) -> None:
        self.images = [(part, image) for part in data for image in part.images if len(image.labels)]
        if not self.images:
            files = ", ".join(str(part.annotations_file) for part in data)
            raise UserError(f"{files}: no object to train on (crowds, empty boxes aside); give another JSON")
        self.cfg, self.pixels, self.augment = cfg, Pixels(cfg), train_augmentation(cfg)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Sample:
        epoch, position = divmod(number, len(self.images))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.cfg.SEED, epoch]).permutation(len(self.images))
            self.epoch = epoch
        data, record = self.images[self.order[position]]
        sample = read_sample(data, record, self.cfg.INPUT.BOTTOM_ROWS)
        seed = int(np.random.SeedSequence([self.cfg.SEED, number]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for good
            sample = self.augment(sample)
        return network_input(self.pixels, record, sample)


class EvalDataset(Dataset[Sample]):
    """The images of one data set in the order of its JSON, resized for testing. Masks are never read."""

    def __init__(self, cfg: CfgNode, data: CocoData) -> None:
        self.cfg, self.data = cfg, data
        self.pixels, self.augment = Pixels(cfg), eval_augmentation(cfg)

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> Sample:
        record = self.data.images[index]
        sample = self.augment(read_sample(self.data, record, self.cfg.INPUT.BOTTOM_ROWS))
        return network_input(self.pixels, record, sample)


def read_sample(data: CocoData, record: ImageRecord, bottom_rows: int) -> Annotated:
    """An image and its objects, with masks if they were read.

    Raises:
        UserError: the image or a segmentation cannot be decoded.
    """
    size = (record.height, record.width)
    pixels = torch.from_numpy(read_image(data.image_root / record.file_name, *size))
    valid = torch.ones(size, dtype=torch.uint8)
    valid[max(record.height - bottom_rows, 0) :] = 0
    boxes = torch.from_numpy(record.boxes).float()
    sample: Annotated = {
        "image": tv_tensors.Image(pixels.permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.from_numpy(record.labels),
        "valid": tv_tensors.Mask(valid),
    }
    if record.segmentations is not None:
        masks = [read_mask(data, record, index) for index in range(len(record.labels))]
        sample["masks"] = tv_tensors.Mask(torch.from_numpy(np.stack(masks)))
    return sample


def read_mask(data: CocoData, record: ImageRecord, index: int) -> np.ndarray:
    """The mask (H, W) uint8 of one object of an image whose masks were read.

    Raises:
        UserError: the segmentation cannot be decoded.
    """
    assert record.segmentations is not None
    try:
        return decode_segmentation(record.segmentations[index], record.height, record.width)
    except ValueError as error:
        where = f"{data.annotations_file}: annotation id {record.annotation_ids[index]}"
        raise UserError(f"{where}: segmentation cannot be decoded ({error}); correct it") from error


def network_input(pixels: Pixels, record: ImageRecord, sample: Annotated) -> Sample:
    """What ``loader.collate`` takes: plain tensors, the image normalised."""
    network_sample: Sample = {
        "image": pixels.normalise(sample["image"].as_subclass(Tensor)),
        "boxes": sample["boxes"].as_subclass(Tensor),
        "labels": sample["labels"],
        "valid": sample["valid"].as_subclass(Tensor).bool(),
        "image_id": record.id,
        "original_size": (record.height, record.width),
    }
    if "masks" in sample:
        network_sample["masks"] = sample["masks"].as_subclass(Tensor).bool()
    return network_sample
