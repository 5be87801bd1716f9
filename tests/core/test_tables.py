"""The text tables that commands print."""

from __future__ import annotations

from sbn_lightning.core.tables import format_table


def test_columns_are_aligned() -> None:
    rows = [["qkv", "12.5 %", "2:4"], ["down", "9 %", ""]]
    assert format_table(["layer", "zeros", "pattern"], rows, left=(0, 2)).split("\n") == [
        "layer   zeros  pattern",
        "-----  ------  -------",
        "qkv    12.5 %  2:4",
        "down      9 %",
    ]
    assert format_table(["a", "b"], [["1", "22"]], rule=False) == "a   b\n1  22"
