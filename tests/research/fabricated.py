"""Made-up lines of results, from a loss that the test chooses."""

import json
import math
import random
from pathlib import Path

from research.reproduce.grid import read_grid
from research.reproduce.tables import density
from sbn_lightning.cli import main

GRID = Path(__file__).parents[2] / "research/reproduce/grid.yaml"


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


BEST = {"ternary": 0.004, "bf16-sparse": 0.002}  # as in the grid file


def loss_of(run):
    factors = run.factors
    loss = 3.0 + 0.4 * (1 - density(factors["pattern"])) * (2 if factors["family"] == "bf16-sparse" else 1)
    loss += {"ternary": math.log(1.2)}.get(factors["mask_source"], 0.0)
    loss -= 0.1 * (factors["gamma_over"] == "kept")
    loss += 0.2 * (factors["learning_rate"] != BEST[factors["family"]])
    loss -= 0.2 * (factors["final_learning_rate"] == 0)
    return loss


def write(lines, *options, grid=GRID):
    Path("results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--results", "results.jsonl", "--output", "out/report.md", "--grid", str(grid)]
    status = main(["reproduce-report", *files, *options])
    return status, Path("out/report.md").read_text() if status == 0 else ""


def rows(text, *start):
    """The table rows that begin with the given cells."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[: len(start)] == list(start)]
