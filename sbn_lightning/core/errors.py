"""The exceptions for what a user can mend: options, data and files.

Each message is one line: what is wrong, where, and the way out. The command line prints the message without a
traceback. A library user can catch the built-in exception that each class derives from.
"""


class SBNError(Exception):
    """The base class of these errors. Kernels raise others, for example ``ValueError`` for a wrong shape."""


class ConfigError(SBNError, ValueError):
    """A value that the user chose cannot work."""


class DataError(SBNError, RuntimeError):
    """A file is missing, damaged, or does not fit the run."""
