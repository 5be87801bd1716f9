"""Folders of a teacher's logits: what is not theirs is left alone, and a Trainer's plugin counts their tokens."""

import os
from dataclasses import replace

import pytest
import torch

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.data import prepare
from sbn_lightning.data.stream.teacher_rows import TeacherRows, write_teacher_rows
from sbn_lightning.training.distillation import Distillation, Distiller
from sbn_lightning.training.precision import _token_ids

ROWS = TeacherRows(sequence_length=8, top_k=2, vocab_size=300)


def teach(tokens):
    return tokens.unsqueeze(-1).expand(*tokens.shape, 2), torch.zeros(*tokens.shape, 2)


def text_folder(root, name="text"):
    (root / "a.txt").write_text("some text " * 100)
    prepare(str(root / "a.txt"), str(root / name), "byte", val_fraction=0.0, num_workers=1)
    return str(root / name)


def test_a_folder_of_the_user_is_left_alone(tmp_path):
    text = text_folder(tmp_path)
    mine = tmp_path / "mine" / "train" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"did not write \(train, "):
            write_teacher_rows(teach, text, str(tmp_path / "mine"), ROWS, 4, overwrite)
    assert mine.read_text() == "mine"


def test_rows_of_a_teacher_that_changed_are_not_continued(tmp_path):
    weights = tmp_path / "teacher.ckpt"
    weights.write_text("old")
    rows, text, out = replace(ROWS, teacher=str(weights)), text_folder(tmp_path), str(tmp_path / "out")
    asked = []

    def counting(tokens):
        asked.append(len(tokens))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return teach(tokens)

    with pytest.raises(KeyboardInterrupt):
        write_teacher_rows(counting, text, out, rows, 4)
    os.utime(weights, (1, 1))
    meta = write_teacher_rows(counting, text, out, rows, 4)
    assert sum(asked[3:]) * rows.tokens == meta["splits"]["train"]["tokens"]
    assert write_teacher_rows(counting, text, out, rows, 4, overwrite=True) == meta
    with pytest.raises(ConfigError, match="prepared from other inputs"):
        text_folder(tmp_path, "out")


def test_likely_next_tokens_are_no_tokens_of_the_batch():
    tokens = torch.zeros(4, 9, dtype=torch.long)
    assert _token_ids((tokens, *teach(tokens[:, 1:]))) == 36
    assert _token_ids({"ids": tokens, "labels": tokens[:, 1:], "lengths": tokens[:, 0]}) == 36
    assert _token_ids(tokens.view(2, 2, 9)) == 36
    assert _token_ids(tokens.float()) == 0


def test_a_batch_without_a_teacher_is_refused():
    with pytest.raises(ConfigError, match="holds no teacher's logits"):
        Distiller(Distillation(teacher=None)).loss(None, torch.zeros(1, 2), torch.zeros(1, 2))
