"""The Fabric loop gives the Trainer's numbers to the last bit, and each continues the checkpoints of the other."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sbn_lightning import (
    DenseToSparseRamp,
    MaskRefresh,
    NMPattern,
    SparseBitLinear,
    SparseBitNet,
    SparsityPatternLogger,
    TokenDataModule,
    WeightDecaySchedule,
)
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.core.errors import ConfigError, DataError
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.sparsity.pattern import top_n_mask
from tests.helpers import Interrupted, Witness, quiet_trainer, regression_loader, small_config

BATCHES_AN_EPOCH = 6
STEPS = 10


def train_by(loop, tokens, refresh, ramp, accumulate, stop=None, ckpt_path=None, precision="32-true", more=()):
    """Train with the Trainer or with the Fabric loop, all else being equal. ``stop``: interrupt before this step."""
    torch.manual_seed(7)
    module = SparseBitNet(
        small_config(pattern="4:8", n_layers=1),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
        warmup_steps=3,
    )
    data = TokenDataModule(str(tokens), batch_size=8, sequence_length=32, num_workers=0, seed=5)
    witness, sparsity, logger = Witness(stop), SparsityPatternLogger(interval=4), CSVLogger("csv", loop)
    callbacks = [
        ModelCheckpoint(dirpath=f"{loop}-checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1),
        MaskRefresh(**refresh),
        DenseToSparseRamp(**ramp),
        WeightDecaySchedule(),
        sparsity,
        witness,
        *more,
    ]
    options = {
        "max_steps": STEPS,
        "accumulate_grad_batches": accumulate,
        "limit_train_batches": BATCHES_AN_EPOCH,
        "limit_val_batches": 2,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
    }
    try:
        if loop == "trainer":
            trainer = quiet_trainer(
                callbacks,
                **options,
                logger=logger,
                enable_checkpointing=True,
                precision=precision,
                num_sanity_val_steps=2,
            )
            trainer.fit(module, data, ckpt_path=ckpt_path)
        else:
            fabric = Fabric(accelerator="cpu", devices=1, precision=precision, callbacks=callbacks, loggers=logger)
            run = FabricRun(fabric, **options, enable_progress_bar=False)
            train(run, module, data, ckpt_path)
    except Interrupted:
        assert stop is not None
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as stream:
        logged = list(csv.DictReader(stream))
    return witness.seen, module.state_dict(), sparsity.counts, logged


# A validation comes every 4 micro-batches. The first epoch has steps 1 to 6, or 1 to 3 with accumulation. In the last
# case it has steps 1 and 2, because the second window of an epoch is shorter than the first.
CASES = {
    "plain": ({}, {}, 1),
    "held masks, walk": ({"interval": 3}, {"shape": "walk", "end": 0.8}, 1),
    "accumulation, rows": ({}, {"shape": "rows"}, 2),
    "short window, step": ({"interval": 3, "freeze_after": 7}, {"shape": "step", "start": 0.5}, 4),
}


@pytest.fixture(scope="module")
def undisturbed(tokens, tmp_path_factory):
    """The uninterrupted run of the Trainer for a case, made once."""
    runs = {}

    def get(case):
        if case not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("undisturbed"))
                runs[case] = train_by("trainer", tokens, *CASES[case])
        return runs[case]

    return get


def assert_same(expected, seen, state, counts):
    assert seen == expected[0]
    assert sorted(state) == sorted(expected[1])
    assert all(torch.equal(state[key], expected[1][key]) for key in state)
    assert counts == expected[2]


@pytest.mark.parametrize("case", CASES)
def test_fabric_equals_the_trainer(tokens, undisturbed, case):
    expected = undisturbed(case)
    seen, state, counts, logged = train_by("fabric", tokens, *CASES[case])
    assert seen[-1][0] >= 1  # at least one epoch has ended
    assert_same(expected, seen, state, counts)
    for row, wanted in zip(logged, expected[3], strict=True):
        # The Trainer rounds logged values to float32.
        assert float(row.pop("learning_rate") or 0) == pytest.approx(float(wanted["learning_rate"] or 0), rel=1e-6)
        assert row == {key: value for key, value in wanted.items() if key != "learning_rate"}


@pytest.mark.parametrize(
    ("case", "first", "second", "stop"),
    [
        ("plain", "trainer", "fabric", 6),  # at the end of an epoch
        ("plain", "fabric", "trainer", 6),
        ("held masks, walk", "trainer", "fabric", 8),  # a validation was due, inside the second epoch
        ("held masks, walk", "fabric", "trainer", 8),
        ("accumulation, rows", "trainer", "fabric", 4),
        ("accumulation, rows", "fabric", "trainer", 5),
        ("short window, step", "trainer", "fabric", 5),
        ("short window, step", "fabric", "trainer", 4),  # at the end of an epoch, after a short window
        ("held masks, walk", "fabric", "fabric", 5),
    ],
)
def test_each_continues_the_other(tokens, undisturbed, case, first, second, stop):
    before, *_ = train_by(first, tokens, *CASES[case], stop=stop)
    checkpoint = f"{first}-checkpoints/step={stop}.ckpt"
    after, state, counts, _ = train_by(second, tokens, *CASES[case], ckpt_path=checkpoint)
    assert after
    assert_same(undisturbed(case), before + after, state, counts)


def test_the_same_under_autocast(tokens):
    expected, got = (train_by(loop, tokens, *CASES["plain"], precision="bf16-mixed") for loop in ("trainer", "fabric"))
    assert_same(expected, *got[:3])
    assert expected[0][0][-1] != train_by("fabric", tokens, *CASES["plain"], stop=1)[0][0][-1]  # it is not float32


class Listener(RunCallback):
    """Records each hook that is called, with the loss or with the sum of the gradients at that moment."""

    def __init__(self):
        self.heard = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.heard.append(("on_before_zero_grad", gradients(optimizer)))

    def on_before_backward(self, trainer, pl_module, loss):
        self.heard.append(("on_before_backward", loss.item()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.heard.append(("on_before_optimizer_step", gradients(optimizer)))


def gradients(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(p.grad.abs().sum().item() for p in parameters if p.grad is not None)


def note(name):
    def hook(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.heard.append(name)

    return hook


STAGES = ("fit", "train", "train_epoch", "validation", "validation_epoch")
for name in ("on_after_backward", *(f"on_{stage}_{end}" for stage in STAGES for end in ("start", "end"))):
    setattr(Listener, name, note(name))


def test_hooks_come_in_the_trainers_order(tokens):
    heard = {}
    for loop in ("trainer", "fabric"):
        listener = Listener()
        train_by(loop, tokens, *CASES["accumulation, rows"], more=[listener])
        heard[loop] = listener.heard
    assert heard["fabric"] == heard["trainer"]
    assert sum(isinstance(hook, tuple) and hook[0] == "on_before_optimizer_step" for hook in heard["fabric"]) == STEPS


# Checkpoints


@pytest.fixture
def interrupted(tokens):
    train_by("fabric", tokens, *CASES["accumulation, rows"], stop=3)
    return torch.load("fabric-checkpoints/step=2.ckpt", weights_only=True)


def resume(tokens, path):
    return train_by("fabric", tokens, *CASES["accumulation, rows"], ckpt_path=path)


def test_a_checkpoint_that_cannot_be_continued_says_why(tokens, interrupted):
    with pytest.raises(DataError, match=r"nowhere\.ckpt does not exist"):
        resume(tokens, "nowhere.ckpt")
    whole = Path("fabric-checkpoints/step=2.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"half\.ckpt is damaged"):
        resume(tokens, "half.ckpt")
    with pytest.raises(ConfigError, match="sharded"):
        resume(tokens, "fabric-checkpoints")
    torch.save({key: interrupted[key] for key in ("state_dict", "loops")}, "weights.ckpt")
    with pytest.raises(ConfigError, match="has no callbacks, lr_schedulers, optimizer_states"):
        resume(tokens, "weights.ckpt")
    interrupted["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] = 3
    torch.save(interrupted, "window.ckpt")
    with pytest.raises(ConfigError, match="inside a window of accumulate_grad_batches=2"):
        resume(tokens, "window.ckpt")
    interrupted["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] = 4
    del interrupted["TokenDataModule"], interrupted["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(interrupted, "nodata.ckpt")
    with pytest.raises(ConfigError, match="no position in the data of TokenLoader"):
        resume(tokens, "nodata.ckpt")


def test_a_state_of_a_callback_that_is_gone_is_named(tokens, interrupted):
    interrupted["callbacks"]["EarlyStopping"] = {"wait_count": 1}
    torch.save(interrupted, "more.ckpt")
    with pytest.warns(UserWarning, match="callbacks that this run lacks: EarlyStopping"):
        resume(tokens, "more.ckpt")


def test_a_failed_save_leaves_the_file_of_before():
    class FullDisk(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")

    module = SparseBitNet(small_config(n_layers=1))
    path = Path("last.ckpt")
    FabricRun(Fabric(accelerator="cpu", devices=1), module=module).save_checkpoint(path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space"):
        FabricRun(Fabric(accelerator="cpu", devices=1, plugins=FullDisk()), module=module).save_checkpoint(path)
    assert path.read_bytes() == before
    assert torch.load(path, weights_only=True)["global_step"] == 0


# A loop of the user's own


def test_callbacks_work_in_any_fabric_loop():
    class Plain:
        """Not a Lightning callback: its hook takes the keywords it chooses."""

        def __init__(self):
            self.steps = []

        def on_train_batch_end(self, trainer):
            self.steps.append(trainer.global_step)

    torch.manual_seed(0)
    module = torch.nn.Sequential(SparseBitLinear(16, 32, pattern="2:8"), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    layer = module[0]
    sparsity, plain = SparsityPatternLogger(interval=2), Plain()
    callbacks = [MaskRefresh(interval=3), DenseToSparseRamp("step", start=0.25), WeightDecaySchedule(until=1.0)]
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[*callbacks, sparsity, plain])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    run = FabricRun(fabric, max_steps=8, module=module, optimizers=[optimizer])
    model, wrapped = fabric.setup(module, optimizer)
    run.call("on_train_start")
    weights, masks = [], []
    for x, y in regression_loader(batch_size=8):
        run.call("on_train_batch_start")
        weights.append(layer.weight.detach().clone())
        masks.append(layer.mask)
        wrapped.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        wrapped.step()
        run.global_step += 1
        run.call("on_train_batch_end")
    run.call("on_train_end")
    assert plain.steps == [*range(1, 9)]
    assert all(mask.all() for mask in masks[:2])  # the model is dense for a quarter of the steps
    for step, refreshed_at in {2: 2, 3: 3, 4: 3, 5: 3, 6: 6, 7: 6}.items():
        assert torch.equal(masks[step], top_n_mask(weights[refreshed_at], NMPattern(2, 8)))
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert sparsity.counts["0"].kept == layer.weight.numel() / 4
