"""Greedy tokens of the persistent decode step against those of the layers, on a model that was trained.

    python cli.py fit --config recipes/sparse_pretrain.yaml --model.config.n_heads 3 --model.config.n_kv_heads 1
    python benchmarks/decode_tokens.py --checkpoint logs/sparse_pretrain [--tokens 128] [--batches 1 4 8 16]

Random weights hide and exaggerate: their logits are nearly flat, and a rounding moves many integers. So the comparison
needs a trained model whose heads have 64 or 128 features (the recipe's own have 48).

For each batch two things are counted. ``free``: each path continues the prompts alone, and whole continuations are
compared, up to the first token that differs. ``forced``: both paths read the tokens of the layers, and each step's most
likely token is compared; ``behind`` is how far, in logits, a token that differs lies behind that of the layers at most.
The prompts are pieces of Python's standard library.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
from pathlib import Path

import torch
from common import header, need_gpu

from sbn_lightning.formats.loaded import LoadedModel
from sbn_lightning.inference import Decoder, generate
from sbn_lightning.inference.opening import open_model
from sbn_lightning.inference.persistent import refusal

PROMPT = 48


def prompts_of(opened: LoadedModel, count: int) -> list[list[int]]:
    """Cuts prompts of different lengths out of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    draw = random.Random(0)
    prompts = []
    while len(prompts) < count:
        text = draw.choice(files).read_text(errors="ignore")
        ids = opened.need_tokenizer().encode(text[:20000]).ids
        length = PROMPT - len(prompts)
        if len(ids) > length:
            start = draw.randrange(len(ids) - length)
            prompts.append(ids[start : start + length])
    return prompts


def compare(opened: LoadedModel, batch: int, count: int) -> bool:
    """Compares one batch, prints a line, and returns whether all continuations are equal."""
    prompts = prompts_of(opened, batch)
    model = opened.model
    plain = generate(model, prompts, max_new_tokens=count)
    ours = generate(model, prompts, max_new_tokens=count, decode_step="persistent")
    equal = sum(a == b for a, b in zip(plain, ours, strict=True))
    agreed = sum(next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
                 for x, y in zip(plain, ours, strict=True))  # fmt: skip
    length = PROMPT + count
    decoders = Decoder(model, batch, length), Decoder(model, batch, length, step="persistent")
    for decoder in decoders:
        decoder.prefill(prompts)
    same = steps = 0
    behind = error = 0.0
    for i in range(count - 1):
        tokens = torch.tensor([row[i] for row in plain], device=model.embed.weight.device)
        expected, logits = (decoder.step(tokens).float() for decoder in decoders)
        chosen = expected.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
        gap = expected.amax(-1) - chosen
        same, steps = same + int((gap == 0).sum()), steps + batch
        behind = max(behind, float(gap.max()))
        error = max(error, float((logits - expected).norm() / expected.norm()))
    decoders[1].check()
    free = (
        f"free {equal} of {batch} continuations equal, {agreed} of {batch * count} tokens before the first difference"
    )
    forced = f"forced {same} of {steps} tokens equal, behind {behind:.4f}, largest relative error {error:.4f}"
    print(f"batch {batch}: {free}; {forced}", flush=True)
    return equal == batch


def main() -> None:
    """Compares all batches; the exit status says whether all continuations are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens for each prompt")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    args = parser.parse_args()
    need_gpu()
    print(header())
    opened = open_model(args.checkpoint, device="cuda")
    if reason := refusal(opened.model, max(args.batches)):
        sys.exit(f"the persistent step {reason}")
    equal = [compare(opened, batch, args.tokens) for batch in args.batches]
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()
