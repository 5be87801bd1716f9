"""``sbn export``: write a trained model in a form that other programs can run.

Each format has its own file in :mod:`sbn_lightning.formats`. This file holds what the formats share: which model is
read, where the export goes, and what is printed. A model that a format cannot hold is refused, with the name of a
format that can, and nothing is left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.output import check_output, output_folder


def export(
    checkpoint: str,
    output: str,
    format: Literal["packed", "hf", "hf-bitnet", "hf-sbn", "gguf"] = "packed",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear",
    quantization: Literal["TQ2_0", "TQ1_0", "Q2_0", "Q4_0"] = "TQ2_0",
    overwrite: bool = False,
    embedding_bits: Literal[8, 16, 32] | None = None,
    perplexity: float | None = None,
) -> None:
    """Write a model in a format to run it from.

    packed is the format of this project, and the smallest one. hf is a Hugging Face Qwen2 or Llama model, for models
    that are not ternary. hf-bitnet is a Hugging Face model with 2-bit weights, for transformers. hf-sbn is a Hugging
    Face model with this project's own quantisation method, for transformers and vLLM. gguf is for llama.cpp.

    A model that was trained with model.source, or any Hugging Face folder of a sparse model, goes to hf-sbn and packed
    if it is ternary, and to hf otherwise.

    Args:
        checkpoint: A checkpoint (.ckpt), the folder of a run, a packed or a Hugging Face folder, or a GGUF file.
        output: The folder to write.
        format: packed, hf, hf-bitnet, hf-sbn or gguf.
        dtype: The dtype of everything but ternary weights. By default weights keep the dtype of the checkpoint, except
            that packed and gguf store embeddings, the head and masked weights in 16 bits.
        tokenizer: A tokenizer.json or the folder that holds it. The default is the tokenizer of the checkpoint.
        linear_class: hf-bitnet: bitlinear keeps weights packed in memory; autobitlinear unpacks them once and is
            faster.
        quantization: gguf: TQ2_0 (2.06 bits a weight, faster), TQ1_0 (1.69 bits), Q2_0 (2.25 bits, blocks of 64, needs
            a llama.cpp of 2026) or Q4_0 (4.5 bits, blocks of 32). A layer whose width the type does not fit gets Q4_0.
        overwrite: Replace what is in the output folder.
        embedding_bits: packed and gguf: 8, 16 or 32 bits for each weight of embeddings and head. The default is 16, or
            the bits of dtype if dtype is given.
        perplexity: hf-sbn: the perplexity for the model card, for example from `sbn evaluate`.

    Raises:
        ConfigError: The model does not fit the format, or the folder is taken.
        DataError: The checkpoint is damaged, or the folder cannot be written.
    """
    target = Path(output)
    check_output(target, overwrite)
    if quantization != "TQ2_0" and format != "gguf":
        raise ConfigError(f"quantization={quantization} is for --format gguf, not for --format {format}")
    if linear_class != "bitlinear" and format != "hf-bitnet":
        raise ConfigError(f"linear_class={linear_class} is for --format hf-bitnet, not for --format {format}")
    if embedding_bits is not None and format in ("hf", "hf-bitnet", "hf-sbn"):
        raise ConfigError(
            f"embedding_bits is for --format packed and gguf; --format {format} has one dtype: use --dtype bfloat16"
        )
    if perplexity is not None and format != "hf-sbn":
        raise ConfigError("perplexity is for the model card of --format hf-sbn; leave it out")
    import torch

    from sbn_lightning.data.tokenizer import vocab_size_of
    from sbn_lightning.formats.write import WriteOptions, write_model
    from sbn_lightning.integrations.opening import load_any
    from sbn_lightning.models.transformer import TernaryTransformer

    chosen = None if dtype is None else getattr(torch, dtype)
    loaded = load_any(checkpoint, dtype=chosen, tokenizer=tokenizer)
    if overwrite and target.resolve() in (loaded.path.resolve(), *loaded.path.resolve().parents):
        raise ConfigError(f"{target} holds the model that is to be exported; give another --output")
    if embedding_bits is not None and not isinstance(loaded.model, TernaryTransformer):
        raise ConfigError("embedding_bits is for models of our own transformer; use --dtype bfloat16")
    if loaded.tokenizer is None and format != "gguf":  # GGUF refuses a model without one
        print(f"note: no tokenizer found with {loaded.path}; add one with --tokenizer")
    if loaded.tokenizer is not None and (size := vocab_size_of(loaded.tokenizer)) > loaded.config.vocab_size:
        raise ConfigError(
            f"{loaded.tokenizer_path} has {size} tokens, the model's vocab_size is {loaded.config.vocab_size}; give "
            "its own with --tokenizer"
        )
    bits = 32 if dtype is not None else 16  # 32 keeps the dtype that was asked for.
    options = WriteOptions(linear_class, quantization, embedding_bits or bits, bits, perplexity)
    with output_folder(target, overwrite) as folder:
        if isinstance(loaded.model, TernaryTransformer):
            summary = write_model(loaded, folder, format, options)
        else:
            from sbn_lightning.integrations.huggingface.export import export_network

            summary = export_network(loaded.model, loaded.text, folder, format, chosen, perplexity)
    print(f"{summary}\nwritten to {target}")
