"""What the study asks trained models: tasks of held-out text, and which heads copy."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from research.pretrained.heads import copying_by_part, induction_scores, repeated_rows
from research.pretrained.items import Item, make_items, read_items, score_items, write_tasks
from research.pretrained.trials import lengthy, options
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.evaluation.probes import make_tasks
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

CODE = "\n".join(
    [f"def first_thing_{n}(value):\n    return value + {n} * long_number_{n}" for n in range(40)]
    + ["total_of_all = first_thing_3(1)", "other_total = total_of_all + 1", "    print(total_of_all)"]
)
ENGLISH = " ".join(f"This is the sentence with the number {n}, and it is long enough to ask." for n in range(30))


@pytest.fixture(scope="module")
def items():
    return make_items({"code": [CODE, "x = 1\n"], "english": [ENGLISH]}, count=9)


def test_items_ask_for_what_follows(items):
    assert {task: len(found) for task, found in items.items()} == {
        "heldout_names": 1,
        "heldout_code": 3,
        "heldout_english": 9,
    }
    for item in items["heldout_names"]:
        assert item.context + item.choices[0] in CODE
        assert item.choices[0].strip() in item.context
    for item in items["heldout_code"]:
        assert item.context + item.choices[item.answer] in CODE + "\n"
        assert len({choice for choice in item.choices}) == 4
        assert len({len(choice) - len(choice.lstrip()) for choice in item.choices}) == 1
    for item in items["heldout_english"]:
        assert item.context + item.choices[item.answer] in ENGLISH
    assert items == make_items({"code": [CODE, "x = 1\n"], "english": [ENGLISH]}, count=9)


def test_items_are_written_for_the_harness_and_read_again(items, tmp_path):
    write_tasks(items, tmp_path)
    assert read_items(tmp_path) == items
    task = yaml.safe_load((tmp_path / "heldout_code.yaml").read_text())
    assert task["output_type"] == "multiple_choice"
    file = task["dataset_kwargs"]["data_files"]["test"]
    assert len(Path(file).read_text(encoding="utf-8").splitlines()) == 3
    assert yaml.safe_load((tmp_path / "heldout_names.yaml").read_text())["output_type"] == "loglikelihood"


def test_scores_take_the_likeliest_choice():
    items = {
        "choose": [Item("ab", ["x", "yy", "z"], 1), Item("ab", ["x", "yy", "z"], 0)],
        "write": [Item("ab", ["yes"]), Item("ab", ["no"])],
    }
    logs = {"x": -2.0, "yy": -3.0, "z": -9.0, "yes": -1.0, "no": -1.0}

    def score(rows, counts):
        texts = [bytes(row[-count:]).decode() for row, count in zip(rows, counts, strict=True)]
        return [(logs[text], text == "yes") for text in texts]

    found = score_items(items, byte_tokenizer(), score, most_tokens=4, batch_size=2)
    assert (found["choose"]["acc"], found["choose"]["acc_norm"]) == (0.5, 0.5)  # x by sum, yy by byte
    assert found["choose"]["log_probability"] == -2.5
    assert (found["write"]["acc"], found["write"]["items"]) == (0.5, 2)


def test_heads_that_see_nothing_attend_to_all_places_alike():
    model = TernaryTransformer(small_config(linear="dense"))
    span = 10
    for block in model.blocks:
        block.attention.qkv.weight.data.zero_()
    rows = repeated_rows(torch.arange(5, 300), 0, span, 3)
    assert torch.equal(rows[:, 1 : span + 1], rows[:, span + 1 :])
    scores = induction_scores(model, rows, span)
    expected = sum(1 / (place + 1) for place in range(span + 1, 2 * span + 1)) / span
    torch.testing.assert_close(scores, torch.full((2, 4), expected))


def test_the_long_comparison_has_each_trial_once():
    names = [trial.name for trial in lengthy(200_000_000, 50_000_000)]
    assert names[:3] == ["200M both 2:4 seed 1", "200M both 8:8 seed 1", "50M both 2:4 seed 1"]
    short = [trial.name for trial in lengthy(50_000_000, 50_000_000)]
    assert len(set(short)) == len(short) == len(names) - 2


def test_each_option_differs_from_a_start_in_one_thing():
    found = [trial for trial in options(3_000_000, 6_000_000) if trial.tokens]
    assert [trial.name for trial in found[:4]] == [
        "3M both, learnable scales 2:4 seed 1",
        "3M both 2:4 seed 1",
        "6M both, learnable scales 2:4 seed 1",
        "6M both 2:4 seed 1",
    ]
    assert len({trial.name for trial in found}) == len(found) == len(options(3_000_000)) + 1
    slow = next(trial for trial in found if trial.name == "3M both, slow start 2:4 seed 1")
    for trial in found:
        start = found[0] if "learnable scales" in trial.name else found[1]
        if "slow start" in trial.name:
            start = slow
        changed = {f.name for f in fields(trial) if getattr(trial, f.name) != getattr(start, f.name)} - {"name"}
        assert len(changed - {"seed"}) <= 1 or changed in ({"distillation", "lr"}, {"rounding", "ramp"})


def test_copying_is_asked_with_each_part_converted():
    config = small_config(linear="dense", vocab_size=2000, n_layers=1, max_sequence_length=200)
    torch.manual_seed(0)
    model = TernaryTransformer(config).eval()
    model.blocks[0].attention.qkv.weight.data *= 20  # heads that attend to some places more than to others
    tasks = make_tasks(byte_tokenizer(), 60, rows=2, names=("copy",))
    before = model(tasks[0].tokens)
    rows = list(copying_by_part(model, tasks, 0, "2:4", batch_size=2))
    assert [(row["converted"], row["variant"]) for row in rows[:3]] == [
        ("nothing", None),
        ("q and k", "masked"),
        ("v and o", "masked"),
    ]
    assert len(rows) == 13
    assert torch.equal(model(tasks[0].tokens), before)  # the model is as it was
    heads = {json.dumps(row["heads"]) for row in rows}
    assert len(heads) == 4  # in one block, only the conversions of q and k change what heads attend to
    logs = {row["probe"][0]["log_probability"] for row in rows}
    assert len(logs) == 13
