"""The one exception for mistakes of the user: broken data, a wrong key, a file that is not there."""

import errno
import re

# What PyTorch, its libraries and the system say on a GPU and on the host, and of a worker that was ended.
_NO_MEMORY = (
    r"MemoryError|out of memory|can('t|not) allocate memory|bad_alloc|STATUS_ALLOC_FAILED"
    r"|killed by signal: (killed|bus error)|dataloader worker .* exited unexpectedly"
)
# What it says where a rank does not answer any more, over gloo and NCCL.
_NO_RANK = (
    r"gloo/|DistNetworkError|remote process exited"
    r"|NCCL communicator was aborted|Watchdog caught collective operation timeout"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")  # XML takes few of them
_NO_SPACE = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


class UserError(Exception):
    """A mistake that the user can put right. The message is one line per problem: what, where, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def memory_problem(error: BaseException) -> str | None:
    """One line where an error means that memory did not suffice, of the GPU or of the host."""
    if isinstance(error, OSError) and error.errno is not None:  # which may name a file of any name
        ran_out = error.errno == errno.ENOMEM
    else:
        ran_out = isinstance(error, MemoryError) or _says(error, _NO_MEMORY)
    if not ran_out:
        return None
    training = "SOLVER.IMS_PER_BATCH, INPUT.IMAGE_SIZE or DATALOADER.NUM_WORKERS"
    tests = "INPUT.MAX_SIZE_TEST (or set TEST.TILE)"
    return f"out of memory ({first_line(error)}); lower {training}, in tests {tests}"


def image_problem(error: Exception, file: object) -> str:
    """What an error says of one of many images, which costs no other: a fault, or too little memory.

    Raises:
        Exception: the error, where it is another one.
    """
    if isinstance(error, UserError):
        return str(error)
    if memory_problem(error) is None:
        raise error
    return f"{file}: out of memory ({first_line(error)}); take a smaller image, or --device cpu"


def file_problem(error: BaseException) -> str | None:
    """One line for an error of the system about a file, or a full disk."""
    if not isinstance(error, OSError):
        return None
    if error.errno in _NO_SPACE:
        return f"{error}; free space, or write elsewhere"
    return f"{error.filename}: {error.strerror}; check the path" if error.filename else None


def rank_problem(error: BaseException) -> str | None:
    """One line where an error means that another rank has ended, which says why itself."""
    if not _says(error, _NO_RANK):
        return None
    return f"another rank has ended ({first_line(error)}); see what it said"


def _says(error: BaseException, pattern: str) -> bool:
    """Whether an exception that is not ours is of a kind, told by its type's name and its text."""
    said = f"{type(error).__name__}: {error}"
    return not isinstance(error, UserError) and re.search(pattern, said, re.IGNORECASE) is not None


def is_line(value: object) -> bool:
    """Whether it is a text of one line that files and terminals take: no characters of control but tabs, no
    halves of characters.
    """
    if not isinstance(value, str) or _CONTROL.search(value) or len(value.splitlines()) > 1:
        return False
    return value.encode(errors="ignore").decode() == value


def first_line(error: BaseException) -> str:
    """What an exception of a library says, for a message of one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
