"""Open a model to run it: with our own transformer where that can be the model, and with transformers otherwise.

``sbn evaluate``, ``sbn generate`` and ``sbn export`` call :func:`open_any` or :func:`load_any`, and so take every model
that this project trains. transformers runs three kinds of models: checkpoints of ``recipes/from_hugging_face.yaml``,
folders of the quantisation method ``"sbn"``, and folders of architectures that our own transformer does not have.

transformers is imported only for a model that needs it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import find_text_files
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.install import how_to_install
from sbn_lightning.formats.assemble import cast_model
from sbn_lightning.formats.files import read_json
from sbn_lightning.formats.load import load_model
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.formats.recognise import Found, recognise
from sbn_lightning.inference.opening import (
    BackendName,
    DTypeName,
    choose_device,
    choose_dtype,
    make_ready,
    open_model,
)

CONFIG = "config.json"
NEEDS = f"this model needs transformers: {how_to_install('hf')}"


def open_any(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: DTypeName = "auto",
    backend: BackendName = "auto",
    compile: bool = False,
) -> LoadedModel:
    """Load a model and make it ready to run; the arguments are those of :func:`~sbn_lightning.inference.open_model`.

    Returns:
        The model. A model of transformers is a
        :class:`~sbn_lightning.integrations.huggingface.network.Network`, which evaluation and generation take like our
        own transformer.

    Raises:
        ConfigError: If there is no such device, the backend cannot run there, or transformers is missing.
        DataError: If there is no such model, or the model is damaged.
    """
    found = recognise(Path(checkpoint))
    if not needs_transformers(found):
        # The place and not the path, so that the newest state of a run is looked for once.
        place = str(found.place)
        return open_model(place, tokenizer=tokenizer, device=device, dtype=dtype, backend=backend, compile=compile)
    where = choose_device(device)
    chosen = choose_dtype(dtype, where)
    loaded = _load(found, tokenizer, chosen)
    loaded.model.to(where)
    return make_ready(loaded, where, chosen, backend, compile)


def load_any(checkpoint: str, *, tokenizer: str | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a model to export it.

    Args:
        checkpoint: The file or folder of the model.
        tokenizer: A ``tokenizer.json`` or a folder with one; None takes the one that comes with the model.
        dtype: The dtype of everything but latent weights; None keeps the stored dtypes.

    Raises:
        ConfigError: If transformers is missing.
        DataError: If there is no such model, or the model is damaged.
    """
    found = recognise(Path(checkpoint))
    if not needs_transformers(found):
        return load_model(found.place, dtype=dtype, tokenizer=tokenizer)
    return _load(found, tokenizer, dtype)


def needs_transformers(found: Found) -> bool:
    """Whether transformers has to run a model, because our own transformer cannot be the model.

    A folder of another architecture is named on stderr, with the reason.

    Args:
        found: The place of the model.

    Raises:
        DataError: If the model is damaged.
        ConfigError: If the folder does not say how to build its model.
    """
    if found.format == "lightning":
        return lightning_file.holds_hugging_face(found.place)
    if found.format != "hf":
        return False
    values = read_json(found.place / CONFIG)
    if values.get("format") == "sbn-sparse":
        if lightning_file.HUGGING_FACE not in values:
            raise ConfigError(
                f"{found.place} was written by save_sparse, and only your own code can build its model: build it, and "
                "call load_sparse(model, folder)"
            )
        return True
    quantization = values.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "sbn":
        return True
    from sbn_lightning.formats.huggingface.folder import read_hf_config

    try:
        read_hf_config(found.place)
    except ConfigError as error:
        if not isinstance(values.get("model_type"), str) or find_spec("transformers") is None:
            return False  # load_model raises this error again.
        reason = str(error).removeprefix(f"{found.place / CONFIG}: ")
        print(f"note: transformers runs this model, our own transformer cannot: {reason}", file=sys.stderr)
        return True
    return False


def _load(found: Found, tokenizer: str | None, dtype: torch.dtype | None) -> LoadedModel:
    if find_spec("transformers") is None:
        raise ConfigError(NEEDS)
    from sbn_lightning.integrations.huggingface.reading import read_network

    network, text = read_network(found)
    if dtype is not None:
        cast_model(cast(Any, network), dtype)
    network.eval().requires_grad_(False)
    text = find_text_files(found.place, text, tokenizer)
    _ = text.tokenizer  # A damaged tokenizer is found now, and not after minutes of work.
    return LoadedModel(cast(Any, network), cast(Any, network.config), found.format, found.place, text)
