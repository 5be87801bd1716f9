"""A whole model: prefill and decoding in tokens a second, ternary against bfloat16 in the same loop.

    python kernels/benchmarks/generation.py [--models qwen2.5-1.5b] [--batches 1 16] [--variants "bf16 dense" "2:4"]

The weights are random, the shapes those of Qwen2.5. Every variant runs the loop of ``sbn generate``: blocks compiled by
``torch.compile``, a static cache, a decode step that is one CUDA graph, tokens chosen on the device. ``transformers``
is Hugging Face's ``generate`` with its default cache, bfloat16: what users run otherwise. Prefill reads 4 x 2,048
tokens; decoding starts after ``--context`` tokens and reads a cache of that and the new tokens.

Before timing, each variant decodes some tokens, and the logits of every step are compared with one forward over the
whole sequence without a cache, graph or compiler and on the reference backend: ``error`` is their relative RMS
difference (bfloat16 rounds, and a rounded activation may fall on another integer), ``same`` the share of steps whose
most likely token is the same one. Dense in float32, and with it the cache, the graph and the padding, has to give the
same tokens exactly.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from common import append, fresh_results, header, need_gpu
from torch import Tensor

from sbn_lightning.checkpoint.load import cast_model
from sbn_lightning.generation import Decoder, Sampling, generate
from sbn_lightning.generation.opening import use_backend
from sbn_lightning.layers import prepare_layers
from sbn_lightning.transformer import QWEN2_5_SHAPES, TernaryTransformer, TransformerConfig

# Variant -> (what its linear layers are, pattern, backend).
VARIANTS = {
    "bf16 dense": ("dense", "6:8", "reference"),
    "2:4": ("ternary", "2:4", "sparse"),
    "6:8": ("ternary", "6:8", "int8"),
}
PREFILL = (4, 2048)
CHECKED, CHECKED_CONTEXT = (4, 72), 64
ERROR = 0.2  # random weights: a rounding in an early block moves many after it; up to 0.10 was seen, at 6:8
GREEDY = Sampling()


def build(name: str, variant: str, length: int) -> TernaryTransformer:
    """A random model on the GPU, on the reference backend."""
    linear, pattern, _ = VARIANTS[variant]
    config = TransformerConfig.preset(name, linear=linear, pattern=pattern, max_sequence_length=length)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = TernaryTransformer(config)
    cast_model(model, torch.bfloat16)
    return model.eval().requires_grad_(False)


def random_tokens(batch: int, length: int) -> Tensor:
    """Token ids ``[batch, length]``."""
    return torch.randint(151936, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1))


def exact_gate() -> None:
    """Dense, float32, ragged prompts: the graph's greedy tokens against a loop without a cache.

    Raises:
        AssertionError: If one differs.
    """
    torch.manual_seed(0)
    shape = QWEN2_5_SHAPES["qwen2.5-0.5b"] | {"n_layers": 2}
    config = TransformerConfig(**shape, vocab_size=4096, qkv_bias=True, linear="dense", max_sequence_length=256)
    with torch.device("cuda"):
        model = TernaryTransformer(config).eval()
    prompts = [row[:n].tolist() for row, n in zip(random_tokens(3, 64) % 4096, (64, 1, 37), strict=True)]
    ours = generate(model, prompts, max_new_tokens=24)
    for prompt, new in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            for token in new:
                expected = int(model(tokens)[0, -1].argmax())
                if token != expected:
                    raise AssertionError(f"token {tokens.shape[1]} is {token}, without a cache {expected}")
                tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)


@torch.no_grad()
def plain_logits(model: TernaryTransformer) -> Tensor:
    """What :func:`compare` expects: logits of one forward."""
    return model.lm_head(model.hidden(random_tokens(*CHECKED))[:, CHECKED_CONTEXT - 1 :])


def compare(model: TernaryTransformer, expected: Tensor) -> tuple[float, float]:
    """``error`` and ``same`` of the graph's steps."""
    (batch, length), tokens = CHECKED, random_tokens(*CHECKED)
    decoder = Decoder(model, batch, length)
    with torch.compiler.set_stance("force_eager"):
        lengths = torch.full((batch,), CHECKED_CONTEXT, device="cuda")
        logits = [decoder.prefill_padded(tokens[:, :CHECKED_CONTEXT], lengths)]
    logits += [decoder.step(tokens[:, i]).clone() for i in range(CHECKED_CONTEXT, length)]
    ours = torch.stack(logits, dim=1)
    return difference(ours, expected), float((ours.argmax(-1) == expected.argmax(-1)).float().mean())


def difference(logits: Tensor, expected: Tensor) -> float:
    """Relative RMS difference of logits.

    Raises:
        AssertionError: If it is above :data:`ERROR`.
    """
    error = float((logits.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt())
    if not error <= ERROR:
        raise AssertionError(f"logits differ from the plain forward's by {error:.3f}, relative RMS")
    return error


def median_event_ms(call: Callable[[], object], count: int) -> float:
    """Median time between the ends of ``count`` calls in a row, after two to warm up."""
    call(), call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def prefill_ms(model: TernaryTransformer) -> float:
    """Median time to read :data:`PREFILL` tokens, checked first."""
    decoder = Decoder(model, *PREFILL)
    tokens, lengths = random_tokens(*PREFILL), torch.full((PREFILL[0],), PREFILL[1], device="cuda")
    logits = decoder.prefill_padded(tokens, lengths)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        difference(logits, model.lm_head(model.hidden(tokens)[:, -1]))
    return median_event_ms(lambda: decoder.prefill_padded(tokens, lengths), 10)


def decode_ms(model: TernaryTransformer, batch: int, context: int, steps: int) -> float:
    """Median time of a step, over windows of 8 steps."""
    decoder = Decoder(model, batch, context + steps + 24)
    with torch.compiler.set_stance("force_eager"):  # not what is timed: not worth compiling for each batch
        logits = decoder.prefill_padded(random_tokens(batch, context), torch.full((batch,), context, device="cuda"))
    token = GREEDY(logits)

    def eight() -> None:
        nonlocal token
        for _ in range(8):
            token = GREEDY(decoder.step(token))

    return median_event_ms(eight, steps // 8) / 8


def ours(path: Path, name: str, args: argparse.Namespace, base: dict[tuple[str, int], float]) -> None:
    """Rows of every variant of one model."""
    for variant in args.variants:
        torch.compiler.reset()
        started = time.perf_counter()
        model = build(name, variant, 4096)
        expected = plain_logits(model)
        use_backend(model, VARIANTS[variant][2], torch.bfloat16)
        prepare_layers(model)
        if args.compile:
            model.compile_blocks()
        cells = {("prefill", PREFILL[0]): prefill_ms(model)}
        error, same = compare(model, expected)
        for batch in args.batches:
            cells["decode", batch] = decode_ms(model, batch, args.context, args.steps)
        for (what, batch), ms in cells.items():
            base.setdefault((what, batch), ms)
            amount = PREFILL[0] * PREFILL[1] if what == "prefill" else batch
            row = {"model": name, "what": what, "batch": batch, "variant": variant, "ms": ms}
            row |= {"tokens_s": 1e3 * amount / ms, "vs_bf16": base[what, batch] / ms, "error": error, "same": same}
            append(path, row)
        print(f"({time.perf_counter() - started:.0f} s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most)")
        del model
        gc.collect()
        torch.cuda.empty_cache()


def huggingface(path: Path, name: str, args: argparse.Namespace, base: dict[tuple[str, int], float]) -> None:
    """Rows of transformers' own ``generate``: the time of ``steps`` tokens less that of one."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError as error:
        print(f"transformers: left out ({error})")
        return
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
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    def seconds(batch: int, new: int) -> float:
        tokens = random_tokens(batch, args.context)
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, min_new_tokens=new, max_new_tokens=new
        )
        torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds(1, 2)
    for batch in args.batches:
        count = 16
        one, more = ([seconds(batch, n) for _ in range(3)] for n in (1, count + 1))
        ms = 1e3 * (statistics.median(more) - statistics.median(one)) / count
        row = {"model": name, "what": "decode", "batch": batch, "variant": "transformers generate", "ms": ms}
        ratio = base["decode", batch] / ms if ("decode", batch) in base else ""
        append(path, row | {"tokens_s": 1e3 * batch / ms, "vs_bf16": ratio, "error": "", "same": ""})


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(QWEN2_5_SHAPES), choices=list(QWEN2_5_SHAPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache when decoding starts")
    parser.add_argument("--steps", type=int, default=64, help="timed steps")
    parser.add_argument("--eager", dest="compile", action="store_false", help="do not compile blocks")
    parser.add_argument("--no_transformers", action="store_true")
    args = parser.parse_args()
    need_gpu()
    print(header())
    exact_gate()
    path = fresh_results("generation")
    for name in args.models:
        base: dict[tuple[str, int], float] = {}
        ours(path, name, args, base)
        if not args.no_transformers:
            huggingface(path, name, args, base)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
