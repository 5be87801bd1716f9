"""Any ``AutoModelForCausalLM`` of transformers as a LightningModule, without porting its architecture.

:class:`CausalLM` is :class:`~sbn_lightning.training.module.SparseBitNet` around another network. It has the same
training step, optimiser groups and learning rates, and takes the same data, callbacks and precision plugin. Its
checkpoints hold the network's configuration, so a checkpoint alone is enough to build the network again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from torch.optim import AdamW

from sbn_lightning.checkpoints.text_files import KEY, TextFiles
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.formats.init_from import check_tokenizer, without_masks
from sbn_lightning.integrations.huggingface.network import (
    Linear,
    Network,
    Shape,
    build_network,
    make_network,
    text_of_source,
)
from sbn_lightning.integrations.huggingface.reading import read_weights
from sbn_lightning.layers.audit import audit
from sbn_lightning.layers.masked_linear import prepare_layers
from sbn_lightning.sparsity.config import Gradient, MaskSource
from sbn_lightning.sparsity.ternary import GammaOver
from sbn_lightning.training.checks import check_teacher
from sbn_lightning.training.distillation import Distillation
from sbn_lightning.training.module import Perplexity, Schedule, SparseBitNet
from sbn_lightning.training.parameter_groups import LearningRateRule

__all__ = ["CausalLM", "Network", "Shape", "build_network"]


class CausalLM(SparseBitNet):
    """Train any ``AutoModelForCausalLM`` on next-token prediction, ternary and N:M sparse.

    A batch is int64 ``[batch, sequence_length + 1]``: inputs and, shifted by one, targets.

    Args:
        source: A folder or a name for ``from_pretrained``, or a configuration as a mapping with ``model_type``, which
            gives random weights.
        linear: ``"ternary"``, ``"masked"`` for sparse weights without quantisation, or ``"dense"``.
        pattern: The pattern "N:M" of the converted layers.
        include: Name patterns of the layers to convert. An output head is converted only if a pattern names it.
        exclude: Name patterns of the layers to leave alone.
        activation_bits: The number of bits of activations: 8, 4, or None for no quantisation.
        mask_source: The numbers that rank the weights of a group: ``"latent"`` weights or ``"ternary"`` codes.
        gradient: The straight-through gradient, for all positions (``"dense"``) or kept ones only (``"masked"``).
        gamma_over: The weights that gamma averages; see :class:`SparseBitLinear`.
        learnable_scales: Whether gamma of each part has a factor that is trained.
        optimizer: A function that makes the optimiser from parameter groups. Norms, biases and embeddings get no weight
            decay.
        schedule: The form of the learning rate after the warm-up: ``"cosine"``, ``"linear"``, ``"two_stage"`` or
            ``"constant"``.
        warmup_steps: The number of optimiser steps of linear warm-up.
        final_learning_rate: The share of the peak learning rate at the last step.
        schedule_steps: The number of optimiser steps until the schedule ends; the trainer's ``max_steps`` if not given.
        compile: Whether to compile each block with ``torch.compile``.
        init_from: A model of the same architecture whose weights a new run starts from: a checkpoint, the folder of a
            run, or a Hugging Face folder. Masks are made anew. A run that continues from a checkpoint takes the
            checkpoint's weights.
        distillation: The teacher and the losses of a distillation. The teacher is a Hugging Face folder or a name of
            the hub. None trains on the text alone.
        learning_rates: Rules for parameters that have a learning rate or a weight decay of their own. A run that
            resumes needs the same rules.
        cuda_graphs: Whether to replay the forward and the backward of a micro-batch as CUDA graphs
            (:mod:`sbn_lightning.training.graphs`). A small model, whose step waits for the host, becomes faster. Needs
            the strategy ``auto`` on one GPU, ``sbn_ddp`` or ``sbn_fsdp2``, and micro-batches of one shape.
        break_ties: Noise at the start of a training on weights that come from ``source`` or ``init_from`` and have ties
            at the edge of the mask, as a share of their standard deviation; see
            :func:`~sbn_lightning.layers.ties.break_ties`. 0 takes weights as they are.

    Raises:
        DataError: If there is no such model.
        ConfigError: If the configuration does not make a model, no layer can be converted, or the distillation has a
            loss that needs our own transformer.
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        linear: Linear = "ternary",
        pattern: str = "6:8",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        activation_bits: int | None = 8,
        mask_source: MaskSource = "latent",
        gradient: Gradient = "dense",
        gamma_over: GammaOver = "dense",
        learnable_scales: bool = False,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        final_learning_rate: float = 0.03,
        schedule_steps: int | None = None,
        compile: bool = False,
        init_from: str | None = None,
        distillation: Distillation | None = None,
        learning_rates: list[LearningRateRule] | None = None,
        cuda_graphs: bool = False,
        break_ties: float = 0.01,
    ) -> None:
        super(SparseBitNet, self).__init__()  # SparseBitNet's own __init__ would build a TernaryTransformer
        if isinstance(distillation, dict):  # A checkpoint holds the options as plain values.
            distillation = Distillation(**distillation)
        network, self.report = make_network(
            source,
            linear,
            pattern=pattern,
            include=include,
            exclude=exclude,
            activation_bits=activation_bits,
            mask_source=mask_source,
            gradient=gradient,
            gamma_over=gamma_over,
            learnable_scales=learnable_scales,
        )
        unsaved = ["source", "optimizer", "init_from", "distillation", "learning_rates", "cuda_graphs", "break_ties"]
        self.save_hyperparameters(ignore=unsaved)
        self.config = network.config  # type: ignore[assignment]
        # A checkpoint builds the same network, with weights of its own: load_from_checkpoint finds no other source.
        self.save_hyperparameters({"source": network.config.hugging_face, "config": network.config.to_dict()})
        if distillation is not None:  # The checkpoint says where the teacher is, and does not hold its weights.
            _check_distillation(distillation, network)
            self.save_hyperparameters({"distillation": asdict(distillation)})
        self.distillation = distillation
        self.learning_rates = learning_rates or ()
        self.cuda_graphs = cuda_graphs
        self._graphed = self._new_graphs()
        self.model = network  # type: ignore[assignment]
        self.init_from, self.break_ties = init_from, break_ties
        self._ties_open = isinstance(source, str)
        # Every checkpoint holds tokenizer, chat template, stop tokens.
        self.text_files = text_of_source(source) if isinstance(source, str) else TextFiles()
        self._source = source
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self._make_optimizer = optimizer

    def setup(self, stage: str) -> None:
        """Check strategy and data against the model, and print before a training how much of the model is sparse."""
        super().setup(stage)
        if stage == "fit":
            if isinstance(self._source, str) and self.init_from is None and Path(self._source).is_dir():
                check_tokenizer(self._source, getattr(self.trainer, "datamodule", None), "model.source")
            self._print_audit()

    @staticmethod
    def check_teacher(distillation: Distillation, config: Any, data: Any) -> None:
        """Check that teacher and student share a tokenizer. A teacher on the hub is checked when it is loaded."""
        if distillation.teacher is None or Path(distillation.teacher).exists():
            check_teacher(distillation, config, data)

    @staticmethod
    def load_teacher(options: Distillation) -> Any:
        """Return the teacher, a :class:`Network`; None if the data hold what the teacher said."""
        if options.teacher is None:
            return None
        dtype = getattr(torch, options.dtype)
        return Network(build_network(options.teacher, "model.distillation.teacher ", dtype), "dense")

    def load_initial_weights(self, path: str) -> TextFiles:
        """Copy the weights of another model into this one; see ``init_from``."""
        weights = read_weights(path)
        if weights.is_packed:
            warnings.warn(
                f"init_from: {path} holds packed weights without the latent ones: training starts from gamma * codes",
                stacklevel=2,
            )
        now = self.config.hugging_face.get("model_type")  # type: ignore[attr-defined]
        if weights.model_type != now:
            raise ConfigError(f"init_from: {path} is a {weights.model_type} model, model.source is {now}")
        own = without_masks(self._hf().state_dict())
        if learned := [name for name in weights.state if name.endswith(".log_scale") and name not in own]:
            raise ConfigError(
                f"init_from: {path} has learned scales such as {learned[0]}: set model.learnable_scales to true"
            )
        # Learned scales start at 1 if the weights have none.
        own = {n: value for n, value in own.items() if n in weights.state or not n.endswith(".log_scale")}
        for name in own:
            if name not in weights.state:
                raise DataError(f"init_from: {path} lacks the tensor {name}")
            if weights.state[name].shape != own[name].shape:
                raise ConfigError(
                    f"init_from: {name} is {list(weights.state[name].shape)} in {path}, {list(own[name].shape)} in "
                    "the model: set model.source to the configuration of the weights"
                )
        self._hf().load_state_dict({name: weights.state[name] for name in own}, strict=False)
        return weights.text

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop masks of another pattern, so that layers make new ones, and refuse another architecture.

        Raises:
            ConfigError: If the architectures differ; the message names both.
        """
        self.text_files = TextFiles(checkpoint.get(KEY) or {})
        saved = checkpoint.get("hyper_parameters", {})
        before = saved.get("config", {}).get("hugging_face", {}).get("model_type")
        now = self.config.hugging_face.get("model_type")  # type: ignore[attr-defined]
        if before != now:
            raise ConfigError(f"the checkpoint is of a {before} model, this one is {now}: set model.source as it was")
        state = checkpoint.get("state_dict") or {}
        anew, pattern = without_masks(state), self.hparams["pattern"]
        if saved.get("pattern", pattern) != pattern and len(anew) < len(state):
            rank_zero_warn(
                f"the checkpoint has masks of the pattern {saved['pattern']}, this run has {pattern}: masks are made "
                "anew from the weights"
            )
            checkpoint["state_dict"] = anew

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Bring codes up to date before a compiled block reads them."""
        if self.model.is_compiled:
            prepare_layers(self.model)

    def export(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the model for ``from_pretrained``: ternary layers 2 bits a weight, other models as plain weights."""
        from sbn_lightning.integrations.huggingface.export import export_network

        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        format = "hf-sbn" if self.config.linear == "ternary" else "hf"
        export_network(self.model, self.text_files, target, format, dtype)  # type: ignore[arg-type]

    def _hf(self) -> nn.Module:
        """The model of transformers."""
        return cast(nn.Module, self.model.hf)

    @rank_zero_only
    def _print_audit(self) -> None:
        print(f"{type(self._hf()).__name__}: {audit(self._hf())}")
        if self.report is not None:
            for line in self.report.split_lines():
                print(line)


def _check_distillation(options: Distillation, network: Network) -> None:
    """Refuse what a distillation of another architecture cannot do."""
    if options.hidden or options.relations:
        raise ConfigError(
            "model.distillation: hidden and relations look into the blocks of our own transformer; set both to 0, or "
            "convert the weights with `sbn import-hf` and take the recipe distill_from_pretrained"
        )
    if getattr(network.hf.config, "router_aux_loss_coef", None) is not None:
        raise ConfigError(
            "model.distillation does not work with a mixture of experts of transformers; set model.distillation to null"
        )
    if options.teacher is not None and options.teacher.endswith(".ckpt"):
        raise ConfigError(
            f"model.distillation.teacher {options.teacher} is a checkpoint; give a Hugging Face folder or a name of "
            "the hub, as in model.source"
        )
