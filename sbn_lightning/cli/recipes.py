"""``sbn recipes``: list the recipes that come with the package, or copy one to edit.

A recipe is a YAML file that ``sbn fit --config`` reads. A clone of the repository has the recipes in ``recipes/``; an
installed package has the same files in its own folder ``recipes``. ``--config`` takes a path, or the name of one of
these recipes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from sbn_lightning.core.errors import ConfigError

_USAGE = """usage: sbn recipes                   list the recipes that come with the package
       sbn recipes copy NAME [TO]   copy one to edit; TO is a file or a folder, by default NAME.yaml here

sbn fit --config NAME trains a recipe as it is.
"""


def folder() -> Path:
    """The folder that holds the recipes: the installed package's own, or the repository's."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """The recipes that come with the package: name -> file."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def first_line(recipe: Path) -> str:
    """What a recipe says about itself: its first line, which is a comment."""
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def find(config: str) -> str:
    """The path of a recipe that ``--config`` names.

    Args:
        config: A path, YAML text, or the name of a recipe that comes with the package, with or without ``.yaml``.

    Returns:
        The path of the shipped recipe if ``config`` is its name and no file here has that name; ``config`` otherwise.

    Raises:
        ConfigError: If ``config`` is neither a file nor the name of a recipe, and is not YAML text either.
    """
    given = Path(config[:4096])
    if (given.exists() and not given.is_dir()) or any(sign in config for sign in ":{\n"):
        return config
    recipes = shipped()
    named = Path(config).name.removesuffix(".yaml")
    if config.removesuffix(".yaml") in recipes:
        return str(recipes[named])
    size = folder() / f"{config.removesuffix('.yaml')}.yaml"
    if config.startswith("sizes/") and size.is_file():  # a part of a recipe, to be merged with a whole one
        return str(size)
    if named in recipes:
        raise ConfigError(f"--config {config}: no such file; --config {named} reads the recipe of the package")
    raise ConfigError(f"--config {config}: no such file, and no such recipe{_suggestion(named, recipes)}")


def copy(name: str, to: str = ".") -> Path:
    """Copy a recipe.

    Args:
        name: The recipe's name, with or without ``.yaml``.
        to: The file to write, or a folder to write ``NAME.yaml`` into.

    Returns:
        The file that was written.

    Raises:
        ConfigError: If there is no such recipe, if the file exists already, or if it cannot be written.
    """
    recipes = shipped()
    name = name.removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}{_suggestion(name, recipes)}")
    target = Path(to)
    if target.is_dir() or to.endswith("/"):
        target = target / f"{name}.yaml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(recipes[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ConfigError(f"{target} exists already; name another file: sbn recipes copy {name} FILE") from error
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}") from error
    return target


def _suggestion(name: str, recipes: dict[str, Path]) -> str:
    close = get_close_matches(name, recipes, n=1)
    return f"; did you mean {close[0]}?" if close else "; sbn recipes lists them"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; sbn recipes --help shows what there is")

    def format_help(self) -> str:
        return _USAGE


def recipes(argv: Sequence[str]) -> None:
    """List the recipes, or copy one.

    Args:
        argv: The words after ``sbn recipes``.

    Raises:
        ConfigError: If the words make no command, or the copy cannot be made.
    """
    parser = _Parser(prog="sbn recipes", allow_abbrev=False)
    parser.add_argument("action", nargs="?", choices=("list", "copy"), default="list")
    parser.add_argument("name", nargs="?")
    parser.add_argument("to", nargs="?", default=".")
    options = parser.parse_args(argv)
    if options.action == "list":
        if options.name:
            raise ConfigError("sbn recipes list takes no name; sbn recipes copy NAME copies a recipe")
        width = max(map(len, shipped()), default=0)
        for name, path in shipped().items():
            print(f"{name:<{width}}  {first_line(path)}")
        return
    if not options.name:
        raise ConfigError("which recipe? sbn recipes copy NAME [TO]")
    target = copy(options.name, options.to)
    print(f"{target}: edit it, then sbn fit --config {target}")
