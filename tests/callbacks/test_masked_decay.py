"""MaskedWeightDecay shrinks masked weights, once an optimiser step, and changes nothing else."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins import MixedPrecision
from torch import distributed as dist
from torch import nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sbn_lightning import MaskedWeightDecay, MaskRefresh, SparseBitLinear
from sbn_lightning.callbacks.base import RunCallback
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.fabric.loop import FabricRun, train
from sbn_lightning.layers.sparse_linear import masked_layers
from tests.helpers import quiet_trainer, small_module, token_loader

LAYER = "model.blocks.0.mlp.down"


class Recorder(RunCallback):
    """Records weights and masks of one layer after each optimiser step."""

    def __init__(self):
        self.weights, self.masks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == len(self.weights):
            layer = dict(masked_layers(pl_module))[LAYER]
            self.weights.append(layer.weight.detach().clone())
            self.masks.append(layer.mask.clone())


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(SparseBitLinear(16, 8, pattern="2:4"), nn.Linear(8, 4))
    rest = [{"params": layers[0].parameters(), "lr": 0.5}, {"params": layers[1].parameters()}]
    return layers, torch.optim.SGD(rest, lr=0.1)


@pytest.mark.parametrize(("decay", "factor"), [(0.25, 1 - 0.5 * 0.25), (50.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_shrinks_what_the_mask_drops_and_nothing_else(decay, factor, dtype):
    layers, optimizer = net()
    layers.to(dtype)
    before = [p.detach().clone() for p in layers.parameters()]
    mask = layers[0].mask.clone()
    MaskedWeightDecay(decay).on_before_optimizer_step(None, layers, optimizer)
    expected = torch.where(mask, before[0], before[0] * factor)
    assert layers[0].weight.dtype == dtype
    torch.testing.assert_close(layers[0].weight.detach(), expected)
    assert all(torch.equal(p, old) for p, old in zip(list(layers.parameters())[1:], before[1:], strict=True))


def run(loop, decay, until=None, **options):
    """Return weights and masks of a run whose gradients are all zero, so that only decays change weights."""
    recorder = Recorder()
    callbacks = [recorder, MaskedWeightDecay(decay, until), MaskRefresh()]
    module = small_module(pattern="2:4")
    module.hparams["warmup_steps"] = 0
    for parameter in module.parameters():
        parameter.register_hook(torch.zeros_like)
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "limit_train_batches": 8} | options
    if loop == "trainer":
        quiet_trainer(callbacks, **options).fit(module, token_loader())
    else:
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
        rows = token_loader().dataset
        data = LightningDataModule.from_datasets(rows, rows, batch_size=4)
        train(FabricRun(fabric, **options, enable_progress_bar=False), module, data)
    return recorder


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
def test_once_an_optimiser_step_in_both_loops(loop):
    without, decayed = run(loop, 0.0), run(loop, 5.0)
    assert len(decayed.weights) == 4
    for step in range(1, 4):
        mask = decayed.masks[0]
        assert torch.equal(decayed.masks[step], mask)
        torch.testing.assert_close(decayed.weights[step][mask], without.weights[step][mask])
    shares = [(d[~mask] / w[~mask]).mean().item() for d, w in zip(decayed.weights, without.weights, strict=True)]
    assert shares[0] == 1
    assert all(after < before - 1e-3 for before, after in itertools.pairwise(shares))
    assert shares[-1] > 1 - 3 * 0.01 * 5.0 - 1e-6  # three steps, each of which shrinks by at most lr * decay


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
def test_it_ends_where_it_is_told(loop):
    """The decay lasts for two of four steps: in full in the first, by half in the second."""
    without, whole, half = run(loop, 0.0), run(loop, 5.0), run(loop, 5.0, 0.5)
    mask = whole.masks[0]

    def kept(recorder, step):
        """The factor by which the decay of one step multiplies masked weights."""
        after, before = (recorder.weights[i][~mask] / without.weights[i][~mask] for i in (step + 1, step))
        return (after / before).mean().item()

    assert kept(half, 0) == pytest.approx(kept(whole, 0), abs=1e-6)
    assert 1 - kept(half, 1) == pytest.approx(0.5 * (1 - kept(whole, 1)), rel=1e-3)
    assert kept(half, 2) == pytest.approx(1, abs=1e-6)
    assert kept(whole, 2) < 1 - 1e-3


def test_masks_flip_less():
    flips = []
    for decay in (0.0, 50.0):
        recorder = Recorder()
        trainer = quiet_trainer([recorder, MaskedWeightDecay(decay)], max_steps=8)
        trainer.fit(small_module(pattern="2:4"), token_loader())
        flips.append(sum((a ^ b).sum().item() for a, b in itertools.pairwise(recorder.masks)))
    assert 0 < flips[1] < 0.8 * flips[0]


def test_what_cannot_work_is_refused_before_training():
    with pytest.raises(ConfigError, match="must not be negative"):
        MaskedWeightDecay(-1.0)
    with pytest.raises(ConfigError, match="must not be negative"):
        MaskedWeightDecay(float("nan"))
    with pytest.raises(ConfigError, match=r"until=1\.5"):
        MaskedWeightDecay(1.0, until=1.5)
    module = small_module()
    module.hparams["schedule"] = "constant"
    endless = quiet_trainer([MaskedWeightDecay(1.0, until=0.5)], max_steps=-1, max_epochs=-1)
    with pytest.raises(ConfigError, match="MaskedWeightDecay must know how long"):
        endless.fit(module, token_loader())
    with pytest.raises(ConfigError, match="no SparseBitLinear"):
        quiet_trainer([MaskedWeightDecay(0.1)]).fit(small_module(linear="dense"), token_loader())
    quiet_trainer([MaskedWeightDecay()], max_steps=1).fit(small_module(linear="dense"), token_loader())  # does nothing
    scaled = quiet_trainer([MaskedWeightDecay(0.1)], plugins=[MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))])
    with pytest.raises(ConfigError, match="bf16-mixed"):
        scaled.fit(small_module(), token_loader())


def test_columns_on_several_ranks_are_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        layers, _ = net()
        weight = distribute_tensor(layers[0].weight.detach(), init_device_mesh("cpu", (1,)), [Shard(1)])
        layers[0].weight = nn.Parameter(weight)
        run = SimpleNamespace(optimizers=[torch.optim.SGD(layers.parameters(), lr=0.1)])
        with pytest.raises(ConfigError, match=r"0 is sharded by \(Shard\(dim=1\),\), not by rows"):
            MaskedWeightDecay(0.1).on_train_start(run, layers)
    finally:
        dist.destroy_process_group()


def test_weights_that_nothing_trains_are_an_error():
    module = small_module()
    for _, layer in masked_layers(module):
        layer.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no optimiser holds"):
        quiet_trainer([MaskedWeightDecay(0.1)]).fit(module, token_loader())
