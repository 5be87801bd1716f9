"""``RankWatch``: if one rank of a run fails, every rank says why, and ends.

:mod:`sbn_lightning.distributed.watch` has the procedure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.stopping import stop_together
from sbn_lightning.distributed.watch import Watch, check_recipes_are_equal, is_consequence, tell

if TYPE_CHECKING:
    from torch import nn

    from sbn_lightning.callbacks.base import Run


class RankWatch(RunCallback):
    """End all ranks of a run within a minute if one fails, each with the cause that the failing rank named.

    A rank that was killed cannot name a cause. It counts as gone after some seconds without a sign of life. The
    callback also compares the recipes of all ranks at the start. It does nothing in a run of one process.

    Args:
        silence: The seconds without a sign of life after which a rank counts as gone.
        grace: The seconds that a rank has to end by itself after another one has failed.

    Attributes:
        recipe: The options of this rank by name, as text. The command line sets them.
        cause: Why the run ended, if another rank was the first to fail; otherwise None.

    Raises:
        ConfigError: If a number of seconds is not positive, or if ranks have different recipes.
    """

    def __init__(self, silence: float = 30.0, grace: float = 10.0) -> None:
        for name, seconds in (("silence", silence), ("grace", grace)):
            if seconds <= 0:
                raise ConfigError(f"RankWatch: {name}={seconds} must be more than 0 seconds")
        self.silence, self.grace = silence, grace
        self.recipe: dict[str, str] = {}
        self.cause: str | None = None
        self._watch: Watch | None = None

    @property
    def seconds_to_end(self) -> float:
        """The seconds in which all ranks end by themselves after one has failed."""
        return self.silence + self.grace

    def setup(self, trainer: Run, pl_module: nn.Module, stage: str) -> None:  # type: ignore[override]
        """Compare the recipes, start to watch, and make ranks agree on signals without their GPUs."""
        if stage == "fit" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            check_recipes_are_equal(self.recipe)
            self._watch = Watch(self.silence, self.grace)
            self._watch.start()
            stop_together(trainer)

    def on_exception(self, trainer: Run, pl_module: nn.Module, exception: BaseException) -> None:  # type: ignore[override]
        """Tell the other ranks why this one fails, or say which rank failed before."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if not isinstance(exception, SystemExit):  # A rank that exits has agreed on that with the others.
            first = watch.wait_for_cause() if is_consequence(exception) else None
            if first is None:
                lines = str(exception).strip().splitlines()
                first = watch.report(f"{type(exception).__name__}: {lines[0] if lines else 'without a message'}")
            if not first.startswith(f"rank {watch.rank}:"):
                self.cause = first
                tell(watch.rank, first)
        watch.stop()  # A program may catch the exception and go on.

    def teardown(self, trainer: Run, pl_module: nn.Module, stage: str) -> None:  # type: ignore[override]
        """Stop to watch."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None


def cause_elsewhere(callbacks: Any) -> str | None:
    """Why a run ended, if another rank was the first to fail; otherwise None.

    Args:
        callbacks: The callbacks of the run.
    """
    return next((one.cause for one in callbacks if isinstance(one, RankWatch) and one.cause is not None), None)


def because_of(cause: str) -> str:
    """The error of a rank that ends because another rank failed. It says once how to go on.

    Args:
        cause: What the other rank wrote down.
    """
    advice = "" if "--ckpt_path last" in cause else "; --ckpt_path last continues from the last checkpoint"
    return f"this rank ends because of {cause}{advice}"
