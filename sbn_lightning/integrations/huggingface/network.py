"""A model of transformers with the methods that training, evaluation and generation of this project call.

:class:`Network` is a thin shell around an ``AutoModelForCausalLM``. :func:`make_network` builds one from a folder, a
name or a configuration, and makes its layers sparse. Nothing here needs Lightning.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbn_lightning.checkpoints.text_files import TextFiles, only_token_ids, read_folder
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.core.install import how_to_install
from sbn_lightning.formats.huggingface.folder import read_hf_text
from sbn_lightning.integrations.huggingface.decoder import NetworkDecoder, NetworkRows
from sbn_lightning.integrations.huggingface.plain_rows import plain_rows
from sbn_lightning.layers.conversion import ConversionReport, convert_quietly
from sbn_lightning.sparsity.config import SparsityOptions

T = TypeVar("T")
Linear = Literal["ternary", "masked", "dense"]

# What a checkpoint of CausalLM records about its layers, by the names of the arguments of make_network.
OPTIONS = ("include", "exclude", *(field.name for field in fields(SparsityOptions)))


@dataclass(frozen=True)
class Shape:
    """What data, callbacks, evaluation and generation ask of a model's configuration.

    Attributes:
        vocab_size: The number of rows of the embedding.
        max_sequence_length: The longest sequence, in tokens.
        linear: ``"ternary"``, ``"masked"`` or ``"dense"``.
        hugging_face: The configuration of the network, as plain values.
        n_experts: 0. A network with experts adds its own load-balancing loss (:meth:`Network.loss`).
    """

    vocab_size: int
    max_sequence_length: int
    linear: str
    hugging_face: dict[str, Any]
    n_experts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"hugging_face": self.hugging_face, "linear": self.linear}


class Network(nn.Module):
    """A Hugging Face model with the methods that this project calls on its own transformer.

    Args:
        hf: An instance of ``AutoModelForCausalLM``.
        linear: The kind of its linear layers.
    """

    is_compiled = False

    def __init__(self, hf: nn.Module, linear: str) -> None:
        super().__init__()
        self.hf = hf
        whole: Any = hf.config
        text = whole.get_text_config()
        self.config = Shape(text.vocab_size, _context(text), linear, whole.to_dict())

    @property
    def embed(self) -> nn.Module:
        """The embedding of the input tokens."""
        embedding: nn.Module = self.hf.get_input_embeddings()  # type: ignore[operator]
        return embedding

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks: the longest list of modules."""
        lists = [module for module in self.hf.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids int64 ``[B, T]`` -> logits ``[B, T, vocab_size]``."""
        logits: Tensor = self._output(tokens).logits
        return logits

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the logits. :attr:`lm_head` then has nothing left to do.

        Architectures scale or cap the product of their head, each in its own way. So head and body are not called
        one by one.
        """
        return self.forward(tokens)

    @property
    def lm_head(self) -> nn.Module:
        """The identity; see :meth:`hidden`."""
        return nn.Identity()

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        """Return ``function(self, *inputs)``. Wrappers such as Fabric's treat the call as a forward of the model.

        Args:
            function: A function of the model, for example the loss against a teacher.
            *inputs: The other arguments of the function.
        """
        return function(self, *inputs)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of ``targets [B, T]``, and a router's balance loss in training."""
        output = self._output(tokens)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
        balance = getattr(output, "aux_loss", None)
        if self.training and isinstance(balance, Tensor):
            loss = loss + self.hf.config.router_aux_loss_coef * balance  # type: ignore[union-attr, operator]
        return loss

    def _output(self, tokens: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.hf(input_ids=tokens, use_cache=False)
        with plain_rows():
            return self.hf(input_ids=tokens, use_cache=False)

    def compile_blocks(self) -> None:
        """Compile each block with ``torch.compile``."""
        for block in self.blocks:
            block.compile()
        self.is_compiled = True

    def make_decoder(self, batch_size: int, max_length: int) -> NetworkDecoder:
        """Return what :func:`sbn_lightning.inference.loop.generate` runs: this model with a cache.

        Args:
            batch_size: The number of sequences.
            max_length: The number of tokens that a sequence can have.
        """
        return NetworkDecoder(self.hf, batch_size, self.config.vocab_size)

    def make_rows(self, batch_size: int, max_length: int) -> NetworkRows:
        """Return what a generator runs: this model, with a cache for each row.

        Args:
            batch_size: The number of rows.
            max_length: The number of tokens that a row can have.
        """
        return NetworkRows(self.hf, batch_size, max_length, self.config.vocab_size)


def make_network(
    source: str | Mapping[str, Any],
    linear: Linear,
    *,
    pattern: str,
    include: Sequence[str],
    exclude: Sequence[str],
    **options: Any,
) -> tuple[Network, ConversionReport | None]:
    """Build a network and make its layers sparse.

    Args:
        source: A folder or a name for ``from_pretrained``, or a configuration as a mapping with ``model_type``.
        linear: ``"ternary"``, ``"masked"`` for sparse weights without quantisation, or ``"dense"``.
        pattern: The pattern "N:M" of the converted layers.
        include: Name patterns of the layers to convert.
        exclude: Name patterns of the layers to leave alone.
        **options: Further options of the converted layers.

    Returns:
        The network, and the report of the conversion; None for a dense network.

    Raises:
        DataError: If there is no such model.
        ConfigError: If the configuration does not make a model, or no layer can be converted.
    """
    if linear not in ("ternary", "masked", "dense"):
        raise ConfigError(f"linear={linear!r} is not 'ternary', 'masked' or 'dense'")
    hf = build_network(source)
    report = None
    if linear != "dense":
        # No look for ties: the start of a training decides them.
        report = convert_quietly(hf, pattern, kind=linear, include=include, exclude=exclude, **options)
        if report.warning is not None:
            warnings.warn(report.warning, stacklevel=3)
    return Network(hf, linear), report


def build_network(
    source: str | Mapping[str, Any], what: str = "model.source ", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build an ``AutoModelForCausalLM``.

    Args:
        source: A folder or a name for ``from_pretrained``, or a configuration as a mapping with ``model_type``.
        what: The option that names the source, for messages; empty for a file that the user named directly.
        dtype: The dtype of the weights. Frequencies of rotary positions stay float32.

    Raises:
        DataError: If there is no such model.
        ConfigError: If the configuration does not make a model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"a Hugging Face model needs transformers: {how_to_install('hf')}") from error
    if isinstance(source, str):
        import sbn_lightning.integrations.huggingface.quantizer  # noqa: F401 (folders of our own method load too)

        if source.endswith(".ckpt"):
            raise ConfigError(f"model.source {source} is a checkpoint: set model.source as it was, and model.init_from")
        try:
            network: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{what}{source}: {str(error).strip().splitlines()[0]}") from error
        return network.train()
    values = dict(source)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError("model.source is a mapping without model_type; name one, for example model_type: qwen3")
    try:
        config = AutoConfig.for_model(kind, **values)
        network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.source: {str(error).strip().splitlines()[0]}") from error
    return network.train()


def text_of_source(source: str) -> TextFiles:
    """Read the tokenizer, the chat template and the stop tokens of a model.

    Args:
        source: A folder, or a name of the hub. Of a name, transformers loads the tokenizer as it loads the model.

    Returns:
        The text files; empty if the model has no tokenizer.
    """
    if Path(source).is_dir():
        return read_hf_text(Path(source))
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        try:
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        except (OSError, ValueError):  # A model without a tokenizer can be trained on prepared tokens.
            return TextFiles()
        return read_folder(Path(folder), only_token_ids(AutoConfig.from_pretrained(source).to_dict()))


def _context(config: Any) -> int:
    """Return the longest sequence of a model, by the names that configurations give it."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    return 1 << 30  # A model with relative positions has no limit.
