"""``MuonAdamW``: Muon for the matrices of a model, and AdamW for everything else, as one optimiser.

Muon (K. Jordan and others, 2024) takes the momentum of a matrix and brings all of its singular values to about one, so
a step is about as large in every direction. It is meant for matrices between hidden states: embeddings, heads, norms
and biases train better with AdamW. ``torch.optim.Muon`` has only the first half, and a ``Trainer`` with automatic
optimisation takes one optimiser.

Both halves are torch's own. They share the parameter groups and the states of this optimiser, so schedules of the
learning rate and of the weight decay, clipping and checkpoints work as with any other optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, ParamsT

from sbn_lightning.core.errors import ConfigError

# The key of a parameter group that says which half trains it.
MUON = "muon"


class MuonAdamW(Optimizer):
    """Train matrices with Muon, and all other parameters with AdamW.

    Muon gets the parameters with two dimensions in groups that have a weight decay. A matrix with the shape of a matrix
    in a group without weight decay counts as the head that belongs to this embedding, and AdamW gets it. In a recipe::

        model:
          optimizer:
            class_path: research.sizes.muon.MuonAdamW
            init_args: {lr: 4.0e-3}

    Args:
        params: The parameters or the parameter groups.
        lr: The peak learning rate of both halves. Muon's steps have the mean square of AdamW's steps
            (``match_rms_adamw``, arXiv 2502.16982), so a rate that suits AdamW is a good start.
        weight_decay: The weight decay of groups that do not say their own.
        momentum: The momentum of Muon, with Nesterov's step.
        betas: The two averages of AdamW.
        eps: The epsilon of AdamW.
        fused: Whether AdamW runs as one kernel; None leaves the choice to torch.

    Raises:
        ConfigError: If there is no matrix to train, or a parameter is sharded.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        self._muon: torch.optim.Muon | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if any(isinstance(weight, DTensor) for group in self.param_groups for weight in group["params"]):
            raise ConfigError("MuonAdamW needs whole matrices, and these are sharded; use AdamW, or the strategy ddp")
        groups = _split(self.param_groups)
        matrices = [group for group in groups if group[MUON]]
        rest = [group for group in groups if not group[MUON]]
        if not matrices:
            raise ConfigError("MuonAdamW: no parameter is a matrix in a group with weight decay; use torch.optim.AdamW")
        self._muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(rest, betas=(betas[0], betas[1]), eps=eps, fused=fused) if rest else None
        halves = (self._adamw, self._muon)
        self.param_groups = [group for half in halves if half is not None for group in half.param_groups]
        self.defaults |= {"momentum": momentum, "betas": tuple(betas), "eps": eps}
        self._share()

    def _share(self) -> None:
        """Let both halves work on the groups and states of this optimiser."""
        for half, is_muon in ((self._muon, True), (self._adamw, False)):
            if half is not None:
                half.param_groups = [group for group in self.param_groups if group[MUON] == is_muon]
                half.state = self.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group while the optimiser is made.

        Raises:
            ConfigError: If the optimiser is there already.
        """
        if self._muon is not None:
            raise ConfigError("MuonAdamW takes no further parameter groups; make it with all parameters")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states and the options of a checkpoint."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step with both halves.

        Args:
            closure: A function that computes the loss and its gradients.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for half in (self._muon, self._adamw):
            if half is not None:
                half.step()
        return loss


def _split(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of which each has one half to train it; the key :data:`MUON` says which."""
    embeddings = {
        weight.shape for group in groups if not group["weight_decay"] for weight in group["params"] if weight.ndim == 2
    }
    found = []
    for group in groups:
        of_muon = [
            weight.ndim == 2 and bool(group["weight_decay"]) and weight.shape not in embeddings
            for weight in group["params"]
        ]
        for is_muon in (True, False):
            params = [weight for weight, chosen in zip(group["params"], of_muon, strict=True) if chosen == is_muon]
            if params:
                found.append(group | {"params": params, MUON: is_muon})
    return found
