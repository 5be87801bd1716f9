"""A loaded model into an empty folder, in the format asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sbn_lightning.checkpoints.tokenizers import TOKENIZER

if TYPE_CHECKING:
    from sbn_lightning.formats.load import LoadedModel


def write_model(loaded: LoadedModel, folder: Path, format: str, *, linear_class: str, quantization: str) -> str:
    """Writes a model.

    Args:
        loaded: The model.
        folder: Where; it exists.
        format: ``"packed"``, ``"hf"``, ``"hf-bitnet"`` or ``"gguf"``.
        linear_class: Of hf-bitnet.
        quantization: Of gguf.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: If the format cannot hold the model.
        OSError: If it cannot be written.
    """
    if format == "gguf":
        from sbn_lightning.formats.gguf.write import write_gguf

        return write_gguf(loaded, folder, quantization)
    if format == "packed":
        from sbn_lightning.formats.packed import write_packed

        if loaded.tokenizer_path is not None:
            shutil.copyfile(loaded.tokenizer_path, folder / TOKENIZER)
        sizes = write_packed(loaded.model, folder)
        return (
            f"{sizes['linear_bits']:.3f} bits a weight in the ternary layers, {sizes['file_bits']:.2f} bits a "
            f"parameter in the file, {sizes['file_bytes'] / 1e6:.2f} MB"
        )
    from sbn_lightning.formats.huggingface.write import write_hf, write_hf_bitnet

    return write_hf(loaded, folder) if format == "hf" else write_hf_bitnet(loaded, folder, linear_class)
