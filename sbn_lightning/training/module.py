"""SparseBitNet: the LightningModule around :class:`TernaryTransformer`.

One module trains the ternary sparse model, the BF16 sparse baseline and the dense model; ``config.linear`` chooses. The
module owns the loss, the metrics, the optimiser and the learning rate's schedule. What happens to masks over time, and
how weight decay falls, is decided by callbacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from sbn_lightning.callbacks.conversion import decide_ties
from sbn_lightning.callbacks.weight_averaging import refuse_plain_averaging
from sbn_lightning.checkpoints.text_files import KEY, TextFiles, text_of_run
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.optimizer_states import name_optimizer_states
from sbn_lightning.distributed.sharding import keep_masks_out_of_broadcasts, shard
from sbn_lightning.distributed.strategies import check_strategy
from sbn_lightning.formats.init_from import SHAPE, check_tokenizer, load_weights, without_masks
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.moe import busiest, load_balance_loss, loads
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training.answers import AnswerLoss, Answers
from sbn_lightning.training.checks import check_graphs, check_lengths, check_teacher, warn_of_other_options
from sbn_lightning.training.distillation import Distillation, Distiller, load_teacher, split_batch
from sbn_lightning.training.graphs import GraphedLoss
from sbn_lightning.training.metrics import Perplexity
from sbn_lightning.training.parameter_groups import LearningRateRule, parameter_groups, scale_learning_rates
from sbn_lightning.training.schedules import Schedule, learning_rate_factor

# Token ids, or a tuple of token ids, a teacher's likely next tokens and their log-probabilities.
Batch = Tensor | Sequence[Tensor]

__all__ = ["Perplexity", "Schedule", "SparseBitNet", "learning_rate_factor"]


class SparseBitNet(LightningModule):
    """Train a :class:`TernaryTransformer` on next-token prediction.

    A batch is int64 ``[batch, sequence_length + 1]``. The inputs are all tokens of a row but the last one, the targets
    are all but the first one. A folder with a teacher's logits gives tuples that begin with such a tensor.

    Args:
        config: The shape and the arithmetic of the transformer.
        optimizer: A function that makes the optimiser from parameter groups. Norms, biases and embeddings get no weight
            decay.
        schedule: The form of the learning rate after the warm-up: ``"cosine"``, ``"linear"``, ``"two_stage"`` or
            ``"constant"``.
        warmup_steps: The number of optimiser steps of the linear warm-up.
        final_learning_rate: The learning rate at the last step, as a share of the peak.
        schedule_steps: The number of optimiser steps until the schedule ends. None takes the trainer's ``max_steps``.
        compile: Whether to compile each block with ``torch.compile``.
        init_from: A model whose weights a new run starts from: a checkpoint, the folder of a run, a packed or a Hugging
            Face folder, or a GGUF file. A run that continues from a checkpoint takes the checkpoint's weights.
        distillation: The teacher and the losses of a distillation. None trains on the text alone.
        answers: The markers of a chat format: the loss is over the answers of conversations alone, in training and in
            validation. None takes all tokens.
        learning_rates: Rules for parameters that have a learning rate or a weight decay of their own. A run that
            resumes needs the same rules.
        cuda_graphs: Whether to replay the forward and the backward of a micro-batch as CUDA graphs
            (:mod:`sbn_lightning.training.graphs`). A small model, whose step waits for the host, becomes faster. Needs
            the strategy ``auto`` on one GPU, ``sbn_ddp`` or ``sbn_fsdp2``, and micro-batches of one shape.
        separate_documents: Whether tokens attend to their own document alone, where a row holds several documents
            (:mod:`sbn_lightning.models.documents`). Needs a :class:`TokenDataModule`, which knows the token that ends a
            document. Masked attention is slower.
        break_ties: Noise at the start of a training on weights that come from ``init_from`` and have ties at the edge
            of the mask, as a share of their standard deviation; see :func:`~sbn_lightning.layers.ties.break_ties`. 0
            takes weights as they are.
    """

    # The values of a subclass whose __init__ has no such options.
    distillation: Distillation | None = None
    answers: Answers | None = None
    learning_rates: Sequence[LearningRateRule] = ()
    cuda_graphs = False
    separate_documents = False
    break_ties = 0.01
    # A subclass has other teachers.
    check_teacher = staticmethod(check_teacher)
    load_teacher = staticmethod(load_teacher)

    answer_loss: AnswerLoss | None = None  # Made when the tokenizer of the data is known.
    _distiller: Distiller | None = None  # Made at the first batch.
    _ties_open = False  # Whether the weights are those of another model, and were not trained here yet.

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        final_learning_rate: float = 0.03,
        schedule_steps: int | None = None,
        compile: bool = False,
        init_from: str | None = None,
        distillation: Distillation | None = None,
        answers: Answers | None = None,
        learning_rates: list[LearningRateRule] | None = None,
        cuda_graphs: bool = False,
        separate_documents: bool = False,
        break_ties: float = 0.01,
    ) -> None:
        super().__init__()
        if isinstance(distillation, dict):
            distillation = Distillation(**distillation)
        if isinstance(config, dict):  # A checkpoint holds the configuration as plain values.
            config = TransformerConfig(**config)
        unsaved = ["config", "optimizer", "init_from", "distillation", "answers", "learning_rates", "cuda_graphs"]
        self.save_hyperparameters(ignore=[*unsaved, "break_ties"])
        self.save_hyperparameters({"config": config.to_dict()})
        if distillation is not None:  # The checkpoint says where the teacher is, and does not hold its weights.
            self.save_hyperparameters({"distillation": asdict(distillation)})
        self.distillation = distillation
        self.config = config
        self.model = TernaryTransformer(config)
        self.init_from, self.break_ties = init_from, break_ties
        self.text_files = TextFiles()  # Every checkpoint holds tokenizer, chat template, stop tokens.
        self.cuda_graphs = cuda_graphs
        self.separate_documents = separate_documents
        self._graphed = self._new_graphs()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()
        self._make_optimizer = optimizer
        self.learning_rates = learning_rates or ()
        self.answers = answers
        if answers is not None and config.n_experts:
            raise ConfigError("model.answers does not work with experts; set it to null")
        if distillation is not None and config.head_precision != "full":
            raise ConfigError("a distillation has no head in 8 bits; set model.config.head_precision to full")

    def setup(self, stage: str) -> None:
        """Check strategy and data against the model.

        Raises:
            ConfigError: If the strategy cannot keep masks, the data were made with another tokenizer than the weights
                of ``init_from``, the tokenizer has more tokens than the embedding has rows, sequences are too long, or
                ``answers`` are given and the data have no tokenizer.
        """
        if self.cuda_graphs and stage == "fit":
            check_graphs(self, self.trainer)
        refuse_plain_averaging(self.trainer.callbacks)  # type: ignore[attr-defined]
        check_strategy(self.trainer.strategy)
        keep_masks_out_of_broadcasts(self)
        data = getattr(self.trainer, "datamodule", None)
        self.check_data(data, stage)
        if self.answers is not None:
            tokenizer = getattr(data, "tokenizer", None)
            if tokenizer is None:
                raise ConfigError("model.answers needs the tokenizer of the data: give the trainer a TokenDataModule")
            self.answer_loss = AnswerLoss(*self.answers.ids(tokenizer))
        if self.separate_documents:
            self.model.separate_at = getattr(data, "eos_id", None)
            if self.model.separate_at is None:
                raise ConfigError(
                    "model.separate_documents needs the token that ends a document: give the trainer a "
                    "TokenDataModule, or set model.separate_documents to false"
                )

    def check_data(self, data: Any, stage: str) -> None:
        """Check that the data fit the model; :meth:`setup` does so.

        Args:
            data: The data module.
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ConfigError: If the data were made with another tokenizer than the weights of ``init_from`` or the teacher,
                the tokenizer has more tokens than the embedding has rows, or sequences are too long.
        """
        if self.init_from is not None:
            check_tokenizer(self.init_from, data)
        if self.distillation is not None and stage == "fit":
            self.check_teacher(self.distillation, self.config, data)
        check_lengths(self.config, data)

    def configure_model(self) -> None:
        """Load ``init_from`` (a training decides its ties), compile blocks, shard under ``ModelParallelStrategy``."""
        if self.init_from is not None:
            self.text_files = self.load_initial_weights(self.init_from)
            self._ties_open = True
            self.init_from = None  # Only once: a Trainer configures the model again for each of its commands.
        if self._ties_open and self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            decide_ties(self.model, self.break_ties)
            self._ties_open = False
        if self.hparams["compile"] and not self.model.is_compiled:
            self.model.compile_blocks()
        if self.device_mesh is not None:  # ModelParallelStrategy
            options = getattr(self.trainer.strategy, "sharding", {"gather": "latent"})  # ShardedStrategy says more
            shard(self.model, self.device_mesh, **options)

    def load_initial_weights(self, path: str) -> TextFiles:
        """Copy the weights of another model into this one, and return the text files of the other model.

        Args:
            path: The value of ``init_from``.
        """
        return load_weights(self.model, path)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop masks of another pattern, so that layers make new ones, and refuse a model of another shape.

        Raises:
            ConfigError: If the shape differs; the message names the fields.
        """
        self.text_files = TextFiles(checkpoint.get(KEY) or {})
        saved = checkpoint.get("hyper_parameters", {}).get("config")
        if not isinstance(saved, dict):
            return
        now = self.config.to_dict()
        if differing := [name for name in SHAPE if name in saved and saved[name] != now[name]]:
            values = ", ".join(f"{name}={saved[name]}, not {now[name]}" for name in differing)
            raise ConfigError(f"the checkpoint is of another model: it has {values}; set model.config as it was")
        state = checkpoint.get("state_dict") or {}
        anew = without_masks(state)
        if saved.get("pattern") != now["pattern"] and len(anew) < len(state):
            rank_zero_warn(
                f"the checkpoint has masks of the pattern {saved.get('pattern')}, this run has {now['pattern']}: masks "
                "are made anew from the weights"
            )
            checkpoint["state_dict"] = anew

    def on_train_start(self) -> None:
        """Warn if the optimiser of the checkpoint has other options than the command gives."""
        for optimizer in self.trainer.optimizers:
            warn_of_other_options(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the model's text files, and key optimiser states by the names of their parameters."""
        self.text_files = text_of_run(self.text_files, getattr(self._trainer, "datamodule", None))
        if self.text_files.contents:
            checkpoint[KEY] = dict(self.text_files.contents)
        # The Fabric loop names the states itself.
        if isinstance(self._trainer, Trainer) and "optimizer_states" in checkpoint:
            name_optimizer_states(checkpoint["optimizer_states"], self, self._trainer.optimizers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[B, T, vocab_size]`` of token ids, int64 ``[B, T]``."""
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, a scalar, and log what :meth:`compute_loss` reports."""
        loss, metrics = self.compute_loss(self.model, batch)
        # Without prog_bar=True, because Lightning would fetch the values after every batch. LossProgressBar shows them.
        for name, value in metrics.items():
            self.log(name, value)
        # A tensor on the CPU: a number would be copied to the device, and the host would wait for the copy.
        self.log("learning_rate", torch.as_tensor(self.trainer.optimizers[0].param_groups[0]["lr"]))
        return loss

    def compute_loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss that training minimises, and values to log.

        Args:
            model: This module's model, or a wrapper of Fabric around it.
            batch: The token ids, int64 ``[batch, sequence_length + 1]``; or a tuple of them, a teacher's likely next
                tokens, and their log-probabilities.

        Returns:
            The loss, a scalar with gradients; and by name the mean cross-entropy in nats (``train/loss``), its
            perplexity, the parts of a distillation, and for a mixture of experts the load-balancing loss and how many
            times the average load the busiest expert has.
        """
        metrics: dict[str, Tensor] = {}
        batch, stored = split_batch(batch)
        if self.distillation is not None:
            if self.cuda_graphs:
                loss, *found = self._graphed(self.model, self._distilled, batch).unbind()
                parts = dict(zip(self.distillation.parts, (part.detach() for part in found), strict=True))
            else:
                places = None if self.answer_loss is None else self.answer_loss.target_places(batch)
                given = (stored, None, places)
                loss, parts = model.run(self._get_distiller(batch.device).loss, batch[:, :-1], batch[:, 1:], *given)
                if places is not None:
                    metrics["train/answer_tokens"] = torch.tensor(float(len(places)))
            cross_entropy = parts.pop("loss")
            metrics["train/distillation"] = loss.detach()
            metrics |= {f"train/distillation_{name}": part for name, part in parts.items()}
        elif self.answer_loss is not None:
            loss, count = model.run(self.answer_loss, batch)
            cross_entropy = loss.detach()
            metrics["train/answer_tokens"] = torch.tensor(float(count))
        else:
            if self.cuda_graphs:
                loss = self._graphed(self.model, self._plain_loss, batch)
            else:
                loss = model.loss(batch[:, :-1], batch[:, 1:])
            cross_entropy = loss.detach()
        if self.config.n_experts:
            balance = load_balance_loss(loads(self.model))
            metrics |= {"train/load_balance": balance.detach(), "train/busiest_expert": busiest(loads(self.model))}
            if self.distillation is None:  # The loss of the model includes the balance, that of a teacher does not.
                cross_entropy = cross_entropy - self.config.load_balance * balance.detach()
            else:
                loss = loss + self.config.load_balance * balance
        return loss, {"train/loss": cross_entropy, "train/perplexity": cross_entropy.exp()} | metrics

    def _plain_loss(self, batch: Tensor) -> Tensor:
        """Return the loss of this module's model against the text, a scalar."""
        loss: Tensor = self.model.loss(batch[:, :-1], batch[:, 1:])
        return loss

    def _distilled(self, batch: Tensor) -> Tensor:
        """Return the loss of this module's model against the teacher, and its parts, in one vector."""
        loss, parts = self._get_distiller(batch.device).loss(self.model, batch[:, :-1], batch[:, 1:])
        return torch.stack([loss, *parts.values()])

    def teardown(self, stage: str) -> None:
        """Give the memory of CUDA graphs back."""
        self._graphed = self._new_graphs()

    def _new_graphs(self) -> GraphedLoss:
        return GraphedLoss(numbers=None if self.distillation is None else 1 + len(self.distillation.parts))

    def _get_distiller(self, device: torch.device) -> Distiller:
        """Return the distiller, made at the first batch: only then is the device known."""
        if self._distiller is None:
            assert self.distillation is not None
            distiller = Distiller(self.distillation, self.load_teacher(self.distillation), device)
            distiller.check(self.model)
            if distiller.teacher is not None:
                if self.separate_documents:
                    distiller.teacher.separate_at = self.model.separate_at
                if self.model.is_compiled:
                    distiller.teacher.compile_blocks()
            self._distiller = distiller
        return self._distiller

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        self._evaluate(batch, self.val_perplexity, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._evaluate(batch, self.test_perplexity, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the log-likelihood of each token after the first, float32 ``[batch, sequence_length]``."""
        batch, _ = split_batch(batch)
        log_probabilities = self.model(batch[:, :-1]).float().log_softmax(-1)
        return log_probabilities.gather(-1, batch[:, 1:].unsqueeze(-1)).squeeze(-1)

    def held_out_loss(self, batch: Batch) -> tuple[Tensor, int, int]:
        """Return the loss of a held-out batch, the number of tokens in it, and the weight of the batch in a mean.

        Args:
            batch: The token ids, int64 ``[batch, sequence_length + 1]``; or a tuple that begins with them.
        """
        batch, _ = split_batch(batch)
        if self.answer_loss is not None:
            loss, count = self.model.run(self.answer_loss, batch)
            return loss, count, count
        return self._plain_loss(batch), batch[:, 1:].numel(), len(batch)

    def _evaluate(self, batch: Batch, perplexity: Perplexity, stage: str) -> None:
        loss, tokens, weight = self.held_out_loss(batch)
        perplexity.update(loss, tokens)
        self.log(f"{stage}/loss", loss, on_epoch=True, on_step=False, batch_size=weight, sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, on_epoch=True, on_step=False, prog_bar=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimiser groups that ``learning_rates`` make; without rules, weights that decay and the rest."""
        return parameter_groups(self.model, self.learning_rates)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimiser and the learning rate's schedule.

        Raises:
            ConfigError: If the schedule must know its end and does not.
        """
        steps = self.hparams["schedule_steps"] or self.trainer.max_steps
        if steps < 1 and self.hparams["schedule"] != "constant":
            raise ConfigError(
                f"a {self.hparams['schedule']} schedule must know its end: set the trainer's max_steps, "
                "or the model's schedule_steps"
            )
        optimizer = self._make_optimizer(self.parameter_groups())
        scale_learning_rates(optimizer)
        factor = partial(
            learning_rate_factor,
            schedule=self.hparams["schedule"],
            warmup_steps=self.hparams["warmup_steps"],
            max_steps=steps,
            floor=self.hparams["final_learning_rate"],
        )
        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
