"""How a user installs the optional parts of this package.

The package is on no package index, so nobody is told to install it by its name: whoever registered the name there would
be installed instead. Messages take the command from here.
"""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """Return the command that installs an optional part of this package.

    Args:
        extra: The name of the part in ``pyproject.toml``, for example ``"hf"``.
    """
    return f'pip install -e ".[{extra}]" in a checkout of the repository'
