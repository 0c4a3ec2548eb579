"""Errors that a user can act on: one clear line each, no traceback at the command line."""


class UserError(ValueError):
    """Bad input. The message is one line that names the key, file or value and what to do.

    Commands print it to stderr and end with ``exit_status``.
    """

    exit_status = 1


class ConfigError(UserError):
    """A configuration key is unknown, has the wrong type, or contradicts another."""

    exit_status = 2


class CheckpointError(UserError):
    """A checkpoint file or directory cannot be read, written or trusted."""


class DataError(UserError):
    """A corpus, text file or tokenizer cannot be used."""
