"""Stored teacher's logits: written once, streamed with the text, and a loss equal to that of the teacher itself."""

import json

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from sbn_lightning import SparseBitNet, TransformerConfig
from sbn_lightning.checkpoints import lightning_file
from sbn_lightning.cli.app import main
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.data import TokenDataModule
from sbn_lightning.data.stream import teacher_rows
from sbn_lightning.data.stream.teacher_rows import TeacherRows, write_teacher_rows
from sbn_lightning.evaluation.texts import text_of_folder
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.models.distillation import LogitsLoss, StoredLogits, likeliest, linear_distillation
from sbn_lightning.models.transformer import TernaryTransformer
from sbn_lightning.training.distillation import Distillation
from tests.helpers import quiet_trainer, small_config

LENGTH, TOP = 24, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, a teacher, and what the teacher said."""
    root = tmp_path_factory.mktemp("stored")
    text = "\n\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(120))
    (root / "a.py").write_text(text)
    (root / "b.py").write_text(text.replace("x", "y"))
    words = ["--tokenizer", "byte", "--val_fraction", "0.5", "--num_workers", "1"]
    assert (
        main(["prepare", "--input", str(root / "a.py"), str(root / "b.py"), "--output", str(root / "text"), *words])
        == 0
    )
    torch.manual_seed(0)
    teacher = TernaryTransformer(small_config(linear="dense", n_layers=1))
    torch.save(lightning_file.contents(teacher.config, teacher.state_dict()), root / "teacher.ckpt")
    assert main(command(root, "stored")) == 0
    return root


def command(root, output, *more):
    words = ["--sequence_length", str(LENGTH), "--top_k", str(TOP), "--batch_size", "7", "--device", "cpu", *more]
    return [
        "teacher-logits", "--checkpoint", str(root / "teacher.ckpt"), "--data", str(root / "text"),
        "--output", str(root / output), *words,
    ]  # fmt: skip


def teacher_of(root):
    from sbn_lightning.formats.load import load_model

    return load_model(str(root / "teacher.ckpt")).model.eval()


def data_of(root, **changes):
    options = {"batch_size": 4, "sequence_length": LENGTH, "num_workers": 0, "shuffle": False}
    return TokenDataModule(str(root / "stored"), **(options | changes))


@torch.no_grad()
def test_rows_hold_what_the_teacher_says_about_each_window(folder):
    stored, text = data_of(folder), TokenDataModule(str(folder / "text"), 4, LENGTH, num_workers=0, shuffle=False)
    for data in (stored, text):
        data.setup("fit")
    teacher = teacher_of(folder)
    count = 0
    for (tokens, classes, logs), plain in zip(stored.train_dataloader(), text.train_dataloader(), strict=True):
        assert torch.equal(tokens, plain)
        log_probabilities = teacher(tokens[:, :-1]).log_softmax(-1)
        best = log_probabilities.topk(TOP, -1)
        assert torch.allclose(best.values, logs.float(), atol=2e-3)
        assert torch.allclose(log_probabilities.gather(-1, classes), logs.float(), atol=2e-3)
        count += 1
    assert count > 5


def test_rows_survive_their_integers():
    rows = TeacherRows(3, 2, 65536)
    tokens, classes = torch.tensor([[1, 2, 3, 65535]]), torch.tensor([[[0, 65535], [7, 8], [9, 1]]])
    logs = torch.tensor([[[-0.0, -17.25], [-1e-4, -9.5], [-0.693, -float("inf")]]])
    back = rows.split(rows.join(tokens, classes, logs).astype(np.uint16))
    assert torch.equal(back[0], tokens)
    assert torch.equal(back[1], classes)
    assert torch.equal(back[2], logs.half())


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_loss_is_that_of_the_teacher_with_top_k(divergence):
    torch.manual_seed(0)
    hidden, weight, theirs, head = (torch.randn(n, 8).double() for n in (20, 30, 20, 30))
    target = torch.randint(30, (20,))
    options = LogitsLoss(0.5, 1.0, divergence, top_k=4)
    results = []
    for teacher in ((theirs, head), (StoredLogits(*likeliest(theirs, head, 4)), None)):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, *parts = linear_distillation(x, w, *teacher, target, options, chunk=7)
        total.backward()
        results.append([total.detach(), *parts, x.grad, w.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    q = F.linear(hidden, weight).log_softmax(-1)
    torch.testing.assert_close(results[0][1].double(), F.nll_loss(q, target), rtol=1e-5, atol=0)


def a_student():
    torch.manual_seed(1)
    config = TransformerConfig(**json.loads(json.dumps(small_config(pattern="2:4", n_layers=1).to_dict())))
    return SparseBitNet(
        config, schedule="constant", warmup_steps=1, separate_documents=True,
        distillation=Distillation(teacher=None, language_model=0.5),
    )  # fmt: skip


def test_a_run_learns_from_stored_logits_and_resumes(folder, tmp_path):
    def fit(steps, ckpt=None):
        trainer = quiet_trainer(max_steps=steps, default_root_dir=tmp_path, limit_val_batches=2, val_check_interval=4)
        trainer.fit(a_student(), datamodule=data_of(folder, shuffle=True), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return trainer.callback_metrics

    whole = fit(8)
    assert {"train/distillation", "train/distillation_logits", "val/loss"} <= whole.keys()
    fit(4)
    resumed = fit(8, tmp_path / "4.ckpt")
    assert float(resumed["train/distillation"]) == float(whole["train/distillation"])
    run = FabricRun(
        Fabric(accelerator="cpu", devices=1), max_steps=8, limit_val_batches=2, val_check_interval=4,
        num_sanity_val_steps=0, enable_progress_bar=False,
    )  # fmt: skip
    train(run, a_student(), data_of(folder, shuffle=True))
    for name in ("train/distillation", "val/loss"):
        assert float(run.callback_metrics[name]) == float(whole[name])


def test_an_interrupted_call_goes_on(folder, tmp_path):
    text = str(folder / "text")
    teacher = teacher_of(folder)
    asked = []

    @torch.no_grad()
    def teach(tokens):
        asked.append(len(tokens))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return likeliest(teacher.hidden(tokens), teacher.lm_head.weight, TOP)

    rows = TeacherRows(LENGTH, TOP, 320, "teacher")
    with pytest.raises(KeyboardInterrupt):
        write_teacher_rows(teach, text, str(tmp_path / "out"), rows, 7)
    assert not (tmp_path / "out" / "meta.json").exists()
    meta = write_teacher_rows(teach, text, str(tmp_path / "out"), rows, 7)
    windows = sum(split["tokens"] // rows.tokens for split in meta["splits"].values())
    assert sum(asked) - asked[2] == windows
    first = json.loads((folder / "stored" / "meta.json").read_text())
    assert meta["files"] == first["files"]
    assert not (tmp_path / "out" / ".work").exists()


def test_what_cannot_work_is_said(folder, tmp_path, capsys):
    assert main(command(folder, "stored")) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(command(folder, "text", "--overwrite")) == 1
    assert main(command(folder, "stored", "--overwrite", "--data", str(folder / "stored"))) == 1
    assert "already; give the folder of the text" in capsys.readouterr().err
    assert main(command(folder, "x", "--top_k", "320")) == 1
    assert main(command(folder, "x", "--sequence_length", "65")) == 1
    with pytest.raises(ConfigError, match=f"set data.sequence_length to {LENGTH}"):
        data_of(folder, sequence_length=16).setup("fit")
    with pytest.raises(ConfigError, match="hold different things"):
        data_of(folder, paths={str(folder / "stored"): 1.0, str(folder / "text"): 1.0}).setup("fit")
    with pytest.raises(DataError, match="between its tokens"):
        text_of_folder(str(folder / "stored"), "val")
    for option in ({"hidden": 1.0}, {"temperature": 2.0}, {"top_k": 3}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            Distillation(teacher=None, **option)
    module = SparseBitNet(small_config(), schedule="constant", distillation=Distillation(teacher=None))
    text = TokenDataModule(str(folder / "text"), 4, LENGTH, num_workers=0)
    with pytest.raises(ConfigError, match="teacher-logits"):
        quiet_trainer(max_steps=1, default_root_dir=tmp_path).fit(module, datamodule=text)
    with pytest.raises(DataError, match="outside the vocabulary of 100"):
        next(iter(torch.utils.data.DataLoader([np.full(TeacherRows(2, 1, 100).size, 300)],
             collate_fn=teacher_rows.CollateRows(TeacherRows(2, 1, 100), "x"))))  # fmt: skip
