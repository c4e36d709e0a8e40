"""Images as samples for the network: read and augmented."""

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import eval_augmentation, train_augmentation
from sim_m2f.data.coco import CocoData, ImageRecord, decoded, read_mask
from sim_m2f.errors import UserError
from sim_m2f.structures import Annotated, Sample


class TrainDataset(Dataset[Sample]):
    """An endless, reproducible sequence of augmented training samples.

    Item ``n`` is sample n of the sequence: epochs follow each other, each a permutation of the images that
    have an object (the others are left out, as in detectron2), with mixed supervision those with a mask as
    often as MODEL.SIM.KNOWN_MASKS.SHARE asks. Image and augmentation depend on (SEED, n) alone, so that
    neither workers nor ranks nor resuming change what is seen. Items are ``SampleReader``'s.

    Raises:
        UserError: no image has an object.
    """

    def __init__(self, cfg: CfgNode, data: list[CocoData]) -> None:
        self.images = [(part, image) for part in data for image in part.images if len(image.labels)]
        if not self.images:
            files = ", ".join(str(part.annotations_file) for part in data)
            raise UserError(f"{files}: no object to train on (crowds, empty boxes aside); give another JSON")
        if cfg.MODEL.SIM.SUPERVISION == "mixed":
            self.images = seen_more(self.images, cfg.MODEL.SIM.KNOWN_MASKS.SHARE)
        self.seed, self.read = cfg.SEED, SampleReader(cfg, train_augmentation(cfg))
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, number: int) -> Sample:
        epoch, position = divmod(number, len(self.images))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self.epoch = epoch
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for good
            return self.read(*self.images[self.order[position]])


def seen_more(images: list[tuple[CocoData, ImageRecord]], share: float) -> list[tuple[CocoData, ImageRecord]]:
    """The images, those with a mask so many times that they are about this share of the list, at least once.

    Of 100 images, 10 of them with a mask, a share of 0.5 makes 90 without and 9 times 10 with one.
    """
    with_mask = [pair for pair in images if any(mask is not None for mask in pair[1].segmentations or ())]
    if not with_mask:
        return images
    others = len(images) - len(with_mask)
    times = round(share / (1 - share) * others / len(with_mask))
    return images + with_mask * (times - 1)  # no more of them where times is 0


class EvalDataset(Dataset[Sample]):
    """The images of one data set in the order of its JSON, resized for testing. Masks are never read."""

    def __init__(self, cfg: CfgNode, data: CocoData) -> None:
        self.data, self.read = data, SampleReader(cfg, eval_augmentation(cfg))

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.data, self.data.images[index])


class SampleReader:
    """Reads an image with its objects, augments both, and gives what ``loader.collate`` takes."""

    def __init__(self, cfg: CfgNode, augmentation: v2.Transform) -> None:
        self.bottom_rows = cfg.INPUT.BOTTOM_ROWS
        self.augment = v2.Compose([augmentation, v2.ToPureTensor()])

    def __call__(self, data: CocoData, record: ImageRecord) -> Sample:
        """
        Raises:
            UserError: the image or a segmentation cannot be decoded.
        """
        sample = self.augment(read_sample(data, record, self.bottom_rows))
        masks = {name: sample[name].bool() for name in ("valid", "masks", "proposals") if name in sample}
        return sample | masks | {"image_id": record.id, "original_size": (record.height, record.width)}


def read_sample(data: CocoData, record: ImageRecord, bottom_rows: int) -> Annotated:
    """An image and its objects, with masks if they were read.

    Raises:
        UserError: the image or a segmentation cannot be decoded.
    """
    size = (record.height, record.width)
    pixels = torch.from_numpy(data.read_image(record))
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
        sample["known"] = torch.tensor([shape is not None for shape in record.segmentations])
    if record.proposals is not None:
        given = [proposal or (None, 0.0) for proposal in record.proposals]
        masks = [decoded(data, record, index, shape) for index, (shape, _) in enumerate(given)]
        sample["proposals"] = tv_tensors.Mask(torch.from_numpy(np.stack(masks)))
        sample["proposal_scores"] = torch.tensor([float(score) for _, score in given])
    return sample
