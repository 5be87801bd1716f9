"""Jobs of :mod:`tests.distributed.forked` that run rows of ``benchmarks/scaling.py`` with a small model."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from tests.benchmarks.test_benchmarks import BENCHMARKS, WallClockEvent
from tests.helpers import small_config, small_module


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """All weights, one after the other."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([weight.detach().flatten() for weight in whole])


def scaling_rows(folder: Path, strategies: list[str]) -> None:
    """Measure rows on all ranks of a job, with the strategies and options of the benchmark.

    Writes for each row the MiB on the wire and how far the weights are from those of the first row, as a part of how
    far they have come.
    """
    sys.path.insert(0, str(BENCHMARKS))
    module = importlib.import_module("scaling_rank")
    rank, digest, trained = int(os.environ["RANK"]), module.masks_of, []

    def digest_of(model: torch.nn.Module) -> Any:
        trained.append(weights_of(model))
        return digest(model)

    def preset(shape: str, max_sequence_length: int, **options: Any) -> Any:
        return small_config(**options)

    torch.compiler.set_stance("force_eager")  # Compiled blocks are the matter of other tests.
    patches = [
        mock.patch.multiple(module, ACCELERATOR="cpu", BACKEND="reference", LENGTH=16, masks_of=digest_of),
        mock.patch.object(module.TransformerConfig, "preset", preset),
        mock.patch.object(torch.cuda, "Event", WallClockEvent),
        *(mock.patch.object(torch.cuda, what) for what in ("synchronize", "reset_peak_memory_stats")),
        *(mock.patch.object(torch.cuda, what, return_value=0) for what in ("memory_allocated", "max_memory_allocated")),
    ]
    for patch in patches:
        patch.start()
    found = {}
    for name in strategies:
        run = module.Run("qwen2.5-0.5b", name, "bf16", 2, [2, 1])
        two, one = module.measure(run, module.plan(run.counts, 1, wire=True, profile=False), rank, 2, print)
        assert (two["accumulate"], one["accumulate"]) == (2, 1), name
        assert two["same_masks"] is one["same_masks"] is True, name
        came = trained[0] - weights_of(small_module(linear="dense" if run.dense else "ternary"))
        away = (trained[-1] - trained[0]).norm() / came.norm()
        found[name] = {"wire_mib": one["wire_mib"], "away": away.item()}
    (folder / f"rows{rank}.json").write_text(json.dumps(found))
