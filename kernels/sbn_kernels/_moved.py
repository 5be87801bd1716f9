"""Makes modules importable under their old names: the import works, gives what the new place holds, and warns.

A package that moved modules calls :func:`install` with a table. Nothing is imported until somebody uses an old name.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _OldModule(ModuleType):
    """A module whose names are looked up in the modules that hold them now."""

    _places: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for place in self._places:
            try:
                return getattr(import_module(place), name)
            except AttributeError:
                continue
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the public name that this old module hides: importing a submodule sets it on its package."""
        package, _, name = self.__name__.rpartition(".")
        try:
            hidden = import_module(package).__getattr__(name)
        except AttributeError:  # The package does not import the name lazily.
            hidden = getattr(self, name)
        return hidden(*arguments, **options)


class _OldNames(MetaPathFinder, Loader):
    def __init__(self, table: Mapping[str, Sequence[str]]) -> None:
        self.table = table

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname in self.table else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _OldModule(spec.name)
        module._places = tuple(self.table[spec.name])
        return module

    def exec_module(self, module: ModuleType) -> None:
        places = " and ".join(self.table[module.__name__])
        warnings.warn(f"{module.__name__} has moved to {places}", DeprecationWarning, stacklevel=2)


def install(table: Mapping[str, Sequence[str]]) -> None:
    """Makes old module names importable.

    Args:
        table: Old dotted name to the dotted names of the modules that now hold its contents, in order of preference.
    """
    sys.meta_path.append(_OldNames(table))
