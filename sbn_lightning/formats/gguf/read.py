"""Read a GGUF file: weights, configuration, tokenizer and chat template.

The ``gguf`` package turns every type that it knows back into float32.

The rotary positions pair up rows of q and k. llama.cpp pairs neighbouring rows of a head, and this project pairs row i
of the first half with row i of the second half. So the rows of architectures such as ``llama`` are put back in order.

A file of Llama 3.1 to 3.3 holds one divisor for each frequency, and not the options that the divisors were computed
from. The options of these models are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.install import how_to_install
from sbn_lightning.formats.files import refuse_pointer
from sbn_lightning.formats.gguf.names import LINEAR, OUTER, ROPE_DIVISORS, block_norms, restore_halves
from sbn_lightning.formats.gguf.tokenizer import read_tokenizer
from sbn_lightning.formats.huggingface.names import from_hf_state, norm_names
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.families.family import GGUFArchitecture
from sbn_lightning.models.families.registry import gguf_architectures
from sbn_lightning.models.rope import rope_frequencies, rope_stretch
from sbn_lightning.models.rope_scaling import RopeScaling, yarn_magnitude

# The factors of Llama 3.1 and 3.3 (8) and of Llama 3.2 (32); their other options are the same.
LLAMA_3 = tuple(RopeScaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))


def read_gguf(file: Path) -> tuple[TransformerConfig, dict[str, Tensor], TextFiles]:
    """Read a model.

    Returns:
        A dense configuration; the state dict of a :class:`TernaryTransformer`, in float32; the text files.

    Raises:
        ConfigError: If the package ``gguf`` is missing, or the model has a feature that is not supported.
        DataError: If the file is damaged, or its tensors do not fit its configuration.
    """
    import gguf

    with _reading(file) as (fields, tensors):
        config = _config(fields, tensors, file)
        ours_of = {theirs: ours for ours, theirs in block_norms(config).items()}
        hf_norms = norm_names(config)
        norms = {theirs: hf_norms[ours] for theirs, ours in ours_of.items()}
        names = {_name_there(name, norms): name for name in tensors if name != ROPE_DIVISORS}
        turned = _architecture(fields, file).alternates_halves

        def read(name: str) -> Tensor:
            tensor = tensors[names[name]]
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            values = values.reshape(tuple(int(size) for size in reversed(tensor.shape)))
            if turned and ("self_attn.q_proj." in name or "self_attn.k_proj." in name):
                values = restore_halves(values, config.head_size)
            return values

        return config, from_hf_state(config, read, set(names), str(file)), read_tokenizer(fields, file)


def read_gguf_config(file: Path) -> TransformerConfig:
    """Read the configuration alone; the errors are those of :func:`read_gguf`."""
    with _reading(file) as (fields, tensors):
        return _config(fields, tensors, file)


def read_gguf_text(file: Path) -> TextFiles:
    """Read the text files alone; the errors are those of :func:`read_gguf`."""
    with _reading(file) as (fields, _):
        return read_tokenizer(fields, file)


@contextmanager
def _reading(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The metadata and the tensors of a file, each by name."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            f"{file}: reading GGUF needs the package gguf: {how_to_install('export')}, or pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # A damaged file can make the package raise anything.
        refuse_pointer(file)
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        if "is not a valid GGMLQuantizationType" in reason:
            raise DataError(f"{file} holds tensors of a type unknown to the installed gguf: {reason}") from error
        raise DataError(f"{file} is damaged, or is not GGUF: {reason}") from error
    yield fields, {tensor.name: tensor for tensor in reader.tensors}


def _architecture(fields: dict[str, Any], file: Path) -> GGUFArchitecture:
    kind, known = fields.get("general.architecture"), gguf_architectures()
    if kind not in known:
        raise ConfigError(f"{file}: the architecture {kind!r} is not one of {', '.join(known)}")
    return known[kind]


def _config(fields: dict[str, Any], tensors: dict[str, Any], file: Path) -> TransformerConfig:
    architecture = _architecture(fields, file)
    kind = architecture.name
    if fields.get(f"{kind}.expert_count"):
        raise ConfigError(
            f"{file}: mixture of experts ({fields[f'{kind}.expert_count']} experts) is not read from "
            "GGUF; give the Hugging Face folder of the model"
        )
    window = fields.get(f"{kind}.attention.sliding_window")
    if window and window < fields.get(f"{kind}.context_length", window):
        raise ConfigError(
            f"{file}: sliding windows ({window} tokens) are not read from GGUF; give the model's Hugging Face folder"
        )
    try:
        heads, d_model = fields[f"{kind}.attention.head_count"], fields[f"{kind}.embedding_length"]
        size = fields.get(f"{kind}.attention.key_length", d_model // heads)
        if (turning := fields.get(f"{kind}.rope.dimension_count", size)) != size:
            raise ConfigError(f"{file}: only {turning} of the {size} features of a head turn, which is not supported")
        embeddings = tensors["token_embd.weight"]
        n_layers = fields[f"{kind}.block_count"]
        config = TransformerConfig(
            vocab_size=int(embeddings.shape[1]),
            d_model=d_model,
            n_layers=n_layers,
            n_heads=heads,
            n_kv_heads=fields.get(f"{kind}.attention.head_count_kv", heads),
            d_ffn=fields[f"{kind}.feed_forward_length"],
            max_sequence_length=fields[f"{kind}.context_length"],
            rope_theta=round(float(fields.get(f"{kind}.rope.freq_base", 10000.0)), 3),
            rope_scaling=_rope_scaling(fields, kind, file),
            norm_eps=_rounded(fields[f"{kind}.attention.layer_norm_rms_epsilon"]),
            qkv_bias="blk.0.attn_q.bias" in tensors,
            tie_embeddings="output.weight" not in tensors,
            linear="dense",
            head_dim=None if size * heads == d_model else size,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            **architecture.implies(n_layers),
        )
    except KeyError as error:
        raise DataError(f"{file} lacks {error.args[0]}") from error
    if ROPE_DIVISORS not in tensors:
        return config
    divisors = torch.from_numpy(tensors[ROPE_DIVISORS].data.copy()).double()
    for scaling in LLAMA_3:
        if torch.allclose(rope_stretch(scaling, rope_frequencies(config)), divisors, rtol=1e-4):
            return replace(config, rope_scaling=scaling)
    raise ConfigError(f"{file}: positions are scaled in another way than that of Llama 3.1 to 3.3")


def _rope_scaling(fields: dict[str, Any], kind: str, file: Path) -> RopeScaling | None:
    """Read linear and YaRN positions."""
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    factor = _rounded(fields.get(f"{kind}.rope.scaling.factor", 1.0))
    if scaling == "none" or (scaling == "linear" and factor == 1):
        return None
    if scaling == "linear":
        return RopeScaling(factor, rope_type="linear")
    if scaling != "yarn":
        raise ConfigError(f"{file}: scaled positions ({scaling}) are not supported")
    magnitude = fields.get(f"{kind}.rope.scaling.attn_factor")
    return RopeScaling(
        factor,
        original_max_position_embeddings=fields.get(
            f"{kind}.rope.scaling.original_context_length", fields[f"{kind}.context_length"]
        ),
        rope_type="yarn",
        attention_factor=None if magnitude is None else _rounded(magnitude * yarn_magnitude(factor)),
        beta_fast=_rounded(fields.get(f"{kind}.rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_rounded(fields.get(f"{kind}.rope.scaling.yarn_beta_slow", 1.0)),
    )


def _rounded(value: float) -> float:
    """A number without the digits that a float32 does not hold: 9.999999747378752e-06 becomes 1e-5."""
    return float(f"{value:.6g}")


def _name_there(name: str, norms: dict[str, str]) -> str:
    """The name of a tensor in Hugging Face's models. An unknown name stays, and is later refused as left over.

    Args:
        name: The name in the file.
        norms: The norms of a block: name in GGUF -> name in transformers.
    """
    if name in OUTER:
        return OUTER[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, kind = rest.partition(".")
    if part in norms:
        return f"model.layers.{block}.{norms[part]}.{kind}"
    if part in LINEAR:
        return f"model.layers.{block}.{LINEAR[part]}.{kind}"
    return name
