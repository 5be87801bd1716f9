"""Optimiser states by the names of their parameters.

torch numbers optimiser states by parameter group, while ``ModelParallelStrategy`` reads a number as the place of a
parameter in the model. With two groups it would give states to the wrong parameters. So a checkpoint here keys
optimiser states by the names of their parameters, which mean the same under every strategy.
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
    """Key the optimiser states of a checkpoint by parameter names, so that they load under every strategy.

    A module needs this function if it has several parameter groups and is to continue under ``ModelParallelStrategy``.
    Call the function in the module's ``on_save_checkpoint``:
    ``name_optimizer_states(checkpoint["optimizer_states"], self, self.trainer.optimizers)``.

    Args:
        states: The value of ``checkpoint["optimizer_states"]``, changed in place. States that already have names stay
            as they are.
        module: The module whose parameters are trained.
        optimizers: The optimisers of the module, in the order of ``states``.
    """
    # torch leaves the wrappers of torch.compile out of such names.
    names = {parameter: name.replace("_orig_mod.", "") for name, parameter in module.named_parameters()}
    for optimizer, state in zip(optimizers, states, strict=True):
        if not all(isinstance(key, int) for key in state.get("state", ())) or "param_groups" not in state:
            continue  # The state has names already, or is empty because this rank does not save.
        groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        # ModelParallelStrategy numbers states by place in the model, any other strategy by place in the groups.
        numbered = list(chain.from_iterable(groups) if module.device_mesh is None else names.values())
        state["state"] = {numbered[key]: value for key, value in state["state"].items()}
        state["param_groups"] = [
            group | {"params": named} for group, named in zip(state["param_groups"], groups, strict=True)
        ]
