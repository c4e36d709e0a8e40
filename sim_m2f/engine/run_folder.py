"""The folder of a run, which is that of one run alone."""

import shutil
from collections.abc import Collection
from pathlib import Path

from sim_m2f.errors import UserError
from sim_m2f.weights.sources import IN_FOLDERS, LAST_CHECKPOINT

CHECKPOINTS, METRICS, EVENTS = "model_*.pth", "metrics.jsonl", "events.out.tfevents.*"
GO_ON = "--resume goes on with it, --overwrite removes it; or choose another OUTPUT_DIR"
FILES = (
    *(LAST_CHECKPOINT, CHECKPOINTS, METRICS, EVENTS, "config.yaml", "index.html"),
    *("inference/*.json", "report/*.png"),
    # of ``fit`` and ``label``: a new network must not be scored by the quality of the one before
    *("classes.json", "quality.json", "reliability.png", "masks.json", "masks.progress.jsonl"),
)


def refuse_used(folder: Path) -> None:
    """Raises UserError if the folder holds a run that has taken a step, or an exported network."""
    refuse_run(folder, GO_ON)
    for name in IN_FOLDERS:
        if (folder / name).exists():
            fault = f"holds a network already ({name}), whose configuration would be replaced"
            raise UserError(f"{folder}: {fault}; choose another OUTPUT_DIR")


def refuse_run(folder: Path, advice: str) -> None:
    """Raises UserError, which ends in ``advice``, if the folder holds a run that has taken a step."""
    found = [*folder.glob(LAST_CHECKPOINT), *folder.glob(CHECKPOINTS)]
    found += [file for file in folder.glob(METRICS) if file.stat().st_size]
    if found:
        raise UserError(f"{folder}: holds a run already ({found[0].name}); {advice}")


def remove_run(folder: Path, inputs: Collection[Path]) -> None:
    """Remove what a run wrote, and what was made of it; the name of its checkpoint goes first.

    Nothing else goes, and no file that the next run reads (``inputs``, resolved).
    """
    for file in (file for pattern in FILES for file in folder.glob(pattern)):
        if file.resolve() not in inputs:
            file.unlink(missing_ok=True)
    shutil.rmtree(folder / "method", ignore_errors=True)
