"""The host's side of the decode step: buffers, launch, CUDA graph, deadline and recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sbn_kernels.decode.step.plan import SHARED_BYTES, Plan, Shape, refusal
from sbn_kernels.decode.step.planner import make_plan
from sbn_kernels.decode.step.schedule import schedule
from sbn_kernels.decode.step.weights import PackedWeights
from sbn_kernels.runtime.capability import Needs, UnsupportedError, multiprocessors
from sbn_kernels.runtime.devices import check_one_device

NEEDS = Needs("decode step", only=(9, 0), gluon=True)
EMPTY = 0x80  # as in ptx.py, which needs Triton 3.9
_TENSORS = ("words", "norms", "embedding", "head", "cos", "sin", "head_scale")  # of PackedWeights
_LOWEST = -(2**63)  # as in head.py
_FIRST_EPOCH = 1  # fresh buffers hold zeros, and no word of the first layer may look like a zero


class StepUnavailableError(UnsupportedError):
    """The device cannot run the kernel; the message says why."""


class StepTimeoutError(RuntimeError):
    """A step waited longer than its deadline. The results of the step are wrong; the device is not harmed."""


def supports(shape: Shape, batch: int, device: torch.device, activation_bits: int | None = 8) -> str | None:
    """Why the decode step cannot compute a model on a device.

    Args:
        shape: The shape of the model.
        batch: The number of sequences.
        device: The device that holds the model.
        activation_bits: The activation bits of the model's ternary layers.

    Returns:
        The reason in one line, or None if the step can compute the model.
    """
    reason = refusal(shape, batch, activation_bits)
    if reason is not None:
        return reason
    if device.type != "cuda":
        return f"needs a model on a CUDA GPU, not on the {device.type.upper()}"
    index = _index(device) if torch.cuda.is_available() else None
    reason = NEEDS.missing(index)
    if index is None or reason is not None:
        return reason
    try:
        make_plan(shape, batch, multiprocessors(index))
    except ValueError as error:
        return str(error)
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _check_devices(weights: PackedWeights, caches: Sequence[tuple[Tensor, Tensor]], lengths: Tensor | None) -> None:
    of_model = {name: getattr(weights, name) for name in _TENSORS}
    of_caches = {
        f"the {name} of layer {i}": cache
        for i, pair in enumerate(caches)
        for name, cache in zip(("keys", "values"), pair, strict=True)
    }
    tensors = {**of_model, **of_caches, "lengths": lengths}
    check_one_device(NEEDS.op, list(tensors), list(tensors.values()))


class DecodeStep:
    """Adds one token to each of ``batch`` sequences, from the embedding to the logits, with one kernel.

    The caller owns the caches and fills them for the prompts. ``lengths`` has the number of tokens of each row. A step
    writes the keys and values of the next token behind the tokens of the row, and adds one to ``lengths``. A row of
    ``max_length`` tokens does not grow: its last token is replaced.

    The programs of the grid wait for each other, so the launch is cooperative: the device runs all programs at the same
    time or refuses the launch. Every wait has a deadline. A step that passes the deadline ends, sets an error flag, and
    leaves wrong results; :meth:`check` reads the flag.

    Args:
        weights: The packed weights of the model.
        caches: The keys and values of each layer, bfloat16 ``[batch, kv_heads, slots, head_size]``, contiguous. Their
            addresses must not change.
        max_length: The number of tokens that a row can have; at most ``slots`` and the positions of the rotary tables.
        lengths: The number of tokens of each row, int64 ``[batch]`` on the device, shared with the caller; zeros if not
            given.
        logits_dtype: The dtype of the logits: ``torch.bfloat16``, as the model under autocast, or ``torch.float32``.
        programs: The number of programs of the grid; one for each multiprocessor if not given.
        timeout: The deadline of a step in seconds.
        cuda_graph: Whether to replay the launch from a CUDA graph.
        traced: Whether to write down when each program reaches each moment of ``plan.STAMPS``; see :attr:`trace`.

    Attributes:
        tokens: The token ids that a step reads, int64 ``[batch]``. :meth:`step` copies its argument here.
        logits: The logits that a step writes, ``[batch, vocab]``.
        chosen: The most likely token of each row, which a step writes, int64 ``[batch]``. Among equal logits the first
            wins, as in ``torch.argmax``.
        lengths: The number of tokens of each row, int64 ``[batch]``.
        plan: The plan of the kernel.
        trace: The times of the last step if it is traced, in cycles of the multiprocessor and in nanoseconds, int64
            ``[programs, layers + 1, stamps, 2]``.

    Raises:
        StepUnavailableError: If the device cannot run the kernel, or refuses to run all programs at the same time.
        ValueError: If the caches do not fit the model, or tensors are on several devices.
    """

    def __init__(
        self,
        weights: PackedWeights,
        caches: Sequence[tuple[Tensor, Tensor]],
        max_length: int,
        *,
        lengths: Tensor | None = None,
        logits_dtype: torch.dtype = torch.bfloat16,
        programs: int | None = None,
        timeout: float = 2.0,
        cuda_graph: bool = True,
        traced: bool = False,
    ) -> None:
        shape, device = weights.shape, weights.words.device
        self.batch = batch = caches[0][0].shape[0]
        _check_devices(weights, caches, lengths)
        reason = supports(shape, batch, device)
        if reason is not None:
            raise StepUnavailableError(f"{NEEDS.op}: {reason}")
        self.weights, self.caches, self.max_length, self.device = weights, list(caches), max_length, device
        self.slots = self._check_caches()
        count = multiprocessors(_index(device)) if programs is None else programs
        plan = make_plan(shape, batch, count, SHARED_BYTES)
        self.plan: Plan = replace(plan, traced=traced, head_bits=weights.head_bits)
        self.timeout = timeout
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device) if lengths is None else lengths
        self.logits = torch.zeros(batch, shape.vocab, dtype=logits_dtype, device=device)
        self._make_buffers()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            self._try_launch()
            if cuda_graph:
                for source in (self.tokens, self.chosen):
                    graph = self._graphs[source.data_ptr()] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        self._launch(source)

    def step(self, tokens: Tensor) -> Tensor:
        """Adds a token to each row.

        The call does not wait for the device. Call :meth:`check` before the results are used. A step after a failed
        step does nothing.

        Args:
            tokens: The token ids, int64 ``[batch]``. Passing :attr:`tokens` or :attr:`chosen` itself saves a copy.

        Returns:
            The logits of the token after these, ``[batch, vocab]``. The next step overwrites them.
        """
        source = self.chosen if tokens.data_ptr() == self.chosen.data_ptr() else self.tokens
        if tokens.data_ptr() != source.data_ptr():
            self.tokens.copy_(tokens)
        graph = self._graphs.get(source.data_ptr())
        if graph is None:
            with torch.cuda.device(self.device):
                self._launch(source)
        else:
            graph.replay()
        return self.logits

    @property
    def flag(self) -> Tensor:
        """The error flag on the device, int32: 0, or 1 once a step has passed its deadline."""
        return self._state[1]

    def check(self) -> None:
        """Waits for the device and checks that no step failed.

        Raises:
            StepTimeoutError: If a step since the last :meth:`recover` has passed its deadline.
        """
        if int(self._state[1]):
            raise StepTimeoutError(
                f"a decode step waited longer than timeout={self.timeout} seconds for its own programs. Its logits and "
                "cache entries are wrong: call recover(), set lengths, and repeat the step"
            )

    def recover(self) -> None:
        """Makes the next step independent of a failed step. The caller sets ``lengths`` again."""
        for buffer in (
            self._x,
            self._y,
            self._qkv,
            self._parts,
            self._parts_m,
            self._attended,
            self._attended_m,
            self._hidden,
            self._places,
            self._state,
        ):
            buffer.zero_()
        self._shared.fill_(EMPTY)
        self._best[: self.batch] = _LOWEST
        self._best[self.batch] = 0
        self._state[0] = _FIRST_EPOCH

    def _check_caches(self) -> int:
        s = self.weights.shape
        slots = self.caches[0][0].shape[2]
        if len(self.caches) != s.layers:
            raise ValueError(f"there are caches for {len(self.caches)} layers, the model has {s.layers}")
        for tensor in (tensor for pair in self.caches for tensor in pair):
            if tuple(tensor.shape) != (self.batch, s.kv_heads, slots, s.head_size):
                raise ValueError(f"a cache is {list(tensor.shape)}, not [batch, kv_heads, slots, head_size]")
            if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
                raise ValueError(f"a cache is {tensor.dtype}, strides {tensor.stride()}: need bfloat16, contiguous")
        positions = self.weights.cos.shape[0]
        if not 1 <= self.max_length <= min(slots, positions):
            raise ValueError(f"max_length={self.max_length} is outside 1 to {min(slots, positions)}")
        return slots

    def _make_buffers(self) -> None:
        p = self.plan

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        self._x, self._y = zeros(p.batch, p.d_model), zeros(p.batch, p.d_model)
        self._qkv, self._hidden = zeros(p.batch, p.qkv_heads, p.head_size), zeros(p.batch, p.d_ffn)
        self._parts = zeros(p.splits, p.batch, p.heads, p.head_size, dtype=torch.int64)
        self._parts_m = zeros(p.splits, p.batch, p.heads, 2, dtype=torch.int64)
        self._attended = zeros(p.direct_parts, p.batch, p.heads, p.head_size)
        self._attended_m = zeros(p.direct_parts, p.batch, p.heads, 2, dtype=torch.int64)
        self._shared = zeros(2, p.shared_bytes if p.o.shared else 16, dtype=torch.uint8).fill_(EMPTY)
        self._places = zeros(5, p.batch, 2, dtype=torch.int64)
        self.trace = zeros(*((p.programs, p.layers + 1, p.stamps, 2) if p.traced else (2,)), dtype=torch.int64)
        self.chosen = zeros(p.batch, dtype=torch.int64)
        self._best = zeros(p.batch + 1, dtype=torch.int64)
        self._best[: p.batch] = _LOWEST
        self._state = zeros(2)
        self._state[0] = _FIRST_EPOCH
        addresses = [[keys.data_ptr(), values.data_ptr()] for keys, values in self.caches]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self._table = torch.tensor(schedule(p), dtype=torch.int32, device=self.device)

    def _launch(self, tokens: Tensor) -> None:
        from sbn_kernels.decode.step.kernel import decode_step_kernel

        w = self.weights
        head_scale = w.cos if w.head_scale is None else w.head_scale  # The kernel reads no scales of a bfloat16 head.
        decode_step_kernel[(self.plan.programs,)](
            tokens, self.lengths, self._state, self._addresses, w.cos, w.sin, w.embedding, w.words, w.norms,
            w.head, head_scale, self.logits, self._best, self.chosen, self._x, self._y, self._qkv, self._parts,
            self._parts_m, self._attended, self._attended_m, self._hidden, self._shared, self._places, self._table,
            self.trace, int(self.timeout * 1e9), self.slots, self.max_length, self.plan,
            num_warps=self.plan.warps, maxnreg=255, enable_fp_fusion=False, launch_cooperative_grid=True,
        )  # fmt: skip

    def _try_launch(self) -> None:
        """Compiles and launches the kernel with the error flag set, so that it does nothing."""
        from triton import TritonError

        self._state[1] = 1
        try:
            self._launch(self.tokens)
            torch.cuda.synchronize()
        except TritonError as error:
            raise StepUnavailableError(f"Triton cannot compile the decode step for this model: {error}") from error
        except RuntimeError as error:
            raise StepUnavailableError(
                f"the device does not run {self.plan.programs} programs of the decode step at the same time: {error}"
            ) from error
        self._state[1] = 0
