"""The rows of transformers in ``generation.py``: the forward on prompts, and the decoding of ``generate``."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from generation_table import DEVICE, PREFILL_LENGTH, Table, few_calls_ms, random_tokens
from torch import Tensor

from sbn_lightning.models.config import QWEN2_5_SHAPES

TRANSFORMERS = "transformers generate"
TRANSFORMERS_BEST = "transformers generate, static cache, compiled"


def qwen2(name: str) -> Any:
    """transformers' model of the same shape, random weights in bfloat16.

    Raises:
        ImportError: Without transformers.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = QWEN2_5_SHAPES[name]
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_ffn"],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=shape["n_heads"],
        num_key_value_heads=shape["n_kv_heads"],
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def huggingface(table: Table, args: argparse.Namespace) -> None:
    """Measures transformers: a forward on prompts; a token of ``generate``, from the times of 17 tokens and of one.

    The token is measured twice: with the defaults, and with a static cache and the compiled step.
    """
    try:
        model = qwen2(table.model)
    except ImportError as error:
        print(f"{TRANSFORMERS}: left out ({error})")
        return

    @torch.no_grad()
    def prefill(tokens: Tensor) -> None:
        model(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, logits_to_keep=1)

    def seconds(batch: int, new: int, **options: Any) -> float:
        tokens = random_tokens(batch, args.context)
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            **options,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - started

    if "prefill" in args.phases:
        prefill(random_tokens(1, PREFILL_LENGTH))  # the very first forward loads kernels
        for batch in args.batches:
            with table.attempt(f"{TRANSFORMERS}, prefill, batch {batch}"):
                ms = few_calls_ms(partial(prefill, random_tokens(batch, PREFILL_LENGTH)))
                table.add(TRANSFORMERS, "prefill", batch, ms, "", "")
    if "decode" in args.phases:
        count = 16
        for variant, options in ((TRANSFORMERS, {}), (TRANSFORMERS_BEST, {"cache_implementation": "static"})):
            for batch in args.batches:
                with table.attempt(f"{variant}, decode, batch {batch}"):
                    for _ in range(2):  # the longest first: a static cache stays as long as its longest text
                        seconds(batch, count + 1, **options)
                    one, more = ([seconds(batch, n, **options) for _ in range(3)] for n in (1, count + 1))
                    ms = 1e3 * (statistics.median(more) - statistics.median(one)) / count
                    table.add(variant, "decode", batch, ms, "", "", args.context)
