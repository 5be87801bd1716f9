"""Docstrings for the site: Sphinx roles become plain code.

The docstrings refer to names as ``:class:`SparsityConfig```, which editors and Sphinx understand and Markdown does not.
mkdocs.yml names this file as an extension of griffe, which reads the docstrings.
"""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Rewrites each docstring before its sections are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replaces roles by code, and the double colon before a block by a single one."""
        if obj.docstring:
            text = ROLE.sub(lambda role: f"`{role[1].removeprefix('sbn_lightning.')}`", obj.docstring.value)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
