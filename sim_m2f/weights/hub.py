"""The Hugging Face Hub: repositories to folders on this machine."""

import re
from pathlib import Path

import huggingface_hub

from sim_m2f.errors import UserError, first_line

HUB = "hf://"


def hub_folder(address: str) -> Path:
    """The files of ``hf://owner/name`` or ``hf://owner/name@revision``, downloaded by huggingface_hub.

    Raises:
        UserError: the address is none, or the repository cannot be had.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address.removeprefix(HUB))
    if not match:
        raise UserError(f"{address}: no such folder or file, and no name on the Hub; write {HUB}owner/name")
    try:
        for weights in ("*.safetensors", "*.bin"):
            files = ["*.json", "*.yaml", weights]
            folder = huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=files)
            if any(Path(folder).glob(weights)):
                break
    except Exception as error:  # of the network, the Hub or the disk, in many classes
        raise UserError(f"{address}: cannot be had from the Hub ({first_line(error)})") from error
    return Path(folder)
