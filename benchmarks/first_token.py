"""The time to the first token in a fresh process, and the time until the process can take a prompt.

    python benchmarks/first_token.py [--models qwen2.5-1.5b] [--variants "bf16 dense" "2:4"] [--length 512]

Every model and variant runs in a process of its own, which this script starts. The weights are random, the shapes are
those of Qwen2.5, and the blocks are not compiled. Times are of the wall clock and include the host:

* ``start_up_s``: from the start of the process until the model is ready: imports, CUDA, weights, choice of kernels.
  Reading a file is not part of it.
* ``cold_ms``: the first prompt of the process to its first token. Kernels are compiled or loaded here.
* ``graph_ms``: the second prompt, which captures the CUDA graph of its length.
* ``warm_ms``: the median of the prompts after that, which replay the graph.

A kernel that Triton has compiled before lies in its cache on disk. ``--empty_cache`` gives every process an empty one.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402 (the clock starts before the imports)
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

# Variant -> (kind of its linear layers, pattern, backend).
VARIANTS = {
    "bf16 dense": ("dense", "6:8", "reference"),
    "2:4": ("ternary", "2:4", "sparse"),
    "6:8": ("ternary", "6:8", "int8"),
}
COLUMNS = ("model", "variant", "length", "start_up_s", "cold_ms", "graph_ms", "warm_ms", "empty_cache")
KEY = ("model", "variant", "length", "empty_cache")
REPEATS = 8


def run(model_name: str, variant: str, length: int, device: str = "cuda") -> dict[str, float]:
    """Measures in this process.

    Args:
        model_name: A name of the presets.
        variant: One of :data:`VARIANTS`.
        length: The number of tokens of a prompt.
        device: The device.

    Returns:
        The times by the names of their columns.
    """
    import torch

    from sbn_lightning.formats.assemble import cast_model
    from sbn_lightning.inference import Decoder
    from sbn_lightning.inference.opening import use_backend
    from sbn_lightning.layers.sparse_linear import prepare_layers
    from sbn_lightning.models.config import TransformerConfig
    from sbn_lightning.models.transformer import TernaryTransformer

    linear, pattern, backend = VARIANTS[variant]
    config = TransformerConfig.preset(model_name, linear=linear, pattern=pattern, max_sequence_length=4096)
    with torch.device(device):
        model = TernaryTransformer(config)
    cast_model(model, torch.bfloat16)
    model.eval().requires_grad_(False)
    use_backend(model, backend, torch.bfloat16)  # type: ignore[arg-type]
    prepare_layers(model)
    decoder = Decoder(model, 1, length + 64)
    if device != "cpu":
        torch.cuda.synchronize()
    start_up = time.perf_counter() - STARTED
    times = []
    for i in range(REPEATS + 2):
        prompt = [(31 * i + 7 * j) % config.vocab_size for j in range(length)]
        started = time.perf_counter()
        int(decoder.extend(0, prompt, 0).argmax())  # the host waits for the token
        times.append(1e3 * (time.perf_counter() - started))
    warm = statistics.median(times[2:])
    return {"start_up_s": start_up, "cold_ms": times[0], "graph_ms": times[1], "warm_ms": warm}


def measure(models: list[str], variants: list[str], length: int = 512, empty_cache: bool = False) -> None:
    """Measures each model and variant in a process of its own, and adds the rows to ``first_token.csv``.

    Raises:
        subprocess.CalledProcessError: If a process fails.
    """
    from common import RESULTS, append

    for name in models:
        for variant in variants:
            with tempfile.TemporaryDirectory() as empty:
                place = {"TRITON_CACHE_DIR": empty} if empty_cache else {}
                command = [sys.executable, str(Path(__file__)), "--run", name, variant, str(length)]
                child = subprocess.run(
                    command, env=os.environ | place, stdout=subprocess.PIPE, text=True, check=True
                ).stdout
            row: dict[str, object] = {"model": name, "variant": variant, "length": length}
            row |= {"empty_cache": empty_cache} | json.loads(child.splitlines()[-1])
            append(RESULTS / "first_token.csv", {column: row[column] for column in COLUMNS}, KEY)


def main() -> None:
    """Measures, or is the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--empty_cache", action="store_true", help="compile all kernels anew in every process")
    parser.add_argument("--append", action="store_true", help="keep the rows of the CSV that are not measured again")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        name, variant, length = args.run
        print(json.dumps(run(name, variant, int(length))))
        return
    from common import fresh_results, header, need_gpu

    need_gpu()
    print(header())
    fresh_results("first_token", args.append, COLUMNS)
    measure(args.models, args.variants, args.length, args.empty_cache)


if __name__ == "__main__":
    main()
