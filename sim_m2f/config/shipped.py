"""The configurations that come with the package, found by their paths in the repository."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> Path:
    """The folder ``configs``: a part of the package where it is installed, beside it in the source tree."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The file or folder of a path; ``configs/...`` that is not here is the one that came with the package.

    Returns:
        the path as it is where there is no such one either.
    """
    path = Path(os.path.expanduser(name))
    if path.parts[:1] != ("configs",) or len(path.parts) == 1 or path.exists():
        return path
    shipped = shipped_configs().joinpath(*path.parts[1:])
    return shipped if shipped.exists() else path
