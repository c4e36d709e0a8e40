"""The one exception for mistakes of the user: broken data, a wrong key, a file that is not there."""


class UserError(Exception):
    """A mistake that the user can put right. The message is one line per problem: what, where, what to do.

    The command line prints it without a traceback and exits with status 2.
    """


def first_line(error: Exception) -> str:
    """What an exception of a library says, for a message of one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
