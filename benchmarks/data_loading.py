"""Tokens a second that the data module delivers, to compare with the tokens that a training step takes.

    python benchmarks/data_loading.py [--path data/stdlib] [--workers 0 2 4]

Batches are read as a Trainer reads them (16 sequences of 2,048 tokens, shuffled), and dropped. No GPU is needed. The
corpus is prepared on first use.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from itertools import islice

from sbn_lightning.data import TokenDataModule


def measure(path: str, workers: int, sequences: int, length: int, seconds: float) -> tuple[int, float]:
    """Returns the number of tokens read and the seconds; the first batches, in which workers start, are left out."""
    data = TokenDataModule(path=path, batch_size=sequences, sequence_length=length, num_workers=workers)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    for _ in islice(batches, 4):
        pass
    tokens, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(data.train_dataloader())
            continue
        tokens += batch[:, 1:].numel()
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="data/stdlib")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for workers in args.workers:
        tokens, seconds = measure(args.path, workers, args.sequences, args.length, args.seconds)
        print(f"{workers} workers: {tokens / seconds / 1e6:.2f} million tokens/s", flush=True)


if __name__ == "__main__":
    main()
