"""Read models of transformers: checkpoints of ``CausalLM``, folders of the method ``"sbn"``, and other folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import TextFiles, only_token_ids, read_folder
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.files import read_json
from sbn_lightning.formats.load import text_of_checkpoint
from sbn_lightning.formats.recognise import Found, recognise
from sbn_lightning.integrations.folder import describe, load_sparse, sparse_layers
from sbn_lightning.integrations.huggingface.network import OPTIONS, Network, build_network, make_network
from sbn_lightning.layers.packed import PackedTernaryLinear

CONFIG = "config.json"


@dataclass(frozen=True)
class Weights:
    """The weights of a model of transformers, for a new run to start from.

    Attributes:
        model_type: The architecture, by transformers' name.
        state: The tensors by their names in the model of transformers; of a sparse layer the latent weight.
        is_packed: Whether the latent weights are lost, so that ``gamma * codes`` takes their place.
        text: The text files that came with the weights.
    """

    model_type: str
    state: dict[str, Tensor]
    is_packed: bool
    text: TextFiles


def read_weights(path: str) -> Weights:
    """Read the weights of a model of transformers, for ``init_from``.

    Args:
        path: A checkpoint, the folder of a run, or a Hugging Face folder.

    Raises:
        DataError: If there is no such model, or it is damaged.
        ConfigError: If the file holds a model of our own transformer.
    """
    found = recognise(Path(path))
    if found.format == "lightning" and not lightning_file.holds_hugging_face(found.place):
        lightning_file.read(found.place)  # Raises its own error about a damaged file.
        raise ConfigError(f"init_from: {path} is a model of our own transformer; use a recipe with model.config")
    if found.format not in ("lightning", "hf"):
        raise ConfigError(f"init_from: {path} is a {found.format} model; give a checkpoint or a Hugging Face folder")
    network, text = read_network(found)
    state: dict[str, Tensor] = dict(network.hf.state_dict())
    packed = {name: one for name, one in network.hf.named_modules() if isinstance(one, PackedTernaryLinear)}
    for name, layer in packed.items():
        state[f"{name}.weight"] = layer.effective_weight()
    return Weights(str(network.config.hugging_face.get("model_type")), state, bool(packed), text)


def read_network(found: Found) -> tuple[Network, TextFiles]:
    """Read a model of transformers and its text files.

    Args:
        found: A checkpoint of ``CausalLM``, or a Hugging Face folder.

    Raises:
        DataError: If the model is damaged.
        ConfigError: If the configuration does not make a model.
    """
    place = found.place
    if found.format == "lightning":
        return _read_checkpoint(place)
    values = read_json(place / CONFIG)
    if values.get("format") == "sbn-sparse":
        described = values[lightning_file.HUGGING_FACE]
        hf = build_network(described)
        load_sparse(hf, place)
        return Network(hf, "ternary"), read_folder(place, only_token_ids(described))
    hf = build_network(str(place), what="")
    return Network(hf, _kind_of(hf)), read_folder(place, only_token_ids(values))


def _read_checkpoint(place: Path) -> tuple[Network, TextFiles]:
    saved = lightning_file.load(place)
    recorded: Mapping[str, Any] = saved["hyper_parameters"]
    linear = recorded["config"]["linear"]
    options: dict[str, Any] = {name: recorded[name] for name in OPTIONS if name in recorded}
    network, _ = make_network(recorded["source"], linear, **options)
    state = {
        name.removeprefix(lightning_file.PREFIX): tensor
        for name, tensor in saved["state_dict"].items()
        if name.startswith(lightning_file.PREFIX)
    }
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{place} does not fit its own configuration: {str(error).splitlines()[-1].strip()}") from error
    return network, text_of_checkpoint(saved, place)


def _kind_of(hf: nn.Module) -> str:
    kinds = {describe(layer)["kind"] for layer in sparse_layers(hf).values()}
    return "dense" if not kinds else "ternary" if "ternary" in kinds else "masked"
