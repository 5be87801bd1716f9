"""``NonFiniteGuard``: end a run whose loss is not finite, name the layer it came from, and keep the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sbn_lightning.callbacks.base import RunCallback, is_step
from sbn_lightning.callbacks.lightning_internals import last_saved
from sbn_lightning.core.errors import ConfigError, SBNError

if TYPE_CHECKING:
    from sbn_lightning.callbacks.base import Run


class NonFiniteError(SBNError, ArithmeticError):
    """The loss or a weight is NaN or infinite."""


class NonFiniteGuard(RunCallback):
    """Stop training when the loss is NaN or infinite, before the optimiser carries it into the weights.

    The guard then runs the last micro-batch again, with hooks on every layer, and names the first layer in forward
    order that has a value that is not finite. Earlier micro-batches of the step are not there any more, so they cannot
    be run again. The guard hooks no layer before it has to. It refuses to save a checkpoint with a weight that is not
    finite.

    Args:
        interval: The number of optimiser steps between looks at the loss. A look waits for the device once, at the last
            micro-batch of the step. None looks at every step on a CPU, and elsewhere every ``log_every_n_steps`` steps,
            when the loss is fetched anyway. If the loss stops being finite between two looks, all weights may be NaN at
            the next look, and no layer can be found. With an interval of 1 the layer is found.

    Raises:
        ConfigError: If ``interval`` is less than 1.
    """

    def __init__(self, interval: int | None = None) -> None:
        if interval is not None and interval < 1:
            raise ConfigError(f"NonFiniteGuard: interval={interval}; give 1 or more")
        self.interval = interval
        self._batch: tuple[Any, int] | None = None
        self._finite: Tensor | None = None
        self._last_look = 0
        self._sees_losses = False
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: Run, pl_module: nn.Module) -> None:
        self._finite, self._last_look = None, trainer.global_step
        if not isinstance(trainer, Trainer):
            # A user's own loop may not call on_before_backward. If the loss is not finite, no gradient is finite, so a
            # look at the gradient of the smallest parameter is enough.
            def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                if not self._sees_losses:
                    self._look(trainer, pl_module, _smallest_gradient(optimizer), steps=True)

            self._hooks += [optimizer.register_step_pre_hook(look) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Run, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        self._batch = (batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: nn.Module, loss: Tensor) -> None:  # type: ignore[override]
        self._sees_losses = True
        self._look(trainer, pl_module, loss, steps=is_step(trainer))

    def on_train_batch_end(self, trainer: Run, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._batch = None

    def on_save_checkpoint(self, trainer: Run, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        name = first_non_finite_weight(pl_module) if trainer.global_step else None
        stop = name is not None
        if isinstance(trainer, Trainer) and trainer.world_size > 1:  # Each process may hold other weights.
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            raise NonFiniteError(
                f"{name or 'a weight on another process'} is not finite after optimiser step {trainer.global_step}: "
                "nothing is saved, the checkpoint before is the last good one"
            )

    def on_exception(self, trainer: Run, pl_module: nn.Module, exception: BaseException) -> None:  # type: ignore[override]
        self._remove_hooks()

    def on_train_end(self, trainer: Run, pl_module: nn.Module) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _look(self, trainer: Run, module: nn.Module, value: Tensor | None, steps: bool) -> None:
        """Note whether a loss or gradient is finite, and stop the run if a look is due and it is not.

        Args:
            trainer: The run.
            module: The model that is trained.
            value: The loss, or a gradient in place of the loss; None if there is neither.
            steps: Whether the optimiser steps with this micro-batch. A look is due only then.
        """
        if value is None:
            return
        finite = value.detach().isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        interval = self.interval or (1 if value.device.type == "cpu" else trainer.log_every_n_steps)  # type: ignore[union-attr]
        if not steps or (trainer.global_step + 1) // interval <= self._last_look // interval:
            return
        here = fine = bool(self._finite)
        if trainer.world_size > 1:  # All processes stop together; otherwise the others wait for ever.
            fine = trainer.strategy.reduce_boolean_decision(fine, all=True)
        self._finite = None
        if not fine:
            self._stop(trainer, module, all_finite=here, last_finite=bool(finite))
        self._last_look = trainer.global_step + 1

    def _stop(self, trainer: Run, module: nn.Module, all_finite: bool, last_finite: bool) -> None:
        """Raise the error.

        Args:
            trainer: The run.
            module: The model that is trained.
            all_finite: Whether all losses of this process since the last look are finite.
            last_finite: Whether the loss of the present micro-batch is finite.
        """
        since, now = self._last_look + 1, trainer.global_step + 1
        when = f"in optimiser step {now}" if now <= since else f"between the optimiser steps {since} and {now}"
        text = f"the loss is NaN or infinite {when}"
        is_at_hand = not last_finite
        if trainer.world_size > 1:  # All processes must run the batch again, or none: sharded weights are gathered.
            is_at_hand = trainer.strategy.reduce_boolean_decision(is_at_hand, all=False)
        origin = find_origin(trainer, module, *self._batch) if is_at_hand and self._batch is not None else ""
        if all_finite:
            text += " on another process"
        elif last_finite:
            text += "; it came with an earlier micro-batch than the last: that one is gone, so no layer can be named"
        elif origin:
            text += f"; {origin}"
        if now > since:
            text += "; set non_finite_guard.interval to 1 to see where it begins"
        checkpoint = last_saved(trainer.checkpoint_callback) or trainer.ckpt_path
        good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        raise NonFiniteError(f"{text}; {good}")


def _smallest_gradient(optimizer: torch.optim.Optimizer) -> Tensor | None:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return min(gradients, key=lambda gradient: gradient.numel(), default=None)


@torch.no_grad()
def first_non_finite_weight(module: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite on this process, or None. Waits for the device once."""
    local = [(name, p.to_local() if isinstance(p, DTensor) else p) for name, p in module.named_parameters()]
    named = [(name, p) for name, p in local if p.is_floating_point() and p.numel()]
    # The smallest and the largest value are enough: a NaN in a tensor makes both of them NaN. This takes no temporary
    # tensor of the size of the parameter.
    finite = [torch.stack(torch.aminmax(p.detach())).isfinite().all() for _, p in named]
    if not finite or bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
        return None
    return next(name for (name, _), flag in zip(named, finite, strict=True) if not flag)


def find_origin(trainer: Run, module: nn.Module, batch: Any, batch_idx: int) -> str:
    """Run a batch again, and return a text that names the first layer, in forward order, with a value not finite."""
    found: list[str] = []
    with _watched(module, found), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            if isinstance(trainer, Trainer):
                with trainer.precision_plugin.train_step_context():
                    module.training_step(batch, batch_idx)  # type: ignore[operator]
            else:
                with trainer.fabric.autocast():
                    step = getattr(module, "training_step", None)
                    step(batch, batch_idx) if step is not None else module(batch)
        except Exception:
            pass  # For example logging may fail. By then the layers have run, and the hooks have seen their outputs.
    if found:
        return found[0]
    if name := first_non_finite_weight(module):
        return f"the first weight that is not finite is {name}"
    return "no layer has such a value when the batch is run again: it is the loss itself, or comes and goes"


@contextmanager
def _watched(root: nn.Module, found: list[str]) -> Iterator[None]:
    def after(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found or _finite(output):
            return
        for key, parameter in module.named_parameters(recurse=False):
            if not _finite(parameter):
                found.append(f"it begins in {name}: its {key} is not finite")
                return
        found.append(f"it begins in {name}: its output is not finite, its parameters are")

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: after(name, module, inputs, output))
        for name, module in root.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return all(map(_finite, value.values())) if isinstance(value, dict) else True
