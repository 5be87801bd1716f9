"""A run that was interrupted and resumed equals an undisturbed one to the last bit: losses, masks, samples."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    SparseBitNet,
    SparsityPatternLogger,
    TokenDataModule,
    WeightDecaySchedule,
)
from tests.helpers import Interrupted, Witness, quiet_trainer, small_config

BATCHES_AN_EPOCH = 6


def run(tokens, steps, refresh, ramp, workers, accumulate, interrupt_at=None, ckpt_path=None):
    torch.manual_seed(7)
    module = SparseBitNet(
        small_config(pattern="4:8", n_layers=1),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, fused=True),
        warmup_steps=3,
        schedule_steps=steps,
    )
    data = TokenDataModule(str(tokens), batch_size=8, sequence_length=32, num_workers=workers, seed=5)
    witness = Witness(interrupt_at)
    sparsity = SparsityPatternLogger(interval=4)
    trainer = quiet_trainer(
        [
            MaskRefresh(**refresh),
            DenseToSparseRamp(**ramp, total_steps=steps),
            WeightDecaySchedule(total_steps=steps),
            sparsity,
            ModelCheckpoint(dirpath="checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1),
            witness,
        ],
        max_steps=steps,
        logger=CSVLogger("csv"),
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        limit_train_batches=BATCHES_AN_EPOCH,
        limit_val_batches=1,
        val_check_interval=2,
        gradient_clip_val=1.0,
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except Interrupted:
        assert interrupt_at is not None
    return witness.seen, module.state_dict(), sparsity.counts


@pytest.mark.parametrize(
    ("stop", "workers", "accumulate", "refresh", "ramp"),
    [
        (3, 2, 1, {}, {}),  # inside the first epoch
        (6, 0, 1, {}, {}),  # at the end of an epoch
        (8, 2, 1, {"interval": 3}, {"shape": "rows", "end": 0.7}),  # inside the second epoch, masks held, rows ramping
        (4, 0, 2, {"interval": 3, "freeze_after": 9}, {"shape": "walk"}),  # in the second epoch; an epoch has 3 steps
        (5, 2, 2, {}, {"shape": "step", "start": 0.5}),
    ],
)
def test_resumed_run_equals_an_undisturbed_one(tokens, stop, workers, accumulate, refresh, ramp):
    steps = 14
    expected, state, counts = run(tokens, steps, refresh, ramp, workers, accumulate)
    assert len(expected) == steps * accumulate
    assert len({row[3] for row in expected}) == len(expected)  # so few epochs repeat no sample
    before, _, _ = run(tokens, steps, refresh, ramp, workers, accumulate, interrupt_at=stop)
    after, resumed_state, resumed_counts = run(
        tokens, steps, refresh, ramp, workers, accumulate, ckpt_path=f"checkpoints/step={stop}.ckpt"
    )
    assert before + after == expected
    assert all(torch.equal(state[key], resumed_state[key]) for key in state)
    assert counts == resumed_counts
