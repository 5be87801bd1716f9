"""Train one model of the study in a plain loop, with forward and backward as CUDA graphs.

The text lies on the device. An epoch reads rows that do not overlap, in an order that the seed and the epoch choose;
each epoch cuts the rows at another place. A trial that was stopped continues from its state. One that was learning its
masks starts anew, since the state has no place for their logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research.queue import append_row
from research.sizes.muon import MuonAdamW
from research.sizes.trials import SIZES, Trial
from research.sizes.variants import EXACT, LearnedMask, learn_masks, settle_masks
from research.training import STATE, forward_context, load_state, save_state
from sbn_lightning import MaskedDecay, SparseTernaryPrecision, SparsitySchedule, TernaryTransformer, TransformerConfig
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.schedule.curves import cosine_to_zero
from sbn_lightning.training.graphs import GraphedLoss
from sbn_lightning.training.parameter_groups import parameter_groups
from sbn_lightning.training.schedules import learning_rate_factor

FILE, ON_THE_WAY = "results.jsonl", "on_the_way.jsonl"
PARTS = 8  # how often the held-out text is measured in a training
WARMUP = 100  # optimiser steps
FLOOR = 0.03  # the learning rate at the last step, as a share of the peak
WEIGHT_DECAY = 0.1
LEARNED = 0.25  # the last share of training, in which the variant "learned" learns its masks
LOGITS_LR = 0.1  # the learning rate of the masks' logits, times the factor of the schedule


@dataclass
class Setting:
    """What all trials share.

    Attributes:
        train: The training text, integers ``[tokens]``, on the device.
        held_out: The held-out text, ``[tokens]``.
        output: The folder of the results.
        device: The device to train on.
        vocab_size: The number of tokens of the vocabulary.
        length: The number of tokens in a sequence.
        batch: The number of sequences in a step.
        held_out_batches: How many batches of the held-out text are measured.
        compile: Whether blocks are compiled.
        graphs: Whether forward and backward are replayed as CUDA graphs.
        gradients: How gradients are rounded; an option of :class:`SparseTernaryPrecision`.
        backend: The backend of ternary layers, an option of :class:`SparseTernaryPrecision`. None takes sparse tensor
            cores for 2:4 and dense ones for other patterns: nothing is measured while other processes run.
        processes: The number of processes that share the device. Rows hold it, because the speed depends on it.
    """

    train: Tensor
    held_out: Tensor
    output: Path
    device: torch.device
    vocab_size: int = 8192
    length: int = 512
    batch: int = 64
    held_out_batches: int = 24
    compile: bool = True
    graphs: bool = True
    gradients: str = "bf16"
    backend: str | None = None
    processes: int = 1

    @property
    def tokens_of_step(self) -> int:
        """The number of tokens of an optimiser step."""
        return self.length * self.batch


class Training:
    """One trial on its way.

    Args:
        trial: What to train.
        setting: What all trials share.
    """

    def __init__(self, trial: Trial, setting: Setting) -> None:
        self.trial, self.setting = trial, setting
        self.steps = max(1, trial.tokens // setting.tokens_of_step)
        self.folder = setting.output / "states" / trial.name
        torch.compiler.set_stance("default")
        torch.manual_seed(trial.seed)
        self.model = make_model(trial, setting)
        self.plugin = None
        on_gpu = setting.device.type == "cuda"
        if trial.variant == "exact":
            for layer in ternary_layers(self.model).values():
                layer.backend = EXACT
        elif ternary_layers(self.model) and on_gpu:
            self.plugin = SparseTernaryPrecision(
                setting.backend or ("sparse" if trial.pattern == "2:4" else "int8"),  # type: ignore[arg-type]
                setting.gradients,  # type: ignore[arg-type]
                tokens=setting.tokens_of_step,
            )
            self.plugin.convert_module(self.model)
        if setting.compile:
            self.model.compile_blocks()
        self.graphed = GraphedLoss() if setting.graphs and on_gpu else None
        self.optimizers = [make_optimizer(self.model, trial)]
        self.schedule: SparsitySchedule | None = None
        if dict(masked_layers(self.model)):
            decay = MaskedDecay(trial.shrink / (trial.lr * trial.scale), until=0.5) if trial.shrink else None
            self.schedule = SparsitySchedule(
                self.model, self.optimizers[-1], total_steps=self.steps, masked_decay=decay
            )
        self.learned: list[LearnedMask] = []
        self.step = 0
        self.seconds = 0.0
        self.timed = 0  # Steps that `seconds` counts.
        self._epoch: tuple[int, Tensor, Tensor] | None = None
        self._loss = torch.zeros((), device=setting.device)
        self._load()

    def run(self, deadline: float = math.inf) -> bool:
        """Train until the end or until a moment of the monotonic clock. Return whether the trial is at its end."""
        marks = {-(-self.steps * part // PARTS) for part in range(1, PARTS)} - {self.steps}
        while self.step < self.steps:
            next_mark = min((mark for mark in marks if mark > self.step), default=self.steps)
            self.advance(min(next_mark - self.step, 50 if self.timed else 10))
            if self.step in marks:
                append_row(self.setting.output / ON_THE_WAY, self.row())
            if time.monotonic() > deadline and self.step < self.steps:
                if not self.learned:
                    self._save()
                return False
        if self.learned:
            settle_masks(ternary_layers(self.model).values())
        append_row(self.setting.output / FILE, self.row())
        (self.folder / STATE).unlink(missing_ok=True)
        return True

    def advance(self, steps: int) -> None:
        """Take some steps, and count their seconds unless they are the first ten."""
        since = time.monotonic()
        first = self.step == 0
        for _ in range(steps):
            self._train_step()
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
        if not first:
            self.seconds += time.monotonic() - since
            self.timed += steps
        elif self.setting.device.type == "cuda":
            torch.cuda.empty_cache()  # The steps before the recording had memory of their own.

    def _learn_masks(self) -> None:
        """Go over to learned masks: in eager mode, without kernels and graphs."""
        if self.plugin is not None:
            self.plugin.teardown()
        self.plugin = self.graphed = None
        torch.compiler.set_stance("force_eager")
        self.learned = learn_masks(ternary_layers(self.model).values())
        logits = torch.optim.AdamW([one.logits for one in self.learned], lr=LOGITS_LR, betas=(0.9, 0.95))
        logits.param_groups[0].update(peak=LOGITS_LR, full_decay=0.0)
        self.optimizers.insert(0, logits)

    def _train_step(self) -> None:
        if self.trial.variant == "learned" and not self.learned and self.step >= (1 - LEARNED) * self.steps:
            self._learn_masks()
        for one in self.learned:
            one.noise = (1 - self.step / self.steps) / LEARNED
        factor = learning_rate_factor(
            self.step,
            schedule="cosine",
            warmup_steps=min(WARMUP, self.steps // 10),
            max_steps=self.steps,
            floor=FLOOR,
        )
        # As in research/reproduce: the decay of ternary models falls to zero over the first half.
        decay = cosine_to_zero(self.step, 0.5 * self.steps) if self.trial.family == "ternary" else 1.0
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
                group["weight_decay"] = group["full_decay"] * decay
        batch = self._batch(self.step)
        with self._context():
            loss = self.loss(batch) if self.graphed is None else self.graphed(self.model, self.loss, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self._loss = loss.detach()
        self.step += 1

    def loss(self, batch: Tensor) -> Tensor:
        """Return the loss of a batch, int64 ``[batch, length + 1]``."""
        found: Tensor = self.model.loss(batch[:, :-1], batch[:, 1:])
        return found

    def _batch(self, step: int) -> Tensor:
        """Return the token ids of a step, int64 ``[batch, length + 1]``."""
        setting = self.setting
        rows_of_epoch = (len(setting.train) - setting.length - 1) // setting.length
        steps_of_epoch = rows_of_epoch // setting.batch
        epoch, place = divmod(step, steps_of_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.trial.seed * 1_000_003 + epoch)
            offset = int(torch.randint(setting.length, (), generator=generator))
            order = torch.randperm(rows_of_epoch, generator=generator).to(setting.device)
            rows = setting.train[offset:].unfold(0, setting.length + 1, setting.length)
            self._epoch = (epoch, order, rows)
        _, order, rows = self._epoch
        return rows[order[place * setting.batch : (place + 1) * setting.batch]].long()

    def _context(self) -> AbstractContextManager[None]:
        return forward_context(self.plugin, self.setting.device)

    def _held_out(self) -> Iterator[Tensor]:
        setting = self.setting
        rows = setting.held_out.unfold(0, setting.length + 1, setting.length)
        whole = len(rows) // setting.batch
        for i in range(min(whole, setting.held_out_batches)):
            yield rows[i * setting.batch : (i + 1) * setting.batch].long()

    def measure(self) -> float:
        """Return the mean cross-entropy on the held-out text, in nats."""
        found = []
        for batch in self._held_out():
            # Gradients stay enabled, because the compiled blocks are then those of the training.
            with self._context():
                found.append(self.loss(batch).detach())
        return float(torch.stack(found).mean())

    def row(self) -> dict[str, Any]:
        """Return a line of results for the model as it is."""
        statistics = {} if self.schedule is None else self.schedule.statistics()
        return {
            "name": self.trial.name,
            "trial": asdict(self.trial),
            "loss": self.measure(),
            "training_loss": float(self._loss),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "tokens": self.step * self.setting.tokens_of_step,
            "steps": self.step,
            "text_tokens": len(self.setting.train),
            "epochs": round(self.step * self.setting.tokens_of_step / len(self.setting.train), 2),
            "seconds": round(self.seconds, 2),
            "processes": self.setting.processes,
            "tokens_per_second": round(self.timed * self.setting.tokens_of_step / max(self.seconds, 1e-9)),
            "zeros": {key: round(value, 5) for key, value in statistics.items()},
            "backends": sorted({layer.backend.name for layer in ternary_layers(self.model).values()}),
            "hardware": torch.cuda.get_device_name() if self.setting.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "timed": self.timed,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }
        save_state(self.folder, state)

    def _load(self) -> None:
        state = load_state(self.folder, self.setting.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds, self.timed = state["step"], state["seconds"], state["timed"]


def make_model(trial: Trial, setting: Setting) -> TernaryTransformer:
    """Return the new model of a trial, on the device."""
    size = SIZES[trial.size]
    kind = "ternary" if trial.family == "ternary" else "dense" if trial.pattern == "8:8" else "masked"
    config = TransformerConfig(
        vocab_size=setting.vocab_size,
        d_model=size.d_model,
        n_layers=size.n_layers,
        n_heads=size.d_model // 64,
        n_kv_heads=size.n_kv_heads,
        d_ffn=size.d_ffn,
        max_sequence_length=setting.length,
        init_std=0.02 * (512 / size.d_model) ** 0.5,
        linear=kind,  # type: ignore[arg-type]
        pattern=trial.pattern,
        activation="relu2" if trial.variant == "relu2" else "silu",
    )
    with setting.device:
        return TernaryTransformer(config)


def make_optimizer(model: nn.Module, trial: Trial) -> torch.optim.Optimizer:
    """Return the optimiser of a trial."""
    matrices, rest = parameter_groups(model)  # The head is the embedding, which is in the second group.
    groups = [matrices | {"lr": trial.lr * trial.scale}, rest]
    options: dict[str, Any] = {"lr": trial.lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    options["fused"] = next(model.parameters()).is_cuda
    optimizer = MuonAdamW(groups, **options) if trial.variant == "muon" else torch.optim.AdamW(groups, **options)
    for group in optimizer.param_groups:
        group["peak"], group["full_decay"] = group["lr"], group["weight_decay"]
    return optimizer
