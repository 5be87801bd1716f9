"""Tables of text for a terminal.

A dependency such as ``tabulate`` would be larger than these few lines, which is all that the reports need.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def format_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,), rule: bool = True
) -> str:
    """Align the columns of a table.

    Args:
        header: The names of the columns.
        rows: The cells of each row, as many as the header has.
        left: The numbers of the columns that are aligned on the left; the others are aligned on the right.
        rule: Whether a line of dashes comes under the header.

    Returns:
        The lines of the table, without spaces at their ends.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, *([["-" * width for width in widths]] if rule else []), *rows]
    aligned = (
        (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)
