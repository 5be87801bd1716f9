"""How many tokens a second one process trains on, for each number of sequences in a step.

A trial of a few steps runs on random tokens. Its first half has a partial rounding and its second half the whole one,
because a layer computes in plain PyTorch during the warm-up and with its kernel after it. The two halves are timed
apart, each without the steps in which code is compiled.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from research.pretrained.train import Setting, Training
from research.pretrained.trials import Trial
from research.queue import append_row
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.formats.load import read_config
from sbn_lightning.models.config import TransformerConfig
from sbn_lightning.models.transformer import TernaryTransformer

FILE = "speed.jsonl"
# Steps of a half that are not timed: code is compiled, kernels are chosen, and memory is allocated.
WARM_UP = 5
# The shape of SmolLM2-135M, for a machine that has no weights.
SMOLLM2 = TransformerConfig(
    vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ffn=1536, tie_embeddings=True,
    linear="dense", rope_theta=100_000.0, norm_eps=1e-5,
)  # fmt: skip


def random_weights(path: Path, config: TransformerConfig = SMOLLM2) -> str:
    """Write a checkpoint with random weights unless the file is there. Return its path."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        lightning_file.write(config, TernaryTransformer(config).state_dict(), path)
    return str(path)


def measure_speed(
    setting: Setting, trials: Sequence[Trial], batches: Sequence[int], deadline: float, steps: int = 12, top: int = 0
) -> None:
    """Time each trial with each number of sequences, and write one row for each to ``speed.jsonl``.

    Args:
        setting: What all trials share. Its training text is replaced by random tokens.
        trials: The trials. Only their kind counts, and not their number of tokens.
        batches: The numbers of sequences in a step.
        deadline: The moment of the monotonic clock after which no further trial starts.
        steps: The number of timed steps of each half.
        top: How many of the kernels that take longest are written; 0 leaves the profile out.
    """
    vocabulary = read_config(setting.weights).vocab_size
    text = torch.randint(vocabulary, (1 << 20,), dtype=torch.int32).to(setting.device)
    half = WARM_UP + steps + bool(top)
    for trial in trials:
        for batch in batches:
            if time.monotonic() > deadline:
                print(f"left out: {trial.name} with {batch} sequences")
                continue
            here = replace(setting, train=text, batch=batch, marks=())
            # Half a step less, so that the whole rounding is in effect at the first step of the second half.
            end = (half - 0.5) / (2 * half) if trial.rounding else 0.0
            one = replace(trial, tokens=2 * half * here.tokens_of_step, rounding=end)
            row: dict[str, Any] = {"trial": trial.name, "batch": batch, "length": here.length}
            try:
                row |= _time(Training(one, here), steps, top)
            except torch.cuda.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
            append_row(setting.output / FILE, row)
            print(", ".join(f"{name}: {_short(value)}" for name, value in row.items()), flush=True)
            gc.collect()
            torch.compiler.reset()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()


def _time(training: Training, steps: int, top: int) -> dict[str, Any]:
    """Return the tokens a second of both halves, the seconds before the timed steps, and the memory in GiB."""
    cuda = training.setting.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {}
    for name in ("partly rounded", "rounded"):
        since = time.monotonic()
        for _ in range(WARM_UP):
            training.train_step()
        training.synchronize()
        middle = time.monotonic()
        for _ in range(steps):
            training.train_step()
        training.synchronize()
        end = time.monotonic()
        row[name] = {
            "tokens_per_second": round(steps * training.setting.tokens_of_step / (end - middle)),
            "seconds_before": round(middle - since, 1),
        }
        if top:
            row[name] |= _profile(training, top)
    if cuda:
        row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return row


def _profile(training: Training, top: int) -> dict[str, Any]:
    """Return the milliseconds that the kernels of a step take (on a CPU: its operators), and the longest kernels."""
    activities = torch.profiler.ProfilerActivity
    on, kind = (activities.CUDA, "device") if training.setting.device.type == "cuda" else (activities.CPU, "cpu")
    with torch.profiler.profile(activities=[on]) as profiler:
        training.train_step()
        training.synchronize()
    times = [(getattr(one, f"self_{kind}_time_total") / 1000, one) for one in profiler.key_averages()]
    times.sort(key=lambda pair: -pair[0])
    rows = [[one.key[:90], one.count, round(ms, 3)] for ms, one in times[:top]]
    return {"kernels_ms": round(math.fsum(ms for ms, _ in times), 2), "top": rows}


def _short(value: Any) -> Any:
    """Return a value without its list of kernels."""
    return {name: one for name, one in value.items() if name != "top"} if isinstance(value, dict) else value
