"""Generation with any model of transformers: the decoders that this project's loops and generators run.

The cache is the architecture's own (transformers' ``DynamicCache``), so sliding windows and compressed keys work as the
architecture has them. There are two decoders:

* :class:`NetworkDecoder` runs a batch of prompts that start and end together, for
  :mod:`sbn_lightning.inference.loop`. Prompts of different lengths are padded on the *left*, as transformers expects.
* :class:`NetworkRows` has rows that requests join and leave, for :class:`~sbn_lightning.inference.generator.Generator`.
  Each row has a cache of its own and is computed by itself, because transformers' cache has one length for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.prompts import check_prompt
from sbn_lightning.inference.sampling import Sampler
from sbn_lightning.layers.masked_linear import prepare_layers


class CachedModel:
    """A model of transformers that is called with a cache.

    Args:
        hf: An instance of ``AutoModelForCausalLM``, on the device to use.
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.device: torch.device = next(hf.parameters()).device
        self._accepted = inspect.signature(hf.forward).parameters
        self._name = "cache" if "cache" in self._accepted else "past_key_values"  # transformers 5.24 has the first one.

    def __call__(self, tokens: Tensor, cache: Any, seen: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
        """Read tokens behind those of a cache.

        Args:
            tokens: The token ids, int64 ``[B, T]``.
            cache: The cache; None for no tokens before these.
            seen: 1 for each token of a sequence and 0 for padding, int64 ``[B, tokens of the cache + T]``.
            positions: The positions of the tokens, int64 ``[B, T]``.

        Returns:
            The logits of each sequence's next token, ``[B, vocab_size]``, and the cache with the new tokens.
        """
        wanted = {"attention_mask": seen, "position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in wanted.items() if name in self._accepted}
        output = self.hf(input_ids=tokens, use_cache=True, **{self._name: cache}, **given)
        return output.logits[:, -1], output[self._name]


class NetworkDecoder:
    """A model of transformers that remembers the keys and values of ``batch_size`` sequences.

    Args:
        hf: An instance of ``AutoModelForCausalLM``, on the device to use.
        batch_size: The number of sequences.
        vocab_size: The number of token ids that the model knows.

    Attributes:
        sampler: Has the settings of each sequence, and chooses tokens.
    """

    def __init__(self, hf: nn.Module, batch_size: int, vocab_size: int) -> None:
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self._model = CachedModel(hf)
        self.device = self._model.device
        self.sampler = Sampler(batch_size, self.device)
        self._cache: Any = None
        self._seen = torch.empty(0)  # 1 for each token of a sequence and 0 for padding, int64 [B, T]

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts, one for each row of the batch; what was in the cache is forgotten.

        Args:
            prompts: The token ids of each prompt: ``batch_size`` prompts, none empty.

        Returns:
            The logits of each prompt's next token, ``[B, vocab_size]``.

        Raises:
            ConfigError: If there are not ``batch_size`` prompts, or a prompt is empty or has a token id beyond the
                vocabulary.
        """
        if len(prompts) != self.batch_size:
            raise ConfigError(f"{len(prompts)} prompts were given to a decoder for {self.batch_size}")
        for i, prompt in enumerate(prompts):
            check_prompt(prompt, self.vocab_size, f"prompt {i}")
        prepare_layers(self._model.hf)
        width = max(map(len, prompts))
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        seen = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(prompt)
            seen[i, width - len(prompt) :] = 1
        self._cache = None
        self._seen = seen.to(self.device)
        return self._forward(tokens.to(self.device))

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each sequence, and return the logits of the next one, ``[B, vocab_size]``."""
        self._seen = torch.cat([self._seen, self._seen.new_ones(len(tokens_B), 1)], dim=1)
        return self._forward(tokens_B.unsqueeze(-1))

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each sequence, int64 ``[B]``."""
        return self._seen.sum(dim=-1)

    def step_next(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each sequence, and return the next ones, int64 ``[B]``."""
        return self.sampler.choose(self.step(tokens_B), self.lengths)

    def check(self) -> None:
        """Do nothing: a step of transformers has no deadline that could pass."""

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = (self._seen.cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, self._cache = self._model(tokens, self._cache, self._seen, positions)
        return logits


class NetworkRows:
    """A model of transformers with rows that requests join and leave; a :class:`~sbn_lightning.inference.engine.Rows`.

    A row computes what it would compute alone, to the last bit. In exchange, a step reads the weights once for each row
    that writes. :class:`NetworkDecoder` or vLLM continue many prompts faster.

    Args:
        hf: An instance of ``AutoModelForCausalLM``, on the device to use. Its weights must not change.
        batch_size: The number of rows.
        max_length: The number of tokens that a row can have.
        vocab_size: The number of token ids that the model knows.

    Attributes:
        lengths: The number of tokens of each row as the engine counts them, int64 ``[B]`` on the CPU.
        growing: 1 for each row that a step makes longer and 0 for the others, int64 ``[B]`` on the CPU.
        sampler: Has the settings of each row, and chooses tokens.
    """

    kind = "rows"
    flag = None
    choice = "the layers of the model, row by row, with the cache of transformers"

    def __init__(self, hf: nn.Module, batch_size: int, max_length: int, vocab_size: int) -> None:
        """Start with empty rows."""
        self.batch_size, self.max_length, self.vocab_size = batch_size, max_length, vocab_size
        self._model = CachedModel(hf)
        self.device = self._model.device
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)
        self.growing = torch.ones_like(self.lengths)
        self.sampler = Sampler(batch_size, self.device)
        self._caches: list[Any] = [None] * batch_size
        self._held: list[list[int]] = [[] for _ in range(batch_size)]  # The tokens of each row's cache.
        prepare_layers(hf)

    @torch.no_grad()
    def extend(self, row: int, tokens: Sequence[int], start: int) -> Tensor:
        """Read tokens into one row, behind tokens that the row holds already.

        Args:
            row: The row, 0 to ``batch_size - 1``.
            tokens: The token ids, at least one.
            start: The number of tokens that the row keeps; the new tokens stand behind them.

        Returns:
            The logits of the token after these, ``[1, vocab_size]``.

        Raises:
            ConfigError: If the tokens do not fit into the row.
        """
        end = start + len(tokens)
        if not 0 <= start < end <= self.max_length or start > len(self._held[row]):
            raise ConfigError(f"tokens {start} to {end} do not fit into a row of {self.max_length} tokens")
        again = self._rewind(row, start)
        logits = self._read(row, [*again, *tokens])
        self.lengths[row] = end
        return logits

    @torch.no_grad()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Add a token to each row that grows.

        Args:
            tokens_B: The token ids, int64 ``[B]``.

        Returns:
            The logits of the token after that, ``[B, vocab_size]``; zeros for rows that do not grow.
        """
        logits = torch.zeros(self.batch_size, self.vocab_size, device=self.device)
        for row, token in enumerate(tokens_B.tolist()):
            if self.growing[row]:
                logits[row] = self._read(row, [token])[0]
                self.lengths[row] += 1
        return logits

    def step_next(self, tokens_B: Tensor) -> Tensor:
        """Step as :meth:`step` does; return the next tokens, int64 ``[B]``."""
        return self.sampler.choose(self.step(tokens_B), self.lengths.to(self.device))

    def check(self) -> None:
        """Do nothing: a step of transformers has no deadline that could pass."""

    def _rewind(self, row: int, start: int) -> list[int]:
        """Make a row forget all but its first tokens.

        Returns:
            The tokens that have to be read again, because the cache could not forget only what comes after them.
        """
        cache, held = self._caches[row], self._held[row]
        if start == len(held):
            return []
        kept, self._held[row] = held[:start], held[:start]
        # A layer with a window or a state has lost what it would need.
        if start and all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers):
            cache.crop(start - len(held))  # transformers takes the number of tokens to remove as a negative number.
            return []
        self._caches[row], self._held[row] = None, []
        return kept

    def _read(self, row: int, tokens: Sequence[int]) -> Tensor:
        held, self._held[row] = self._held[row], []  # If the model fails, nothing is known about the cache.
        end = len(held) + len(tokens)
        logits, self._caches[row] = self._model(
            torch.tensor([tokens], device=self.device),
            self._caches[row] if held else None,
            torch.ones(1, end, dtype=torch.int64, device=self.device),
            torch.arange(len(held), end, device=self.device)[None],
        )
        self._held[row] = [*held, *tokens]
        return logits
