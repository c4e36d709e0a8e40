"""The one exception for mistakes of the user: broken data, a wrong key, a file that is not there."""

import re

# What PyTorch says on a GPU and on the host, and of a data worker that the system has ended.
_NO_MEMORY = r"OutOfMemoryError|MemoryError|can't allocate memory|killed by signal: (Killed|Bus error)"
# What it says where a rank does not answer any more, over gloo and NCCL.
_NO_RANK = r"gloo/|DistNetworkError|remote process exited"


class UserError(Exception):
    """A mistake that the user can put right. The message is one line per problem: what, where, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def memory_problem(error: BaseException) -> str | None:
    """One line where an error means that memory did not suffice, of the GPU or of the host."""
    if not (isinstance(error, MemoryError) or re.search(_NO_MEMORY, f"{type(error).__name__}: {error}")):
        return None
    training = "SOLVER.IMS_PER_BATCH, INPUT.IMAGE_SIZE or DATALOADER.NUM_WORKERS"
    tests = "INPUT.MAX_SIZE_TEST (or set TEST.TILE)"
    return f"out of memory ({first_line(error)}); lower {training}, in tests {tests}"


def rank_problem(error: BaseException) -> str | None:
    """One line where an error means that another rank has ended, which says why itself."""
    if not re.search(_NO_RANK, f"{type(error).__name__}: {error}"):
        return None
    return f"another rank has ended ({first_line(error)}); see what it said"


def is_line(value: object) -> bool:
    """Whether it is a text of one line that files and terminals take: no zeros, no halves of characters."""
    if not isinstance(value, str) or "\0" in value or len(value.splitlines()) > 1:
        return False
    return value.encode(errors="ignore").decode() == value


def first_line(error: BaseException) -> str:
    """What an exception of a library says, for a message of one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
