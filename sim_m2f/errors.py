"""The one exception for mistakes of the user: broken data, a wrong key, a file that is not there."""


class UserError(Exception):
    """A mistake that the user can put right. The message is one line per problem: what, where, what to do.

    The command line prints it without a traceback and exits with status 2.
    """
