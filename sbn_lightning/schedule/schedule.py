"""One object that runs mask refreshes, ramp, rounding warm-up and masked decay in any training loop.

The schedule does its work at two moments. :meth:`SparsitySchedule.step`, called after ``optimizer.step()``, refreshes
masks and sets densities. A hook on the optimiser applies the masked decay just before each step. Everything depends on
the number of optimiser steps alone, so a run that loads :meth:`SparsitySchedule.state_dict` continues as if it had
never stopped.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import MaskedLinear, masked_layers
from sbn_lightning.layers.statistics import Counts, Snapshot, count
from sbn_lightning.schedule.masked_decay import MaskedDecay
from sbn_lightning.schedule.ramp import Density, Ramp
from sbn_lightning.schedule.refresh import Refresh
from sbn_lightning.schedule.rounding import Rounding


class SparsitySchedule:
    """What the callbacks for masks, density, rounding and masked decay do, without Lightning.

    Usage::

        convert(model, "2:4")
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = SparsitySchedule(model, optimizer, total_steps=1000, ramp=Ramp("rows", end=0.3))
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    Args:
        model: The model whose masked layers the schedule governs.
        optimizer: The optimiser that trains the model. Only ``masked_decay`` needs one.
        total_steps: The number of optimiser steps of the whole training. A ramp and a decay with ``until`` need it.
        refresh: When masks are recomputed, or just the interval. The default follows the weights at every step.
        ramp: The way from dense to the pattern. None trains at the pattern from the start.
        rounding: The way from unrounded to ternary weights. None rounds from the start.
        masked_decay: The decay of masked weights, or just its strength. None means no decay.
        steps: The number of optimiser steps that the model has already taken, for a run that resumes without
            :meth:`load_state_dict`. The loaded masks then stay as they are until a refresh is due.

    Attributes:
        steps: The number of optimiser steps that the schedule has counted.

    Raises:
        ConfigError: If the model has no masked layer, or the schedule lacks a length or an optimiser that it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        total_steps: int | None = None,
        refresh: Refresh | int = 1,
        ramp: Ramp | None = None,
        rounding: Rounding | None = None,
        masked_decay: MaskedDecay | float | None = None,
        steps: int = 0,
    ) -> None:
        self.refresh = refresh if isinstance(refresh, Refresh) else Refresh(refresh)
        self.ramp, self.rounding = ramp, rounding
        self.masked_decay = masked_decay if isinstance(masked_decay, MaskedDecay) else MaskedDecay(masked_decay or 0.0)
        parts = (self.ramp, self.rounding, self.masked_decay)
        needs_length = [part.owner for part in parts if part is not None and part.needs_length]
        if needs_length and (total_steps is None or total_steps < 1):
            raise ConfigError(f"SparsitySchedule: {needs_length[0]} depends on the length of training: set total_steps")
        self.model = model
        self.steps = steps
        self._length = total_steps or 1
        self._densities: list[Density] = []
        self._snapshots: dict[str, Snapshot] = {}
        self._hook: RemovableHandle | None = None
        if self.refresh.warning:
            warnings.warn(self.refresh.warning, stacklevel=2)
        layers = self._layers()
        if self.masked_decay.decay:
            if optimizer is None:
                raise ConfigError("SparsitySchedule: masked_decay acts before each optimiser step: pass the optimizer")
            self.masked_decay.check(layers, [optimizer])
            self._hook = optimizer.register_step_pre_hook(self._before_step)
        if steps and ramp is not None:
            progress = ramp.progress(steps, self._length)
            masked = list(layers.values())
            ramp.restore(masked, [ramp.density(progress, one.pattern, i, len(masked)) for i, one in enumerate(masked)])
        self._apply(before=steps - 1)

    def step(self, step: int | None = None) -> None:
        """Do what is due after an optimiser step.

        Args:
            step: The number of optimiser steps done. None counts one more. A number that was seen already does
                nothing, so a loop that accumulates gradients may call this after every micro-batch.

        Raises:
            ConfigError: If ``step`` lies before a step that was seen already.
        """
        before, step = self.steps, self.steps + 1 if step is None else step
        if step < before:
            raise ConfigError(
                f"SparsitySchedule: step={step} comes after step {before}; use load_state_dict to go back"
            )
        if step > before:
            self.steps = step
            self._apply(before)

    def statistics(self, per_layer: bool = False) -> dict[str, float]:
        """Return the shares of zeros, of kept weights, and of mask bits and codes that changed since the last call.

        Args:
            per_layer: Whether to add the same numbers for each layer, as ``"zeros/<layer>"`` and so on.

        Returns:
            The shares, under the names that :class:`SparsityPatternLogger` uses. The first call has no flip rates.
        """
        is_first = not self._snapshots
        counts, self._snapshots = count(self._layers(), self._snapshots)
        values = sum(counts.values(), Counts()).shares()
        if per_layer:
            for name, layer in counts.items():
                values |= {f"{key}/{name}": value for key, value in layer.shares().items()}
        return {key: value for key, value in values.items() if not (is_first and key.startswith("flip_rate"))}

    def finish(self) -> None:
        """End the schedule.

        Held masks stay until the weights train again. Masked weights no longer decay. Everything is rounded, also if
        training ended within the warm-up. A warning says if training ended before the warm-up or the ramp did.
        """
        layers = list(self._layers().values())
        self.refresh.release(layers)
        found = [] if self.ramp is None else [self.ramp.unfinished(layers, self.steps, self._length)]
        if self.rounding is not None:
            found.append(self.rounding.unfinished(layers, self.steps, self._length))
            Rounding().apply(layers, 1, 1)
        for warning in filter(None, found):
            warnings.warn(warning, stacklevel=2)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict[str, Any]:
        """Return the plain values that :meth:`load_state_dict` continues from."""
        return {"steps": self.steps, "densities": list(self._densities)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state. Load the model's state dict first: its masks belong to these densities."""
        self.steps = int(state_dict["steps"])
        self._snapshots = {}
        if self.ramp is not None:
            saved = [(int(keep_n), float(share)) for keep_n, share in state_dict["densities"]]
            self.ramp.restore(list(self._layers().values()), saved)
        self._apply(before=self.steps - 1)

    def _apply(self, before: int) -> None:
        layers = list(self._layers().values())
        self.refresh.apply(layers, self.steps, before)
        if self.ramp is not None:
            self._densities = self.ramp.apply(layers, self.steps, self._length)
        if self.rounding is not None:
            self.rounding.apply(layers, self.steps, self._length)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.masked_decay.apply(self._layers(), optimizer, self.masked_decay.decay_at(self.steps, self._length))

    def _layers(self) -> dict[str, MaskedLinear]:
        layers = dict(masked_layers(self.model))
        if not layers:
            raise ConfigError(
                f"SparsitySchedule found no SparseBitLinear or SparseLinear in {type(self.model).__name__}; "
                "call convert(model) first"
            )
        return layers
