"""MuonAdamW: who trains what, the same steps as torch's two optimisers, and checkpoints that continue."""

from functools import partial

import pytest
import torch
from torch import nn

from research.sizes.muon import MUON, MuonAdamW
from sbn_lightning import MaskedWeightDecay, SparseBitNet, TernaryTransformer, WeightDecaySchedule
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.training.parameter_groups import parameter_groups
from tests.helpers import Losses, quiet_trainer, small_config, token_loader, unbounded


def make(tied=True):
    torch.manual_seed(0)
    return TernaryTransformer(small_config(n_layers=1, tie_embeddings=tied))


def train(model, optimizers, steps, first=0):
    for step in range(first, first + steps):
        tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(step))
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("tied", [True, False])
def test_muon_trains_the_matrices_of_the_blocks(tied):
    model = make(tied)
    optimizer = MuonAdamW(parameter_groups(model), lr=1e-2)
    by_muon = {id(p) for group in optimizer.param_groups if group[MUON] for p in group["params"]}
    matrices = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert by_muon == matrices
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters()}
    assert len(everything) == len(list(model.parameters()))


def test_steps_are_those_of_the_two_optimisers():
    ours, theirs = make(), make()
    matrices, rest = parameter_groups(theirs)
    pair = [
        torch.optim.Muon(matrices["params"], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([rest], lr=1e-2, betas=(0.9, 0.95)),
    ]
    one = train(ours, [MuonAdamW(parameter_groups(ours), lr=1e-2)], 3)
    assert all(map(torch.equal, one, train(theirs, pair, 3)))


def test_a_loaded_state_continues_and_takes_new_rates():
    whole, stopped = make(), make()
    expected = train(whole, [MuonAdamW(parameter_groups(whole), lr=1e-2)], 4)
    first = MuonAdamW(parameter_groups(stopped), lr=1e-2)
    train(stopped, [first], 2)
    again = make()
    again.load_state_dict(stopped.state_dict())
    second = MuonAdamW(parameter_groups(again), lr=0.5)
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, expected, train(again, [second], 2, first=2)))
    for group in second.param_groups:  # As a schedule does.
        group["lr"] = group["weight_decay"] = 0.0
    before = [parameter.detach().clone() for parameter in again.parameters()]
    assert all(map(torch.equal, before, train(again, [second], 1)))


def test_a_closure_runs_once():
    model = make()
    calls = []

    def closure():
        calls.append(1)
        loss = model.loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
        loss.backward()
        return loss

    assert MuonAdamW(parameter_groups(model)).step(closure) > 0
    assert len(calls) == 1


def test_models_without_matrices_and_further_groups_are_refused():
    with pytest.raises(ConfigError, match="no parameter is a matrix"):
        MuonAdamW(nn.LayerNorm(4).parameters())
    optimizer = MuonAdamW(nn.Linear(4, 4).parameters())
    with pytest.raises(ConfigError, match="no further parameter groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def fit(max_steps, tmp_path, ckpt_path=None, first=0):
    module = SparseBitNet(small_config(n_layers=1), partial(MuonAdamW, lr=1e-2), warmup_steps=2, schedule_steps=6)
    losses = Losses()
    callbacks = [losses, WeightDecaySchedule(until=0.5, total_steps=6), MaskedWeightDecay(1.0)]
    trainer = quiet_trainer(callbacks, max_steps=max_steps, gradient_clip_val=1.0)
    batches = list(token_loader(batches=6))[first:]
    trainer.fit(module, unbounded(batches), ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / f"step_{max_steps}.ckpt")
    return losses.values


def test_a_trainer_continues_with_its_schedules(tmp_path):
    torch.manual_seed(0)
    whole = fit(6, tmp_path)
    torch.manual_seed(0)
    fit(3, tmp_path)
    assert fit(6, tmp_path, tmp_path / "step_3.ckpt", first=3) == whole[3:]
