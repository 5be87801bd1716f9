"""The schedule and the statistics in ``transformers.Trainer``, and in what is built on it (TRL, axolotl).

What the schedule does depends on the Trainer's step count alone. A resumed run therefore continues the schedule where
it was, and the checkpoint needs to hold nothing but the model with its masks.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.schedule import MaskedDecay, Ramp, Refresh, Rounding, SparsitySchedule


class SparsityCallback(TrainerCallback):
    """Run a :class:`SparsitySchedule` in ``transformers.Trainer``, and add its statistics to the logs.

    Args:
        refresh: The options of the mask refresh, or only its interval in optimiser steps.
        ramp: The way from dense to the pattern; None trains at the pattern from the start.
        masked_decay: The options of the decay of masked weights, or only its strength.
        total_steps: The number of optimiser steps that the schedule spans; None takes the Trainer's ``max_steps``.
        log_statistics: Whether to log shares of zeros and flip rates, as ``sparsity/...``, at each of the Trainer's
            logging steps.
        rounding: The way from unrounded to ternary weights, for a model whose weights were trained already; None rounds
            from the start.

    Attributes:
        schedule: The schedule, from the start of training on.
    """

    def __init__(
        self,
        refresh: Refresh | int = 1,
        ramp: Ramp | None = None,
        masked_decay: MaskedDecay | float | None = None,
        total_steps: int | None = None,
        log_statistics: bool = True,
        rounding: Rounding | None = None,
    ) -> None:
        self.refresh, self.ramp, self.rounding, self.masked_decay = refresh, ramp, rounding, masked_decay
        self.total_steps = total_steps
        self.log_statistics = log_statistics
        self.schedule: SparsitySchedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the schedule, or continue it at the step that the Trainer resumes from."""
        if args.n_gpu > 1:
            raise ConfigError(
                f"SparsityCallback: the Trainer would copy the model to {args.n_gpu} GPUs in each forward "
                "(nn.DataParallel), and a copy has no latent weights: start the program with torchrun --nproc_per_node "
                f"{args.n_gpu}, or use one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if optimizer is None:
            raise ConfigError("SparsityCallback: the Trainer has no optimizer yet at the start of training")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimiser.
        self.schedule = SparsitySchedule(
            _unwrapped(model),
            inner,
            total_steps=self.total_steps or state.max_steps,
            refresh=self.refresh,
            ramp=self.ramp,
            rounding=self.rounding,
            masked_decay=self.masked_decay,
            steps=state.global_step,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do what is due after an optimiser step."""
        if self.schedule is not None:
            self.schedule.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the statistics to what the Trainer logs."""
        if self.log_statistics and self.schedule is not None and logs is not None and "loss" in logs:
            values = {f"sparsity/{name}": value for name, value in self.schedule.statistics().items()}
            logs |= values
            state.log_history[-1] |= values

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the schedule."""
        if self.schedule is not None:
            self.schedule.finish()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel; names of layers then match the checkpoint's."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
