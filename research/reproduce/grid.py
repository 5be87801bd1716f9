"""Read factors and groups from a YAML file, and make runs: each is a whole recipe with a stable id.

The id of a run is a readable name and a digest of its recipe. The digest leaves out what cannot change a result: the
places of data and logs, and the device. So a run that two groups ask for is done once, and a changed recipe makes new
runs, which are not mistaken for the old ones.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from research.reproduce.corpus import TOKENS
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data.tokenization.sources import digest

# Factors that stand in every name, and so are never listed among what a run varies. The learning rate is one of them: a
# new default for a family must not rename the runs of a sweep.
ALWAYS_NAMED = ("family", "pattern", "learning_rate", "seed")
# Where version 0.1.0 had its grid.
_BEFORE = ("recipes", "reproduce", "grid.yaml")
# Keys that change no result.
_PLACES = ("data.path", "data.num_workers", "trainer.accelerator", "trainer.devices", "trainer.logger")


@dataclass
class Run:
    """One training run.

    Attributes:
        name: The readable name: what the run varies, and its seed.
        recipe: The whole configuration that ``fit`` gets.
        factors: The value of every factor.
        varied: The factors whose value is not the default, without :data:`ALWAYS_NAMED`.
        groups: The groups that ask for the run.
    """

    name: str
    recipe: dict[str, Any]
    factors: dict[str, Any]
    varied: dict[str, Any]
    groups: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The stable id: the name, and a digest of the recipe."""
        recipe = copy.deepcopy(self.recipe)
        for key in _PLACES:
            set_key(recipe, key, None)
        return f"{self.name}-{digest(json.dumps(recipe, sort_keys=True))[:8]}"

    @property
    def tokens(self) -> int:
        """The number of tokens that the run trains on."""
        data, trainer = self.recipe["data"], self.recipe["trainer"]
        batches = trainer["max_steps"] * trainer.get("accumulate_grad_batches", 1)
        return int(batches * data["batch_size"] * data["sequence_length"])

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether the id, the name or ``group/name`` matches one of the globs; no glob at all matches."""
        names = [self.id, self.name, *(f"{group}/{self.name}" for group in self.groups)]
        return not patterns or any(fnmatch(name, pattern) for name in names for pattern in patterns)


@dataclass
class Grid:
    """The content of a grid file.

    Attributes:
        recipe: The base recipe, with the overrides of the command line.
        factors: The factors by name: the keys that a factor sets, or its choices.
        groups: The groups by name: values of factors.
        probe: The settings of the probe, or None for no probe.
    """

    recipe: dict[str, Any]
    factors: dict[str, list[str] | dict[str, dict[str, Any]]]
    groups: dict[str, dict[str, Any]]
    probe: dict[str, int] | None

    def runs(self) -> list[Run]:
        """Return all runs, each once, in the order of the groups.

        Raises:
            ConfigError: If a group names a factor or a value that is not there, or a recipe cannot give a result.
        """
        runs: dict[str, Run] = {}
        for group, values in self.groups.items():
            for name in values:
                if name not in self.factors:
                    known = ", ".join(self.factors)
                    raise ConfigError(f"group {group}: {name!r} is not one of the factors {known}")
            lists = [value if isinstance(value, list) else [value] for value in values.values()]
            for combination in product(*lists):
                run = self._run(group, dict(zip(values, combination, strict=True)))
                runs.setdefault(run.id, run).groups.append(group)
        return list(runs.values())

    def _run(self, group: str, values: Mapping[str, Any]) -> Run:
        recipe = copy.deepcopy(self.recipe)
        varied: dict[str, Any] = {}
        factors: dict[str, Any] = {}
        for name, spec in self.factors.items():
            before = copy.deepcopy(recipe)
            if isinstance(spec, dict):
                choice = values.get(name, next(iter(spec)))
                if choice not in spec:
                    raise ConfigError(f"group {group}: {name}: {choice!r} is not one of {', '.join(spec)}")
                for key, value in spec[choice].items():
                    set_key(recipe, key, copy.deepcopy(value))
                factors[name] = choice
            else:
                for key in spec if name in values else ():
                    _check(values[name], key, f"group {group}: {name}")
                    if get_key(recipe, key.rpartition(".")[0], missing=None) is None and "." in key:
                        raise ConfigError(f"group {group}: {name} sets {key}, and this family has no such part")
                    set_key(recipe, key, values[name])
                factors[name] = get_key(recipe, spec[0], missing=None)
            if recipe != before and name not in ALWAYS_NAMED:
                varied[name] = factors[name]
        _check_length(recipe, group)
        parts = [str(factors[name]) for name in ("family", "pattern") if name in factors]
        parts += [f"lr_{factors['learning_rate']:g}"] if "learning_rate" in factors else []
        parts += [f"{name}_{value}" for name, value in varied.items()]
        parts += [f"s{factors['seed']}"] if "seed" in factors else []
        name = re.sub(r"[^\w.-]+", "_", "-".join(parts).replace(":", "of"))
        return Run(name, recipe, factors, varied)


def read_grid(path: str | Path, overrides: Sequence[str] = (), data: str | None = None) -> Grid:
    """Read a grid file.

    Args:
        path: The path of the file. The file's recipe lies next to it.
        overrides: The changes to the base recipe, each ``key=value`` with a YAML value. They are made first.
        data: The folder of the corpus, if it is not the one in the recipe.

    Raises:
        ConfigError: If a file is not there, is no YAML, or lacks a part.
    """
    grid = _read_yaml(Path(path))
    for key in ("recipe", "factors", "groups"):
        if key not in grid:
            raise ConfigError(f"{path} has no {key!r}")
    if unknown := grid.keys() - {"recipe", "factors", "groups", "probe"}:
        raise ConfigError(f"{path}: {sorted(unknown)[0]!r} is not one of recipe, factors, groups, probe")
    recipe = _read_yaml(Path(path).parent / grid["recipe"])
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r} is not of the form key=value")
        set_key(recipe, key, _parse_yaml(value, f"override {text!r}"))
    if data is not None:
        set_key(recipe, "data.path", str(Path(data, TOKENS)))
    factors = {
        name: spec if isinstance(spec, dict) else [spec] if isinstance(spec, str) else list(spec)
        for name, spec in grid["factors"].items()
    }
    return Grid(recipe, factors, grid["groups"], grid.get("probe"))


def get_key(config: Any, key: str, missing: Any) -> Any:
    """Return the value at a dotted key, or ``missing``."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return missing
        config = config[part]
    return config


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, and make the mappings that the key goes through."""
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(config.get(part), dict):
            config[part] = {}
        config = config[part]
    config[last] = value


def _check(value: Any, key: str, where: str) -> None:
    """Refuse values that YAML reads in another way than the author meant."""
    if key.endswith("pattern") and not isinstance(value, str):
        raise ConfigError(f'{where}: {value!r} is not a pattern; quote it, like "6:8": YAML reads 6:8 as a number')
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.IGNORECASE):
        raise ConfigError(f"{where}: YAML reads {value} as a text; write it with a point, like 1.0e-3")


def _check_length(recipe: dict[str, Any], group: str) -> None:
    steps = get_key(recipe, "trainer.max_steps", missing=None)
    for key in ("trainer.val_check_interval", "checkpoint.every_n_train_steps"):
        every = get_key(recipe, key, missing=None)
        batches = get_key(recipe, "trainer.accumulate_grad_batches", missing=1) if "val" in key else 1
        if not isinstance(steps, int) or not isinstance(every, int) or (steps * batches) % every:
            raise ConfigError(
                f"group {group}: {key}={every} does not divide trainer.max_steps={steps}: the run's last step must be "
                "validated and saved, change one of them"
            )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        moved = "; the grid moved to research/reproduce/grid.yaml" if path.parts[-3:] == _BEFORE else ""
        raise ConfigError(f"cannot read {path}: {error.strerror}{moved}") from error
    value = _parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is no mapping of keys to values")
    return value


def _parse_yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {' '.join(str(error).split())}") from error
