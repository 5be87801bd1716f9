"""A whole model: prefill and decoding in tokens a second, ternary against bfloat16 in the same loop.

    python benchmarks/generation.py [--models qwen2.5-1.5b] [--batches 1 16] [--variants "bf16 dense" "2:4"]

The weights are random, the shapes are those of Qwen2.5. Every variant runs the loop of ``sbn generate``: blocks
compiled by ``torch.compile``, anew for each batch; a static cache; a decode step that is one CUDA graph with the choice
of the token. A single prompt is read as a :class:`Generator` reads it, from a CUDA graph of its bucket; up to eight
prompts together are read from a graph, too. On a Hopper GPU short prompts have the attention of ``sbn_kernels.prompt``,
those of "bf16 dense" as well. "one kernel" decodes with the persistent step, up to 16 sequences; "8-bit head" has the
rows of the head rounded.
``transformers generate`` is Hugging Face's, in bfloat16 with its default attention and cache, not compiled: what users
run otherwise. Its prefill is the forward of the model as ``generate`` calls it. ``transformers generate, static cache,
compiled`` is its fastest form: ``cache_implementation="static"``, with which it compiles its decode step itself.

Prefill reads 2,048 tokens a sequence, and "prefill 512" one prompt of 512. Decoding starts after ``--context`` tokens,
and its cache has room for these and the new tokens. Logits are those of the last token. ``bandwidth`` is the share of
the memory bandwidth that a decode step reaches: the bytes of weights and of the context's keys and values over the
time, relative to a copy (read plus written) in the same run.

The phase ``first_token`` starts ``first_token.py`` for each variant: the time to the first token in a fresh process.
Its rows are in ``first_token.csv``.

Before timing, each variant decodes some tokens. The logits of every step are compared with one forward over the whole
sequence, without cache, graph or compiler and on the reference backend. ``error`` is the relative RMS difference of the
logits (bfloat16 rounds, and a rounded activation may become another integer), and ``same`` is the share of steps with
the same most likely token. At each batch, the logits after the prefill of four prompts are compared with those of a
plain forward. The dense model in float32 has to give exactly the same tokens, which checks the cache, the graph and the
padding.

``bf16_ms`` is the time of "bf16 dense" in the same run, and ``vs_bf16`` is that time over ``ms``. Both are empty where
"bf16 dense" was not run. With ``--append`` a new row replaces the row of the same model, variant, phase and batch. A
cell that fails is named at the end and does not stop the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import first_token
import torch
from common import fresh_results, header, need_gpu
from generation_table import (
    CHECKED_PROMPTS,
    COLUMNS,
    DEVICE,
    PERSISTENT,
    PREFILL_LENGTH,
    ROUNDED,
    SHORT_LENGTH,
    VARIANTS,
    Table,
    call_times,
    few_calls_ms,
    random_tokens,
)
from generation_transformers import TRANSFORMERS, huggingface
from torch import Tensor

from sbn_lightning.formats.assemble import cast_model
from sbn_lightning.inference import Decoder, Sampling, generate
from sbn_lightning.inference.decoder import StepKind
from sbn_lightning.inference.head import use_head
from sbn_lightning.inference.opening import use_backend
from sbn_lightning.inference.persistent import refusal
from sbn_lightning.layers.sparse_linear import prepare_layers
from sbn_lightning.models.config import QWEN2_5_SHAPES, TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

PHASES = ("prefill", "decode", "first_token")
CHECKED, CHECKED_CONTEXT = (4, 72), 64
ERROR = 0.2  # random weights: one rounding in an early block moves many in later ones; up to 0.10 was seen, at 6:8
GREEDY = Sampling()


def build(name: str, variant: str, length: int) -> TernaryTransformer:
    """Makes a random model on the GPU, on the reference backend."""
    linear, pattern, _ = VARIANTS[variant]
    config = TransformerConfig.preset(name, linear=linear, pattern=pattern, max_sequence_length=length)
    torch.manual_seed(0)
    with DEVICE:
        model = TernaryTransformer(config)
    cast_model(model, torch.bfloat16)
    return model.eval().requires_grad_(False)


def exact_gate() -> None:
    """Dense, float32, ragged prompts: the graph's greedy tokens against a loop without a cache.

    Raises:
        AssertionError: If one differs.
    """
    torch.manual_seed(0)
    shape = QWEN2_5_SHAPES["qwen2.5-0.5b"] | {"n_layers": 2}
    config = TransformerConfig(**shape, vocab_size=4096, qkv_bias=True, linear="dense", max_sequence_length=256)
    with DEVICE:
        model = TernaryTransformer(config).eval()
    prompts = [row[:n].tolist() for row, n in zip(random_tokens(3, 64) % 4096, (64, 1, 37), strict=True)]
    ours = generate(model, prompts, max_new_tokens=24)
    for prompt, new in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt], device=DEVICE)
        with torch.no_grad():
            for token in new:
                expected = int(model(tokens)[0, -1].argmax())
                if token != expected:
                    raise AssertionError(f"token {tokens.shape[1]} is {token}, without a cache {expected}")
                tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)


@torch.no_grad()
def plain_logits(model: TernaryTransformer) -> Tensor:
    """Returns the logits of one forward, which :func:`compare` expects."""
    return model.lm_head(model.hidden(random_tokens(*CHECKED))[:, CHECKED_CONTEXT - 1 :])


def compare(model: TernaryTransformer, expected: Tensor, step: StepKind = "graph") -> tuple[float, float]:
    """Returns ``error`` and ``same`` of the steps."""
    (batch, length), tokens = CHECKED, random_tokens(*CHECKED)
    decoder = Decoder(model, batch, length, step=step)
    with torch.compiler.set_stance("force_eager"):
        lengths = torch.full((batch,), CHECKED_CONTEXT, device=DEVICE)
        logits = [decoder.prefill_padded(tokens[:, :CHECKED_CONTEXT], lengths)]
    logits += [decoder.step(tokens[:, i]).clone() for i in range(CHECKED_CONTEXT, length)]
    decoder.check()
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


def rows_read(batch: int) -> int:
    """Returns the number of prompts in whole batches that is at least :data:`CHECKED_PROMPTS`."""
    return -(-CHECKED_PROMPTS // batch) * batch


@torch.no_grad()
def plain_prefill(model: TernaryTransformer, tokens: Tensor) -> Tensor:
    """Returns the logits after the first :data:`CHECKED_PROMPTS` prompts, without compiler and cache."""
    with torch.compiler.set_stance("force_eager"):
        return model.lm_head(model.hidden(tokens[:CHECKED_PROMPTS])[:, -1])


def prompt_ms(model: TernaryTransformer, tokens: Tensor, expected: Tensor | None = None) -> float:
    """Returns the median time to read one prompt; logits are checked first, without a graph and from the graph."""
    decoder = Decoder(model, 1, max(tokens.shape[1], 64))
    prompts = tokens.tolist()
    for _ in range(2):
        logits = torch.cat([decoder.extend(0, prompt, 0) for prompt in prompts])
        if expected is not None:
            difference(logits, expected)
    return few_calls_ms(lambda: decoder.extend(0, prompts[0], 0))


def prefill_ms(model: TernaryTransformer, batch: int, tokens: Tensor, expected: Tensor) -> float:
    """Returns the median time to read ``batch`` prompts; the logits are checked first."""
    if batch == 1:
        return prompt_ms(model, tokens[:CHECKED_PROMPTS], expected)
    decoder = Decoder(model, batch, PREFILL_LENGTH)
    lengths = torch.full((batch,), PREFILL_LENGTH, device=DEVICE)
    # The same number of prompts at any batch, because a single prompt may be further off.
    parts = tokens[: rows_read(batch)].split(batch)
    for _ in range(2):  # without a graph, and with one
        difference(torch.cat([decoder.prefill_padded(part, lengths) for part in parts])[:CHECKED_PROMPTS], expected)
    return few_calls_ms(lambda: decoder.prefill_padded(parts[0], lengths))


def decode_ms(model: TernaryTransformer, batch: int, context: int, steps: int, step: StepKind = "graph") -> float:
    """Returns the median time of a step, over windows of 8 steps."""
    decoder = Decoder(model, batch, context + steps + 24, step=step)
    with torch.compiler.set_stance("force_eager"):  # this is not timed, so it need not be compiled for each batch
        logits = decoder.prefill_padded(random_tokens(batch, context), torch.full((batch,), context, device=DEVICE))
    token = GREEDY(logits)

    def eight() -> None:
        nonlocal token
        for _ in range(8):
            token = decoder.step_next(token)

    eight(), eight()
    times = call_times(eight, max(1, steps // 8))
    decoder.check()
    return statistics.median(times) / 8


def ours(table: Table, variant: str, args: argparse.Namespace) -> None:
    """Measures the rows of one variant."""
    model = build(table.model, variant, 4096)
    expected = plain_logits(model)
    use_backend(model, VARIANTS[variant][2], torch.bfloat16)
    prepare_layers(model)
    step: StepKind = "persistent" if PERSISTENT in variant else "graph"
    use_head(model, 8 if ROUNDED in variant else 16)
    if step == "persistent" and (reason := refusal(model, 1)):
        print(f"{table.model}, {variant}: left out, the kernel {reason}", flush=True)
        return
    if args.compile and step == "graph":
        model.compile_blocks()
    error, same = compare(model, expected, step)
    if "prefill" in args.phases and PERSISTENT not in variant and ROUNDED not in variant:  # "2:4" has the same
        tokens = random_tokens(max(map(rows_read, args.batches)), PREFILL_LENGTH)
        logits = plain_prefill(model, tokens)
        for batch in args.batches:
            with table.attempt(f"{variant}, prefill, batch {batch}"):
                table.add(variant, "prefill", batch, prefill_ms(model, batch, tokens, logits), error, same)
        with table.attempt(f"{variant}, prefill 512, batch 1"):
            ms = prompt_ms(model, random_tokens(1, SHORT_LENGTH))
            table.add(variant, "prefill 512", 1, ms, error, same)
    if "decode" in args.phases:
        for batch in args.batches:
            if step == "persistent" and (reason := refusal(model, batch)):
                print(f"{table.model}, {variant}, batch {batch}: left out, the kernel {reason}", flush=True)
                continue
            with table.attempt(f"{variant}, decode, batch {batch}"):
                ms = decode_ms(model, batch, args.context, args.steps, step)
                table.add(variant, "decode", batch, ms, error, same, args.context)


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(QWEN2_5_SHAPES), choices=list(QWEN2_5_SHAPES))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}; or none")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, default=256, help="tokens in the cache when decoding starts")
    parser.add_argument("--steps", type=int, default=64, help="timed steps")
    parser.add_argument("--eager", dest="compile", action="store_false", help="do not compile blocks")
    parser.add_argument("--no_transformers", action="store_true")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows but those measured anew")
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"no such variants: {', '.join(sorted(unknown))}")
    need_gpu()
    path = fresh_results("generation", args.append, COLUMNS)
    if "first_token" in args.phases:
        fresh_results("first_token", args.append, first_token.COLUMNS)
    print(header())
    exact_gate()
    missing: list[str] = []
    for name in args.models:
        table = Table(path, name)
        # In the order of VARIANTS: BF16 comes first, because it is the base of the ratios.
        for variant in [variant for variant in VARIANTS if variant in args.variants]:
            started = time.perf_counter()
            with table.attempt(variant):
                ours(table, variant, args)
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(f"({time.perf_counter() - started:.0f} s, {memory:.1f} GiB at most)", flush=True)
        if not args.no_transformers:
            with table.attempt(TRANSFORMERS):
                huggingface(table, args)
        if "first_token" in args.phases:
            with table.attempt("first token"):
                first_token.measure([name], [each for each in args.variants if each in first_token.VARIANTS])
        missing += table.missing
    if missing:
        sys.exit(f"not measured: {'; '.join(missing)}")


if __name__ == "__main__":
    main()
