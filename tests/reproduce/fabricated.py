"""Lines of results made up for tests, from a loss that the test chooses."""

import random
from pathlib import Path

from sbn_lightning.reproduce.grid import read_grid

GRID = Path(__file__).parents[2] / "recipes/reproduce/grid.yaml"


def line_of(run, loss, probe=0.8):
    curve = [[step, loss + 2 / (1 + step / 100)] for step in range(384, 1537, 384)]
    accuracies = {"places": 100, "accuracy": probe, "balanced_accuracy": probe, "always_round": 0.7}
    return {
        "id": run.id,
        "name": run.name,
        "factors": run.factors,
        "varied": run.varied,
        "tokens": run.tokens,
        "steps": 1536,
        "parameters": 15_000_000,
        "validation": {"loss": loss, "perplexity": 2.718281828459045**loss},
        "validation_curve": [*curve[:-1], [1536, loss]],
        "training_curve": curve,
        "sparsity": {
            name: [[step, 0.3 / (1 + step)] for step in (32, 768, 1536)]
            for name in ("zeros", "zeros_natural", "zeros_enforced", "flip_rate_mask", "flip_rate_code")
        },
        "seconds": 30.0,
        "data": {"fingerprint": "f", "vocab_size": 8192, "tokens": {"train": 50_000_000, "val": 1_000_000}},
        "hardware": "a GPU",
        "versions": {"python": "3.12", "torch": "2.11"},
        "probe": accuracies | {"by_distance": {"128+": accuracies}},
    }


def all_lines(loss_of, noise=0.0):
    """A line for every run of the shipped grid."""
    draw = random.Random(0)
    return [line_of(run, loss_of(run) + draw.gauss(0, noise)) for run in read_grid(GRID).runs()]
