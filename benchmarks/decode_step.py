"""A whole decode step, embedding to logits, as one persistent kernel (`Decoder(step="persistent")`).

    python benchmarks/decode_step.py [--models qwen2.5-1.5b] [--batches 1 4] [--compare] [--timeline]

The weights are random, the shapes are those of Qwen2.5, the pattern is 2:4. ``us`` is the median over 9 windows of 40
steps, without the choice of a token. The caches hold random keys and values of ``context`` tokens.

Before timing, the persistent step and the model's own step continue the same prompts, and their logits are compared.
With random weights a rounding in an early layer moves many integers after it, so the logits differ by a few per cent. A
difference (relative RMS) above 0.2 ends the benchmark.

``--compare`` also times the model's own step, as a CUDA graph, for the ternary model and for a dense model in bfloat16.
These times are printed and not stored. Blocks are not compiled.

``--timeline`` prints where a step spends its time: for each moment of a layer when the last program reaches it, in
nanoseconds from the moment in which the last program has begun the layer, as a mean over the layers. The stamps
themselves cost some per cent.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from common import append, fresh_results, header, need_gpu
from sbn_kernels.decode.step.plan import STAMPS
from sbn_kernels.decode.step.step import DecodeStep
from sbn_kernels.decode.step.weights import pack

from sbn_lightning.formats.assemble import cast_model
from sbn_lightning.inference import Decoder
from sbn_lightning.inference.opening import use_backend
from sbn_lightning.inference.persistent import gather_weights, persistent_step, refusal
from sbn_lightning.models.config import QWEN2_5_SHAPES, TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

COLUMNS = ("model", "batch", "context", "us")
KEY = ("model", "batch", "context")
DEVICE = torch.device("cuda")
WINDOWS, STEPS, CHECKED, PROMPT, ERROR = 9, 40, 12, 96, 0.2


def build(name: str, linear: str, length: int) -> TernaryTransformer:
    """Makes a random model in bfloat16 on the GPU."""
    torch.manual_seed(0)
    config = TransformerConfig.preset(name, linear=linear, pattern="2:4", max_sequence_length=length)
    with DEVICE:
        model = TernaryTransformer(config)
    cast_model(model, torch.bfloat16)
    model.eval().requires_grad_(False)
    if linear == "ternary":
        use_backend(model, "sparse", torch.bfloat16)
    return model


def filled(model: TernaryTransformer, batch: int, context: int) -> Decoder:
    """Makes a decoder whose caches hold random keys and values."""
    decoder = Decoder(model, batch, context + STEPS + 8)
    decoder.prefill([[1, 2, 3]] * batch)
    for layer in decoder._layers:
        layer.keys.normal_()
        layer.values.normal_()
    return decoder


def microseconds(step: Callable[[], object], lengths: torch.Tensor, context: int) -> float:
    """Median time of a step."""
    times = []
    for window in range(WINDOWS + 1):
        lengths.fill_(context - 1)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        if window:  # the first one captures the graph
            times.append(start.elapsed_time(end) / STEPS * 1e3)
    return statistics.median(times)


def compare(model: TernaryTransformer, batch: int) -> None:
    """Compares the logits of the persistent step with those of the model's own step, for prompts of several lengths.

    Raises:
        AssertionError: If the difference is above :data:`ERROR`.
    """
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (batch, PROMPT + CHECKED)
    tokens = torch.randint(model.config.vocab_size, size, device=DEVICE, generator=generator)
    lengths = torch.tensor([PROMPT - 7 * i for i in range(batch)], device=DEVICE)
    theirs, ours = Decoder(model, batch, 160), Decoder(model, batch, 160, step="persistent")
    for decoder in (theirs, ours):
        decoder.prefill_padded(tokens[:, :PROMPT], lengths)
    square = wanted = 0.0
    for i in range(PROMPT, PROMPT + CHECKED):
        expected, logits = theirs.step(tokens[:, i]).float(), ours.step(tokens[:, i]).float()
        ours.check()
        square += float((logits - expected).square().sum())
        wanted += float(expected.square().sum())
    error = (square / wanted) ** 0.5
    print(f"batch {batch}: the logits differ from the model's own by {error:.4f}")
    if not error <= ERROR:
        raise AssertionError(f"batch {batch}: the logits differ from the model's own by {error:.3f}, above {ERROR}")


def print_others(model: TernaryTransformer, label: str, batch: int, context: int) -> None:
    """Times and prints the model's own step."""
    decoder = filled(model, batch, context)
    tokens = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    us = microseconds(lambda: decoder.step(tokens), decoder.lengths, context)
    print(f"{label}, batch {batch}, context {context}: {us:.1f} us")


def print_timeline(model: TernaryTransformer, batch: int, context: int) -> None:
    """Traces a step, and prints when the last program reaches each moment of a layer."""
    decoder = filled(model, batch, context)
    caches = [(layer.keys, layer.values) for layer in decoder._layers]
    step = DecodeStep(pack(gather_weights(model)), caches, decoder.max_length, lengths=decoder.lengths, traced=True)
    for _ in range(4):
        decoder.lengths.fill_(context - 1)
        step.step(step.tokens)
    step.check()
    times = step.trace[..., 1].double()  # [programs, layers + 1, stamps], ns; 0 where a program has no part
    reached = times.amax(0)[1:-1]  # without the first layer, which waits for memory
    since = (reached - reached[:, :1]).mean(0)
    print(f"batch {batch}, context {context}: ns after the beginning of a layer")
    for name, ns in zip(STAMPS, since.tolist(), strict=True):
        if ns > 0:
            print(f"  {name:32s} {ns:7.0f}")
    head = times.amax(0)[-1]
    print(f"  {'next layer':32s} {float((head[0] - reached[0, 0]) / len(reached)):7.0f}")
    print(f"  {'head: norm, product':32s} {float(head[1] - head[0]):7.0f} {float(head[2] - head[1]):7.0f}", flush=True)


def main() -> None:
    """Checks, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(QWEN2_5_SHAPES), choices=list(QWEN2_5_SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 2048])
    parser.add_argument("--compare", action="store_true", help="also time the model's own step and bfloat16")
    parser.add_argument("--timeline", action="store_true", help="also print where the time goes")
    parser.add_argument("--append", action="store_true", help="keep the rows of the CSV that are not measured again")
    args = parser.parse_args()
    need_gpu()
    print(header())
    path = fresh_results("decode_step", args.append, COLUMNS)
    length = max(*args.contexts, PROMPT) + 128
    for name in args.models:
        if args.compare:
            dense = build(name, "dense", length)
            for batch in args.batches:
                for context in args.contexts:
                    print_others(dense, f"{name}, bfloat16", batch, context)
            del dense
        model = build(name, "ternary", length)
        for batch in args.batches:
            if reason := refusal(model, batch):
                print(f"{name}, batch {batch}: no persistent step: {reason}")
                continue
            compare(model, batch)
            for context in args.contexts:
                decoder = filled(model, batch, context)
                caches = [(layer.keys, layer.values) for layer in decoder._layers]
                step = persistent_step(model, caches, decoder.max_length, decoder.lengths, cuda_graph=True)
                us = microseconds(lambda step=step: step.step(step.tokens), decoder.lengths, context)
                step.check()
                append(path, {"model": name, "batch": batch, "context": context, "us": us}, KEY)
                if args.compare:
                    print_others(model, f"{name}, ternary", batch, context)
                if args.timeline:
                    print_timeline(model, batch, context)
        del model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
