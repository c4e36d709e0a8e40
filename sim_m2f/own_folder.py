"""A folder that one process at a time writes to, and what a killed one left there."""

import contextlib
import fcntl
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from sim_m2f.errors import UserError
from sim_m2f.files import RANDOM

LOCK = ".lock"
TEMPORARY = "." + RANDOM * "[a-z0-9_]"  # behind the name of a file that ``atomic_write`` has not finished


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


def remove_leftovers(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the half-written files of these names that a killed process left.

    The folder has to be ``locked``: another process may be about to finish them.
    """
    for pattern in map(PurePath, patterns):
        for file in folder.glob(str(pattern.with_name(f".{pattern.name}{TEMPORARY}"))):
            file.unlink(missing_ok=True)
