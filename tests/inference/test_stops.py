"""Stop strings in a text that comes in pieces."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.inference.stops import StopStrings


def run(stops, pieces):
    strings = StopStrings(stops)
    given = [strings.push(piece) for piece in pieces]
    return given + ([] if strings.found else [strings.finish()]), strings.found


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["some E", "N", "D more"], ["some ", "", ""]),
        (["END"], ["some E", "N", "E"], ["some ", "", "EN", "E"]),
        (["END"], ["some EN"], ["some ", "EN"]),
        (["aab"], ["aaa", "b"], ["a", ""]),
        (["\n\n", "\nQ:"], ["A\n", "Q", ": B"], ["A", "", ""]),
        ([], ["a", "b"], ["a", "b", ""]),
    ],
)
def test_holds_back_what_may_become_a_stop_string(stops, pieces, expected):
    assert run(stops, pieces)[0] == expected


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.text("ab", max_size=30), st.lists(st.integers(1, 5))
)
def test_pieces_do_not_matter(stops, text, lengths):
    """The text ends where it first ends with a stop string, read character by character."""
    pieces, rest = [], text
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    found, stopped = run(stops, [*pieces, rest])
    expected = text
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            expected = text[: end - max(map(len, matches))]
            break
    assert "".join(found) == expected
    assert stopped == (expected != text)


def test_refuses_an_empty_stop_string():
    with pytest.raises(ConfigError, match="is empty"):
        StopStrings(["a", ""])
