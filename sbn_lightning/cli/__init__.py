"""The command line, one file a command.

:mod:`sbn_lightning.cli.app` finds the command, and prints errors in one line.
"""

from sbn_lightning.cli.app import TOOLS, TRAINING, main, print_without_secrets, usage

__all__ = ["TOOLS", "TRAINING", "main", "print_without_secrets", "usage"]
