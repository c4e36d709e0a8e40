"""Reading JSON, and writing files so that a reader, or a process killed half-way, never sees half of one."""

import contextlib
import json
import math
import os
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from sim_m2f.errors import UserError, first_line

NAME_BYTES = 255  # of a file, at most
RANDOM = 8  # characters that mkstemp appends
UMASK = os.umask(0)  # which can be read only by setting it
os.umask(UMASK)


def cache_folder() -> Path:
    """Where data sets and weights are kept: ``$SIM_M2F_CACHE``, by default ~/.cache/sim_m2f."""
    return expanded(os.environ.get("SIM_M2F_CACHE") or "~/.cache/sim_m2f")


def expanded(path: str | Path) -> Path:
    """The path with ``~`` or ``~user`` as the home folder.

    Raises:
        UserError: there is no such user, or no home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        fault = "the home folder that its ~ stands for is not known"
        raise UserError(f"{path}: {fault}; write the whole path") from error


def refuse_special(path: Path, megabytes: float = math.inf) -> None:
    """Raises UserError for a pipe or a device, whose reader may wait for ever, and for a larger file."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: is not a regular file; give the path of a file")
        size = path.stat().st_size / 1e6 if path.is_file() else 0
    except (OSError, ValueError) as error:  # of names that no file can have
        raise UserError(f"{path}: cannot be read ({error}); check the path") from error
    if size > megabytes:
        fault = f"has {size:,.1f} MB, more than INPUT.LIMITS.FILE_SIZE ({megabytes:,})"
        raise UserError(f"{path}: {fault}; raise it, or take a smaller file")


def refuse_inputs(
    outputs: Iterable[Path], annotations: Iterable[Path | None], images: Iterable[Path | None]
) -> None:
    """Raises UserError where a file or folder to write would replace what is read, or lie beside it.

    Args:
        outputs: files and folders to write.
        annotations: files, and folders of files; a folder in one of these may be written to.
        images: folders whose images are read by name, so that others may lie among them.
    """
    for output in outputs:
        place = _real(output)
        for given in (path for path in (*annotations, *images) if path):
            if place in (_real(given), *_real(given).parents):
                raise UserError(f"{output}: would replace {given}; give another --output")
        for given in (path for path in annotations if path and path.is_dir()):
            if _real(given) == place.parent:
                raise UserError(f"{output}: would lie in {given}, which is read; give another --output")


def _real(path: Path) -> Path:
    """The path without links; of one that links to itself as well."""
    return Path(os.path.realpath(path))


def read_text(path: Path) -> str:
    """The text of a file, without the mark that Windows' editors begin it with.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    refuse_special(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no text ({first_line(error)}); correct it or remove it") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds: an object, or a list if ``kind`` is list.

    Raises:
        UserError: the file cannot be read, is not JSON, has a key twice, or holds something else.
    """
    refuse_special(path)
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=partial(_each_once, path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); is the file complete?") from error
    if not isinstance(content, kind):
        found, expected = type(content).__name__, "an object" if kind is dict else "a list"
        raise UserError(f"{path}: holds a JSON {found}, not {expected}; take another file")
    return content


def _each_once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; UserError for a key that stands twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"{path}: the key {reprlib.repr(twice)} stands twice in one object; leave one out")
    return found


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError where the system refuses what the block writes to ``path``."""
    try:
        yield
    except OSError as error:
        advice = "free space or choose another folder"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` and rename it to ``path`` when the block ends without an error.

    The file may be read and written by whom the process's umask lets.

    Args:
        path: the final name; its folder is created.
        mode: "w" (UTF-8 text) or "wb".

    Raises:
        UserError: the folder cannot be written to, or the disk is full. ``path`` is as it was before.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        name = shortened(path.name, NAME_BYTES - len("..") - RANDOM)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=path.parent)
        try:
            with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(PermissionError):  # where files have no modes of their own
                os.chmod(temporary, 0o666 & ~UMASK)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def shortened(name: str, size: int) -> str:
    """The first characters of the name of a file: those that take at most so many bytes."""
    return os.fsencode(name)[:size].decode(errors="ignore")


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write a whole file as ``atomic_write`` does.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_write(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)
