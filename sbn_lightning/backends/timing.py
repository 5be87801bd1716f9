"""Measures how fast a layer runs on each backend, and compares each product with the dense one.

Calls are captured in CUDA graphs and replayed, so the GPU is timed and not the host. A graph goes through several
tensors of tokens that together exceed the L2 cache. In a training step the tokens of a layer come from memory as well,
and with one tensor the smaller layers of a foreign model would be timed from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from sbn_lightning.backends.base import Backend
from sbn_lightning.backends.candidates import TernaryLayer
from sbn_lightning.sparsity.ternary import quantize_activations

WRONG = "its product differs from the dense one"
_PREFERENCE = ("sparse", "int8", "reference")  # the order that decides where measured times are level
_CALLS = 20  # calls in a graph, which the host launches at once
_ROUNDS, _ROUND_MS = 9, 2.0
_LEVEL = 0.03  # times closer than this share of the best are level
CHECKED = 256  # tokens that are compared with the dense product
_MOST_COPIES = 5  # divides _CALLS, so that each copy is used equally often


def first_line(error: RuntimeError) -> str:
    """The first line of an error, or its class."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def decide(samples: Mapping[str, list[float]]) -> tuple[str, str]:
    """Takes the fastest backend. If several backends are level with it, a fixed order decides among them.

    Two backends are level if their median times differ by less than 3 %, or by less than the rounds of either scatter
    (the distance between the quartiles).

    Args:
        samples: The times of each backend in milliseconds, one a round. Where two kernels of one backend were timed,
            the second goes by the name of the backend and its own name, for example ``"sparse (ampere-sparse)"``.

    Returns:
        The name of the fastest, and the times in one line.
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

    level = sorted((name for name in times if is_level(name)), key=lambda name: _PREFERENCE.index(name.split()[0]))
    timed = ", ".join(f"{name} {time:.3f} ms" for name, time in times.items())
    if len(level) > 1:
        timed += f" ({' and '.join(level)} are level within the noise: {level[0]} comes first)"
    return level[0], timed


class Trial:
    """Random weights and tokens in the shape of a layer.

    Args:
        layer: The layer.
        device: The device to measure on.
        dtype: The dtype of the tokens.
        tokens: The number of tokens.
    """

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
        self.copies = [self.x, *(self.x.clone() for _ in range(copies_beyond_cache(self.x) - 1))]
        self.calls = 0
        self.sparsity = layer.sparsity
        self.bits = bits

    def prepare(self, backend: Backend) -> Any:
        """Make the weight for a backend."""
        with torch.no_grad():
            return backend.prepare(self.latent, None, self.sparsity.nm.n, self.sparsity)

    def run(self, backend: Backend, weight: Any, tokens: int | None = None) -> Tensor:
        """Multiply the first ``tokens`` tokens; None: all. Each call takes the next copy of the tokens."""
        x = self.copies[self.calls % len(self.copies)]
        self.calls += 1
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return backend.linear(x[:tokens], self.latent, weight, None, self.bits)

    def agrees(self, backend: Backend, weight: Any) -> bool:
        """Whether the product equals the dense one of the same codes, up to the rounding of its output."""
        x8, scale = quantize_activations(self.x[:CHECKED], self.bits)
        row_scale = weight.row_scale.double()
        exact = (x8.double() @ weight.codes.double().t()) * scale.double() * row_scale
        y = self.run(backend, weight, CHECKED).double()
        tolerance = torch.finfo(self.x.dtype).eps * exact.abs() + 1e-5 * scale.double() * row_scale
        if self.bits == 4:  # the last bits of a mean depend on the order of its sum, and rarely an integer does too
            tolerance += 2 * scale.double() * row_scale.max()
        return bool(((y - exact).abs() <= tolerance).all())


def copies_beyond_cache(x: Tensor) -> int:
    """The number of copies of a tensor that together exceed the L2 cache twice, at most ``_MOST_COPIES``."""
    if not x.is_cuda:
        return 1
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    needed = -(-2 * cache // max(x.nbytes, 1))
    return next((count for count in (1, 2, 4) if count >= needed), _MOST_COPIES)


def milliseconds(
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
                failed[name] = first_line(error)
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
