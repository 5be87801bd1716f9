"""Run a model with a key/value cache: prompts are read at once, and then each step adds one token.

The cache is static: for each layer ``[batch, key/value heads, max_length, head size]``, allocated once. Prompts of
different lengths are padded on the *right*. Under causal attention no token sees the tokens after it. So each row
computes what it would compute alone, at the same positions and in the same slots of the cache, and the prompts run
through the causal kernel without a mask. The next step writes each row's token into the row's own next slot, over the
padding, and attends to the slots up to this one. Activations are quantised token by token, so rows do not influence
each other there either.

On a GPU a step and the choice of the next tokens are one CUDA graph (:mod:`sbn_lightning.inference.recorded`): nothing
in them depends on the host, and the tensors that they read keep their place. A step launches hundreds of kernels that
run for microseconds each; without the graph the host would be the bottleneck. On a Hopper GPU the step can be one
persistent kernel instead, where the caller asks for it (:mod:`sbn_lightning.inference.persistent`) or leaves the choice
to a measurement (:mod:`sbn_lightning.inference.choice`).

A row can also start while other rows go on: :meth:`Decoder.extend` reads tokens into one row. A step always computes
all rows of the cache. So the sums of a row have the same shapes whatever the other rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.attention import Slots
from sbn_lightning.inference.choice import judge, key_of, known, withdraw
from sbn_lightning.inference.layers_step import LayersStep
from sbn_lightning.inference.persistent import persistent_step, refusal
from sbn_lightning.inference.prepared import PreparedWeights
from sbn_lightning.inference.prompts import check_prompt
from sbn_lightning.inference.reader import PromptReader
from sbn_lightning.inference.recorded import RecordedStep
from sbn_lightning.inference.sampling import Kind, Sampler
from sbn_lightning.layers.mask_tracker import version
from sbn_lightning.models.transformer import TernaryTransformer

StepKind = Literal["graph", "persistent", "auto"]

# The length of the cache is a multiple of this: attention kernels want the rows of a mask aligned.
_SLOTS = 64


class Decoder:
    """A model that remembers the keys and values of ``batch_size`` sequences.

    ``prefill`` starts sequences and ``step`` continues them. ``prefill`` may be called again for other sequences. The
    weights of the model must not change between the two, and the layers and their backends must not change as long as
    the decoder is used. The first ``prefill`` or ``extend`` reads all latent weights to see whether they have changed.
    Later ones notice in-place operations and steps of optimisers. They do not notice writes through ``weight.data``:
    make another decoder after such a write.

    Args:
        model: The model, in training or evaluation mode; the modes do not differ.
        batch_size: The number of sequences.
        max_length: The number of tokens that a sequence can have, prompt included; at most the model's
            ``max_sequence_length``.
        cuda_graph: Whether to capture a step as a CUDA graph; None captures on a GPU.
        step: How a step is computed. ``"graph"`` runs the layers of the model. ``"persistent"`` runs the whole step,
            embedding to logits, as one kernel of :mod:`sbn_kernels.decode.step`. The kernel needs a Hopper GPU, Triton
            3.9, a ternary model in bfloat16 with 8-bit activations, and at most 16 sequences. The kernel packs a copy
            of the weights at the first step after :meth:`prefill`. ``"auto"`` takes the faster of the two. The first
            step of such a decoder compares their logits and times both, once for a shape, a batch and a GPU in a
            process. Where the kernel cannot be used, the layers of the model take over. :attr:`choice` says which path
            runs, and why.
        prefill_chunk: The largest number of tokens of a prompt that :meth:`prefill` reads at a time; None reads prompts
            at once. Activations of a long prompt then take bounded memory. The logits are the same up to the rounding
            of the attention's sums.

    Attributes:
        lengths: The number of tokens of each row, int64 ``[B]`` on the device.
        growing: 1 for each row that a step makes longer and 0 for the others, int64 ``[B]`` on the device;
            :meth:`prefill` sets ones. A row of 0 must have fewer than ``max_length`` tokens.
        sampler: Has the settings of each row, and chooses tokens. All rows start greedy.

    Raises:
        ConfigError: If ``max_length`` is beyond the model's context, if a CUDA graph is asked for without a GPU, if
            ``prefill_chunk`` is below 1, or if the model, the batch or the device cannot use the persistent step.
    """

    def __init__(
        self,
        model: TernaryTransformer,
        batch_size: int,
        max_length: int,
        *,
        cuda_graph: bool | None = None,
        step: StepKind = "graph",
        prefill_chunk: int | None = None,
    ) -> None:
        """Check the sizes; memory for the cache is allocated by the first prompt."""
        limit = model.config.max_sequence_length
        if not 1 <= max_length <= limit:
            raise ConfigError(f"max_length={max_length} is outside 1 to the model's max_sequence_length={limit}")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is below 1")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk={prefill_chunk} is below 1; leave it out to read prompts at once")
        self.device = model.embed.weight.device
        if cuda_graph and self.device.type != "cuda":
            raise ConfigError(f"a CUDA graph needs a model on a GPU, this one is on {self.device}; use cuda_graph=None")
        if cuda_graph and model.config.n_experts:
            raise ConfigError("a mixture of experts cannot be captured in a CUDA graph; use cuda_graph=None")
        if step not in get_args(StepKind):
            raise ConfigError(f"step={step!r} is none of {', '.join(map(repr, get_args(StepKind)))}")
        self._refusal = None if step == "graph" else refusal(model, batch_size)
        if step == "persistent" and self._refusal is not None:
            raise ConfigError(f'step="persistent" cannot be used: {self._refusal}; use step="graph"')
        self._gives_way, self._measured = step == "auto", ""
        self.kind: Literal["graph", "persistent"] = (
            "graph" if step == "graph" or self._refusal is not None else "persistent"
        )
        self._persistent: RecordedStep | None = None
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.slots = min(-(-max_length // _SLOTS) * _SLOTS, limit)
        # The host reads how many tokens each expert has, which a graph cannot do.
        able = self.device.type == "cuda" and not model.config.n_experts
        self._use_graph = able if cuda_graph is None else cuda_graph
        self._weights = PreparedWeights(model)
        self._shared = Slots()
        self._shared.rows = torch.arange(batch_size, device=self.device)
        self.sampler = Sampler(batch_size, self.device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._reader = PromptReader(model, self._shared, self.slots, use_graph=self._use_graph)
        self._layers = self._reader.layers
        self.growing = torch.ones_like(self.lengths)
        tokens = torch.zeros_like(self.lengths)
        compute = LayersStep(
            model, self._layers, self._shared, self.slots, max_length, tokens, self.lengths, self.growing
        )
        self._plain = RecordedStep(compute, tokens, self.lengths, self.sampler, use_graph=self._use_graph)
        self._ones = -1  # The version of ``growing`` that holds ones only.

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
        self._prepare()
        self._persistent = None  # The weights may have changed since the step copied them.
        logits = self._reader.read_all(tokens_BT, lengths_B, self.prefill_chunk)
        self._start_rows(lengths_B)
        return logits

    def _prepare(self) -> None:
        """Prepare the weights of the layers, and drop what reads weights that have been replaced."""
        if self._weights.prepare():
            self._persistent = None
            self._plain.forget()
            self._reader.forget()

    def _start_rows(self, lengths_B: Tensor) -> None:
        self.lengths.copy_(lengths_B)
        self.growing.fill_(1)
        self._ones = version(self.growing)

    @torch.no_grad()
    def extend(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read tokens into one row, behind tokens that the row holds already; the other rows do not change.

        A long prompt can be read in parts. The row does not grow in steps before ``growing[row]`` is 1.

        Args:
            row: The row, 0 to ``batch_size - 1``.
            tokens: The token ids, at least one. They are not checked against the vocabulary.
            start: The number of tokens that the row keeps; the new tokens stand behind them.

        Returns:
            The logits of the token after these, ``[1, vocab_size]``.

        Raises:
            ConfigError: If there is no such row, or the tokens do not fit into the row.
        """
        if not 0 <= row < self.batch_size:
            raise ConfigError(f"row {row} is outside 0 to {self.batch_size - 1}, the rows of batch_size")
        end = start + len(tokens)
        if not 0 <= start < end <= self.max_length:
            raise ConfigError(f"tokens {start} to {end} do not fit into a row of {self.max_length} tokens")
        if start and not self._layers:
            raise ConfigError(f"a new decoder holds no tokens, so row {row} cannot keep {start}")
        self._prepare()
        logits = self._reader.read_row(row, tokens, start)
        self.lengths[row : row + 1].fill_(end)  # ``lengths[row] = end`` would wait for the device.
        return logits

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each sequence.

        A sequence of ``max_length`` tokens does not grow: its last token is replaced. A row whose ``growing`` is 0
        keeps its tokens. The step computes that row too, and its logits mean nothing.

        Args:
            tokens_B: The token ids, int64 ``[B]`` on the model's device.

        Returns:
            The logits of the token after that, ``[B, vocab_size]``. With a CUDA graph the next step overwrites them.

        Raises:
            ConfigError: If ``prefill`` was not called before, or if the persistent step cannot compute in the dtype of
                the model.
        """
        return self._advance(tokens_B, None)[0]

    @torch.no_grad()
    def step_next(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each sequence, and choose the next tokens as :attr:`sampler` says.

        On a GPU step and choice are one CUDA graph. The first step of a kind of choice captures the graph.

        Args:
            tokens_B: The token ids, int64 ``[B]`` on the model's device. Without a copy if they are the result of the
                last step.

        Returns:
            ``sampler.choose(step(tokens_B), lengths)``, int64 ``[B]``. The next step overwrites it.

        Raises:
            ConfigError: As :meth:`step`.
        """
        return self._advance(tokens_B, self.sampler.kind)[1]

    def _advance(self, tokens_B: Tensor, kind: Kind | None) -> tuple[Tensor, Tensor]:
        """Add a token to each sequence; return the logits and, unless ``kind`` is None, the next tokens."""
        if not self._layers:
            raise ConfigError("a decoder steps on from prompts: call prefill first")
        persistent = self._persistent_step(tokens_B, kind) if self.kind == "persistent" else None
        step = persistent or self._plain
        logits = step(tokens_B, kind)
        if persistent is not None and (self.growing.is_inference() or self.growing._version != self._ones):
            # The kernel has added one to every row. Rows that do not grow have a free slot, so they grew as well.
            self.lengths.sub_(1 - self.growing)
        return logits, step.tokens

    def check(self) -> None:
        """Check that the steps so far are valid. The persistent step waits for the device. A graph has no deadline.

        Raises:
            StepTimeoutError: If a persistent step passed its deadline. The logits since the last check are wrong. Rows
                that are read again start anew. With ``step="auto"`` the layers of the model compute all later steps,
                and those of later decoders of the same shape.
        """
        step, self._persistent = self._persistent, None
        if step is not None and step.kernel is not None:
            try:
                step.kernel.check()
            except RuntimeError:
                if self._gives_way:  # Whatever held the step up may come again.
                    key = key_of(self.model, self.batch_size, self._use_graph)
                    verdict = withdraw(key, "is not used any more: a step passed its deadline")
                    self.kind, self._refusal = verdict.kind, verdict.reason
                raise
        self._persistent = step  # A step that has failed is not used again.

    @property
    def choice(self) -> str:
        """How a step is computed, in one line."""
        if self.kind == "persistent":
            if self._gives_way and not self._measured:
                return "measured at the first step, which has not come yet"
            return "one persistent kernel" + self._measured
        plain = "the layers of the model" + (", as a CUDA graph" if self._use_graph else "")
        return plain if self._refusal is None else f"{plain}; the persistent kernel {self._refusal}"

    @property
    def flag(self) -> Tensor | None:
        """A tensor on the device that is not 0 once a persistent step has passed its deadline; None for a graph."""
        kernel = None if self._persistent is None else self._persistent.kernel
        return None if kernel is None else kernel.flag

    def _persistent_step(self, tokens_B: Tensor, kind: Kind | None) -> RecordedStep | None:
        """Make the persistent step, or give way to the layers of the model where the caller allows that."""
        if self._persistent is not None:
            return self._persistent
        key = key_of(self.model, self.batch_size, self._use_graph)
        verdict = known(key) if self._gives_way else None
        if verdict is None or verdict.kind == "persistent":
            caches = [(layer.keys, layer.values) for layer in self._layers]
            try:
                kernel = persistent_step(self.model, caches, self.max_length, self.lengths)
            except (ConfigError, torch.OutOfMemoryError) as error:  # The kernel has a copy of the weights.
                if not self._gives_way:
                    raise
                reason = str(error.__cause__ or error).splitlines()[0]
                self.kind, self._refusal = "graph", f"cannot be used: {reason}"
                return None
            self._persistent = RecordedStep(
                lambda: kernel.step(kernel.chosen),
                kernel.chosen,
                self.lengths,
                self.sampler,
                use_graph=self._use_graph,
                kernel=kernel,
            )
            if self._gives_way and verdict is None:
                # No step has run yet, so ``tokens_B`` is no tensor that these steps write into.
                ours, theirs = (partial(step, tokens_B, kind) for step in (self._persistent, self._plain))
                verdict = judge(key, ours, theirs, kernel.check, self.growing.bool(), self.lengths)
        if verdict is not None:
            self.kind = verdict.kind
            if verdict.kind == "persistent":
                self._measured = f": {verdict.reason}"
                self._plain.forget()
            else:
                self._refusal, self._persistent = verdict.reason, None
        return self._persistent

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        if len(prompts) != self.batch_size:
            raise ConfigError(f"{len(prompts)} prompts for a decoder of batch_size={self.batch_size}")
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, self.model.config.vocab_size, f"prompt {i}")
            if len(prompt) > self.max_length:
                raise ConfigError(f"prompt {i} has {len(prompt)} tokens, the cache holds {self.max_length}")
