"""The exceptions a user can meet. Each message is one line: what is wrong, where, and the way out.

Both kinds also derive from the built-in exception a library user would catch (``ValueError``, ``RuntimeError``);
the command line prints them without a traceback.
"""


class SBNError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SBNError, ValueError):
    """A value the user chose cannot work."""


class DataError(SBNError, RuntimeError):
    """A file is missing, damaged, or does not fit the run."""
