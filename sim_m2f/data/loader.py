"""Batches for the network: the same sequence for any number of workers and ranks, from any iteration on."""

import atexit
import itertools
import multiprocessing.queues
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import DatasetSource, data_sources
from sim_m2f.data.coco import CocoData, check_categories, read_coco
from sim_m2f.data.dataset import EvalDataset, TrainDataset
from sim_m2f.data.proposals import with_proposals
from sim_m2f.distributed import once_per_node, share
from sim_m2f.errors import UserError, first_line
from sim_m2f.files import expanded
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Batch, Sample, Target

Data = TypeVar("Data", TrainDataset, EvalDataset)
WAIT = 2.0  # seconds for workers, between looks at what else the run is asked to do


class GlobalBatches(Sampler[list[int]]):
    """The samples of one rank's slots of each global batch: slot s of iteration t is sample t*B + s."""

    def __init__(self, batch_size: int, start_iteration: int, rank: int, world_size: int) -> None:
        self.batch_size, self.start_iteration = batch_size, start_iteration
        self.slots = share(batch_size, rank, world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in itertools.count(self.start_iteration):
            yield [iteration * self.batch_size + slot for slot in self.slots]


class Batches(DataLoader[Sample], Generic[Data]):
    """A data set as batches (see ``collate``); a worker's UserError comes without its traceback.

    Args:
        cfg: the configuration.
        dataset: what gives the samples.
        least_size: least height and width of a batch, pixels.
        options: those of ``DataLoader`` that choose the samples.
    """

    dataset: Data
    pixels: Pixels  # for ``Pixels.of_batch``

    def __init__(self, cfg: CfgNode, dataset: Data, least_size: int, **options: Any) -> None:
        self.pixels, divisor = Pixels(cfg), cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        super().__init__(
            dataset,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=partial(collate, least_size=least_size, divisor=divisor),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # else making an iterator draws from the global random state
            timeout=WAIT if cfg.DATALOADER.NUM_WORKERS else 0,
            **options,
        )

    def __iter__(self) -> "BatchIterator":  # type: ignore[override]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:  # workers that begin now never receive these signals; the run decides when they end
            return BatchIterator(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class BatchIterator(Iterator[Batch]):
    """Batches, which are waited for as long as it takes, or a while at a time."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        while (batch := self.awaited()) is None:
            pass
        return batch

    def awaited(self) -> Batch | None:
        """The next batch; None where workers have not made it within WAIT seconds: ask again."""
        try:
            return next(self._batches)
        except UserError as error:
            raise UserError(str(error).rpartition("sim_m2f.errors.UserError: ")[2].strip()) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            return None

    def end(self) -> None:
        """End the workers; those that do not end by themselves within a second are killed.

        PyTorch would wait for ten, and asks with SIGTERM, which they block.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))  # of which it makes an error
        killing = threading.Timer(1.0, end_workers)
        killing.daemon = True
        killing.start()
        self._batches = iter(())
        killing.cancel()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(_: int) -> None:
    """Let threads of a worker be silent when the run ends while it takes a batch, and end it when they fail.

    A batch that cannot be handed over would be waited for for ever.
    """

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, (EOFError, ConnectionError)):
            sys.__excepthook__(kind, error, trace)

    def lost(error: Exception, _: object) -> None:
        if not isinstance(error, (EOFError, ConnectionError)):
            fault = f"error: a data worker cannot hand over a batch ({first_line(error)})"
            advice = "enlarge /dev/shm (docker run --shm-size) or set DATALOADER.NUM_WORKERS 0"
            print(f"{fault}; {advice}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)  # which the run takes for want of memory

    sys.excepthook = told
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lost)  # type: ignore[attr-defined]


@atexit.register
def end_workers() -> None:
    """Kill the workers that are left: Python would ask with SIGTERM, which they block, and wait for ever."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def train_loader(
    cfg: CfgNode, start_iteration: int = 0, rank: int = 0, world_size: int = 1
) -> Batches[TrainDataset]:
    """The endless stream of training batches (see ``collate``): this rank's shares of SOLVER.IMS_PER_BATCH.

    Images have INPUT.IMAGE_SIZE pixels a side (rounded up to MODEL.MASK_FORMER.SIZE_DIVISIBILITY).

    Args:
        cfg: the configuration; segmentations are not read if MODEL.SIM.SUPERVISION is "box".
        start_iteration: the iteration whose batch comes first.
        rank, world_size: this process among all; they share the global batch as evenly as can be, in order.

    Raises:
        UserError: the data or the configuration are wrong; while iterating, an image cannot be decoded.
    """
    batch_size = cfg.SOLVER.IMS_PER_BATCH
    if batch_size < world_size:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {batch_size}; use as many as there are ranks, {world_size}")
    if batch_size % world_size and cfg.SOLVER.IMAGES_AT_ONCE and cfg.MODEL.RESNETS.NORM == "SyncBN":
        fault = f"SOLVER.IMS_PER_BATCH is {batch_size}: with SyncBN and SOLVER.IMAGES_AT_ONCE, all ranks"
        raise UserError(f"{fault} need as many images; use a multiple of {world_size}")
    data = once_per_node(lambda: _train_data(cfg))
    if rank == 0:
        print_notes(data)
    batches = GlobalBatches(batch_size, start_iteration, rank, world_size)
    return Batches(cfg, TrainDataset(cfg, data), cfg.INPUT.IMAGE_SIZE, batch_sampler=batches)


def _train_data(cfg: CfgNode) -> list[CocoData]:
    """The data sets that are trained on, with their proposals where there are some."""
    kind = cfg.MODEL.SIM.SUPERVISION
    data = [read_coco(source, kind != "box", kind == "mixed") for source in data_sources(cfg, "TRAIN")]
    check_classes(cfg, data)
    if not cfg.DATASETS.TRAIN_PROPOSALS:
        return data
    if len(data) > 1:
        fault = f"has the ids of one data set, but DATASETS.TRAIN names {len(data)}"
        raise UserError(f"DATASETS.TRAIN_PROPOSALS: {fault}; train on one")
    return [with_proposals(data[0], expanded(cfg.DATASETS.TRAIN_PROPOSALS))]


def eval_loader(
    cfg: CfgNode, source: DatasetSource, rank: int = 0, world_size: int = 1
) -> Batches[EvalDataset]:
    """One image a batch (see ``collate``): images rank, rank + world_size, ... of a data set, each once.

    ``loader.dataset.data`` is its CocoData.

    Raises:
        UserError: the data are wrong; while iterating, an image cannot be decoded.
    """
    data = once_per_node(lambda: read_coco(source, read_masks=False))
    check_classes(cfg, [data])
    own = range(rank, len(data.images), world_size)
    return Batches(cfg, EvalDataset(cfg, data), least_size=1, sampler=own)


def collate(samples: Sequence[Sample], least_size: int = 1, divisor: int = 32) -> Batch:
    """Samples as one batch, padded at the bottom and on the right to a common size.

    Args:
        samples: at least one; all of them have masks or none.
        least_size: least height and width of the batch, pixels.
        divisor: height and width become multiples of it.
    """
    sizes = [(sample["image"].shape[-2], sample["image"].shape[-1]) for sample in samples]
    height, width = (-(-max(least_size, *side) // divisor) * divisor for side in zip(*sizes, strict=True))
    counts = [len(sample["labels"]) for sample in samples]
    # One tensor each, given out as views: every tensor that leaves a worker costs a file descriptor.
    parts = {
        "labels": torch.cat([sample["labels"] for sample in samples]).split(counts),
        "boxes": torch.cat([sample["boxes"] for sample in samples]).split(counts),
        "valid": pad_and_cat([sample["valid"][None] for sample in samples], height, width).unbind(),
    }
    if "masks" in samples[0]:
        parts["masks"] = pad_and_cat([sample["masks"] for sample in samples], height, width).split(counts)
        parts["known"] = torch.cat([sample["known"] for sample in samples]).split(counts)
    if "proposals" in samples[0]:
        masks = pad_and_cat([sample["proposals"] for sample in samples], height, width)
        parts["proposals"] = masks.split(counts)
        parts["proposal_scores"] = torch.cat([sample["proposal_scores"] for sample in samples]).split(counts)
    targets = [dict(zip(parts, of_image, strict=True)) for of_image in zip(*parts.values(), strict=True)]
    images = pad_and_cat([sample["image"] for sample in samples], height, width)
    return {
        "images": images.view(len(samples), -1, height, width),
        "targets": cast(list[Target], targets),
        "image_ids": [sample["image_id"] for sample in samples],
        "image_sizes": sizes,
        "original_sizes": [sample["original_size"] for sample in samples],
    }


def pad_and_cat(tensors: list[Tensor], height: int, width: int) -> Tensor:
    """Tensors (n, h, w) of several sizes as one of (sum of n, height, width), zero beyond each one's own."""
    counts = [len(tensor) for tensor in tensors]
    padded = tensors[0].new_zeros((sum(counts), height, width))
    for part, tensor in zip(padded.split(counts), tensors, strict=True):
        part[:, : tensor.shape[1], : tensor.shape[2]] = tensor
    return padded


def check_classes(cfg: CfgNode, data: list[CocoData]) -> None:
    """Raises UserError unless all data sets have the same categories, as many as the network has classes."""
    check_categories(data)
    first = data[0]
    classes, categories = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, len(first.category_ids)
    if categories != classes:
        fault = f"{first.annotations_file}: has {categories} categories, but the network {classes}"
        raise UserError(f"{fault}; set MODEL.SEM_SEG_HEAD.NUM_CLASSES {categories}")


def print_notes(data: list[CocoData]) -> None:
    """Tell on stderr what the training data hold that is not trained on."""
    for part in data:
        empty = sum(not len(image.labels) for image in part.images)
        if part.zero_area or empty:
            left_out = f"{part.zero_area} boxes of zero area and {empty} images without an object"
            print(f"note: {part.name}: left out {left_out}", file=sys.stderr)
