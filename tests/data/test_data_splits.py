"""Which side text files and records go to, and that neither side stays empty while a text file can fill it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbn_lightning.data import prepare
from sbn_lightning.data.tokenization.sources import share
from tests.data.helpers import contents, prepare_small
from tests.data.test_data_prepare import both, documents

FEW = 0.01


def text_names(fraction: float, *, val: int, train: int, start: str = "text") -> list[str]:
    """Names of text files of which the hash puts so many into each side."""
    names = [f"{start}{number}.md" for number in range(10_000)]
    low = [name for name in names if share(name) < fraction]
    high = [name for name in names if share(name) >= fraction]
    return low[:val] + high[:train]


def write_texts(folder: Path, names: list[str]) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    texts = {name: f"line of {name}\n" * 400 for name in names}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return texts


def write_records(folder: Path, *, val: int, train: int, fraction: float = FEW) -> list[str]:
    """A ``records.jsonl`` of which the hash puts so many records into each side; other lines hold no text."""
    lines, records, position = [], [], 0
    left = {"val": val, "train": train}
    while any(left.values()):
        side = "val" if share(f"records.jsonl:{position}") < fraction else "train"
        line = '{"text": ""}'
        if left[side]:
            left[side] -= 1
            records.append(f"record {position}")
            line = json.dumps({"text": records[-1]})
        lines.append(line + "\n")
        position += len(lines[-1])
    (folder / "records.jsonl").write_text("".join(lines))
    return records


@pytest.mark.parametrize("segment_bytes", [300, 10**6])
@pytest.mark.parametrize("records", [{"val": 0, "train": 1}, {"val": 0, "train": 0}])
def test_text_files_fill_the_side_that_few_records_leave_empty(
    tmp_path: Path, records: dict[str, int], segment_bytes: int
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    texts = write_texts(folder, text_names(FEW, val=0, train=18))
    lines = write_records(folder, **records)
    if not lines:
        (folder / "records.jsonl").write_text('{"text": ""}\n')
    prepare_small(folder, out, val_fraction=FEW, segment_bytes=segment_bytes)
    assert documents(out, "val") == [texts[min(texts, key=share)]]
    assert both(out) == sorted([*texts.values(), *lines])


def test_text_files_fill_a_training_side_that_records_leave_empty(tmp_path: Path) -> None:
    folder, out, most = tmp_path / "in", tmp_path / "out", 0.99
    texts = write_texts(folder, text_names(most, val=5, train=0))
    lines = write_records(folder, val=2, train=0, fraction=most)
    prepare_small(folder, out, val_fraction=most)
    assert documents(out, "train") == [texts[max(texts, key=share)]]
    assert both(out) == sorted([*texts.values(), *lines])


def test_no_text_file_moves_if_records_fill_both_sides(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_texts(folder, text_names(FEW, val=0, train=3))
    write_records(folder, val=1, train=1)
    prepare_small(folder, out, val_fraction=FEW)
    assert [text.split()[0] for text in documents(out, "val")] == ["record"]


def test_without_a_validation_side_no_text_file_moves(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_texts(folder, text_names(FEW, val=0, train=3))
    write_records(folder, val=0, train=1)
    assert set(prepare_small(folder, out, val_fraction=0)["splits"]) == {"train"}


@pytest.mark.parametrize("start", ["before", "text"])  # before or after records.jsonl
def test_a_lone_text_file_is_cut_if_the_records_beside_it_are_too_few(tmp_path: Path, start: str) -> None:
    folder = tmp_path / "in"
    (text,) = write_texts(folder, text_names(FEW, val=0, train=1, start=start)).values()
    (record,) = write_records(folder, val=0, train=1)
    for segment_bytes in (100, 10**6):
        out = tmp_path / f"out{segment_bytes}"
        prepare_small(folder, out, val_fraction=FEW, segment_bytes=segment_bytes)
        (tail,) = documents(out, "val")
        (head,) = (one for one in documents(out, "train") if one != record)
        assert head + tail == text
    assert contents(tmp_path / "out100" / "val") == contents(out / "val")


@pytest.mark.parametrize("rows", [1, 2000])
def test_a_lone_text_file_beside_a_dataset_is_cut_only_if_the_dataset_is_too_small(tmp_path: Path, rows: int) -> None:
    import datasets

    name, folder = "story.txt", tmp_path / "in"
    (text,) = write_texts(folder, [name]).values()
    datasets.Dataset.from_dict({"text": [f"row {row}" for row in range(rows)]}).save_to_disk(str(tmp_path / "rows"))
    inputs = [str(folder / name), f"hf:{tmp_path / 'rows'}"]
    prepare(inputs, str(tmp_path / "out"), "byte", val_fraction=0.05, num_workers=1)
    stories = [one for one in both(tmp_path / "out") if not one.startswith("row")]
    assert len(stories) == (2 if rows == 1 else 1)
    assert sum(map(len, stories)) == len(text)
