"""The one place that chooses hardware: which kernel a layer gets, and why.

Kernels say what they need and register themselves (:mod:`sbn_kernels.gemm.registry`). :func:`choose` asks the registry
for training, for packed layers and for decoding alike. Of the kernels of one backend ("int8" or "sparse") that can
serve a layer, the registry's order decides. Between backends a measurement decides, if the user asked for ``"auto"``:
the quantisation and the product are replayed as a CUDA graph, so the GPU is timed and not the host. Between
times that differ by less than the noise a fixed order decides, so two runs choose alike. Layers of one shape share a
measurement.

Every kernel is compared with the dense product before it is used, because wrong results have been reported from
cuSPARSELt's algorithms. Whatever is chosen computes the same sums, so the choice changes speed alone.

Layers that hold packed weights are not measured: the registry's order decides for them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from sbn_lightning.backends.reference import REFERENCE, Backend
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.sparsity.config import SparsityConfig
from sbn_lightning.sparsity.ternary import quantize_activations

if TYPE_CHECKING:
    from sbn_lightning.backends.integer import Gradients

BackendName = Literal["auto", "reference", "int8", "sparse"]
BACKENDS: tuple[BackendName, ...] = ("auto", "reference", "int8", "sparse")

WRONG = "its product differs from the dense one"
_PREFERENCE = ("sparse", "int8", "reference")  # the order that decides where measured times are level
_CALLS = 20  # calls in a graph, which the host launches at once
_ROUNDS, _ROUND_MS = 9, 2.0
_LEVEL = 0.03  # times closer than this share of the best are level
_CHECKED = 256  # tokens that are compared with the dense product


class TernaryLayer(Protocol):
    """What the choice asks of a layer."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def sparsity(self) -> SparsityConfig: ...


class _Shape(NamedTuple):
    """A layer as the registry sees it; the fields are those of ``sbn_kernels.gemm.registry.LinearShape``."""

    in_features: int
    out_features: int
    n: int
    m: int
    activation_bits: int | None


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

    def make(self, gradients: Gradients) -> Backend:
        """Makes the backend for a layer with latent weights."""
        if self.kernel is None:
            return REFERENCE
        from sbn_lightning.backends.integer import KernelBackend

        return KernelBackend(self.kernel, gradients=gradients)


class KernelStatus(NamedTuple):
    """One row of :func:`describe`.

    Attributes:
        kernel: The name of the kernel.
        serves: What the kernel does, in a few words.
        reason: Why the kernel does not run here; None if it runs.
    """

    kernel: str
    serves: str
    reason: str | None


def describe(device: torch.device | None = None) -> list[KernelStatus]:
    """Says which kernels run on a device, and why the others do not.

    Args:
        device: The device; None: the current GPU if there is one, else the CPU.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    nowhere = _why_none(device)
    if find_spec("triton") is None:
        return [KernelStatus("all kernels", "integer products", nowhere)]
    from sbn_kernels.catalog import report

    return [KernelStatus(row.kernel, row.serves, nowhere or row.reason) for row in report(_index(device))]


def candidates(
    layer: TernaryLayer | _Shape, device: torch.device, packed: bool = False
) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Asks the registry which kernels can serve a layer.

    Args:
        layer: The layer, or its shape.
        device: The device of the layer.
        packed: Whether the layer holds packed weights and no latent weight.

    Returns:
        For each backend that can serve the layer the name of its first kernel; for each other backend the reason; and
        the backends of which no kernel runs on the device, whatever the layer.
    """
    backends = ("int8", "sparse")
    if nowhere := _why_none(device):
        return {}, dict.fromkeys(backends, nowhere), set(backends)
    import sbn_kernels.catalog  # noqa: F401 (registers the kernels)
    from sbn_kernels.gemm.registry import products

    found: dict[str, str] = {}
    reasons: dict[str, str] = {}
    absent: set[str] = set()
    for backend in backends:
        kernels = [kernel for kernel in products(backend) if kernel.most_tokens is None]
        missing = [f"{kernel.name} {reason}" for kernel in kernels if (reason := kernel.needs.missing(_index(device)))]
        here = [kernel for kernel in kernels if kernel.needs.missing(_index(device)) is None]
        misfits = []
        for kernel in here:
            if (reason := unfit(layer, kernel.name, packed)) is None:
                found[backend] = kernel.name
                break
            misfits.append(reason)
        else:
            on_cpu = device.type != "cuda" and not here
            reasons[backend] = "tensors are on the CPU" if on_cpu else "; ".join(dict.fromkeys(misfits or missing))
            if not here:
                absent.add(backend)
    return found, reasons, absent


def unfit(layer: TernaryLayer | _Shape, kernel: str, packed: bool = False) -> str | None:
    """Says why a layer cannot run on a kernel, whatever the machine.

    Args:
        layer: The layer, or its shape.
        kernel: The name of the kernel.
        packed: Whether the layer holds packed weights and no latent weight.

    Returns:
        The reason in one line, or None if the layer can run.
    """
    from sbn_kernels.gemm.registry import LinearShape, product

    reason = product(kernel).unfit(LinearShape(*_shape(layer)))
    if packed and reason is None and not product(kernel).for_packed_layers:
        reason = f"{kernel} reads no packed weights"
    return reason


def engines(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    """What ``device`` can run for a layer that every kernel fits.

    Returns:
        For each backend the name of its first kernel; for each other backend the reason.
    """
    found, reasons, _ = candidates(_Shape(128, 128, 2, 4, 8), device)
    return found, reasons


def _why_none(device: torch.device) -> str | None:
    """Why no kernel at all can run on ``device``."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda" and torch.cuda.is_available():
        return f"tensors are on the {device.type.upper()}"
    return None


def _index(device: torch.device) -> int | None:
    """The number of a GPU; None for the CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _shape(layer: TernaryLayer | _Shape) -> _Shape:
    if isinstance(layer, _Shape):
        return layer
    sparsity = layer.sparsity
    return _Shape(layer.in_features, layer.out_features, sparsity.nm.n, sparsity.nm.m, sparsity.activation_bits)


def require(
    layers: Mapping[str, TernaryLayer | _Shape], wanted: str, device: torch.device, packed: bool = False
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
            raise ConfigError(f'backend "{wanted}" cannot run on {_describe(device)}: {reasons[wanted]}; use {able}')
        if wanted not in found and packed and "reads no packed weights" in reasons[wanted]:
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
            trial = _Trial(layer, device, dtype, min(tokens, _CHECKED))
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
    wanted: Literal["auto", "reference", "kernels", "int8"],
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
            ones. ``"auto"``: as ``"kernels"``, or the reference where no kernel can run.
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
        shape = _Shape(in_features, out_features, n, m, activation_bits)
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


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


def _fastest(layer: TernaryLayer, device: torch.device, dtype: torch.dtype, tokens: int) -> Choice:
    found, reasons, _ = candidates(layer, device)
    remarks = [f"{name}: {reason}" for name, reason in reasons.items()]
    if not found and len(set(reasons.values())) == 1:
        remarks = list(reasons.values())[:1]
    if not found or device.type != "cuda":
        return Choice("reference", None, "; ".join(remarks) or "kernels are timed on GPUs only")
    trial = _Trial(layer, device, dtype, tokens)
    runs: dict[str, Callable[[], Tensor]] = {}
    for name in ("reference", *found):
        backend = REFERENCE if name == "reference" else Choice(name, found[name], "").make("bf16")
        try:
            weight = trial.prepare(backend)
            if name != "reference" and not trial.agrees(backend, weight):
                remarks.append(f"{name}: {WRONG}")
                continue
            runs[name] = partial(trial.run, backend, weight)
        except RuntimeError as error:  # for example from cuSPARSELt on a GPU that cuSPARSELt does not know
            if name == "reference":
                raise
            remarks.append(f"{name}: {_first_line(error)}")
    samples, failed = _milliseconds(runs, device)
    remarks += [f"{name}: {reason}" for name, reason in failed.items()]
    best, why = decide(samples)
    return Choice(best, found.get(best), "; ".join([why, *remarks]))


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def decide(samples: Mapping[str, list[float]]) -> tuple[str, str]:
    """Takes the fastest backend. If several backends are level with it, a fixed order decides among them.

    Two backends are level if their median times differ by less than 3 %, or by less than the rounds of either scatter
    (the distance between the quartiles).

    Args:
        samples: The times of each backend in milliseconds, one a round.

    Returns:
        The name of the backend, and the times in one line.
    """
    times = {name: median(rounds) for name, rounds in samples.items()}
    best = min(times, key=times.__getitem__)

    def scatter(name: str) -> float:
        if len(samples[name]) < 2:
            return 0.0
        low, _, high = quantiles(samples[name], n=4)
        return high - low

    def is_level(name: str) -> bool:
        allowed = max(_LEVEL * times[best], scatter(best), scatter(name))
        return times[name] - times[best] <= allowed

    level = sorted((name for name in times if is_level(name)), key=_PREFERENCE.index)
    timed = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    if len(level) > 1:
        timed += f" ({' and '.join(level)} are level within the noise: {level[0]} comes first)"
    return level[0], timed


class _Trial:
    """Random weights and tokens in the shape of a layer."""

    def __init__(self, layer: TernaryLayer, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        bits = layer.sparsity.activation_bits
        assert bits is not None
        generator = torch.Generator(device).manual_seed(0)
        shape = layer.out_features, layer.in_features
        self.latent = torch.randn(shape, generator=generator, device=device)
        # Each token is integers up to 127 times a power of two, and the next token has another power. 8 bits hold such
        # tokens exactly, so no rounding hides or feigns a difference. A scale that is dropped, or that belongs to
        # another token, shows.
        x = torch.randint(-127, 128, (tokens, layer.in_features), generator=generator, device=device)
        x[:, 0] = 127
        self.x = (x * 2.0 ** (torch.arange(tokens, device=device) % 7 - 3).unsqueeze(1)).to(dtype)
        self.sparsity = layer.sparsity
        self.bits = bits

    def prepare(self, backend: Backend) -> Any:
        with torch.no_grad():
            return backend.prepare(self.latent, None, self.sparsity.nm.n, self.sparsity)

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
        if self.bits == 4:  # the last bits of a mean depend on the order of its sum, and rarely an integer does too
            tolerance += 2 * scale.double() * row_scale.max()
        return bool(((y - exact).abs() <= tolerance).all())


def _milliseconds(
    runs: Mapping[str, Callable[[], Tensor]], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times calls on the GPU: each is captured in a CUDA graph several times over, and the graphs are replayed in turn.

    The graphs take turns, so that a change of the clock affects all of them equally.

    Args:
        runs: The calls by name.
        device: The GPU.

    Returns:
        For each name the milliseconds of a call, one value a round; and the reason for each that cannot be captured.
    """
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    failed: dict[str, str] = {}
    with torch.cuda.device(device):
        for name, run in runs.items():
            try:
                graph = _capture(run)
                graphs[name] = graph, max(1, round(_ROUND_MS / max(_replay(graph, 1), 1e-3)))
            except RuntimeError as error:
                if name == "reference":
                    raise
                failed[name] = _first_line(error)
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(_ROUNDS):
            for name, (graph, replays) in graphs.items():
                samples[name].append(_replay(graph, replays) / (replays * _CALLS))
    return samples, failed


def _capture(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of ``_CALLS`` calls. A call before the capture lets kernels tune and load themselves."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # "thread_local": the threads of a data loader or of NCCL may call CUDA while this thread captures.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            run()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """The milliseconds that ``replays`` replays take."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


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
