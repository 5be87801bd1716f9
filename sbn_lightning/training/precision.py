"""``SparseTernaryPrecision``: the precision plugin that gives ternary layers their kernels.

The plugin makes three choices: the dtype that everything else computes in, the backend of each ternary layer, and how
gradients are rounded. Layers are changed in place and keep their parameters and their state-dict keys. So a checkpoint
moves freely between backends, and between CPU and GPU.

One class serves ``Trainer(plugins=...)`` and ``Fabric(plugins=...)``. Both call the hooks of a precision plugin, with
different arguments: a Trainer passes its LightningModule, so that the module's own hooks run around the backward pass;
Fabric has none to pass. The arguments show which of the two is calling.

The dtypes are those of Lightning's own ``"bf16-mixed"``. The forward runs under autocast. Under Fabric, floating-point
outputs of the forward become float32, so that a loss outside of the model is computed in float32. Inputs keep their
dtype, because autocast rounds them where a layer multiplies in bfloat16.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from sbn_lightning.backends.base import Gradients, SavedGates
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.backends.selection import BackendName, Choice, check_options, choose, table
from sbn_lightning.callbacks.base import is_compiled
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.masked_linear import prepare_layers
from sbn_lightning.layers.seeds import draw_seeds, place
from sbn_lightning.layers.sparse_linear import SparseBitLinear, ternary_layers

ComputeDtype = Literal["bf16", "fp32"]

_TOKENS = 8192  # The number of tokens in a micro-batch for the measurement, where no batch tells.


@dataclass
class _Model:
    """A converted module. References are weak, because Fabric tears nothing down: a plugin may outlive its models."""

    module: weakref.ref[nn.Module]
    device: torch.device | None = None  # The backends were chosen for this device.
    layers: list[weakref.ref[SparseBitLinear]] = field(default_factory=list)

    def ternary_layers(self) -> list[SparseBitLinear]:
        """The layers that have a backend. A layer that was reverted to ``nn.Linear`` is left out."""
        return [layer for ref in self.layers if isinstance(layer := ref(), SparseBitLinear)]


class SparseTernaryPrecision(Precision):
    """Run ternary layers on integer tensor cores, and everything else in ``dtype``.

    The forward equals the reference up to rounding, whatever the backend: weights and tokens are integers, and their
    product is exact. Parameters keep their dtype. They should be float32, because bfloat16 would round away small
    updates.

    Args:
        backend: ``"auto"``: for each layer the fastest backend that gives the dense result, measured at the start; on
            a CPU the reference. ``"sparse"``: sparse tensor cores, for 2:4 only. ``"int8"``: dense int8 tensor cores,
            for any pattern. ``"reference"``: plain PyTorch.
        gradients: ``"bf16"``: exact straight-through, in ``dtype``. ``"int8"``: the gradient of a layer's output is
            rounded stochastically to int8, and both products of the backward run on int8 tensor cores. ``"int8-dx"``:
            only the gradient of the layer's tokens is made that way, and the gradient of the weight is exact.
            ``"int8-dw"``: the other way round.
        dtype: ``"bf16"``: autocast to bfloat16. ``"fp32"``: no autocast.
        tokens: The number of tokens in a micro-batch, which the measurement uses. None counts the token ids of the
            first batch; without ids the number is 8,192.
        seed: The seed of the stochastic rounding.
        saved_gates: How the gates and ups of a fused layer are saved for the backward. ``"full"``: in ``dtype``.
            ``"int8"``: as codes with two scales a token, in half the memory. The forward stays as it is; the gradients
            are those of the rounded gates and ups. Gates and ups from two layers that are not joined are saved in full,
            and so are those of layers on the reference backend.
        join_layers: Whether a compiled training step computes layers that read the same tokens as one product, such as
            q, k and v of a model from elsewhere. The forward has the same bits either way. Our own transformer has
            nothing to join.

    Raises:
        ConfigError: If an option has a value that is not listed here.
    """

    precision: Any = "bf16-mixed"

    def __init__(
        self,
        backend: BackendName = "auto",
        gradients: Gradients = "bf16",
        dtype: ComputeDtype = "bf16",
        tokens: int | None = None,
        seed: int = 0,
        saved_gates: SavedGates = "full",
        join_layers: bool = True,
    ) -> None:
        check_options("SparseTernaryPrecision", backend, gradients, saved_gates, tokens)
        if dtype not in get_args(ComputeDtype):
            raise ConfigError(f"SparseTernaryPrecision: dtype={dtype!r} is not one of bf16, fp32")
        self.backend, self.gradients, self.dtype, self.tokens, self.seed = backend, gradients, dtype, tokens, seed
        self.saved_gates, self.join_layers = saved_gates, join_layers
        self.precision = "bf16-mixed" if dtype == "bf16" else "32-true"
        self._models: list[_Model] = []
        self._passes = 0
        self._tokens = tokens or _TOKENS
        self._device_type = "cuda" if torch.cuda.is_available() else "cpu"

    def __repr__(self) -> str:
        return f"SparseTernaryPrecision(backend={self.backend!r}, gradients={self.gradients!r}, dtype={self.dtype!r})"

    # Layers.

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Note ``module``. Its layers get their backends before the first forward, when their device is known.

        Raises:
            ConfigError: If ``module`` has no ternary layer.
        """
        if not ternary_layers(module):
            raise ConfigError(
                f"SparseTernaryPrecision found no SparseBitLinear in {type(module).__name__}; add the "
                "TernarySparseConversion callback, build the model with these layers, or replace the plugin by "
                'precision="bf16-mixed"'
            )
        self._models = [model for model in self._models if model.module() not in (None, module)]
        self._models.append(_Model(weakref.ref(module)))
        return module

    def _install(self, model: _Model, module: nn.Module) -> None:
        layers = ternary_layers(module)
        device = next(iter(layers.values())).weight.device
        self._device_type = device.type
        choices = self._agreed_choices(layers, device)
        exact = sum(choice.kernel is None for choice in choices.values())
        for name, layer in layers.items():
            layer.backend = choices[name].make(self.gradients, self.saved_gates == "int8", self.join_layers)
        model.layers, model.device = [weakref.ref(layer) for layer in layers.values()], device
        rank_zero_info(f"{self!r}:\n{table(layers, choices)}")
        if self.gradients != "bf16" and exact:
            rank_zero_info(f"gradients stay exact in the {exact} layers on the reference backend")

    def _agreed_choices(self, layers: dict[str, SparseBitLinear], device: torch.device) -> dict[str, Choice]:
        """Make the choices once for all ranks, because timings differ between ranks."""
        rank, processes = place()
        agreed: list[dict[str, Choice] | None] = [None]
        if self.backend != "auto" or rank == 0:
            agreed = [choose(layers, self.backend, device, self._compute_dtype, self._tokens)]
        if processes > 1:
            dist.broadcast_object_list(agreed)
        choices = agreed[0]
        assert choices is not None
        return choices

    @property
    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @override
    def teardown(self) -> None:
        """Put the layers back on the reference backend, because Lightning moves the module to the CPU at the end."""
        for model in self._models:
            for layer in model.ternary_layers():
                layer.backend = REFERENCE
        self._models = []

    # A pass through the model.

    @override
    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Set autocast, draw seeds, and give a backend to layers that are new or have moved to another device."""
        layers = []
        ready: list[SparseBitLinear] = []
        for model in self._models:
            module, known = model.module(), model.ternary_layers()
            if module is not None and (model.device is None or (known and known[0].weight.device != model.device)):
                self._install(model, module)
                known = model.ternary_layers()
            if module is not None and _weights_stay_in_a_pass(module):
                ready += _prepared_for_a_graph(module, known)
            layers += known
        if self.gradients != "bf16" and torch.is_grad_enabled() and layers:
            draw_seeds(layers, self.seed, self._passes)
            self._passes += 1
        try:
            with torch.autocast(self._device_type, torch.bfloat16, enabled=self.dtype == "bf16"):
                yield
        finally:
            for layer in ready:
                layer.owner_prepares = False

    @override
    def convert_input(self, data: Any) -> Any:
        """Count the tokens of a batch, and return the batch as it is. A Trainer and Fabric call this before a forward.

        The first batch decides, because the kernels are chosen before the first forward.
        """
        if self.tokens is None and any(model.device is None for model in self._models):
            self._tokens = _token_ids(data) or self._tokens
        return data

    @override
    def convert_output(self, data: Any) -> Any:
        """Give floating-point outputs of a forward the default dtype. Fabric calls this hook; a Trainer does not."""
        if self.dtype != "bf16":
            return data
        return apply_to_collection(data, Tensor, _in_default_dtype)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"passes": self._passes} if self.gradients != "bf16" else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._passes = state_dict.get("passes", 0)

    # Trainer or Fabric.

    @override
    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:  # type: ignore[override]
        return _hooks(module).pre_backward(self, tensor, module)  # type: ignore[arg-type]

    @override
    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        _hooks(model).backward(self, tensor, model, *args, **kwargs)  # type: ignore[arg-type]

    @override
    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:  # type: ignore[override]
        return _hooks(module).post_backward(self, tensor, module)  # type: ignore[arg-type]

    @override
    def optimizer_step(self, optimizer: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        given = {} if model is None else {"model": model}
        return _hooks(model).optimizer_step(self, optimizer, **given, **kwargs)


def _weights_stay_in_a_pass(module: nn.Module) -> bool:
    """Whether no optimiser can change weights inside a forward context.

    A Trainer's context holds one step of the user, who steps the optimiser in it under manual optimisation. Fabric's
    context holds one forward.
    """
    return getattr(module, "automatic_optimization", True) is True


def _prepared_for_a_graph(module: nn.Module, layers: list[SparseBitLinear]) -> list[SparseBitLinear]:
    """Prepare the layers of a compiled model that has no owner for them, and return those that were prepared.

    A compiled graph cannot ask whether a weight has changed, so it would prepare each weight in every micro-batch.
    """
    mine = [layer for layer in layers if not layer.owner_prepares]
    if not mine or any(isinstance(layer._weight(), DTensor) for layer in mine) or not is_compiled(module):
        return []
    prepare_layers(module)
    for layer in mine:
        layer.owner_prepares = True
    return mine


def _token_ids(batch: Any) -> int:
    """The number of token ids in a batch.

    Token ids are the largest integer tensor among those with the fewest dimensions, at least two. A tensor with one
    more dimension holds something about each token, such as a teacher's likely next tokens.
    """
    found: dict[int, int] = {}  # The number of dimensions -> the elements of the largest tensor.

    def count(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and not tensor.is_floating_point() and tensor.dtype != torch.bool:
            found[tensor.ndim] = max(found.get(tensor.ndim, 0), tensor.numel())
        return tensor

    apply_to_collection(batch, Tensor, count)
    return found[min(found)] if found else 0


def _in_default_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _hooks(module: nn.Module | None) -> type[FabricPrecision]:
    """The class whose hooks suit the caller: a Trainer or Fabric."""
    trained = isinstance(module, LightningModule) and isinstance(module._trainer, Trainer)
    return Precision if trained else FabricPrecision
