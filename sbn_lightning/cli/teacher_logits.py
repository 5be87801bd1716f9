"""``sbn teacher-logits``: store with a text what a teacher says about it, for a distillation without the teacher."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sbn_lightning.core.errors import ConfigError

if TYPE_CHECKING:
    from sbn_lightning.inference.opening import DTypeName


def teacher_logits(
    checkpoint: str,
    data: str,
    output: str,
    sequence_length: int = 1024,
    top_k: int = 16,
    batch_size: int = 8,
    device: str = "auto",
    dtype: DTypeName = "auto",
    overwrite: bool = False,
) -> None:
    """Ask a teacher about each token of a prepared folder, and store its most likely next tokens with the text.

    Train on the new folder with model.distillation.teacher: null and data.sequence_length as here. The new
    folder takes 1 + 2 * top_k times the disk of the text. A call that was interrupted goes on where it stopped.

    Args:
        checkpoint: The teacher: a .ckpt, the folder of a run, a packed or a Hugging Face folder, or a GGUF file.
        data: The folder that `prepare` wrote with the teacher's tokenizer.
        output: The folder to write.
        sequence_length: The number of inputs of a window. The teacher sees one window at a time.
        top_k: How many next tokens to store for each token. All others count as one in the loss.
        batch_size: The number of windows that the teacher sees at once.
        device: "auto" takes a GPU if there is one; or cpu, cuda, cuda:1.
        dtype: The precision of the teacher: auto, float32, bfloat16 or float16.
        overwrite: Whether to replace the output if it is there.

    Raises:
        ConfigError: If an option cannot work, or the output is there already.
        DataError: If the teacher or the data cannot be read, or they have different tokenizers.
    """
    for option, number in (("sequence_length", sequence_length), ("top_k", top_k), ("batch_size", batch_size)):
        if number < 1:
            raise ConfigError(f"{option}={number} is below 1")
    import torch
    from torch import Tensor

    from sbn_lightning.data import TokenDataModule
    from sbn_lightning.data.stream.teacher_rows import TeacherRows, write_teacher_rows
    from sbn_lightning.formats.init_from import check_tokenizer
    from sbn_lightning.inference.opening import open_model
    from sbn_lightning.models.distillation import likeliest

    loaded = open_model(checkpoint, device=device, dtype=dtype)
    model, config = loaded.model, loaded.config
    if sequence_length > config.max_sequence_length:
        raise ConfigError(
            f"sequence_length={sequence_length} is above the teacher's max_sequence_length={config.max_sequence_length}"
        )
    if top_k >= config.vocab_size:
        raise ConfigError(f"top_k={top_k} is not below the teacher's vocab_size={config.vocab_size}")
    source = TokenDataModule(data)
    check_tokenizer(str(loaded.path), source, "checkpoint")
    if source.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{data} has a vocabulary of {source.vocab_size} tokens, the teacher {checkpoint} of {config.vocab_size}: "
            "prepare the text with the teacher's tokenizer"
        )
    place = model.embed.weight.device

    @torch.no_grad()
    def teach(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return likeliest(model.hidden(tokens.to(place)), model.lm_head.weight, top_k)

    rows = TeacherRows(sequence_length, top_k, config.vocab_size, checkpoint)
    meta = write_teacher_rows(teach, data, output, rows, batch_size, overwrite)
    counts = ", ".join(f"{split['tokens']:,} {name} tokens" for name, split in meta["splits"].items())
    print(f"{output}: {counts}, each with the teacher's {top_k} most likely next tokens", file=sys.stderr)
