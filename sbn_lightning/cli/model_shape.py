"""Take the shape of the model from the weights that a run starts from, so that nobody has to copy it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace

from sbn_lightning.checkpoints import lightning_file, sharded
from sbn_lightning.checkpoints.io import say
from sbn_lightning.formats.init_from import FIXED, inserts_sub_norms
from sbn_lightning.formats.load import read_config
from sbn_lightning.formats.recognise import recognise
from sbn_lightning.models.config import TransformerConfig

OPTION = "model.config"
# The options that name a model. Several functions read the model, each from the path.
MODELS = ("model.init_from", "model.distillation.teacher")


def find_states(config: Namespace) -> None:
    """Replace the folder of a run, where an option names a model, by the newest state of the run.

    So all who read the model read the same file, also while the run goes on, and a damaged file is named once. A run
    that continues from a checkpoint does not read ``model.init_from``.

    Args:
        config: The options of a training command; changed in place.

    Raises:
        DataError: If a folder holds no model.
    """
    for option in MODELS[1:] if config.get("ckpt_path") else MODELS:
        path = config.get(option)
        if isinstance(path, str) and Path(path).is_dir() and (place := recognise(Path(path)).place).is_file():
            config[option] = str(place)


def take_shape(config: Namespace, arguments: Sequence[str]) -> None:
    """Set the fields of ``model.config`` that come with the weights of ``model.init_from``.

    A field that the command line names keeps its value there. If this value does not fit the weights, loading them
    raises the error. A value from a recipe is replaced, and a printed line says so. Only ``sub_norms: true`` stays,
    because a run may insert these norms. A run that continues from a checkpoint takes the fields from the checkpoint,
    because the weights that the run started from may be gone.

    Args:
        config: The options of a training command; changed in place.
        arguments: The arguments of the command line.

    Raises:
        DataError: If there is no model at ``model.init_from``, or it is damaged.
        ConfigError: If the model at ``model.init_from`` has a feature that is not supported.
    """
    path, shape = config.get("model.init_from"), config.get(OPTION)
    if not path or not isinstance(shape, Namespace):
        return
    source = config.get("ckpt_path") or path
    found = _config_of_checkpoint(source) if source != path else _config_of_weights(path)
    if found is None:
        return
    given = {word.partition("=")[0].removeprefix(f"--{OPTION}.") for word in arguments if word.startswith("--")}
    values = found.to_dict()
    changed = {}
    for name in FIXED:
        value, present = values[name], shape.get(name)
        if name in given or (list(present) if isinstance(present, tuple) else present) == value:
            continue
        if name == "sub_norms" and inserts_sub_norms(value, present):
            continue
        changed[name] = value
        shape[name] = Namespace(value) if isinstance(value, dict) else value
    if changed:
        told = ", ".join(f"{name} {value}" for name, value in changed.items())
        say(f"model.config takes from {source}: {told}")


def _config_of_weights(path: str) -> TransformerConfig | None:
    # A path that does not exist is refused where the weights are loaded, with the command that writes such a file.
    return read_config(path) if Path(path).exists() else None


def _config_of_checkpoint(path: str) -> TransformerConfig | None:
    """Return the configuration in a checkpoint; None if the checkpoint is not on this machine."""
    file = Path(path)
    file = file / sharded.REST if file.is_dir() else file
    if not file.is_file():
        return None
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=file.name != sharded.REST)
    return lightning_file.config_of(saved, file)
