"""Write a loaded model into an empty folder, in the format asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.choices import ExportFormat, LinearClass, Quantization

if TYPE_CHECKING:
    from sbn_lightning.formats.loaded import LoadedModel


@dataclass(frozen=True)
class WriteOptions:
    """What a user may choose about an export.

    Attributes:
        linear_class: The class of transformers that reads an ``hf-bitnet`` export.
        quantization: The GGUF type of ternary tensors.
        embedding_bits: Bits for each weight of embedding and head, in ``packed`` and ``gguf``.
        value_bits: Bits for each weight of a masked layer, in ``packed``.
        perplexity: The perplexity for the model card of ``hf-sbn``; None if it was not measured.
    """

    linear_class: LinearClass = "bitlinear"
    quantization: Quantization = "TQ2_0"
    embedding_bits: int = 16
    value_bits: int = 16
    perplexity: float | None = None


def write_model(loaded: LoadedModel, folder: Path, format: ExportFormat, options: WriteOptions) -> str:
    """Write a model.

    Args:
        loaded: The model and its text files.
        folder: The folder to write to; it exists and is empty.
        format: The format to write.
        options: The choices of the user.

    Returns:
        What was written, for the user: a line, and the size of each part.

    Raises:
        ConfigError: If the format cannot hold the model.
        OSError: If a file cannot be written.
    """
    if format == "gguf":
        from sbn_lightning.formats.gguf.write import write_gguf

        return write_gguf(loaded, folder, options.quantization, options.embedding_bits)
    if format == "packed":
        from sbn_lightning.formats.packed import WEIGHTS, write_packed

        sizes = write_packed(loaded.model, folder, loaded.text, options.embedding_bits, options.value_bits)
        linear = loaded.config.linear
        size = (folder / WEIGHTS).stat().st_size
        return (
            f"{sizes[f'{linear} layers'].bits:.3f} bits a weight in the {linear} layers, "
            f"{8 * size / sizes.weights:.2f} bits a parameter in the file, {size / 1e6:.2f} MB\n{sizes.table()}"
        )
    from sbn_lightning.formats.huggingface.write import write_hf, write_hf_bitnet

    if options.embedding_bits == 8:
        raise ConfigError(f"--format {format} cannot hold 8-bit embeddings; use --dtype bfloat16, or --format packed")
    if format == "hf":
        return write_hf(loaded, folder)
    if format == "hf-sbn":
        from sbn_lightning.formats.huggingface.sbn import write_hf_sbn

        return write_hf_sbn(loaded, folder, options.perplexity)
    return write_hf_bitnet(loaded, folder, options.linear_class)
