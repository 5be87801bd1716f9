"""The commands ``reproduce`` and ``reproduce-report``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from research.reproduce.corpus import PROBE, TOKENS
from research.reproduce.grid import Run, read_grid
from research.reproduce.results import FILE, read_results
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import shards

GRID = "research/reproduce/grid.yaml"


def reproduce(
    grid: str = GRID,
    output: str = "results",
    data: str = "data/reproduce",
    only: str | list[str] | None = None,
    override: str | list[str] | None = None,
    jobs: int = 1,
    stop_after: float | None = None,
    keep_checkpoints: bool = False,
    dry_run: bool = False,
) -> None:
    """Run a grid of trainings. Runs that are done are skipped, and runs that were interrupted continue.

    Args:
        grid: The YAML file of factors and groups.
        output: The folder for results.jsonl, with a line for each run, and for the logs of the runs.
        data: The folder that `reproduce-corpus` wrote.
        only: The runs to do, as globs that match a name, an id or group/name; --only 'ablation_*/*' '*2of4*'.
        override: The changes to every run's recipe, like trainer.max_steps=100. A changed run is another run.
        jobs: The number of runs at a time. They are spread over the visible GPUs, and each run has one GPU.
        stop_after: The number of seconds after which running ones save and stop.
        keep_checkpoints: Whether to keep the checkpoints of finished runs.
        dry_run: Whether to list the runs only.

    Raises:
        ConfigError: The grid, an option or the corpus cannot work.
        SBNError: Runs failed; the others went on.
    """
    if jobs < 1:
        raise ConfigError(f"jobs {jobs} is below 1")
    read = read_grid(grid, _list(override), str(Path(data).absolute()))
    patterns = _list(only)
    runs = [run for run in read.runs() if run.matches(patterns)]
    if not runs:
        raise ConfigError(f"no run of {grid} matches {' or '.join(patterns)}; --dry_run true lists them")
    results = read_results(Path(output, FILE))
    if dry_run:
        _list_runs(runs, {line["id"] for line in results})
        return
    _check_data(data, results, Path(output), with_probe=read.probe is not None)
    _check_recipes(runs, {line["id"] for line in results})
    from research.reproduce.runner import Runner

    probe = None if read.probe is None else {**read.probe, "data": str(Path(data, PROBE).absolute())}
    Runner(Path(output).absolute(), probe, jobs, keep_checkpoints)(runs, stop_after)


def reproduce_report(
    results: str = "results/results.jsonl",
    output: str = "results/reproduction.md",
    images: str | None = None,
    plots: bool = True,
    grid: str = GRID,
) -> None:
    """Write tables and plots of what `reproduce` measured, next to what the paper reports.

    Args:
        results: The file of lines that `reproduce` wrote.
        output: The Markdown file to write.
        images: The folder for the plots; not given, images/ next to the output.
        plots: Whether to draw the plots; they need matplotlib.
        grid: The grid file, to list its runs that have no line and to explain its names. If the file is not there, the
            report goes without both.

    Raises:
        ConfigError: There are no results, the grid cannot work, or matplotlib is missing.
        DataError: The results are damaged.
    """
    lines = read_results(Path(results))
    if not lines:
        raise ConfigError(f"{results} holds no results yet; python cli.py reproduce makes them")
    from research.reproduce.report import write_report

    folder = Path(images) if images is not None else Path(output).parent / "images"
    there = Path(grid).is_file()
    write_report(lines, Path(output), folder if plots else None, read_grid(grid) if there else None)
    if not there:
        print(f"{grid} is not there: the report does not list what was not run", file=sys.stderr)
    print(f"wrote {output} from {len(lines)} runs")


def _check_data(data: str, results: list[dict[str, Any]], output: Path, with_probe: bool) -> None:
    for part in (TOKENS, PROBE) if with_probe else (TOKENS,):
        meta = shards.read_meta(Path(data, part))
        if meta is None:
            raise DataError(
                f"{Path(data, part)} is not there or not finished; write it with: python cli.py reproduce-corpus "
                f"--output {data}"
            )
        others = {line["data"]["fingerprint"] for line in results} - {meta["fingerprint"]}
        if part == TOKENS and others:
            raise ConfigError(f"{output / FILE} holds runs on another corpus than {data}; give another --output")


def _check_recipes(runs: list[Run], done: set[str]) -> None:
    """Check all recipes before any run starts: a key that ``fit`` does not know would fail one run after the other."""
    from sbn_lightning.cli.training import RecipeCheck

    parser = None
    todo = [run for run in runs if run.id not in done]
    print(f"checking the recipes of {len(todo)} runs", file=sys.stderr, flush=True)
    for run in todo:
        try:
            if parser is None:
                parser = RecipeCheck(run.recipe).parser
            else:
                parser.parse_object(run.recipe)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


def _list_runs(runs: list[Run], done: set[str]) -> None:
    for run in runs:
        state = "done" if run.id in done else "to do"
        print(f"{state:<6} {run.id}  {json.dumps(run.varied)}  {', '.join(run.groups)}")
    left = [run for run in runs if run.id not in done]
    print(f"{len(runs)} runs, {len(left)} to do: {sum(run.tokens for run in left):,} tokens")


def _list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
