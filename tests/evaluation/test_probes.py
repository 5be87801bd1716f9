"""The probe's tasks have answers that a perfect copier finds, and the noise is that of the rows."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sbn_lightning.checkpoints.lightning_file import contents
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.evaluation.probes import ANNOUNCED, SHOTS, SPAN, Task, _score, as_records, make_tasks, probe
from sbn_lightning.models.transformer import TernaryTransformer
from tests.helpers import small_config

LENGTH = 160


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh"]
    pieces = ["<|endoftext|>", *words, *"0123456789+=\n.;", " quick_", "counter", "other_", "name"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="."))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def one_hot(answers, size):
    return torch.nn.functional.one_hot(answers, size).float()


def tasks_by_name(tasks):
    return {f"{task.name} {task.setting}".strip(): task for task in tasks}


def test_a_model_that_looks_ahead_is_always_right_and_one_that_repeats_never(tokenizer):
    tasks = make_tasks(tokenizer, LENGTH, rows=6)
    size = tokenizer.get_vocab_size()
    shapes = set()

    def cheat(tokens):
        shapes.add(tuple(tokens.shape))
        return one_hot(tokens.roll(-1, 1), size)

    names = ["copy distance 32", "copy distance 128", "induction distance 32", "induction distance 128", "sums"]
    results = probe(cheat, tasks, batch_size=4)
    assert [f"{r.task} {r.setting}".strip() for r in results] == names
    assert all(result.accuracy == 1 and result.error == 0 and result.rows == 6 for result in results)
    assert shapes == {(4, LENGTH)}
    repeated = probe(lambda tokens: one_hot(tokens, size), [task for task in tasks if task.name != "sums"], 4)
    assert all(result.accuracy == 0 for result in repeated)


def test_spans_come_again_at_the_distance_and_nothing_else_does(tokenizer):
    tasks = tasks_by_name(make_tasks(tokenizer, LENGTH, rows=2, names=["copy", "induction"]))
    for name, distance, span, announced in (
        ("copy distance 32", 32, SPAN, ANNOUNCED),
        ("induction distance 32", 32, 2, 1),
    ):
        task = tasks[name]
        for row, items in zip(task.tokens, task.items, strict=True):
            places = torch.nonzero(items >= 0).flatten()
            assert torch.equal(row[places], row[places - distance])
            again = (row.unsqueeze(0) == row.unsqueeze(1)).sum() - len(row)
            spans = len(places) // (span - announced)
            assert again == 2 * spans * span
            assert spans == (LENGTH - 1) // (distance + span)


def test_sums_are_right_and_come_after_the_examples(tokenizer):
    (task,) = make_tasks(tokenizer, LENGTH, rows=3, names=["sums"])
    for row, items in zip(task.tokens, task.items, strict=True):
        lines = tokenizer.decode(row.tolist(), skip_special_tokens=True).replace(" ", "").split("\n")
        assert all(eval(line.replace("=", "==")) for line in lines if line)
        assert items[items >= 0].unique().tolist() == list(range(SHOTS, len([line for line in lines if line])))


def test_identifiers_are_long_names_seen_before_and_only_in_this_row(tokenizer):
    ids = {text: tokenizer.token_to_id(text) for text in (" quick_", "counter", "other_", "name", ";")}
    quick, other = [ids[" quick_"], ids["counter"]], [ids["other_"], ids["name"]]
    row = [*quick, ids[";"], *other, ids[";"], *quick]
    rows = [row + [ids[";"]] * (LENGTH - len(row)), [*other, ids[";"], *other] + [ids[";"]] * (LENGTH - 5)]
    (task,) = make_tasks(tokenizer, LENGTH, text=torch.tensor(rows).flatten(), names=["identifiers"])
    assert torch.nonzero(task.items >= 0).tolist() == [[0, len(row) - 1]]  # `counter`; other_name is in both rows


def test_words_of_a_tokenizer_that_drops_the_first_space_are_not_one_name():
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "▁long": 1, "▁words": 2, "▁counter": 3, "_of": 4, ";": 5}, []))
    tokenizer.decoder = decoders.Metaspace()
    row = torch.full((LENGTH,), 5)
    row[:10] = torch.tensor([1, 2, 5, 3, 4, 5, 1, 2, 3, 4])
    (task,) = make_tasks(tokenizer, LENGTH, text=row, names=["identifiers"])
    assert torch.nonzero(task.items >= 0).tolist() == [[0, 9]]  # `_of` of counter_of; there is no `longwords`


def test_the_error_is_that_of_the_rows_means():
    items = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    right = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    log = torch.tensor([[-1.0, -3, -2], [-1, -1, -1], [-9, -9, -9]])
    result = _score(Task("copy", "", items, items), right, log)
    assert (result.log_probability, result.log_probability_error) == (-1.5, 0.5)
    assert (result.accuracy, result.items, result.rows) == (0.75, 5, 2)
    assert result.error == pytest.approx(0.25)  # rows of 0.5 and 1
    (alone,) = as_records([_score(Task("copy", "", items[:1], items[:1]), right[:1], log[:1])])
    assert (alone["accuracy"], alone["error"], alone["log_probability_error"]) == (0.5, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 40}, "length=40 is too short; take 49"),
        ({"length": 5000}, "need a larger vocabulary"),
        ({"names": ["copies"]}, "'copies' is not one of copy"),
    ],
)
def test_options_that_cannot_work_are_refused(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        make_tasks(tokenizer, **options)


def test_the_command_prints_a_table_and_json(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    model = TernaryTransformer(small_config(vocab_size=tokenizer.get_vocab_size(), max_sequence_length=LENGTH))
    torch.save(contents(model.config, model.state_dict()), tmp_path / "m.ckpt")
    tokenizer.save(str(tmp_path / "m.tokenizer.json"))
    (tmp_path / "text.txt").write_text("abcaabaac other_name;" * 40)
    words = ["probe", "--checkpoint", str(tmp_path / "m.ckpt"), "--length", "60", "--rows", "3", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)["results"]
    assert [result["task"] for result in results] == ["copy", "induction"]  # eight sums do not fit into 60 tokens
    assert "rows of 60 tokens have nothing to ask: sums" in printed.err
    assert all(0 <= result["accuracy"] <= 1 and result["rows"] == 3 for result in results)
    assert main([*words, "--tasks", "copy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "setting", "accuracy", "+-", "log-probability", "+-", "items", "rows"]
    assert lines[2].startswith("copy  distance 32")
    assert main([*words, "--tasks", "identifiers"]) == 1
    assert "give --data" in capsys.readouterr().err
    larger = Tokenizer.from_str(tokenizer.to_str())
    larger.add_tokens([f"x{word}" for word in tokenizer.get_vocab() if word.isalpha()])
    larger.save(str(tmp_path / "larger.json"))
    assert main([*words, "--tasks", "copy", "--tokenizer", str(tmp_path / "larger.json")]) == 1
    assert "give the model's own tokenizer" in capsys.readouterr().err
    assert main([*words, "--data", str(tmp_path / "text.txt")]) == 0
