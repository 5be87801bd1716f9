"""Read a model in any of its formats.

A loaded model is ready to compute: it is in evaluation mode, needs no gradients, and is on the device asked for. Where
a format allows it, weights are mapped from the file. A checkpoint with its optimiser states then costs no more memory
than its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.checkpoints.text_files import KEY, TextFiles, find_text_files
from sbn_lightning.checkpoints.tokenizers import TOKENIZER
from sbn_lightning.core.devices import usable_device
from sbn_lightning.formats.assemble import build_model, cast_model
from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.formats.recognise import Found, recognise
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Read a model.

    Args:
        path: The file or folder of the model: a checkpoint of this project (``.ckpt``), the folder of a run (its
            ``last.ckpt`` is read), a packed folder, a Hugging Face folder of a family in
            :mod:`sbn_lightning.models.families` (unquantised or packed by ``hf-bitnet``), or a GGUF file of such a
            model. The content decides which of these it is.
        device: The device to put the model on.
        dtype: The dtype of embeddings, norms, biases, the head and unquantised layers; None keeps the stored dtypes.
            Latent weights of ternary layers keep theirs: rounding them would change the codes.
        tokenizer: A ``tokenizer.json`` or a folder that holds one; None takes the one that comes with the model.

    Raises:
        DataError: If there is no model, the model is damaged, or there is no such tokenizer.
        ConfigError: If :class:`TernaryTransformer` cannot be this model, or the device cannot be used here.
    """
    where = usable_device(device, "load_model: device", 'load it with device="cpu", the default')
    found = recognise(Path(path))
    model, text = _read(found)
    if dtype is not None:
        cast_model(model, dtype)
    model.to(where).eval().requires_grad_(False)
    text = find_text_files(found.place, text, tokenizer)
    _ = text.tokenizer  # A damaged tokenizer is found now, and not after minutes of work.
    return LoadedModel(model, model.config, found.format, found.place, text)


def read_config(path: str | Path) -> TransformerConfig:
    """Read the configuration of a model without its weights.

    Args:
        path: As for :func:`load_model`.

    Raises:
        DataError: If there is no model, or the model is damaged.
        ConfigError: If :class:`TernaryTransformer` cannot be this model.
    """
    format, place = recognise(Path(path))
    if format == "lightning":
        return lightning_file.read(place).config
    if format == "packed":
        from sbn_lightning.formats.packed import read_packed_config

        return read_packed_config(place)
    if format == "gguf":
        from sbn_lightning.formats.gguf.read import read_gguf_config

        return read_gguf_config(place)
    if format == "hf-bitnet":
        from sbn_lightning.formats.huggingface.bitnet import read_bitnet_config

        return read_bitnet_config(place)
    from sbn_lightning.formats.huggingface.folder import read_hf_config

    return read_hf_config(place)


def read_text(path: str | Path) -> TextFiles:
    """Read the text files of a model without its weights.

    Args:
        path: As for :func:`load_model`.

    Raises:
        DataError: If there is no model, or a file is damaged.
    """
    format, place = recognise(Path(path))
    if format == "lightning":
        own = text_of_checkpoint(lightning_file.load(place), place)
    elif format == "packed":
        from sbn_lightning.formats.packed import read_packed_text

        own = read_packed_text(place)
    elif format == "gguf":
        from sbn_lightning.formats.gguf.read import read_gguf_text

        own = read_gguf_text(place)
    else:
        from sbn_lightning.formats.huggingface.folder import read_hf_text

        own = read_hf_text(place)
    return find_text_files(place, own, None)


def text_of_checkpoint(saved: Mapping[str, Any], place: Path) -> TextFiles:
    """Return the text files in the contents of a checkpoint.

    Args:
        saved: The contents of the checkpoint.
        place: The file of the checkpoint, for messages.
    """
    contents = saved.get(KEY) or {}
    return TextFiles(contents, place if TOKENIZER in contents else None)


def _read(found: Found) -> tuple[TernaryTransformer, TextFiles]:
    format, place = found
    if format == "packed":
        from sbn_lightning.formats.packed import read_packed

        return read_packed(place)
    if format == "hf-bitnet":
        from sbn_lightning.formats.huggingface.bitnet import read_hf_bitnet

        return read_hf_bitnet(place)
    if format == "lightning":
        saved = lightning_file.read(place)
        config, state, text = saved.config, saved.state, text_of_checkpoint({KEY: saved.text_files}, place)
    elif format == "gguf":
        from sbn_lightning.formats.gguf.read import read_gguf

        config, state, text = read_gguf(place)
    else:
        from sbn_lightning.formats.huggingface.folder import read_hf

        config, state, text = read_hf(place)
    return build_model(config, state, str(place)), text
