"""Addresses of weights: a path, https://, detectron2:// or hf://, each turned into a file on this machine."""

from pathlib import Path

from sim_m2f.errors import UserError
from sim_m2f.weights.download import download
from sim_m2f.weights.hub import HUB, hub_folder

DETECTRON2 = "detectron2://"
DETECTRON2_ADDRESS = "https://dl.fbaipublicfiles.com/detectron2/"
# Names of the weights in a folder, the preferred one first: those of transformers, which are ours too.
IN_FOLDERS = [
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
]
CHECKPOINTS = (".pth", ".pkl", ".safetensors")
LAST_CHECKPOINT = "last_checkpoint"


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
    path = Path(address).expanduser()
    return weights_in(path) if path.is_dir() else path


def weights_in(folder: Path) -> Path:
    """The weights in a folder of ours, of transformers or of a run: its only checkpoint, or the named one.

    Raises:
        UserError: there are none.
    """
    checkpoints = [file for file in folder.iterdir() if file.suffix in CHECKPOINTS]
    if len(checkpoints) == 1:
        return checkpoints[0]
    pointer = folder / LAST_CHECKPOINT
    for name in (*IN_FOLDERS, *([pointer.read_text(encoding="utf-8").strip()] if pointer.is_file() else [])):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: a folder without {IN_FOLDERS[0]}; give the path of a checkpoint")
