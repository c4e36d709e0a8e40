"""The Hugging Face Hub: repositories to folders on this machine, and folders to repositories."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub

from sim_m2f.errors import UserError, first_line

HUB = "hf://"
DESCRIPTIONS = ["*.json", "*.yaml"]


def hub_folder(address: str) -> Path:
    """The files of ``hf://owner/name`` or ``hf://owner/name@revision``, downloaded by huggingface_hub.

    Raises:
        UserError: the address is none, or the repository cannot be had.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address.removeprefix(HUB))
    if not match:
        raise UserError(f"{address}: not a name on the Hugging Face Hub; write {HUB}owner/name")
    try:
        folder = _snapshot(match[1], match[2], "*.safetensors")
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(match[1], match[2], "*.bin")
    except Exception as error:  # of the network, the Hub or the disk, in many classes
        raise UserError(
            f"{address}: cannot be had from the Hugging Face Hub ({first_line(error)})"
        ) from error
    return folder


def _snapshot(name: str, revision: str | None, weights: str) -> Path:
    return Path(
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[*DESCRIPTIONS, weights])
    )


def upload_folder(folder: Path, repository: str, **options: Any) -> str:
    """Upload a folder's files; ``options`` are those of ``HfApi.create_repo``. Returns the address."""
    hub = huggingface_hub.HfApi()
    address = hub.create_repo(repository, exist_ok=True, **options)
    hub.upload_folder(repo_id=address.repo_id, folder_path=folder)
    return str(address)
