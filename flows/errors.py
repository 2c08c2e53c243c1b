"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something outside the program is wrong: a recipe, a shard, a checkpoint, a machine.

    The message is one sentence (or a list of them) that says what is wrong, where, and what to do. The
    command line prints it without a traceback and exits with code 2; a bug raises anything else.
    """
