"""Addresses of weights: a path, https://, detectron2:// or hf://, each turned into a file on this machine."""

import re
from pathlib import Path

import huggingface_hub

from sim_m2f.errors import UserError, first_line
from sim_m2f.files import expanded
from sim_m2f.weights.download import download

HUB, DETECTRON2 = "hf://", "detectron2://"
DETECTRON2_ADDRESS = "https://dl.fbaipublicfiles.com/detectron2/"
# Names of the weights in a folder, the preferred one first: those of transformers, which are ours too.
NAMES = ("model.safetensors", "pytorch_model.bin")
IN_FOLDERS = [name + end for name in NAMES for end in ("", ".index.json")]
CHECKPOINTS = (".pth", ".pkl", ".safetensors")
LAST_CHECKPOINT = "last_checkpoint"
# What is fetched from the Hub until a repository has some of it.
ON_THE_HUB = (("*.safetensors",), ("*.bin",), ("*.pth", "*.pkl", LAST_CHECKPOINT))


def local_weights(address: str | Path) -> Path:
    """The file that holds the weights of an address; downloaded if it is not in the cache.

    Raises:
        UserError: the address cannot be reached, or the folder has no weights.
    """
    address = str(address)
    if address.startswith(DETECTRON2):
        return download(DETECTRON2_ADDRESS + address.removeprefix(DETECTRON2))
    if address.startswith(("https://", "http://")):
        return download(address)
    if address.startswith(HUB):
        return weights_in(hub_folder(address))
    path = expanded(address)
    return weights_in(path) if path.is_dir() else path


def weights_in(folder: Path) -> Path:
    """The weights in a folder of ours, of transformers or of a run.

    First comes the checkpoint that a run calls its last one, which may have begun from the others, then files
    of the names that folders of ours and of transformers have, then an only checkpoint.

    Raises:
        UserError: there are none.
    """
    for file in filter(None, (last_checkpoint(folder), *(folder / name for name in IN_FOLDERS))):
        if file.is_file():
            return file
    checkpoints = [file for file in folder.iterdir() if file.suffix in CHECKPOINTS]
    if len(checkpoints) == 1:
        return checkpoints[0]
    raise UserError(f"{folder}: a folder without {IN_FOLDERS[0]}; give the path of a checkpoint")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, named in ``last_checkpoint``, or None."""
    pointer = folder / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    return folder / pointer.read_text("utf-8", "replace").strip().replace("\0", "")


def hub_folder(address: str) -> Path:
    """The files of ``hf://owner/name`` or ``hf://owner/name@revision``, downloaded by huggingface_hub.

    Raises:
        UserError: the address is none, or the repository cannot be had.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address.removeprefix(HUB))
    if not match:
        raise UserError(f"{address}: no such folder or file, and no name on the Hub; write {HUB}owner/name")
    try:
        for weights in ON_THE_HUB:
            files = ["*.json", "*.yaml", *weights]
            folder = huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=files)
            if any(file for pattern in weights for file in Path(folder).glob(pattern)):
                break
    except Exception as error:  # of the network, the Hub or the disk, in many classes
        raise UserError(f"{address}: cannot be had from the Hub ({first_line(error)})") from error
    return Path(folder)
