"""``export``: a trained model in a form that others can run.

Each format has its own file; here is what they share: which model, where to, and what is printed. A model that a format
cannot hold is refused with the formats that can, and leaves nothing behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.core.files import check_output, folder_aside


def export(
    checkpoint: str,
    output: str,
    format: Literal["packed", "hf", "hf-bitnet", "gguf"] = "packed",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear",
    quantization: Literal["TQ2_0", "TQ1_0", "Q4_0"] = "TQ2_0",
    overwrite: bool = False,
) -> None:
    """Write a model in a format to run it from.

    packed: this project's own, the smallest, with the exact logits. hf: a Hugging Face Qwen2 or Llama model, for models
    that are not ternary. hf-bitnet: a Hugging Face model with 2-bit weights, for transformers. gguf: for llama.cpp.

    Args:
        checkpoint: A checkpoint (.ckpt), the folder of a run, a packed or a Hugging Face folder.
        output: Folder to write.
        format: packed, hf, hf-bitnet or gguf.
        dtype: Of embeddings, norms, biases and head; default as in the checkpoint.
        tokenizer: A tokenizer.json or the folder that holds it; default the one found with the checkpoint.
        linear_class: hf-bitnet: transformers' bitlinear (weights stay packed in memory) or autobitlinear (unpacked
            once, faster).
        quantization: gguf: TQ2_0 (2.06 bits a weight, faster), TQ1_0 (1.69 bits), or Q4_0 (4.5 bits) for widths that
            are not a multiple of 256.
        overwrite: Replace what is in the output folder.

    Raises:
        ConfigError: The model does not fit the format, or the folder is taken.
        DataError: The checkpoint is damaged, or the folder cannot be written.
    """
    target = Path(output)
    check_output(target, overwrite)
    import torch

    from sbn_lightning.data.tokenizer import vocab_size_of
    from sbn_lightning.formats.load import load_model
    from sbn_lightning.formats.write import write_model

    loaded = load_model(checkpoint, dtype=None if dtype is None else getattr(torch, dtype), tokenizer=tokenizer)
    if overwrite and target.resolve() in (loaded.path.resolve(), *loaded.path.resolve().parents):
        raise ConfigError(f"{target} holds the model that is to be exported; give another --output")
    if loaded.tokenizer is None and format != "gguf":  # which cannot do without
        print(f"note: no tokenizer found with {loaded.path}; add one with --tokenizer")
    if loaded.tokenizer is not None and (size := vocab_size_of(loaded.tokenizer)) > loaded.config.vocab_size:
        raise ConfigError(
            f"{loaded.tokenizer_path} has {size} tokens, the model's vocab_size is {loaded.config.vocab_size}; give "
            "its own with --tokenizer"
        )
    with folder_aside(target, overwrite) as folder:
        summary = write_model(loaded, folder, format, linear_class=linear_class, quantization=quantization)
    print(f"{summary}\nwritten to {target}")
