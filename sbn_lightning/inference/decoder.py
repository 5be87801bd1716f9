"""Run a model with a key/value cache: prompts are read at once, and then each step adds one token.

The cache is static: for each layer ``[batch, key/value heads, max_length, head size]``, allocated once. Prompts of
different lengths are padded on the *right*. Under causal attention no token sees the tokens after it. So each row
computes what it would compute alone, at the same positions and in the same slots of the cache, and the prompts run
through the causal kernel without a mask. The next step writes each row's token into the row's own next slot, over the
padding, and attends to the slots up to this one. Activations are quantised token by token, so rows do not influence
each other there either.

On a GPU a step is one CUDA graph: nothing in a step depends on the host, and the tensors that it reads keep their
place. A step launches hundreds of kernels that run for microseconds each; without the graph the host would be the
bottleneck. On a Hopper GPU the step can be one persistent kernel instead, where the caller asks for it
(:mod:`sbn_lightning.inference.gather`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.gather import persistent_step, refusal
from sbn_lightning.layers.sparse_linear import prepare_layers, ternary_layers
from sbn_lightning.models.transformer import TernaryTransformer, causal_attention

if TYPE_CHECKING:
    from sbn_kernels.decode.step import DecodeStep

StepKind = Literal["graph", "persistent"]

# The length of the cache is a multiple of this: attention kernels want the rows of a mask aligned.
_SLOTS = 64
_WARM_UP = 2  # How many steps run before a CUDA graph is captured.


class _PromptAttention:
    """Causal attention that remembers the keys and values, ``[B, K, T, E]``."""

    keys: Tensor
    values: Tensor

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        self.keys, self.values = k_BKTE, v_BKTE
        return causal_attention(q_BHTE, k_BKTE, v_BKTE)


class _Slots:
    """The slots that the present step writes to; all layers share them.

    Attributes:
        rows: The indices of the rows, 0 to B - 1, int64 ``[B]``.
        now: The slot of each row's token, int64 ``[B]``.
        bias: 0 for the slots up to ``now`` and -inf for those after, ``[B, 1, 1, L]`` in the dtype of the cache.
    """

    rows: Tensor
    now: Tensor
    bias: Tensor


class _StepAttention:
    """Attention of one token in each row to the cache of one layer, the token itself included."""

    def __init__(self, keys: Tensor, values: Tensor, slots: _Slots) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        slots = self.slots
        self.keys[slots.rows, :, slots.now] = k_BKTE.squeeze(2)
        self.values[slots.rows, :, slots.now] = v_BKTE.squeeze(2)
        # Measured on an H200, torch 2.11, one sequence, 2,048 slots, 16 query heads, 2 key heads: 7 us. With the heads
        # of a group laid along the sequence: 44 us. As two products and a fused softmax: 10 us.
        return F.scaled_dot_product_attention(
            q_BHTE, self.keys, self.values, attn_mask=slots.bias, enable_gqa=q_BHTE.shape[1] != self.keys.shape[1]
        )


class Decoder:
    """A model that remembers the keys and values of ``batch_size`` sequences.

    ``prefill`` starts sequences and ``step`` continues them. ``prefill`` may be called again for other sequences. The
    weights of the model must not change between the two, and the backends of its layers must not change as long as the
    decoder is used.

    Args:
        model: The model, in training or evaluation mode; the modes do not differ.
        batch_size: The number of sequences.
        max_length: The number of tokens that a sequence can have, prompt included; at most the model's
            ``max_sequence_length``.
        cuda_graph: Whether to capture a step as a CUDA graph; None captures on a GPU.
        step: How a step is computed. ``"graph"`` runs the layers of the model. ``"persistent"`` runs the whole step,
            embedding to logits, as one kernel of :mod:`sbn_kernels.decode.step`. The kernel needs a Hopper GPU, Triton
            3.9, a ternary model in bfloat16 with 8-bit activations, and at most 8 sequences. The kernel packs a copy of
            the weights at the first step after each prompt. The caller has to ask for it, because we have verified the
            kernel on H200s and with random weights only.

    Raises:
        ConfigError: If ``max_length`` is beyond the model's context, if a CUDA graph is asked for without a GPU, or if
            the model, the batch or the device cannot use the persistent step.
    """

    def __init__(
        self,
        model: TernaryTransformer,
        batch_size: int,
        max_length: int,
        *,
        cuda_graph: bool | None = None,
        step: StepKind = "graph",
    ) -> None:
        """Check the sizes; memory for the cache is allocated by the first prompt."""
        limit = model.config.max_sequence_length
        if not 1 <= max_length <= limit:
            raise ConfigError(f"max_length={max_length} is outside 1 to the model's max_sequence_length={limit}")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is below 1")
        self.device = model.embed.weight.device
        if cuda_graph and self.device.type != "cuda":
            raise ConfigError(f"a CUDA graph needs a model on a GPU, this one is on {self.device}; use cuda_graph=None")
        if step not in get_args(StepKind):
            raise ConfigError(f"step={step!r} is none of {', '.join(map(repr, get_args(StepKind)))}")
        if step == "persistent" and (reason := refusal(model, batch_size)):
            raise ConfigError(f'step="persistent" cannot be used: {reason}; use step="graph"')
        self._kind = step
        self._persistent: DecodeStep | None = None
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.slots = min(-(-max_length // _SLOTS) * _SLOTS, limit)
        self._use_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: list[Any] = []
        self._logits: Tensor | None = None
        self._shared = _Slots()
        self._shared.rows = torch.arange(batch_size, device=self.device)
        self._layers: list[_StepAttention] = []
        self._index = torch.arange(self.slots, device=self.device)
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=self.device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, one for each row of the batch; what was in the cache is forgotten.

        Args:
            prompts: The token ids of each prompt: ``batch_size`` prompts, none empty.

        Returns:
            The logits of each prompt's next token, ``[B, vocab_size]``.

        Raises:
            ConfigError: If there are not ``batch_size`` prompts, or a prompt is empty, does not fit, or has a token id
                beyond the vocabulary.
        """
        self._check(prompts)
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.zeros(self.batch_size, max(lengths), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return self.prefill_padded(tokens.to(self.device), torch.tensor(lengths).to(self.device))

    @torch.no_grad()
    def prefill_padded(self, tokens_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Start sequences as :meth:`prefill` does, from prompts on the model's device, without checks.

        Args:
            tokens_BT: The prompts, padded at their ends with any token, int64 ``[B, T]``.
            lengths_B: The lengths of the prompts, int64 ``[B]``.
        """
        prepare_layers(self.model)
        self._persistent = None  # The weights may have changed since the step copied them.
        if self._graph is not None and any(
            now is not then for now, then in zip(self._weights(), self._recorded, strict=True)
        ):
            self._graph = None  # The graph reads weights that have been replaced.
        attend = [_PromptAttention() for _ in self.model.blocks]
        hidden = self.model.hidden(tokens_BT, attend=attend)
        if not self._layers:
            # The dtype of keys and values is known only now: the model may compute in another dtype than it stores.
            for layer in attend:
                shape = (*layer.keys.shape[:2], self.slots, layer.keys.shape[3])
                # Zeros, because an infinity left in memory would pass the mask as 0 * inf.
                self._layers.append(
                    _StepAttention(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), self._shared)
                )
        for cache, layer in zip(self._layers, attend, strict=True):
            cache.keys[:, :, : tokens_BT.shape[1]] = layer.keys
            cache.values[:, :, : tokens_BT.shape[1]] = layer.values
        self.lengths.copy_(lengths_B)
        logits: Tensor = self.model.lm_head(hidden[self._shared.rows, lengths_B - 1])
        return logits

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each sequence.

        A sequence of ``max_length`` tokens does not grow: its last token is replaced.

        Args:
            tokens_B: The token ids, int64 ``[B]`` on the model's device.

        Returns:
            The logits of the token after that, ``[B, vocab_size]``. With a CUDA graph the next step overwrites them.

        Raises:
            ConfigError: If ``prefill`` was not called before, or if the persistent step cannot compute in the dtype of
                the model.
        """
        if not self._layers:
            raise ConfigError("a decoder steps on from prompts: call prefill first")
        if self._kind == "persistent":
            return self._persistent_step().step(tokens_B)
        self._tokens.copy_(tokens_B.unsqueeze(1))
        if not self._use_graph:
            logits = self._step()
        else:
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            assert self._logits is not None
            self._graph.replay()
            logits = self._logits
        self.lengths.add_(1).clamp_(max=self.max_length)
        return logits

    def check(self) -> None:
        """Check that the steps so far are valid. The persistent step waits for the device. A graph has no deadline.

        Raises:
            StepTimeoutError: If a persistent step passed its deadline. The logits since the last check are wrong; the
                next ``prefill`` starts anew.
        """
        if self._persistent is not None:
            self._persistent.check()

    def _persistent_step(self) -> DecodeStep:
        if self._persistent is None:
            caches = [(layer.keys, layer.values) for layer in self._layers]
            self._persistent = persistent_step(
                self.model, caches, self.max_length, self.lengths, cuda_graph=self._use_graph
            )
        return self._persistent

    def _step(self) -> Tensor:
        shared, dtype = self._shared, self._layers[0].keys.dtype
        shared.now = self.lengths.clamp(max=self.max_length - 1)
        seen = self._index <= shared.now.unsqueeze(1)
        shared.bias = torch.zeros(seen.shape, dtype=dtype, device=self.device).masked_fill_(~seen, float("-inf"))
        shared.bias = shared.bias[:, None, None]
        hidden = self.model.hidden(self._tokens, shared.now.unsqueeze(1), self._layers)
        logits: Tensor = self.model.lm_head(hidden[:, 0])
        return logits

    def _capture(self) -> None:
        # At their first call kernels are compiled, chosen and given workspaces, which a graph cannot record. Repeating
        # a step does no harm, because the step writes the same keys and values into the same slots.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph, self._recorded = graph, self._weights()

    def _weights(self) -> list[Any]:
        """The prepared weights of the ternary layers. A layer prepares another object when its weight has changed."""
        return [layer._prepared for layer in ternary_layers(self.model).values()]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) != self.batch_size:
            raise ConfigError(f"{len(prompts)} prompts for a decoder of batch_size={self.batch_size}")
        vocabulary = self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ConfigError(f"prompt {i} is empty; begin it with a token, for example the end-of-document token")
            if len(prompt) > self.max_length:
                raise ConfigError(f"prompt {i} has {len(prompt)} tokens, the cache holds {self.max_length}")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                wrong = next(token for token in prompt if not 0 <= token < vocabulary)
                raise ConfigError(
                    f"prompt {i} has token id {wrong}, the model's vocab_size is {vocabulary}; was it written with "
                    "another tokenizer?"
                )
