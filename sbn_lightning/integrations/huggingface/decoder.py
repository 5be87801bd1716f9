"""Generation with any model of transformers: the decoder that :mod:`sbn_lightning.inference.loop` runs.

The cache is the architecture's own (transformers' ``DynamicCache``), so sliding windows and compressed keys work as the
architecture has them. Prompts of different lengths are padded on the *left*, as transformers expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.prompts import check_prompt
from sbn_lightning.layers.masked_linear import prepare_layers


class NetworkDecoder:
    """A model of transformers that remembers the keys and values of ``batch_size`` sequences.

    Args:
        hf: An instance of ``AutoModelForCausalLM``, on the device to use.
        batch_size: The number of sequences.
        vocab_size: The number of token ids that the model knows.
    """

    def __init__(self, hf: nn.Module, batch_size: int, vocab_size: int) -> None:
        self.hf = hf
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.device: torch.device = next(hf.parameters()).device
        self._accepted = inspect.signature(hf.forward).parameters
        self._name = "cache" if "cache" in self._accepted else "past_key_values"  # transformers 5.24 has the first one.
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
        prepare_layers(self.hf)
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

    def check(self) -> None:
        """Do nothing: a step of transformers has no deadline that could pass."""

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = (self._seen.cumsum(dim=-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        wanted = {"attention_mask": self._seen, "position_ids": positions, "logits_to_keep": 1}
        given = {name: value for name, value in wanted.items() if name in self._accepted}
        output = self.hf(input_ids=tokens, use_cache=True, **{self._name: self._cache}, **given)
        self._cache = output[self._name]
        logits: Tensor = output.logits[:, -1]
        return logits
