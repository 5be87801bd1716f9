"""A training step fetches no value from the device. The progress bar fetches the loss, but only when it draws."""

import traceback
from contextlib import ExitStack

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils._python_dispatch import TorchDispatchMode

from sbn_lightning import LossProgressBar, MaskRefresh, NonFiniteGuard, TokenThroughput, WeightDecaySchedule
from tests.helpers import quiet_trainer, small_module, token_loader


class Fetches(TorchDispatchMode):
    """Records each place that turns a tensor into a number. Step counts of torch's optimisers are on the CPU anyway."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_local_scalar_dense":
            stack = "".join(traceback.format_stack(limit=12))
            if "torch/optim" not in stack:
                self.places.append(stack)
        return func(*args, **(kwargs or {}))


class Watch(Callback):
    """Starts to record at the third step."""

    def __init__(self):
        self.fetches, self.stack = Fetches(), ExitStack()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and batch_idx % 2 == 0:
            self.stack.enter_context(self.fetches)


def places(*callbacks, bar=False):
    watch = Watch()
    callbacks = [
        watch,
        MaskRefresh(interval=2),
        WeightDecaySchedule(),
        NonFiniteGuard(50),
        TokenThroughput(),
        *callbacks,
    ]
    trainer = quiet_trainer(
        callbacks, max_steps=6, accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=50,
        enable_progress_bar=bar,
    )  # fmt: skip
    with watch.stack:
        trainer.fit(small_module(), token_loader(batches=12))
    assert trainer.global_step == 6
    return watch.fetches.places


def test_a_step_fetches_nothing():
    assert places() == []


class FetchingModule(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("shown", outputs["loss"], prog_bar=True)


def test_what_lightning_shows_is_fetched_after_every_batch():
    """This is why the project has a progress bar of its own. If Lightning changes this, our bar can be removed."""
    assert len(places(FetchingModule())) >= 8


def test_the_bar_fetches_when_it_draws(capsys):
    each, some, last = (places(LossProgressBar(refresh_rate=rate), bar=True) for rate in (1, 4, 100))
    assert len(each) >= 16  # loss and perplexity of 8 batches
    assert len(last) < len(some) < len(each) - 6
    assert all("progress.py" in place for place in each)
    shown = capsys.readouterr()
    assert "train/loss=" in shown.out + shown.err
    assert "train/perplexity=" in shown.out + shown.err


def test_it_is_lightnings_bar():
    assert isinstance(LossProgressBar(), TQDMProgressBar)
    assert LossProgressBar(refresh_rate=3).refresh_rate == 3


@pytest.mark.parametrize("max_epochs", [None, 2])
def test_the_bar_goes_on_after_a_resume_inside_an_epoch(max_epochs):
    shown = []

    class Shown(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            bar = trainer.progress_bar_callback.train_progress_bar
            shown.append((bar.desc, bar.n, bar.total, bar.initial))

    save = ModelCheckpoint(dirpath="saved", every_n_train_steps=5, save_last=True)
    options = {"enable_progress_bar": True, "enable_checkpointing": True, "max_epochs": max_epochs or -1}
    first = quiet_trainer([LossProgressBar(refresh_rate=1), save], max_steps=5, **options)
    first.fit(small_module(), token_loader(batches=8))
    again = quiet_trainer([LossProgressBar(refresh_rate=1), Shown()], max_steps=10, **options)
    again.fit(small_module(), token_loader(batches=8), ckpt_path="saved/last.ckpt")
    total = 8
    resumed = [("Epoch 0: ", n, total, 5) for n in (6, 7, 8)]
    assert shown == [*resumed, *(("Epoch 1: ", n, total if max_epochs else 2, 0) for n in (1, 2))]


@pytest.mark.parametrize(
    ("versions", "number"),
    [(["version_12"], 12), ([3], 3), (["version_4", 4], None), (["version_4", "version_4"], 4), (["job7"], "job7")],
)
def test_the_bar_shows_the_number_of_the_version(tmp_path, versions, number):
    loggers = [CSVLogger(tmp_path / str(i), version=version) for i, version in enumerate(versions)]
    trainer = quiet_trainer([bar := LossProgressBar()], max_steps=1, enable_progress_bar=True, logger=loggers)
    trainer.fit(small_module(), token_loader(batches=1))
    shown = bar.get_metrics(trainer, trainer.lightning_module)["v_num"]
    assert shown == number if number is not None else isinstance(shown, str)


def test_the_bar_has_a_total_after_a_resume():
    """The same holds where ``max_steps`` ends the run inside an epoch, with two micro-batches in a step."""
    totals = []

    class Total(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            bar = trainer.progress_bar_callback.train_progress_bar
            totals.append((bar.n, bar.total))

    options = {"accumulate_grad_batches": 2, "enable_progress_bar": True}
    first = quiet_trainer([LossProgressBar(refresh_rate=1), Total()], max_steps=4, **options)
    first.fit(small_module(), token_loader(batches=20))
    first.save_checkpoint("half.ckpt")
    assert totals[-1] == (8, 8)
    again = quiet_trainer([LossProgressBar(refresh_rate=1), Total()], max_steps=6, **options)
    again.fit(small_module(), token_loader(batches=20), ckpt_path="half.ckpt")
    assert totals[8:] == [(9, 12), (10, 12), (11, 12), (12, 12)]
