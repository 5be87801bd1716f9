"""Train one trial in a plain loop, and write a row each time that the held-out text is measured.

The text lies on the device as one long row of token ids. A step draws its windows with a seed of its own, so a trial
that continues sees the same windows as one that never stopped. On a GPU, the forward and the backward of a step are two
CUDA graphs, and nothing in a step makes the host wait for the GPU.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from research.pretrained.together import LOOK_EVERY, SharedTeacher
from research.pretrained.trials import Trial
from research.queue import append_row
from research.training import autocast, forward_context, load_state, save_state
from sbn_lightning import MaskedDecay, Ramp, Rounding, SparseTernaryPrecision, SparsitySchedule, TernaryTransformer
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.formats.load import load_model, read_config
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.sparse_bit_linear import ternary_layers
from sbn_lightning.models.config import LayerRule
from sbn_lightning.training.distillation import Distillation, Distiller
from sbn_lightning.training.graphs import GraphedLoss
from sbn_lightning.training.schedules import learning_rate_factor

FILE, ANSWERS = "results.jsonl", "answers.jsonl"
# The least seconds between two saves of a trial. It is saved when the held-out text is measured.
SAVE_EVERY = 100.0
# The number of steps whose windows are drawn at once. Their way to the GPU makes the host wait.
AHEAD = 512


@dataclass
class Setting:
    """What all trials share.

    Attributes:
        weights: The published model: the start of trials, and the teacher.
        train: The training text, integers ``[tokens]``, on the device.
        held_out: The held-out texts by name, each ``[tokens]``.
        output: The folder of the results.
        device: The device to train on.
        length: The number of tokens in a sequence.
        batch: The number of sequences in a step.
        marks: The numbers of training tokens after which the held-out texts are measured.
        held_out_rows: How many sequences of each held-out text are measured; a multiple of ``batch``, or below it.
        compile: Whether blocks are compiled.
        graphs: Whether forward and backward are replayed as CUDA graphs; without effect on a CPU.
        together: Whether the processes that ``torchrun`` started train students of one teacher at the same time.
        gradients: How gradients are rounded; an option of :class:`SparseTernaryPrecision`.
        expected_speed: The tokens a second to plan with until some are measured.
        probe: A function that returns further measurements of a trained model, given a function from token ids
            ``[batch, length]`` to logits.
        ask: A function that returns what a trained model, without kernels and graphs, answers to further questions.
    """

    weights: str
    train: Tensor
    held_out: dict[str, Tensor]
    output: Path
    device: torch.device
    length: int = 1024
    batch: int = 16
    marks: tuple[int, ...] = tuple(million * 1_000_000 for million in (1, 2, 5, 10, 20, 45, 50, 100))
    held_out_rows: int = 64
    compile: bool = True
    graphs: bool = True
    together: bool = False
    gradients: str = "bf16"
    expected_speed: float = 100_000.0
    probe: Callable[[Callable[[Tensor], Tensor]], list[dict[str, Any]]] | None = None
    ask: Callable[[TernaryTransformer], dict[str, Any]] | None = None

    @property
    def tokens_of_step(self) -> int:
        """The number of tokens of an optimiser step."""
        return self.length * self.batch


class Training:
    """One trial on its way. It continues where an earlier process saved it.

    Args:
        trial: What to train.
        setting: What all trials share.
    """

    def __init__(self, trial: Trial, setting: Setting) -> None:
        self.trial, self.setting = trial, setting
        self.steps = math.ceil(trial.tokens / setting.tokens_of_step)
        self.folder = setting.output / trial.folder
        torch.manual_seed(trial.seed)
        self.model = make_model(trial, setting)
        self.plugin = None
        if ternary_layers(self.model) and setting.device.type == "cuda":
            self.plugin = SparseTernaryPrecision(gradients=setting.gradients, tokens=setting.tokens_of_step)  # type: ignore[arg-type]
            self.plugin.convert_module(self.model)
        if setting.compile and self.steps:
            self.model.compile_blocks()
        self.distiller: Distiller | None = None
        if trial.distillation is not None:
            options = Distillation(teacher=setting.weights, **trial.distillation)
            self.distiller = Distiller(options, make_teacher(setting), setting.device)
            self.distiller.check(self.model)
            if setting.compile:
                self.distiller.teacher.compile_blocks()
        self.shared: SharedTeacher | None = None
        if setting.together:
            teacher = None if self.distiller is None else self.distiller.teacher
            if teacher is None:
                raise ConfigError(f"trial {trial.name!r} has no teacher that it could share with others")
            with self._context():
                pass  # Kernels are chosen before the processes meet, because students may need different ones.
            self.shared = SharedTeacher(teacher, (setting.batch, setting.length))
        self.graphed = GraphedLoss() if setting.graphs and setting.device.type == "cuda" else None
        self.optimizer = make_optimizer(self.model, trial)
        self.schedule: SparsitySchedule | None = None
        if dict(masked_layers(self.model)):
            self.schedule = SparsitySchedule(
                self.model,
                self.optimizer,
                total_steps=max(self.steps, 1),
                rounding=Rounding(end=trial.rounding) if trial.rounding else None,
                ramp=Ramp("walk", *trial.ramp) if trial.ramp else None,
                masked_decay=MaskedDecay(trial.masked_decay, until=0.5) if trial.masked_decay else None,
            )
        self.step = 0
        self.seconds = 0.0  # The time of the timed steps.
        self.timed = 0
        self._recent: list[Tensor] = []
        self._starts: tuple[int, Tensor] | None = None  # The first step that was drawn, and the windows of all drawn.
        self._load()
        if self.shared is not None:
            self.shared.check(self.step, self.steps, trial.seed)

    def run(self, deadline: float = math.inf) -> bool:
        """Train until the end or until a moment of the monotonic clock. Return whether the trial is at its end."""
        marks = {math.ceil(mark / self.setting.tokens_of_step) for mark in self.setting.marks}
        if not self.steps:
            self._report(finished=True)
            return True
        since = saved = time.monotonic()
        warm = self.step + 10  # By then this process has compiled its code and chosen its kernels.
        first = self.step
        while self.step < self.steps:
            self.train_step()
            if self.step == warm:
                self.synchronize()
                since, first = time.monotonic(), self.step
            late = self._is_late(deadline)
            if self.step in marks or self.step == self.steps or late:
                self.synchronize()
                if self.step >= warm:
                    self.seconds += time.monotonic() - since
                    self.timed += self.step - first
                self._report(finished=self.step == self.steps)
                if self.step < self.steps and (late or time.monotonic() - saved > SAVE_EVERY):
                    self._save()
                    saved = time.monotonic()
                if late:
                    break
                since, first = time.monotonic(), self.step
        return self.step == self.steps

    def _is_late(self, deadline: float) -> bool:
        """Whether the time is up. Students that share a teacher stop at the same step."""
        late = time.monotonic() > deadline
        if self.shared is None:
            return late
        return self.step % LOOK_EVERY == 0 and self.shared.agree(late)

    def train_step(self) -> None:
        """Take one optimiser step."""
        factor = learning_rate_factor(
            self.step,
            schedule="cosine",
            warmup_steps=max(1, min(50, int(self.steps * self.trial.warmup))),
            max_steps=self.steps,
            floor=0.05,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        batch = self._windows(self.step)
        with self._context():
            if self.shared is not None:
                self.shared.advance(self.step, lambda step: self._windows(step)[:, :-1])
            loss = self.loss(batch) if self.graphed is None else self.graphed(self.model, self.loss, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        self._recent = [*self._recent[-9:], loss.detach()]
        self.step += 1

    def loss(self, batch: Tensor) -> Tensor:
        """Return the loss of a batch, int64 ``[batch, length + 1]``: against the text, or against the teacher."""
        if self.distiller is None:
            return self.model.loss(batch[:, :-1], batch[:, 1:])
        theirs = None if self.shared is None else self.shared.hidden
        return self.distiller.loss(self.model, batch[:, :-1], batch[:, 1:], teacher_hidden=theirs)[0]

    def _windows(self, step: int) -> Tensor:
        """Return the token ids of a step, int64 ``[batch, length + 1]``."""
        setting = self.setting
        first = step // AHEAD * AHEAD
        if self._starts is None or self._starts[0] != first:
            draws = [self._draw(one) for one in range(first, first + AHEAD)]
            self._starts = first, torch.stack(draws).to(setting.device)
        offsets = torch.arange(setting.length + 1, device=setting.device)
        return setting.train[self._starts[1][step - first] + offsets].long()

    def _draw(self, step: int) -> Tensor:
        """Return where the windows of a step begin, int64 ``[batch, 1]``."""
        generator = torch.Generator().manual_seed(self.trial.seed * 1_000_003 + step)
        return torch.randint(
            len(self.setting.train) - self.setting.length, (self.setting.batch, 1), generator=generator
        )

    def _context(self) -> AbstractContextManager[None]:
        return forward_context(self.plugin, self.setting.device)

    def _held_out(self, tokens: Tensor) -> Iterator[Tensor]:
        rows = tokens[: len(tokens) // (self.setting.length + 1) * (self.setting.length + 1)]
        rows = rows.view(-1, self.setting.length + 1)[: self.setting.held_out_rows]
        if len(rows) < self.setting.batch:  # A batch that is not whole would be compiled anew.
            rows = rows[torch.arange(self.setting.batch, device=rows.device) % len(rows)]
        yield from (batch for batch in rows.split(self.setting.batch) if len(batch) == self.setting.batch)

    def measure(self, most: int | None = None) -> dict[str, float]:
        """Return the mean cross-entropy on each held-out text, in nats.

        Gradients stay enabled after a training: the compiled blocks are then those of the training.

        Args:
            most: The largest number of batches of each text; None for the number of the setting.
        """
        losses: dict[str, float] = {}
        for name, tokens in self.setting.held_out.items():
            found = []
            for batch in islice(self._held_out(tokens), most):
                with torch.set_grad_enabled(self.steps > 0), self._context():
                    found.append(self.model.loss(batch[:, :-1].long(), batch[:, 1:].long()).detach())
            losses[name] = float(torch.stack(found).mean())
        return losses

    def measure_anew(self) -> dict[str, float]:
        """Return the losses of a new model with the trained weights, in plain PyTorch: kernels and graphs are left out.

        It shows whether :meth:`measure` saw the model whose weights are saved. One batch of each text is measured.
        """
        model = self.plain_model()
        losses: dict[str, float] = {}
        for name, tokens in self.setting.held_out.items():
            batch = next(self._held_out(tokens))
            with torch.no_grad(), autocast(self.setting.device):
                parts = [float(model.loss(row[:, :-1].long(), row[:, 1:].long())) for row in batch.split(4)]
            losses[name] = sum(parts) / len(parts)
        return losses

    def plain_model(self) -> TernaryTransformer:
        """Return a new model with the present weights, which computes in plain PyTorch."""
        model = make_model(replace(self.trial, start="random"), self.setting)
        model.load_state_dict(self.model.state_dict())
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        """Token ids ``[batch, length]`` -> logits of the next token, ``[batch, length, vocab_size]``."""
        with torch.set_grad_enabled(self.steps > 0), self._context():
            return self.model(tokens.to(self.setting.device)).detach()

    def _report(self, finished: bool) -> None:
        losses = self.measure()
        loss = sum(losses.values()) / len(losses)
        trained = self.step * self.setting.tokens_of_step
        timed = self.timed * self.setting.tokens_of_step
        row: dict[str, Any] = {
            "trial": asdict(self.trial),
            "tokens": trained,
            "finished": finished,
            "loss": loss,
            "held_out": losses,
            "perplexity": {name: math.exp(min(value, 50.0)) for name, value in losses.items()},
            "training_loss": float(torch.stack(self._recent).mean()) if self._recent else None,
            "tokens_per_second": round(timed / self.seconds) if self.seconds and timed else None,
            "seconds": round(self.seconds, 1),
        }
        layers = list(ternary_layers(self.model).values())
        row["rounding"] = layers[0].rounding if layers else None
        if finished and self.steps:
            row["first_batch"] = {"trained": self.measure(1), "anew": self.measure_anew()}
        if finished and self.trial.probed and self.setting.probe is not None:
            row["probe"] = self.setting.probe(self.logits)
        append_row(self.setting.output / FILE, row)
        if finished and self.trial.probed and self.setting.ask is not None:
            answers = {"trial": self.trial.name, "tokens": trained, **self.setting.ask(self.plain_model().eval())}
            append_row(self.setting.output / ANSWERS, answers)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "timed": self.timed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }
        save_state(self.folder, state)

    def _load(self) -> None:
        state = load_state(self.folder, self.setting.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds, self.timed = state["step"], state["seconds"], state["timed"]


def make_model(trial: Trial, setting: Setting) -> TernaryTransformer:
    """Return the model of a trial at its start, on the device."""
    config = replace(
        read_config(setting.weights),
        linear=trial.linear,
        pattern=trial.pattern,
        max_sequence_length=setting.length,
        sub_norms=trial.sub_norms,
        learnable_scales=trial.learnable_scales,
        activation_bits=trial.activation_bits,
        layers=tuple(LayerRule(**rule) for rule in trial.layers),
        loss="auto" if setting.device.type == "cuda" else "plain",
    )
    with setting.device:
        model = TernaryTransformer(config)
    if trial.start == "weights":
        _, unexpected = model.load_state_dict(_weights(setting.weights), strict=False)
        assert not unexpected, unexpected
    if trial.untied:
        generator = torch.Generator().manual_seed(trial.seed)
        with torch.no_grad():
            for _, layer in masked_layers(model):
                noise = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
                layer.weight.add_(noise, alpha=trial.untied * float(layer.weight.std()))
    return model


def make_teacher(setting: Setting) -> TernaryTransformer:
    """Return the published model in the dtype that the device computes in."""
    with setting.device:
        model = TernaryTransformer(replace(read_config(setting.weights), max_sequence_length=setting.length))
    model.load_state_dict(_weights(setting.weights))
    return model.to(torch.bfloat16 if setting.device.type == "cuda" else torch.float32)


@functools.cache
def _weights(path: str) -> dict[str, Tensor]:
    """Return the weights of the published model, read once."""
    return load_model(path).model.state_dict()


def make_optimizer(model: TernaryTransformer, trial: Trial) -> torch.optim.AdamW:
    """Return AdamW with the learning rates of the trial: one for the blocks' matrices and scales, one for the rest."""
    blocks = [(name, p) for name, p in model.named_parameters() if name.startswith("blocks.")]
    matrices = [p for _, p in blocks if p.ndim >= 2]
    scales = [p for name, p in blocks if name.endswith("log_scale")]
    ids = {id(parameter) for parameter in (*matrices, *scales)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups: list[dict[str, Any]] = [{"params": rest, "peak": trial.other_lr, "weight_decay": 0.0}]
    if scales:  # Logarithms: a step changes the factor by a share of itself.
        groups.append({"params": scales, "peak": trial.lr, "weight_decay": 0.0})
    if trial.relative:
        peaks = [trial.lr * float(parameter.detach().abs().mean()) for parameter in matrices]
        groups += [
            {"params": [parameter], "peak": peak, "weight_decay": trial.weight_decay}
            for parameter, peak in zip(matrices, peaks, strict=True)
        ]
    else:
        groups.append({"params": matrices, "peak": trial.lr, "weight_decay": trial.weight_decay})
    return torch.optim.AdamW(groups, lr=trial.lr, betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)
