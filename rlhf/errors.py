"""Errors that say all there is to say in their message: the command prints it in one line, without a traceback."""


class RunError(RuntimeError):
    """A run that cannot start, or go on, for a reason that its message tells."""
