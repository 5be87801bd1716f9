"""``TernarySparseConversion``: makes an existing LightningModule ternary and sparse, before its optimiser exists."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sbn_lightning.callbacks.base import is_compiled
from sbn_lightning.callbacks.weight_averaging import refuse_plain_averaging
from sbn_lightning.checkpoints import lightning_file, search
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.distributed.own_module import check_not_alone
from sbn_lightning.distributed.sharding import keep_masks_out_of_broadcasts, reshard
from sbn_lightning.distributed.strategies import check_strategy
from sbn_lightning.layers.conversion import (
    ConversionReport,
    as_patterns,
    convert_quietly,
    revert_linears,
)
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.layers.matching import convert_to_match
from sbn_lightning.layers.ties import break_ties, of_ties
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.pattern import NMPattern


def decide_ties(model: nn.Module, noise: float) -> None:
    """Call :func:`~sbn_lightning.layers.ties.break_ties` before a training, and log what it changed."""
    reshard(model)  # A validation may have left whole weights in the place of the rows that are trained.
    if found := break_ties(model, noise):
        rank_zero_info(of_ties(found, noise))


class TernarySparseConversion(Callback):
    """Turns ``nn.Linear`` layers into :class:`SparseBitLinear` (or :class:`SparseLinear`), selected by name patterns.

    A model may build its layers in ``__init__`` or in ``configure_model``. In both cases they are converted before a
    checkpoint is loaded and before ``configure_optimizers``. The attribute ``report`` says which layers were converted,
    and which were skipped and why. The report is logged too.

    :meth:`revert` turns the layers back. Only a new callback converts a reverted model again.

    Args:
        sparsity: The options of the new layers: a :class:`SparsityConfig`, or only a pattern.
        include: One shell-style pattern or several, for the names of layers to convert. A pattern that matches a module
            also matches all layers inside.
        exclude: The patterns for layers to leave alone. ``exclude`` wins over ``include``.
        split_sizes: The rows of each part of fused layers, by name pattern; see :func:`convert_linears`.
        break_ties: Noise on weights that have ties at the edge of the mask when a training begins, as a share of their
            standard deviation; see :func:`~sbn_lightning.layers.ties.break_ties`. 0 takes weights as they are.
        **options: Single fields of :class:`SparsityConfig`. A recipe writes them beside ``include``, for example
            ``pattern: "2:4"``.

    Raises:
        ConfigError: When training starts, if nothing was converted, if something else replaced converted layers, if
            the model computes with the weight of a converted layer without calling the layer, or if the strategy
            cannot keep masks.
    """

    def __init__(
        self,
        sparsity: SparsityConfig | NMPattern | str | None = None,
        include: str | Sequence[str] = ("*",),
        exclude: str | Sequence[str] = (),
        *,
        split_sizes: dict[str, tuple[int, ...] | None] | None = None,
        break_ties: float = 0.01,
        **options: Any,
    ) -> None:
        self.break_ties = break_ties
        self.sparsity = SparsityConfig.make(sparsity, **options)
        self.split_sizes = split_sizes
        self.include, self.exclude = as_patterns(include), as_patterns(exclude)
        self.report: ConversionReport | None = None
        self._module: LightningModule | None = None
        self._ties_open = False  # Whether a training would be the first one of the converted layers.
        self._not_called: dict[str, RemovableHandle] = {}

    @staticmethod
    def revert(module: nn.Module) -> list[str]:
        """Turn the masked layers of ``module`` into plain layers with effective weights, and return their names."""
        return revert_linears(module)

    @staticmethod
    def load(
        module: nn.Module, path: str | Path, sparsity: SparsityConfig | NMPattern | str | None = None, **options: Any
    ) -> list[str]:
        """Convert a plain module like the one in a checkpoint, and load the checkpoint's weights and masks.

        ``load_from_checkpoint`` cannot do this for a class that builds plain layers, which have no place for masks.

        Args:
            module: A module with plain layers, changed in place: as a whole or, on an error, not at all. A module that
                builds layers in ``configure_model`` must have done so: call ``module.configure_model()`` first.
            path: A checkpoint file of a run with this callback, or the folder of the run.
            sparsity: The options of the layers, for a checkpoint that does not carry them.
            **options: Single fields of :class:`SparsityConfig`, as ``pattern="2:4"``.

        Returns:
            The names of the converted layers.

        Raises:
            DataError: If there is no checkpoint at ``path``, or if it is damaged.
            ConfigError: If the weights are those of another module, or if nothing says how layers were converted.
        """
        if any(masked_layers(module)):
            raise ConfigError(f"this {type(module).__name__} is converted already: use its load_state_dict")
        file = search.locate(path)
        checkpoint = lightning_file.load(file)
        state = checkpoint.get("state_dict")
        if not isinstance(state, dict):
            raise DataError(f"{file} is no checkpoint of Lightning: it holds no state_dict")
        if (reason := _why_not_of(module, state)) is not None:
            if isinstance(module, LightningModule) and is_overridden("configure_model", module):
                reason += "; if the module builds layers in configure_model, call module.configure_model() first"
            raise ConfigError(f"{file} is not of this {type(module).__name__}: {reason}")
        names = convert_to_match(module, _with_options(state, checkpoint), sparsity, **options)
        module.load_state_dict(state)
        return names

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_plain_averaging(trainer.callbacks)  # type: ignore[attr-defined]
        check_strategy(trainer.strategy)
        if self._module is pl_module:
            self._decide_ties(pl_module, stage)  # A validation may have converted the module.
            return
        if stage == "fit" and isinstance(getattr(trainer.strategy, "launcher", None), _MultiProcessingLauncher):
            rank_zero_warn(
                "TernarySparseConversion: this strategy (spawn, fork, notebook) trains a copy of the model in other "
                "processes; yours gets the trained weights and keeps its plain layers, which compute something else: "
                "call convert_linears on it with the same options, or load a checkpoint"
            )
        if not isinstance(pl_module, LightningModule) or not is_overridden("configure_model", pl_module):
            self._convert(pl_module, stage)
            return
        # The model may build its layers in configure_model. That runs after this hook, and no other hook fires before
        # the code that must see converted layers. So configure_model itself is wrapped.
        build = pl_module.configure_model

        @wraps(build)
        def build_and_convert() -> None:
            pl_module.__dict__.pop("configure_model", None)
            build()
            self._convert(pl_module, stage)

        pl_module.configure_model = build_and_convert  # type: ignore[method-assign]

    def state_dict(self) -> dict[str, Any]:
        """Return the options of the converted layers. A sharded model's own state dict does not carry them."""
        layers = masked_layers(self._module) if self._module is not None else ()
        return {"layers": {name: layer.sparsity.to_dict() for name, layer in layers}}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.report is not None
        layers = dict(masked_layers(pl_module))
        if len(layers) < len(self.report.converted):
            lost = [name for name in self.report.converted if name not in layers]
            raise ConfigError(
                f"converted layers were replaced or reverted before training began: {', '.join(lost)}; "
                "does the precision plugin swap linear layers? Use one that does not"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_not_alone(pl_module, trainer.strategy)
        # A model may pass the weight of a layer to some function and never call the layer. The first backward pass
        # shows this: the weight gets a gradient although the layer was not called. A compiled model is not watched,
        # because the hooks would make it compile twice.
        if not is_compiled(pl_module):
            for name, layer in masked_layers(pl_module):
                self._not_called[name] = layer.register_forward_pre_hook(partial(self._note_call, name))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._not_called:
            return
        bypassed = []
        for name, layer in masked_layers(pl_module):
            gradient = layer._parameters["weight"].grad  # type: ignore[union-attr]
            if name in self._not_called and gradient is not None and bool((gradient != 0).any()):
                bypassed.append(name)
        self._stop_watching()
        if bypassed:
            raise ConfigError(
                "the model computes with the dense weights of these layers without calling them, so they would be "
                f"neither sparse nor ternary: {', '.join(bypassed)}; exclude them"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)
        self._stop_watching()

    def _convert(self, module: LightningModule, stage: str) -> None:
        self.report = convert_quietly(
            module, self.sparsity, include=self.include, exclude=self.exclude, split_sizes=self.split_sizes
        )
        self._ties_open = True
        self._decide_ties(module, stage)
        if self.report.warning is not None:
            rank_zero_warn(f"TernarySparseConversion: {self.report.warning}")
        self._module = module
        keep_masks_out_of_broadcasts(module)
        rank_zero_info(f"TernarySparseConversion({self.sparsity.pattern}): {self.report}")

    def _decide_ties(self, module: LightningModule, stage: str) -> None:
        if stage == "fit" and self._ties_open:
            decide_ties(module, self.break_ties)
            self._ties_open = False

    def _note_call(self, name: str, layer: nn.Module, inputs: Any) -> None:
        self._not_called.pop(name).remove()

    def _stop_watching(self) -> None:
        for handle in self._not_called.values():
            handle.remove()
        self._not_called.clear()


def _with_options(state: dict[str, Tensor], checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict with the options that this callback has saved, if the state dict does not carry any."""
    own = checkpoint.get("callbacks", {}).get(TernarySparseConversion.__qualname__, {}).get("layers", {})
    if hasattr(state, "_metadata") or not own:
        return state
    carrying = OrderedDict(state)
    carrying._metadata = {name: {"sparsity": options} for name, options in own.items()}  # type: ignore[attr-defined]
    return carrying


def _why_not_of(module: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """Why a state dict with masks does not fit a module with plain layers; None if it fits."""
    own = module.state_dict()
    layers = [name.removesuffix("mask_bits") for name in saved if name.endswith(".mask_bits")]
    of_layers = {f"{layer}{part}" for layer in layers for part in ("mask_bits", "log_scale")}
    weights = {name: value for name, value in saved.items() if name not in of_layers}
    if absent := [name for name in own if name not in weights]:
        return f"it lacks {', '.join(absent[:3])}"
    if unknown := [name for name in weights if name not in own]:
        return f"it has {', '.join(unknown[:3])}, which the module lacks"
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != weights[name].shape:
            return f"{name} has the shape {tuple(weights[name].shape)} there and {tuple(value.shape)} in the module"
    return None
