"""The loss on answers alone: which tokens count, and that nothing else does."""

import math

import pytest
import torch
from torch.nn import functional as F

from sbn_lightning import SparseBitNet
from sbn_lightning.cli import main
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data import prepare
from sbn_lightning.data.tokenizer import byte_tokenizer
from sbn_lightning.models.loss import linear_cross_entropy
from sbn_lightning.training.answers import AnswerLoss, Answers
from tests.helpers import quiet_trainer, small_config, small_module, token_loader

START, END = [7, 8], [9]


def test_the_tokens_of_answers_and_their_end_markers_count():
    rows = torch.tensor(
        [
            [1, 7, 8, 20, 21, 9, 30, 7, 8, 22, 9, 31],  # two answers
            [20, 9, 30, 7, 31, 8, 7, 7, 8, 22, 23, 24],  # the start of the first lies before the row, the last is cut
            [1, 2, 3, 4, 5, 6, 9, 9, 1, 2, 3, 4],  # no answer
        ]
    )
    expected = torch.zeros_like(rows, dtype=torch.bool)
    for row, places in enumerate([[3, 4, 5, 9, 10], [9, 10, 11], []]):
        expected[row, places] = True
    assert torch.equal(AnswerLoss(START, END).places(rows), expected)
    assert not AnswerLoss([1] * 20, END).places(rows).any()


def test_the_loss_is_the_mean_over_these_tokens():
    model = small_module(linear="dense").model
    batch = torch.randint(10, 300, (2, 13), generator=torch.Generator().manual_seed(0))
    batch[0, 2:4], batch[0, 6], batch[1, 8:10] = torch.tensor(START), 9, torch.tensor(START)
    loss, count = AnswerLoss(START, END)(model, batch)
    logits = model(batch[:, :-1])
    places = AnswerLoss(START, END).places(batch)[:, 1:]
    assert count == int(places.sum()) == 6
    torch.testing.assert_close(loss, F.cross_entropy(logits[places], batch[:, 1:][places]))
    none, count = AnswerLoss([1, 1, 1], END)(model, batch)
    none.backward()
    assert (none.item(), count) == (0.0, 0)


@pytest.mark.parametrize("implementation", ["plain", "chunked", "torch"])
def test_the_loss_of_no_tokens_is_0_with_gradients(implementation):
    if implementation == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this version of torch has no such loss")
    hidden, weight = torch.ones(3, 8, requires_grad=True), torch.ones(20, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden[none], weight, none, implementation)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_run_learns_answers_and_validates_on_them():
    module = small_module(linear="dense")
    module.answer_loss = AnswerLoss([3], [4])
    loader = token_loader()
    for row in loader.dataset:
        row[2] = 3
        row[6] = 4
    trainer = quiet_trainer(max_steps=4)
    trainer.fit(module, loader, token_loader())
    assert trainer.callback_metrics["train/loss"] > 0
    (result,) = trainer.validate(module, loader, verbose=False)
    with torch.no_grad():
        losses, counts = zip(*(module.answer_loss(module.model, batch) for batch in loader), strict=True)
    expected = float(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    assert result["val/loss"] == pytest.approx(expected, rel=1e-4)
    assert result["val/perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert min(counts) >= 4 * 4


def test_markers_are_text_of_the_tokenizer():
    tokenizer = byte_tokenizer()
    assert Answers("ab", "c").ids(tokenizer) == ([97, 98], [99])
    with pytest.raises(ConfigError, match=r"answers\.end is empty"):
        Answers(end="")


def test_answers_need_data_with_a_tokenizer():
    module = SparseBitNet(small_config(linear="dense"), answers=Answers())
    with pytest.raises(ConfigError, match=r"model\.answers needs the tokenizer of the data"):
        quiet_trainer(max_steps=1).fit(module, token_loader())


@pytest.mark.parametrize("command", ["fit", "fabric"])
def test_the_commands_read_the_markers_from_the_recipe(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.txt").write_text("Q:one two;A:three four;" * 300)
    (tmp_path / "more.txt").write_text("Q:five;A:six seven;" * 300)
    prepare(input=["chat.txt", "more.txt"], output="tokens", tokenizer="byte", val_fraction=0.5, num_workers=1)
    shape = {"vocab_size": 257, "d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ffn": 64}
    options = [f"--model.config.{key}={value}" for key, value in shape.items()]
    options += ["--model.answers.start=A:", "--model.answers.end=;", "--data.path=tokens", "--data.batch_size=4"]
    options += ["--data.sequence_length=32", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    options += ["--trainer.limit_val_batches=2", "--checkpoint.every_n_train_steps=2", "--trainer.log_every_n_steps=1"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    assert main([command, "--config", "sparse_pretrain", *options]) == 0
    assert "Trained 2 steps." in capsys.readouterr().out
    assert main([command, "--config", "sparse_pretrain", *options, "--model.answers.end="]) == 1
    assert "answers.end is empty" in capsys.readouterr().err
