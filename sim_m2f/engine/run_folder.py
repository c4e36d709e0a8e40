"""The folder of a run: of one run, and of one process at a time."""

import contextlib
import fcntl
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath

from sim_m2f.errors import UserError
from sim_m2f.files import RANDOM
from sim_m2f.weights.sources import IN_FOLDERS, LAST_CHECKPOINT

LOCK = ".lock"
CHECKPOINTS, METRICS, EVENTS = "model_*.pth", "metrics.jsonl", "events.out.tfevents.*"
GO_ON = "--resume goes on with it, --overwrite removes it; or choose another OUTPUT_DIR"
TEMPORARY = "." + RANDOM * "[a-z0-9_]"  # behind the name of a file that ``atomic_write`` has not finished
FILES = (
    *(LAST_CHECKPOINT, CHECKPOINTS, METRICS, EVENTS, "config.yaml", "index.html"),
    *("inference/*.json", "report/*.png"),
    # of ``fit`` and ``label``: a new network must not be scored by the quality of the one before
    *("classes.json", "quality.json", "reliability.png", "masks.json", "masks.progress.jsonl"),
)


@contextlib.contextmanager
def locked(folder: Path, option: str = "OUTPUT_DIR", name: str = LOCK) -> Iterator[None]:
    """Within the block no other process works in the folder, which is created.

    The lock is a process's (lockf), not an open file's (flock), and so data workers that outlive a killed run
    for a moment do not hold it.

    Args:
        folder: where the work is written.
        option: what the user chose it by.
        name: of the file that is locked; one for each output where a folder has several.

    Raises:
        UserError: another process does, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("a")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another {option}") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            advice = f"wait for it, end it, or choose another {option}"
            raise UserError(f"{folder}: another process is at work here; {advice}") from error
        except OSError:  # a file system without locks
            pass
        yield


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


def remove_leftovers(folder: Path, patterns: Iterable[str] = FILES) -> None:
    """Remove the half-written files that a killed process left, of a run or of other names.

    The folder has to be ``locked``: another process may be about to finish them.
    """
    for pattern in map(PurePath, patterns):
        for file in folder.glob(str(pattern.with_name(f".{pattern.name}{TEMPORARY}"))):
            file.unlink(missing_ok=True)
