"""Distillation: a ternary student learns from the dense model that it was converted from.

:class:`Distillation` holds the options, and :class:`Distiller` computes the loss in any training loop::

    student = TernaryTransformer(replace(config, linear="ternary", pattern="2:4"))
    load_weights(student, "models/smollm2.ckpt")
    distiller = Distiller(Distillation(teacher="models/smollm2.ckpt"))
    loss, parts = distiller.loss(student, tokens[:, :-1], tokens[:, 1:])
    loss.backward()

``SparseBitNet(distillation=...)`` does the same. The teacher is frozen and belongs to no module, so neither a
checkpoint nor an optimiser holds its weights. A run that resumes reads the teacher again from its file. With
``teacher=None`` there is no model: the data hold what a teacher said before
(:mod:`sbn_lightning.data.stream.teacher_rows`). :mod:`sbn_lightning.models.distillation` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sbn_lightning.core.devices import usable_device
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.models.distillation import (
    Divergence,
    LogitsLoss,
    StoredLogits,
    hidden_state_loss,
    linear_distillation,
    relation_loss,
)
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.sparsity.config import check_choice


@dataclass(frozen=True)
class Distillation:
    """The options of a distillation. A loss with the weight 0 is not computed.

    Args:
        teacher: The teacher's weights: a checkpoint, the folder of a run, a Hugging Face folder, or a GGUF file. None
            takes what ``teacher-logits`` stored with the text (:mod:`sbn_lightning.data.stream.teacher_rows`).
        logits: The weight of the divergence between the two models' next tokens.
        language_model: The weight of the cross-entropy against the text, as in a training without a teacher.
        divergence: ``"forward"`` or ``"reverse"``; :mod:`sbn_lightning.models.distillation` has the formulas.
        temperature: The number by which logits are divided for the divergence; above 0.
        top_k: How many of the teacher's classes are compared one by one. The others count as one class. None compares
            all of them.
        hidden: The weight of the loss on the hidden states after each block.
        relations: The weight of the loss on the relations between queries, between keys and between values.
        relation_block: The block whose relations are compared; negative numbers count from the last block. BitDistill
            takes one late block.
        dtype: The dtype of the teacher's weights. bfloat16 halves their memory.

    Raises:
        ConfigError: If an option cannot work, or no loss is left.
    """

    teacher: str | None
    logits: float = 1.0
    language_model: float = 0.0
    divergence: Divergence = "forward"
    temperature: float = 1.0
    top_k: int | None = None
    hidden: float = 0.0
    relations: float = 0.0
    relation_block: int = -2
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_choice("distillation.divergence", self.divergence, get_args(Divergence))
        check_choice("distillation.dtype", self.dtype, ("float32", "bfloat16"))
        weights = {name: getattr(self, name) for name in ("logits", "language_model", "hidden", "relations")}
        if negative := [name for name, weight in weights.items() if not weight >= 0]:
            raise ConfigError(f"distillation.{negative[0]}={weights[negative[0]]} must be 0 or more")
        if not any(weights[name] for name in ("logits", "hidden", "relations")):
            raise ConfigError(
                "distillation: logits, hidden and relations are all 0, so the teacher has no effect; leave "
                "distillation out to train without a teacher"
            )
        if not self.temperature > 0:
            raise ConfigError(f"distillation.temperature={self.temperature} must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"distillation.top_k={self.top_k} must be 1 or more")
        if self.teacher is None:
            wanted = {"hidden": 0.0, "relations": 0.0, "temperature": 1.0, "top_k": None}
            for name, value in wanted.items():
                if getattr(self, name) != value:
                    raise ConfigError(
                        f"distillation.{name} needs the teacher itself, and distillation.teacher is null; the data "
                        "hold the teacher's most likely tokens alone"
                    )

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts that :meth:`Distiller.loss` returns, in their order."""
        return "loss", "logits", *(name for name in ("hidden", "relations") if getattr(self, name))


def load_teacher(options: Distillation) -> TernaryTransformer | None:
    """Return the teacher that the options name; None if the data hold what a teacher said.

    Args:
        options: The options of the distillation.

    Raises:
        DataError: If there is no such model, or its file is damaged.
    """
    if options.teacher is None:
        return None
    from sbn_lightning.formats.load import load_model

    return load_model(options.teacher, dtype=getattr(torch, options.dtype)).model


class Distiller:
    """Computes the loss of a student against a frozen teacher.

    Both may be of another class than :class:`TernaryTransformer`, if ``hidden`` returns logits and ``lm_head`` has no
    weight. The losses on blocks then have to be off.

    Args:
        options: The options, with the place of the teacher's weights.
        teacher: A teacher that is in memory already; None reads it from ``options.teacher``, if that is a path.
        device: The device to put the teacher on.

    Raises:
        DataError: If there is no teacher, or its file is damaged.
        ConfigError: If the device cannot be used here.
    """

    def __init__(
        self,
        options: Distillation,
        teacher: TernaryTransformer | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options
        where = usable_device(device, "Distiller: device", 'leave device out: the teacher then runs on "cpu"')
        teacher = load_teacher(options) if teacher is None else teacher
        self.teacher = None if teacher is None else teacher.to(where).eval().requires_grad_(False)

    def check(self, student: TernaryTransformer) -> None:
        """Check that a student can learn from the teacher.

        Raises:
            ConfigError: If the vocabularies differ, or a loss needs blocks or widths that are not equal.
        """
        if self.teacher is None:
            return
        ours, theirs = student.config, self.teacher.config
        if ours.vocab_size != theirs.vocab_size:
            raise ConfigError(
                f"distillation: the teacher {self.options.teacher} has {theirs.vocab_size} tokens, the student "
                f"{ours.vocab_size}: they must share a tokenizer"
            )
        if self.options.hidden and (ours.n_layers, ours.d_model) != (theirs.n_layers, theirs.d_model):
            raise ConfigError(
                f"distillation.hidden compares block by block, and the teacher has {theirs.n_layers} blocks of width "
                f"{theirs.d_model}, the student {ours.n_layers} of width {ours.d_model}: set hidden to 0"
            )
        if self.options.relations:
            block, fewest = self.options.relation_block, min(ours.n_layers, theirs.n_layers)
            if not -fewest <= block < fewest:
                raise ConfigError(
                    f"distillation.relation_block={block}: the models have {ours.n_layers} and {theirs.n_layers} blocks"
                )

    def loss(
        self,
        student: TernaryTransformer,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        stored: StoredLogits | None = None,
        teacher_hidden: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss, a scalar with gradients for the student, and its parts without gradients.

        Args:
            student: The student.
            tokens_BT: The token ids, int64 ``[B, T]``.
            targets_BT: The token that follows each token, int64 ``[B, T]``.
            stored: What the teacher said about these tokens, ``[B * T, k]``, if there is no teacher.
            teacher_hidden: The teacher's final hidden states of these tokens, ``[B, T, D]``, if somebody has computed
                them already. The losses on blocks (``hidden`` and ``relations``) need more than these.
            places: The indices of the flattened targets that count, int64 ``[n]``; None for all. The losses on blocks
                are over all tokens.

        Returns:
            The loss, and by name the cross-entropy (``"loss"``), the divergence of the logits (``"logits"``), and the
            other losses that are computed (``"hidden"``, ``"relations"``).

        Raises:
            ConfigError: If there is neither a teacher nor ``stored``, or if ``teacher_hidden`` is not enough.
        """
        options = self.options
        if self.teacher is None:
            if stored is None:
                raise ConfigError(
                    "distillation.teacher is null, and the batch holds no teacher's logits: give the teacher, or data "
                    "that `sbn teacher-logits` wrote"
                )
            return self._against_stored(student, tokens_BT, targets_BT, stored, places)
        if teacher_hidden is not None and (options.hidden or options.relations):
            raise ConfigError("distillation.hidden and distillation.relations need the blocks of the teacher")
        with torch.no_grad(), self._watch(self.teacher) as theirs:
            if teacher_hidden is None:
                teacher_hidden = theirs.hidden(self.teacher, tokens_BT)
        with self._watch(student) as ours:
            hidden = ours.hidden(student, tokens_BT)
        total, language, divergence = linear_distillation(
            _chosen(hidden.flatten(0, 1), places),
            _head(student),
            _chosen(teacher_hidden.flatten(0, 1), places),
            _head(self.teacher),
            _chosen(targets_BT.flatten(), places),
            LogitsLoss(options.language_model, options.logits, options.divergence, options.temperature, options.top_k),
        )
        parts = {"loss": language, "logits": divergence}
        if options.hidden:
            pairs = zip(ours.after_blocks or (), theirs.after_blocks or (), strict=True)
            value = torch.stack([hidden_state_loss(a, b) for a, b in pairs]).mean()
            parts["hidden"] = value.detach()
            total = total + options.hidden * value
        if options.relations:
            heads = student.config.n_kv_heads
            qkv = zip(_split(student, ours.qkv), _split(self.teacher, theirs.qkv), strict=True)
            value = torch.stack([relation_loss(a, b, heads) for a, b in qkv]).mean()
            parts["relations"] = value.detach()
            total = total + options.relations * value
        return total, parts

    def _against_stored(
        self,
        student: TernaryTransformer,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        stored: StoredLogits,
        places: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        total, language, divergence = linear_distillation(
            _chosen(student.hidden(tokens_BT).flatten(0, 1), places),
            _head(student),
            StoredLogits(*(_chosen(part, places) for part in stored)),
            None,
            _chosen(targets_BT.flatten(), places),
            LogitsLoss(options.language_model, options.logits, options.divergence),
        )
        return total, {"loss": language, "logits": divergence}

    @contextmanager
    def _watch(self, model: TernaryTransformer) -> Iterator[_Seen]:
        """Collect what the losses compare while the model computes."""
        seen = _Seen([] if self.options.hidden else None)
        if not self.options.relations:
            yield seen
            return

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.qkv = output

        block = model.blocks[self.options.relation_block]
        block._compiled_call_impl = None  # Compiled code would not call the hook. All other blocks stay compiled.
        hook = block.get_submodule("attention.qkv").register_forward_hook(note)
        try:
            yield seen
        finally:
            hook.remove()


@dataclass
class _Seen:
    """Hidden states after each block, and the fused queries, keys and values of one block ``[B, T, features]``."""

    after_blocks: list[Tensor] | None
    qkv: Tensor | None = None

    def hidden(self, model: TernaryTransformer, tokens_BT: Tensor) -> Tensor:
        """Return what a model's head sees, and fill :attr:`after_blocks`."""
        if self.after_blocks is None:
            return model.hidden(tokens_BT)
        return model.hidden(tokens_BT, after_blocks=self.after_blocks)


def _chosen(rows: Tensor, places: Tensor | None) -> Tensor:
    return rows if places is None else rows[places]


def _head(model: TernaryTransformer) -> Tensor | None:
    """Return the weight of the head; None if the model's hidden states are logits already."""
    return getattr(model.lm_head, "weight", None)


def _split(model: TernaryTransformer, qkv: Tensor | None) -> tuple[Tensor, ...]:
    assert qkv is not None
    return qkv.split(model.blocks[0].get_submodule("attention").splits, -1)  # type: ignore[arg-type]


def split_batch(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, StoredLogits | None]:
    """Return the token ids of a batch, and what a teacher said about them if the data hold that."""
    if isinstance(batch, Tensor):
        return batch, None
    tokens, classes, log_probabilities = batch
    return tokens, StoredLogits(classes.flatten(0, 1), log_probabilities.flatten(0, 1))
