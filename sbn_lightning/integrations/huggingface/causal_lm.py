"""Any ``AutoModelForCausalLM`` of transformers as a LightningModule, without porting its architecture.

:class:`CausalLM` is :class:`~sbn_lightning.training.module.SparseBitNet` around another network. It has the same
training step, optimiser groups and learning rates, and takes the same data, callbacks and precision plugin. Its
checkpoints hold the network's configuration, so a checkpoint alone is enough to build the network again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.integrations.pytorch import convert
from sbn_lightning.layers.masked_linear import prepare_layers
from sbn_lightning.training.module import Perplexity, Schedule, SparseBitNet

Linear = Literal["ternary", "masked", "dense"]


@dataclass(frozen=True)
class Shape:
    """What data and callbacks ask of a model's configuration.

    Attributes:
        vocab_size: The number of rows of the embedding.
        max_sequence_length: The longest sequence, in tokens.
        linear: ``"ternary"``, ``"masked"`` or ``"dense"``.
        hugging_face: The configuration of the network, as plain values.
    """

    vocab_size: int
    max_sequence_length: int
    linear: str
    hugging_face: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"hugging_face": self.hugging_face, "linear": self.linear}


class Network(nn.Module):
    """A Hugging Face model with the methods that the training loop calls.

    Args:
        hf: An instance of ``AutoModelForCausalLM``.
    """

    is_compiled = False

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf

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
        logits: Tensor = self.hf(input_ids=tokens, use_cache=False).logits
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of ``targets [B, T]``, and a router's balance loss in training."""
        output = self.hf(input_ids=tokens, use_cache=False)
        loss = F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
        balance = getattr(output, "aux_loss", None)
        if self.training and isinstance(balance, Tensor):
            loss = loss + self.hf.config.router_aux_loss_coef * balance  # type: ignore[union-attr, operator]
        return loss

    def compile_blocks(self) -> None:
        """Compile each block with ``torch.compile``."""
        for block in self.blocks:
            block.compile()
        self.is_compiled = True


class CausalLM(SparseBitNet):
    """Train any ``AutoModelForCausalLM`` on next-token prediction, ternary and N:M sparse.

    A batch is int64 ``[batch, sequence_length + 1]``: inputs and, shifted by one, targets.

    Args:
        source: A folder or a name for ``from_pretrained``, or a configuration as a mapping with ``model_type``, which
            gives random weights.
        linear: ``"ternary"``, ``"masked"`` for sparse weights without quantisation, or ``"dense"``.
        pattern: The pattern "N:M" of the converted layers.
        include: Name patterns of the layers to convert.
        exclude: Name patterns of the layers to leave alone.
        activation_bits: The number of bits of activations: 8, 4, or None for no quantisation.
        mask_source: The numbers that rank the weights of a group: ``"latent"`` weights or ``"ternary"`` codes.
        gradient: The straight-through gradient, for all positions (``"dense"``) or kept ones only (``"masked"``).
        gamma_over: The weights that gamma averages; see :class:`SparseBitLinear`.
        optimizer: A function that makes the optimiser from parameter groups. Norms, biases and embeddings get no weight
            decay.
        schedule: The learning rate after the warm-up: ``"cosine"``, ``"linear"`` or ``"constant"``.
        warmup_steps: The number of optimiser steps of linear warm-up.
        final_learning_rate: The share of the peak learning rate at the last step.
        schedule_steps: The number of optimiser steps until the schedule ends; the trainer's ``max_steps`` if not given.
        compile: Whether to compile each block with ``torch.compile``.

    Raises:
        DataError: If there is no such model.
        ConfigError: If the configuration does not make a model, or no layer can be converted.
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        linear: Linear = "ternary",
        pattern: str = "2:4",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("lm_head", "embed_out"),
        activation_bits: int | None = 8,
        mask_source: Literal["latent", "ternary"] = "latent",
        gradient: Literal["dense", "masked"] = "dense",
        gamma_over: Literal["dense", "kept", "masked", "nonzero"] = "dense",
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        final_learning_rate: float = 0.03,
        schedule_steps: int | None = None,
        compile: bool = False,
    ) -> None:
        super(SparseBitNet, self).__init__()  # SparseBitNet's own __init__ would build a TernaryTransformer
        if linear not in ("ternary", "masked", "dense"):
            raise ConfigError(f"linear={linear!r} is not 'ternary', 'masked' or 'dense'")
        hf = build_network(source)
        if linear != "dense":
            options = {"mask_source": mask_source, "gradient": gradient, "gamma_over": gamma_over}
            report = convert(
                hf,
                pattern,
                kind=linear,
                include=include,
                exclude=exclude,
                activation_bits=activation_bits,
                **options,
            )
            print(f"{type(hf).__name__}: {report}")
        values = hf.config.to_dict()  # type: ignore[union-attr, operator]
        text = hf.config.get_text_config()  # type: ignore[union-attr, operator]
        self.save_hyperparameters(ignore=["source", "optimizer", "init_from"])
        self.config = Shape(text.vocab_size, _context(text), linear, values)  # type: ignore[assignment]
        # A checkpoint builds the same network, with weights of its own: load_from_checkpoint finds no other source.
        self.save_hyperparameters({"source": values, "config": self.config.to_dict()})
        self.model = Network(hf)  # type: ignore[assignment]
        self.init_from = None
        self.text_files = _no_text_files()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self._make_optimizer = optimizer

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture.

        Raises:
            ConfigError: If the architectures differ; the message names both.
        """
        saved = checkpoint.get("hyper_parameters", {}).get("config", {}).get("hugging_face", {})
        before, now = saved.get("model_type"), self.config.hugging_face.get("model_type")  # type: ignore[attr-defined]
        if before != now:
            raise ConfigError(f"the checkpoint is of a {before} model, this one is {now}: set model.source as it was")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Bring codes up to date before a compiled block reads them."""
        if self.model.is_compiled:
            prepare_layers(self.model)

    def export(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model for ``from_pretrained``: ternary layers 2 bits a weight, a dense model as it is."""
        from sbn_lightning.integrations.huggingface.quantizer import save_packed

        hf: Any = self.model.hf
        if self.config.linear == "ternary":
            save_packed(hf, directory, dtype=dtype)
        elif self.config.linear == "dense":
            hf.save_pretrained(directory)
        else:
            raise ConfigError("linear='masked' has no packed form: call revert(model) and save_pretrained")


def build_network(source: str | dict[str, Any]) -> nn.Module:
    """Build an ``AutoModelForCausalLM``.

    Args:
        source: A folder or a name for ``from_pretrained``, or a configuration as a mapping with ``model_type``.

    Raises:
        DataError: If there is no such model.
        ConfigError: If the configuration does not make a model.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError('a Hugging Face model needs transformers: pip install "sbn-lightning[hf]"') from error
    if isinstance(source, str):
        import sbn_lightning.integrations.huggingface.quantizer  # noqa: F401 (folders of our own method load too)

        try:
            network: nn.Module = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise DataError(f"model.source {source}: {str(error).strip().splitlines()[0]}") from error
        return network.train()
    values = dict(source)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError("model.source is a mapping without model_type; name one, for example model_type: qwen3")
    try:
        config = AutoConfig.for_model(kind, **values)
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.source: {str(error).strip().splitlines()[0]}") from error
    return network.train()


def _context(config: Any) -> int:
    """Return the longest sequence of a model, by the names that configurations give it."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    return 1 << 30  # A model with relative positions has no limit.


def _no_text_files() -> Any:
    from sbn_lightning.checkpoints.text_files import TextFiles

    return TextFiles()
