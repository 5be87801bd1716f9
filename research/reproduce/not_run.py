"""List the runs of a grid that have no line of results."""

from __future__ import annotations

from research.reproduce.grid import Grid, Run
from research.reproduce.tables import Results, table


def not_run(results: Results, grid: Grid) -> str | None:
    """Return a table of the missing runs by group, or None if every run of the grid has its line.

    A run that several groups ask for counts in each of them.

    Args:
        results: The lines of results.
        grid: The grid that was to be run.
    """
    done = {line["id"] for line in results.lines}
    runs = grid.runs()
    left = {run.id for run in runs} - done
    if not left:
        return None
    said = f"{len(left)} of the grid's {len(runs)} runs"
    if len(left) == len(runs):
        return f"{said}: the results are of another grid, or were made with --override."
    rows = []
    for group, values in grid.groups.items():
        asked = [run for run in runs if group in run.groups]
        missing = [run for run in asked if run.id in left]
        if missing:
            several = [name for name, value in values.items() if isinstance(value, list) and len(value) > 1]
            which = "all" if len(missing) == len(asked) else "; ".join(_short(run, several) for run in missing)
            rows.append([group, f"{len(missing)} of {len(asked)}", which])
    return f"{said}:\n\n{table(('group', 'not run', 'which'), rows)}"


def _short(run: Run, names: list[str]) -> str:
    """Return the values that distinguish a run from the other runs of its group."""
    values = {name: run.factors[name] for name in names}
    return " ".join(f"{'seed ' if name == 'seed' else ''}{value}" for name, value in values.items())
