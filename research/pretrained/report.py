"""Tables of what the study measured, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def report(rows: Sequence[Row]) -> str:
    """Return a table of perplexities and a table of probes.

    Args:
        rows: The rows that trials wrote. Trials that did not come to their end are in the table, too.
    """
    return f"{perplexities(rows)}\n\n{probes(rows)}"


def perplexities(rows: Sequence[Row]) -> str:
    """Return a row for each trial, with the perplexities of the held-out texts at each number of tokens."""
    names = list(dict.fromkeys(row["trial"]["name"] for row in rows))
    lines = ["| trial | tokens | loss | code | English | tokens/s |", "| --- | --- | --- | --- | --- | --- |"]
    for name in names:
        for row in sorted((row for row in rows if row["trial"]["name"] == name), key=lambda row: row["tokens"]):
            speed = row["tokens_per_second"]
            done = f"{row['tokens'] / 1e6:.1f}M" + (
                "" if row["finished"] else f" of {row['trial']['tokens'] / 1e6:.1f}M"
            )
            cells = [
                name,
                done,
                f"{row['loss']:.3f}",
                *(_short(row["perplexity"][kind]) for kind in ("code", "english")),
            ]
            lines.append("| " + " | ".join([*cells, f"{speed:,}" if speed else "-"]) + " |")
    return "\n".join(lines)


def probes(rows: Sequence[Row]) -> str:
    """Return a row for each trial that was probed at its end, and a column for each task."""
    probed = [row for row in rows if row.get("probe")]
    tasks = list(dict.fromkeys(f"{one['task']} {one['setting']}".strip() for row in probed for one in row["probe"]))
    lines = [f"| trial | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for row in probed:
        found = {f"{one['task']} {one['setting']}".strip(): one for one in row["probe"]}
        cells = [
            f"{found[task]['accuracy']:.3f} ± {found[task]['error']:.3f}" if task in found else "-" for task in tasks
        ]
        lines.append(f"| {row['trial']['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tasks(answers: Sequence[Row]) -> str:
    """Return a row for each trained model, with its accuracy in each task and its best induction head.

    Args:
        answers: What the models answered, the rows of ``answers.jsonl``.
    """
    names = list(dict.fromkeys(task for row in answers for task in row["tasks"]))
    lines = [f"| trial | tokens | {' | '.join(names)} | best head |", "| --- | --- |" + " --- |" * (len(names) + 1)]
    for row in answers:
        found = [row["tasks"].get(name) for name in names]
        cells = ["-" if one is None else f"{one['acc']:.3f} ± {one['acc_error']:.3f}" for one in found]
        block, head, score = row["induction_heads"][0]
        best = f"{score:.3f} (block {block:.0f}, head {head:.0f})"
        lines.append(f"| {row['trial']} | {row['tokens'] / 1e6:.1f}M | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def copying(rows: Sequence[Row]) -> str:
    """Return a row for each conversion without training, with what is left of copying and of the best induction heads.

    Args:
        rows: The rows of ``copying.jsonl``.
    """
    names = [f"{one['task']} {one['setting']}" for one in rows[0]["probe"]] if rows else []
    lines = [f"| converted | how | {' | '.join(names)} | best heads |", "| --- | --- |" + " --- |" * (len(names) + 1)]
    for row in rows:
        right = [f"{one['accuracy']:.3f} ± {one['error']:.3f}" for one in row["probe"]]
        heads = ", ".join(f"{score:.2f}" for _, _, score in row["heads"][:3])
        how = "ternary, no mask" if row["variant"] == "rounded" else f"{row['variant']} {row['pattern']}"
        how = "-" if row["variant"] is None else how
        lines.append(f"| {row['converted']} | {how} | {' | '.join(right)} | {heads} |")
    return "\n".join(lines)


def _short(perplexity: float) -> str:
    return f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:,.0f}"
