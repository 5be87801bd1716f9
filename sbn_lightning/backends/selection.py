"""Which backend a layer gets, and why: what the hardware can do, and under ``auto`` what was measured.

``auto`` times every backend that can run a layer's shape, on random weights and tokens, quantisation included, and
drops any whose product differs from the dense one: wrong results have been reported from cuSPARSELt's algorithms. A
backend asked for by name is compared likewise, and refused. Layers of one shape share a measurement. Whatever is chosen
computes the same sums, so the choice changes speed alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from sbn_lightning.backends.reference import REFERENCE, Backend, WeightSpec
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.pattern import NMPattern
from sbn_lightning.sparsity.ternary import GammaOver, quantize_activations

if TYPE_CHECKING:
    from sbn_lightning.backends.integer import Engine, Gradients

BackendName = Literal["auto", "reference", "int8", "sparse"]
BACKENDS: tuple[BackendName, ...] = ("auto", "reference", "int8", "sparse")

WRONG = "its product differs from the dense one"
_ROUNDS, _REPEATS = 5, 4
_CHECKED = 256  # tokens that are compared with the dense product


class LayerShape(Protocol):
    """What a kernel asks of a layer before it says whether it can serve it."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def pattern(self) -> NMPattern: ...
    @property
    def activation_bits(self) -> int | None: ...


class TernaryLayer(LayerShape, Protocol):
    """What the measurement needs to know as well."""

    @property
    def split_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def gamma_over(self) -> GammaOver: ...


@dataclass(frozen=True)
class Choice:
    """What a layer runs on.

    Attributes:
        backend: ``"reference"``, ``"int8"`` or ``"sparse"``.
        engine: Which kernels, for the last two.
        why: One line.
    """

    backend: str
    engine: Engine | None
    why: str

    def make(self, gradients: Gradients) -> Backend:
        """The backend itself."""
        if self.engine is None:
            return REFERENCE
        from sbn_lightning.backends.integer import KernelBackend

        return KernelBackend(self.engine, sparse=self.backend == "sparse", gradients=gradients)


def engines(device: torch.device) -> tuple[dict[str, Engine], dict[str, str]]:
    """What ``device`` can run: the engine of ``"int8"`` and of ``"sparse"``, or the reason why there is none."""
    if find_spec("triton") is None:
        return {}, dict.fromkeys(("int8", "sparse"), "Triton is not installed")
    import sbn_kernels as sk

    if device.type != "cuda" and torch.cuda.is_available():
        return {}, dict.fromkeys(("int8", "sparse"), f"tensors are on the {device.type.upper()}")
    here = sk.capabilities(device if device.type == "cuda" else None)
    found: dict[str, Engine] = {}
    reasons: dict[str, str] = {}
    candidates: dict[str, list[tuple[str, Engine]]] = {
        "int8": [("ternary_gemm", "hopper"), ("int8_gemm", "portable")],
        "sparse": [("sparse_gemm", "hopper"), ("cusparselt", "cusparselt")],
    }
    for name, ways in candidates.items():
        able = [engine for op, engine in ways if here.can(op)]
        if device.type == "cpu" and not able:
            reasons[name] = "tensors are on the CPU"
        elif able:
            found[name] = able[0]
        else:
            reasons[name] = "; ".join(f"{op} {here.reasons[op]}" for op, _ in ways)
    return found, reasons


def unfit(layer: LayerShape, name: str, engine: Engine) -> str | None:
    """Why ``layer`` cannot run on a backend that the hardware has; None if it can."""
    if layer.activation_bits is None:
        return "activation_bits=None leaves nothing to multiply as integers"
    if name == "sparse" and (layer.pattern.m != 4 or layer.pattern.n > 2):
        return f"sparse tensor cores take 2:4, not {layer.pattern}"
    if engine == "cusparselt" and (layer.in_features % 32 or layer.out_features % 32):
        return f"cuSPARSELt needs multiples of 32, not {layer.in_features} -> {layer.out_features}"
    return None


def require(layers: Mapping[str, TernaryLayer], wanted: BackendName, device: torch.device) -> Engine:
    """The engine of the backend ``wanted``, ``"int8"`` or ``"sparse"``.

    Raises:
        ConfigError: If ``device`` has none or one of the layers does not fit it: what it needs and what would work.
    """
    found, reasons = engines(device)
    if wanted not in found:
        able = ", ".join(["auto", "reference", *found])
        raise ConfigError(f'backend "{wanted}" cannot run on {_describe(device)}: {reasons[wanted]}; use {able}')
    for name, layer in layers.items():
        if reason := unfit(layer, wanted, found[wanted]):
            raise ConfigError(_refusal(wanted, name, reason))
    return found[wanted]


def _refusal(wanted: str, name: str, reason: str) -> str:
    return f'backend "{wanted}" cannot run layer {name}: {reason}; use auto'


def choose(
    layers: Mapping[str, TernaryLayer], wanted: BackendName, device: torch.device, dtype: torch.dtype, tokens: int
) -> dict[str, Choice]:
    """Chooses a backend for each layer.

    Args:
        layers: By name.
        wanted: ``"auto"`` measures; the others are taken at their word.
        device: Where the layers run.
        dtype: Of their tokens.
        tokens: In a micro-batch, for the measurement.

    Raises:
        ConfigError: If ``wanted`` cannot run here or on one of the layers: what it needs and what would work.
    """
    if wanted == "reference":
        return {name: Choice("reference", None, "asked for") for name in layers}
    if wanted != "auto":
        engine = require(layers, wanted, device)
        checked = set()
        for name, layer in layers.items():
            if device.type == "cuda" and _key(layer) not in checked:
                checked.add(_key(layer))
                trial = _Trial(layer, device, dtype, min(tokens, _CHECKED))
                backend = Choice(wanted, engine, "").make("bf16")
                if not trial.agrees(backend, trial.prepare(backend)):
                    raise ConfigError(_refusal(wanted, name, WRONG))
        return {name: Choice(wanted, engine, f"asked for ({engine})") for name in layers}
    found, reasons = engines(device)
    measured: dict[tuple[object, ...], Choice] = {}
    choices = {}
    for name, layer in layers.items():
        if _key(layer) not in measured:
            measured[_key(layer)] = _fastest(layer, found, reasons, device, dtype, tokens)
        choices[name] = measured[_key(layer)]
    return choices


def _key(layer: TernaryLayer) -> tuple[object, ...]:
    """Layers that agree in this share a measurement."""
    return layer.in_features, layer.out_features, layer.pattern, layer.activation_bits, layer.split_sizes


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _fastest(
    layer: TernaryLayer,
    found: dict[str, Engine],
    reasons: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> Choice:
    remarks = [f"{name}: {reason}" for name, reason in reasons.items()]
    if not found and len(set(reasons.values())) == 1:
        remarks = list(reasons.values())[:1]
    candidates: dict[str, Backend] = {"reference": REFERENCE}
    for name, engine in found.items():
        if reason := unfit(layer, name, engine):
            remarks.append(f"{name}: {reason}")
        else:
            candidates[name] = Choice(name, engine, "").make("bf16")
    if len(candidates) == 1 or device.type != "cuda":
        return Choice("reference", None, "; ".join(remarks) or "kernels are timed on GPUs only")
    trial = _Trial(layer, device, dtype, tokens)
    times: dict[str, float] = {}
    for name, backend in candidates.items():
        try:
            weight = trial.prepare(backend)
            if name != "reference" and not trial.agrees(backend, weight):
                remarks.append(f"{name}: {WRONG}")
                continue
            times[name] = _milliseconds(partial(trial.run, backend, weight))
        except RuntimeError as error:  # of cuSPARSELt on a GPU that it does not know, for example
            if name == "reference":
                raise
            remarks.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    best = min(times, key=times.__getitem__)
    timed = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    return Choice(best, found.get(best), "; ".join([timed, *remarks]))


class _Trial:
    """Random weights and tokens in the shape of a layer."""

    def __init__(self, layer: TernaryLayer, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        assert layer.activation_bits is not None
        generator = torch.Generator(device).manual_seed(0)
        shape = layer.out_features, layer.in_features
        self.latent = torch.randn(shape, generator=generator, device=device)
        # Integers up to 127 times a power of two, another one for each token's neighbour: 8 bits hold them as they are,
        # so no rounding hides or feigns a difference, and a scale that is dropped or another token's shows.
        x = torch.randint(-127, 128, (tokens, layer.in_features), generator=generator, device=device)
        x[:, 0] = 127
        self.x = (x * 2.0 ** (torch.arange(tokens, device=device) % 7 - 3).unsqueeze(1)).to(dtype)
        self.spec = WeightSpec(layer.pattern, layer.split_sizes, layer.gamma_over)
        self.bits = layer.activation_bits

    def prepare(self, backend: Backend) -> Any:
        with torch.no_grad():
            return backend.prepare(self.latent, None, self.spec.pattern.n, self.spec)

    def run(self, backend: Backend, weight: Any, tokens: int | None = None) -> Tensor:
        with torch.no_grad(), torch.autocast(self.x.device.type, enabled=False):
            return backend.linear(self.x[:tokens], self.latent, weight, None, self.bits)

    def agrees(self, backend: Backend, weight: Any) -> bool:
        """Whether the product equals the dense one of the same codes, up to the rounding of its output."""
        x8, scale = quantize_activations(self.x[:_CHECKED], self.bits)
        row_scale = weight.row_scale.double()
        exact = (x8.double() @ weight.codes.double().t()) * scale.double() * row_scale
        y = self.run(backend, weight, _CHECKED).double()
        tolerance = torch.finfo(self.x.dtype).eps * exact.abs() + 1e-5 * scale.double() * row_scale
        if self.bits == 4:  # a mean's last bits depend on the order of its sum, and with them now and then an integer
            tolerance += 2 * scale.double() * row_scale.max()
        return bool(((y - exact).abs() <= tolerance).all())


def _milliseconds(run: Callable[[], Tensor]) -> float:
    """Median time of a call on the GPU, back to back."""
    for _ in range(2):
        run()
    samples = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_REPEATS):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / _REPEATS)
    return sorted(samples)[_ROUNDS // 2]


def table(layers: Mapping[str, TernaryLayer], choices: Mapping[str, Choice]) -> str:
    """The choices as text: layers that differ in a number only share a row."""
    rows: dict[tuple[str, ...], int] = {}
    for name, layer in layers.items():
        choice = choices[name]
        chosen = choice.backend if choice.engine is None else f"{choice.backend} ({choice.engine})"
        shape = f"{layer.in_features} -> {layer.out_features}"
        key = (re.sub(r"\b\d+\b", "*", name), shape, str(layer.pattern), chosen, choice.why)
        rows[key] = rows.get(key, 0) + 1
    cells: list[tuple[str, ...]] = [("layer", "shape", "pattern", "backend", "why")]
    cells += [(f"{key[0]} ({count})" if count > 1 else key[0], *key[1:]) for key, count in rows.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(4)] + [0]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
