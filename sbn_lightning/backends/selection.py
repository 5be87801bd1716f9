"""The one place that chooses hardware: which kernel a layer gets, and why.

Kernels say what they need and register themselves (:mod:`sbn_kernels.gemm.registry`). :func:`choose` asks the registry
for training, for packed layers and for decoding alike. Of the kernels of one backend ("int8" or "sparse") that can
serve a layer, the registry's order decides. Between backends a measurement decides, if the user asked for ``"auto"``
(:mod:`sbn_lightning.backends.timing`). The measurement also decides about kernels of one backend where nobody has timed
one of them. Between times that differ by less than the noise a fixed order decides, so two runs choose alike. Layers of
one shape share a measurement.

Every kernel is compared with the dense product before it is used, because wrong results have been reported from
cuSPARSELt's algorithms. Whatever is chosen computes the same sums, so the choice changes speed alone.

Layers that hold packed weights are not measured: the registry's order decides for them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from sbn_lightning.backends.base import Backend, Gradients, SavedGates
from sbn_lightning.backends.candidates import (
    KernelStatus,
    Shape,
    TernaryLayer,
    candidates,
    describe,
    engines,
    named,
    rivals,
    unfit,
)
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.backends.timing import CHECKED, WRONG, Trial, decide, first_line, milliseconds
from sbn_lightning.core.errors import ConfigError

BackendName = Literal["auto", "reference", "int8", "sparse"]
BACKENDS: tuple[BackendName, ...] = ("auto", "reference", "int8", "sparse")

__all__ = [
    "BACKENDS",
    "BackendName",
    "Choice",
    "KernelStatus",
    "TernaryLayer",
    "candidates",
    "check_options",
    "choose",
    "choose_packed",
    "decide",
    "describe",
    "engines",
    "pack_for",
    "require",
    "table",
    "unfit",
]


@dataclass(frozen=True)
class Choice:
    """What a layer runs on.

    Attributes:
        backend: ``"reference"``, ``"int8"`` or ``"sparse"``.
        kernel: The name of the kernel; None for the reference.
        why: The reason, one line.
    """

    backend: str
    kernel: str | None
    why: str

    def make(self, gradients: Gradients, saved_gates: bool = False, joins: bool = True) -> Backend:
        """Makes the backend for a layer with latent weights.

        Args:
            gradients: The kind of gradients.
            saved_gates: Whether gates and ups are saved for the backward as int8 codes.
            joins: Whether layers that read the same tokens may become one product.
        """
        if self.kernel is None:
            return REFERENCE
        from sbn_lightning.backends.integer import KernelBackend

        return KernelBackend(self.kernel, gradients=gradients, saved_gates=saved_gates, joins=joins)


def check_options(owner: str, backend: str, gradients: str, saved_gates: str, tokens: int | None) -> None:
    """Refuses options of a training run that do not exist or cannot work together.

    Args:
        owner: What has the options, for the message.
        backend: The backend that the user asked for.
        gradients: The kind of gradients.
        saved_gates: How gates and ups are saved.
        tokens: The number of tokens in a micro-batch; None if it is not known.

    Raises:
        ConfigError: If an option has a value that cannot work.
    """
    for option, value, known in (
        ("backend", backend, BACKENDS),
        ("gradients", gradients, get_args(Gradients)),
        ("saved_gates", saved_gates, get_args(SavedGates)),
    ):
        if value not in known:
            raise ConfigError(f"{owner}: {option}={value!r} is not one of {', '.join(known)}")
    if backend == "reference" and (gradients != "bf16" or saved_gates != "full"):
        option = f'gradients="{gradients}"' if gradients != "bf16" else 'saved_gates="int8"'
        raise ConfigError(f'{owner}: {option} needs integer tensor cores: use backend="auto", "int8" or "sparse"')
    if tokens is not None and tokens < 1:
        raise ConfigError(f"{owner}: tokens={tokens} must be at least 1")


def require(
    layers: Mapping[str, TernaryLayer | Shape], wanted: str, device: torch.device, packed: bool = False
) -> dict[str, str]:
    """Finds the kernel of the backend that the user asked for, for each layer.

    Args:
        layers: The layers by name.
        wanted: ``"int8"`` or ``"sparse"``.
        device: The device of the layers.
        packed: Whether the layers hold packed weights and no latent weight.

    Returns:
        The name of the kernel of each layer.

    Raises:
        ConfigError: If ``device`` has no such kernel or a layer does not fit: what is needed and what would work.
    """
    chosen = {}
    for name, layer in layers.items():
        found, reasons, absent = candidates(layer, device, packed)
        if wanted in absent:
            able = ", ".join(["auto", "reference", *sorted(engines(device)[0])])
            raise ConfigError(f'backend "{wanted}" cannot run on {named(device)}: {reasons[wanted]}; use {able}')
        if wanted not in found and packed and wanted in candidates(layer, device)[0]:  # It fits with latent weights.
            raise ConfigError(
                f'backend "{wanted}" cannot run packed weights here: {reasons[wanted]}; use auto, or give the '
                "checkpoint that they were exported from"
            )
        if wanted not in found:
            raise ConfigError(_refusal(wanted, name, reasons[wanted]))
        chosen[name] = found[wanted]
    return chosen


def _refusal(wanted: str, name: str, reason: str) -> str:
    return f'backend "{wanted}" cannot run layer {name}: {reason}; use auto'


def choose(
    layers: Mapping[str, TernaryLayer], wanted: BackendName, device: torch.device, dtype: torch.dtype, tokens: int
) -> dict[str, Choice]:
    """Chooses a kernel for each layer with latent weights.

    Args:
        layers: The layers by name.
        wanted: ``"auto"`` measures; any other backend is taken if it can run.
        device: The device of the layers.
        dtype: The dtype of their tokens.
        tokens: The number of tokens in a micro-batch, which the measurement uses.

    Returns:
        The choice for each layer.

    Raises:
        ConfigError: If ``wanted`` cannot run here or on one of the layers: what is needed and what would work.
    """
    if wanted == "reference":
        return {name: Choice("reference", None, "asked for") for name in layers}
    # Each expert of a mixture multiplies by itself, so the shape of one expert decides.
    layers = {name: getattr(layer, "one_expert", layer) for name, layer in layers.items()}
    made: dict[tuple[object, ...], Choice] = {}
    if wanted == "auto":
        for layer in layers.values():
            if _key(layer) not in made:
                made[_key(layer)] = _fastest(layer, device, dtype, tokens)
        return {name: made[_key(layer)] for name, layer in layers.items()}
    kernels = require(layers, wanted, device)
    for name, layer in layers.items():
        if _key(layer) in made:
            continue
        made[_key(layer)] = choice = Choice(wanted, kernels[name], f"asked for ({kernels[name]})")
        if device.type == "cuda":
            trial = Trial(layer, device, dtype, min(tokens, CHECKED))
            backend = choice.make("bf16")
            if not trial.agrees(backend, trial.prepare(backend)):
                raise ConfigError(_refusal(wanted, name, WRONG))
    return {name: made[_key(layer)] for name, layer in layers.items()}


def choose_packed(
    in_features: int,
    out_features: int,
    n: int,
    m: int,
    activation_bits: int | None,
    wanted: Literal["auto", "reference", "kernels", "int8", "grouped"],
    device: torch.device,
) -> Choice:
    """Chooses a kernel for a layer that holds packed weights. Nothing is measured: the registry's order decides.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        n: Weights that are not zero in a group, at most.
        m: Weights of a group.
        activation_bits: Bits of a quantised token; None: tokens are not quantised.
        wanted: ``"kernels"``: sparse tensor cores where device and pattern allow, else dense ones. ``"int8"``: dense
            ones. ``"auto"``: as ``"kernels"``, or the reference where no kernel can run. ``"grouped"``: as
            ``"kernels"``.
        device: The device of the layer.

    Returns:
        The choice.

    Raises:
        ConfigError: If ``wanted`` cannot run here.
    """
    if wanted == "reference":
        return Choice("reference", None, "asked for")
    if activation_bits is None:  # no machine would help
        reason = "activation_bits is null, and the kernels multiply integers"
    else:
        shape = Shape(in_features, out_features, n, m, activation_bits)
        found, reasons, _ = candidates(shape, device, packed=True)
        for backend in ("int8",) if wanted == "int8" else ("sparse", "int8"):
            if backend in found:
                return Choice(backend, found[backend], f"the first kernel that fits ({found[backend]})")
        reason = reasons["int8"]
    if wanted == "auto":
        return Choice("reference", None, reason)
    raise ConfigError(f"backend={wanted!r} cannot run a packed layer here: {reason}; use 'auto' or 'reference'")


def pack_for(kernel: str, codes: Tensor) -> tuple[Tensor | None, str]:
    """Packs the codes of a layer without latent weights for the kernels that will read them.

    If the kernel reads plain codes, a kernel for few tokens that reads packed words is added, if one exists.

    Args:
        kernel: The name of the kernel for many tokens.
        codes: int8 ``[out, in]``.

    Returns:
        The packed weight and its form; None and ``"codes"`` if no kernel reads anything but the codes.
    """
    from sbn_kernels.gemm import registry

    many = registry.product(kernel)
    form = registry.form_for_few_tokens(many, codes.device.index)
    if form is None:
        return None, many.form
    packer = many if many.form == form else registry.product(registry.readers(form, codes.device.index)[0])
    return packer.pack(codes), form


def _key(layer: TernaryLayer) -> tuple[object, ...]:
    """The properties that are equal in layers that share a measurement."""
    sparsity = layer.sparsity
    return layer.in_features, layer.out_features, sparsity.nm, sparsity.activation_bits, sparsity.split_sizes


def _fastest(layer: TernaryLayer, device: torch.device, dtype: torch.dtype, tokens: int) -> Choice:
    found, reasons, _ = candidates(layer, device)
    remarks = [f"{name}: {reason}" for name, reason in reasons.items()]
    if not found and len(set(reasons.values())) == 1:
        remarks = list(reasons.values())[:1]
    if not found or device.type != "cuda":
        return Choice("reference", None, "; ".join(remarks) or "kernels are timed on GPUs only")
    trial = Trial(layer, device, dtype, tokens)
    runs: dict[str, Callable[[], Tensor]] = {}
    named_choices = {"reference": Choice("reference", None, "")}
    for name, kernel in found.items():
        named_choices[name] = Choice(name, kernel, "")
        named_choices |= {f"{name} ({rival})": Choice(name, rival, "") for rival in rivals(layer, device, name, kernel)}
    for name, choice in named_choices.items():
        backend = REFERENCE if choice.kernel is None else choice.make("bf16")
        try:
            weight = trial.prepare(backend)
            if name != "reference" and not trial.agrees(backend, weight):
                remarks.append(f"{name}: {WRONG}")
                continue
            runs[name] = partial(trial.run, backend, weight)
        except RuntimeError as error:  # for example from cuSPARSELt on a GPU that cuSPARSELt does not know
            if name == "reference":
                raise
            remarks.append(f"{name}: {first_line(error)}")
    samples, failed = milliseconds(runs, device)
    remarks += [f"{name}: {reason}" for name, reason in failed.items()]
    best, why = decide(samples)
    return replace(named_choices[best], why="; ".join([why, *remarks]))


def table(layers: Mapping[str, TernaryLayer], choices: Mapping[str, Choice]) -> str:
    """The choices as text; layers whose names differ in a number only share a row."""
    rows: dict[tuple[str, ...], int] = {}
    for name, layer in layers.items():
        choice = choices[name]
        chosen = choice.backend if choice.kernel is None else f"{choice.backend} ({choice.kernel})"
        shape = f"{layer.in_features} -> {layer.out_features}"
        key = (re.sub(r"\b\d+\b", "*", name), shape, str(layer.sparsity.pattern), chosen, choice.why)
        rows[key] = rows.get(key, 0) + 1
    cells: list[tuple[str, ...]] = [("layer", "shape", "pattern", "backend", "why")]
    cells += [(f"{key[0]} ({count})" if count > 1 else key[0], *key[1:]) for key, count in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(4)] + [0]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
