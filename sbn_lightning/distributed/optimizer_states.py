"""Optimiser states by the names of their parameters.

A checkpoint keys optimiser states by the names of their parameters. torch numbers them by parameter group, and
``ModelParallelStrategy`` takes numbers for places in the model: with two groups it would give states to the wrong
parameters. Names mean the same under every strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def name_optimizer_states(
    states: Sequence[dict[str, Any]], module: LightningModule, optimizers: Sequence[Optimizer]
) -> None:
    """Keys the optimiser states of a checkpoint by parameter names, so that they load under every strategy.

    Call it in ``on_save_checkpoint`` of a module with several parameter groups that is to go on under
    ``ModelParallelStrategy``: ``name_optimizer_states(checkpoint["optimizer_states"], self, self.trainer.optimizers)``.

    Args:
        states: ``checkpoint["optimizer_states"]``; changed in place. Those that have names are left as they are.
        module: The module whose parameters are trained.
        optimizers: Its optimisers, in the order of ``states``.
    """
    # torch leaves the wrappers of torch.compile out of such names.
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        if not all(isinstance(key, int) for key in state.get("state", ())) or "param_groups" not in state:
            continue  # named, or the empty one of a rank that does not save
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        # ModelParallelStrategy has numbered them by place in the model, any other by place in the groups.
        numbered = list(chain.from_iterable(groups) if module.device_mesh is None else names.values())
        state["state"] = {numbered[key]: value for key, value in state["state"].items()}
        state["param_groups"] = [
            group | {"params": named} for group, named in zip(state["param_groups"], groups, strict=True)
        ]
