"""``LoadedModel``: a model that was read, in any of the formats, and what came with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sbn_lightning.checkpoints.text_files import TextFiles
from sbn_lightning.core.errors import DataError
from sbn_lightning.formats.recognise import ModelFormat
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass
class LoadedModel:
    """A model that can compute, and what came with its weights.

    Attributes:
        model: The model, in evaluation mode. No parameter needs a gradient.
        config: The configuration of the model; the same object as ``model.config``.
        format: The format that the model was read from.
        path: The file or folder that the model was read from.
        text: The model's text files: tokenizer, chat template, stop tokens.
    """

    model: TernaryTransformer
    config: TransformerConfig
    format: ModelFormat
    path: Path
    text: TextFiles

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was found with the model, or None. See :meth:`need_tokenizer`."""
        return self.text.tokenizer

    @property
    def tokenizer_path(self) -> Path | None:
        """The file that the tokenizer was read from: a ``tokenizer.json``, or the model's own file."""
        return self.text.source

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            DataError: If the model has no tokenizer; the message says how to pass one.
        """
        if self.tokenizer is None:
            raise DataError(
                f"no tokenizer found with {self.path}: pass --tokenizer with a tokenizer.json or the folder that "
                "`prepare` wrote"
            )
        return self.tokenizer
