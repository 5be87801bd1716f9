"""The order of callbacks does not change a run, even if the run is interrupted and resumed at any step."""

from itertools import combinations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from sbn_lightning import (
    DenseToSparseRamp,
    MaskedWeightDecay,
    MaskRefresh,
    NonFiniteGuard,
    SparsityPatternLogger,
    TernarySparseConversion,
    WeightDecaySchedule,
)
from sbn_lightning.layers.masked_linear import masked_layers
from tests.helpers import ForeignModule, quiet_trainer, regression_loader

INTERVAL, STEPS = 3, 7  # two refresh intervals and one more step
MAKE = {
    "refresh": lambda: MaskRefresh(interval=INTERVAL),
    "ramp": lambda: DenseToSparseRamp("step", start=0.6),
    "walk": lambda: DenseToSparseRamp("walk", end=0.9),
    "weight decay": lambda: WeightDecaySchedule(until=1.0),
    "masked decay": lambda: MaskedWeightDecay(decay=0.1),
    "conversion": lambda: TernarySparseConversion("2:8", kind="masked"),
    "logger": lambda: SparsityPatternLogger(interval=2),
    "guard": lambda: NonFiniteGuard(interval=1),
}
GROUPS = [
    names
    for count in (2, 3)
    for names in combinations([name for name in MAKE if name != "conversion"], count)
    if not {"ramp", "walk"} <= set(names)
]


def same_batches():
    """Batches that are all equal, because Lightning starts a plain loader from its beginning when a run resumes."""
    x, y = next(iter(regression_loader()))
    return DataLoader(TensorDataset(x.repeat(10, 1), y.repeat(10, 1)), batch_size=len(x))


class Decaying(ForeignModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def train(names, folder, resume_at=None):
    """Train, save a checkpoint after every step, and return the final weights, masks, densities and weight decay."""
    module = Decaying()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [MAKE[name]() for name in names] + ([saving] if resume_at is None else [])
    trainer = quiet_trainer(callbacks, max_steps=STEPS, enable_checkpointing=resume_at is None)
    path = None if resume_at is None else folder / f"step={resume_at}.ckpt"
    trainer.fit(module, same_batches(), ckpt_path=path)
    layers = dict(masked_layers(module))
    return {
        **{f"{name} weight": layer.weight.detach().clone() for name, layer in layers.items()},
        **{f"{name} mask": layer.mask for name, layer in layers.items()},
        **{f"{name} density": torch.tensor(layer.density) for name, layer in layers.items()},
        "weight decay": torch.tensor(trainer.optimizers[0].param_groups[0]["weight_decay"]),
    }


def assert_equal(expected, got, what):
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different, f"{what}: {', '.join(different)}"


@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_both_orders_resumed_at_every_step(names, tmp_path):
    expected = None
    for order in (names, names[::-1]):
        # The conversion comes last, then first: its place must not matter either.
        whole = (*order, "conversion") if order == names else ("conversion", *order)
        folder = tmp_path / "-".join(whole).replace(" ", "_")
        end = train(whole, folder)
        expected = expected or end
        assert_equal(expected, end, f"{whole}, not interrupted")
        for step in range(1, STEPS):
            assert_equal(expected, train(whole, folder, resume_at=step), f"{whole}, resumed at step {step}")
