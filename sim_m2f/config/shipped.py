"""The configurations that come with the package, found by their paths in the repository."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_configs() -> Path:
    """The folder ``configs``: a part of the package where it is installed, beside it in the source tree."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(name: str | Path) -> Path:
    """The file of a path; ``configs/...`` that does not exist here is the one that came with the package.

    Returns:
        the path as it is where there is no such file either.
    """
    path = Path(name)
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    shipped = shipped_configs().joinpath(*path.parts[1:])
    return shipped if shipped.is_file() else path
