"""Turns the linear layers of an existing LightningModule ternary and sparse, before its optimiser exists."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from sbn_lightning.convert import ConversionReport, convert_linears
from sbn_lightning.layers import Gradient, MaskSource
from sbn_lightning.pattern import NMPattern
from sbn_lightning.ternary import GammaOver


class TernarySparseConversion(Callback):
    """Swaps ``nn.Linear`` for :class:`SparseBitLinear` (or :class:`SparseLinear`) by name patterns.

    Works on modules built in ``__init__`` and in ``configure_model``; in both cases layers are converted before a
    checkpoint is loaded and before ``configure_optimizers``. What was converted, and what was skipped and why, is
    logged and kept in :attr:`report`.

    Args:
        pattern: "N:M".
        include: Shell-style patterns of layer names to convert; a pattern also matches everything below a module.
        exclude: Patterns of layers to leave alone; wins over ``include``.
        kind: ``"ternary"``, or ``"masked"`` for sparse layers without quantisation.
        activation_bits: 8, 4 or None.
        mask_source: ``"latent"`` or ``"ternary"``; see :class:`SparseBitLinear`.
        gradient: ``"dense"`` or ``"masked"``; see :class:`SparseBitLinear`.
        gamma_over: ``"dense"``, ``"kept"`` or ``"masked"``; see :class:`SparseBitLinear`.

    Raises:
        ConfigError: When training starts, if nothing was converted.
    """

    def __init__(
        self,
        pattern: NMPattern | str = "6:8",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = ("lm_head",),
        kind: Literal["ternary", "masked"] = "ternary",
        activation_bits: int | None = 8,
        mask_source: MaskSource = "latent",
        gradient: Gradient = "dense",
        gamma_over: GammaOver = "dense",
    ) -> None:
        self.pattern = NMPattern.parse(pattern)
        self.include, self.exclude, self.kind = tuple(include), tuple(exclude), kind
        self.activation_bits, self.mask_source = activation_bits, mask_source
        self.gradient, self.gamma_over = gradient, gamma_over
        self.report: ConversionReport | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.report is not None:
            return
        if not is_overridden("configure_model", pl_module):
            self._convert(pl_module)
            return
        # The model may be built in configure_model, which runs after this hook and before everything that must see
        # the converted layers; there is no hook in between.
        build = pl_module.configure_model

        @wraps(build)
        def build_and_convert() -> None:
            build()
            if self.report is None:
                self._convert(pl_module)

        pl_module.configure_model = build_and_convert  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("configure_model", None)

    def _convert(self, module: LightningModule) -> None:
        self.report = convert_linears(
            module,
            self.pattern,
            include=self.include,
            exclude=self.exclude,
            kind=self.kind,
            activation_bits=self.activation_bits,
            mask_source=self.mask_source,
            gradient=self.gradient,
            gamma_over=self.gamma_over,
        )
        rank_zero_info(f"TernarySparseConversion({self.pattern}): {self.report}")
