"""SparsitySchedule in a plain loop gives the numbers of the Lightning callbacks, and resumes to the last bit."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning import DenseToSparseRamp, MaskedWeightDecay, MaskRefresh, RoundingWarmup
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.integrations.pytorch import convert
from sbn_lightning.layers.masked_linear import masked_layers
from sbn_lightning.schedule import MaskedDecay, Ramp, Refresh, Rounding, SparsitySchedule
from tests.helpers import ForeignModule, Losses, imported, quiet_trainer, regression_loader

STEPS = 8


def converted():
    model = ForeignModule()
    convert(model, "2:4", exclude=())
    return model


def plain_loop(model, optimizer, schedule, first=0, last=STEPS):
    losses = []
    for x, y in list(regression_loader())[first:last]:
        loss = F.mse_loss(model.net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


CASES = {
    "every step": {},
    "interval": {"refresh": Refresh(3)},
    "frozen": {"refresh": Refresh(1, freeze_after=2)},
    "ramp": {"ramp": Ramp("rows", end=0.6)},
    "walk": {"ramp": Ramp("walk", end=0.6, curve="cubic"), "refresh": Refresh(2)},
    "decay": {"masked_decay": MaskedDecay(5.0, until=0.5)},
    "rounding": {"rounding": Rounding(0.8)},
    "rounding by layers": {"rounding": Rounding(0.7, 0.1, "layers", "cubic", "weights")},
    "everything": {
        "refresh": Refresh(3, freeze_after=6),
        "ramp": Ramp("walk", start=0.1, end=0.9),
        "masked_decay": MaskedDecay(2.0),
    },
}


def start(options, model=None):
    model = converted() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, SparsitySchedule(model, optimizer, total_steps=STEPS, **options)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_plain_loop_computes_what_the_callbacks_do(options):
    model, optimizer, schedule = start(options)
    losses = plain_loop(model, optimizer, schedule)

    refresh, ramp, decay = (options.get(name) for name in ("refresh", "ramp", "masked_decay"))
    callbacks = [MaskRefresh(refresh.interval, refresh.freeze_after)] if refresh else [MaskRefresh()]
    callbacks += [DenseToSparseRamp(ramp.shape, ramp.start, ramp.end, ramp.curve)] if ramp else []
    callbacks += [MaskedWeightDecay(decay.decay, decay.until)] if decay else []
    if rounding := options.get("rounding"):
        callbacks += [RoundingWarmup(rounding.end, rounding.start, rounding.shape, rounding.curve, rounding.what)]
    module, seen = converted(), Losses()
    quiet_trainer([*callbacks, seen], max_steps=STEPS).fit(module, regression_loader())
    assert losses == seen.values
    for (name, ours), (_, theirs) in zip(masked_layers(model), masked_layers(module), strict=True):
        assert torch.equal(ours.weight, theirs.weight), name
        assert torch.equal(ours.mask, theirs.mask), name


@pytest.mark.parametrize("stop", [2, 3, 5])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_resumed_loop_is_the_uninterrupted_one(options, stop):
    model, optimizer, schedule = start(options)
    whole = plain_loop(model, optimizer, schedule)
    model, optimizer, schedule = start(options)
    begun = plain_loop(model, optimizer, schedule, last=stop)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule.state_dict()])

    again, optimizer, schedule = start(options)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert begun + plain_loop(again, optimizer, schedule, first=stop) == whole


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_schedule_may_start_at_the_step_of_a_loaded_model(options):
    model, optimizer, schedule = start(options)
    whole = plain_loop(model, optimizer, schedule)
    model, optimizer, schedule = start(options)
    begun = plain_loop(model, optimizer, schedule, last=5)
    again = converted()
    again.load_state_dict(model.state_dict())
    _, later, schedule = start(options | {"steps": 5}, again)
    later.load_state_dict(optimizer.state_dict())
    assert begun + plain_loop(again, later, schedule, first=5) == whole


def test_density_follows_the_ramp_and_statistics_show_it():
    model, optimizer, schedule = start({"ramp": Ramp("step", start=0.5)})
    assert schedule.statistics()["mask_density"] == 1
    plain_loop(model, optimizer, schedule, last=4)
    values = schedule.statistics(per_layer=True)
    assert values["mask_density"] == 0.5
    assert values["flip_rate_mask"] == 0.5
    assert values["mask_density/net.0"] == 0.5
    assert values["zeros"] == pytest.approx(values["zeros_natural"] + values["zeros_enforced"])


def test_a_step_that_was_seen_does_nothing_and_going_back_is_refused():
    model, _, schedule = start({"refresh": Refresh(2)})
    schedule.step(2)
    layer = next(iter(dict(masked_layers(model)).values()))
    before = layer.mask.clone()
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(-1))
    schedule.step(2)
    assert torch.equal(layer.mask, before)
    schedule.step(4)
    assert not torch.equal(layer.mask, before)
    with pytest.raises(ConfigError, match="step=1 comes after step 4"):
        schedule.step(1)


def test_finish_stops_the_decay_and_lets_masks_follow_again():
    model, optimizer, schedule = start({"refresh": Refresh(5), "masked_decay": 3.0})
    schedule.finish()
    layer = next(iter(dict(masked_layers(model)).values()))
    assert not layer.hold_mask
    assert layer.regrow
    before = layer.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_finish_rounds_everything():
    model, optimizer, schedule = start({"rounding": Rounding(1.0)})
    plain_loop(model, optimizer, schedule, last=2)
    x, expected = torch.randn(3, 16), converted()
    expected.load_state_dict(model.state_dict())
    assert not torch.equal(model.net(x), expected.net(x))
    with pytest.warns(UserWarning, match=r"Rounding: training ended after 2 of \d+ steps, at \d+% of the rounding"):
        schedule.finish()
    assert torch.equal(model.net(x), expected.net(x))


def test_finish_says_if_the_ramp_had_not_ended():
    model, optimizer, schedule = start({"ramp": Ramp("rows", end=1.0)})
    plain_loop(model, optimizer, schedule, last=2)
    with pytest.warns(UserWarning, match=r"Ramp: training ended after 2 of \d+ steps, at \d+% of the ramp"):
        schedule.finish()
    model, optimizer, schedule = start({"ramp": Ramp("rows", end=0.1), "rounding": Rounding(0.1)})
    plain_loop(model, optimizer, schedule, last=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.finish()


def test_masked_weights_decay_in_a_conv1d_which_stores_its_transpose():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(transformers.pytorch_utils.Conv1D(6, 8))
    convert(model, "2:4")
    before, mask = model[0].weight.detach().clone(), model[0].mask
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    SparsitySchedule(model, optimizer, masked_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), torch.where(mask, before, before * 0.75))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ramp": Ramp("rows")}, "Ramp depends on the length of training: set total_steps"),
        ({"masked_decay": MaskedDecay(1.0, until=0.5)}, "MaskedDecay depends on the length"),
        ({"masked_decay": 1.0}, "pass the optimizer"),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        SparsitySchedule(converted(), **options)


def test_a_dense_model_and_bad_values_are_refused():
    with pytest.raises(ConfigError, match="found no SparseBitLinear or SparseLinear in Linear; call convert"):
        SparsitySchedule(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="Refresh: interval=0 must be at least 1"):
        Refresh(0)
    with pytest.raises(ConfigError, match=r"Ramp: end=0.1 must lie after start=0.2"):
        Ramp("walk", start=0.2, end=0.1)
    with pytest.raises(ConfigError, match="MaskedDecay: decay=-1 must not be negative"):
        MaskedDecay(-1)
    with pytest.warns(UserWarning, match="masked weights drift"):
        SparsitySchedule(converted(), refresh=Refresh(5, stale_gradient="dense"))


def test_the_schedule_needs_torch_alone():
    found, _ = imported("from sbn_lightning.schedule import SparsitySchedule", ["lightning", "litdata", "transformers"])
    assert found == []


def test_the_rounding_grows_to_the_whole_and_the_layers_follow():
    model, optimizer, schedule = start({"rounding": Rounding(0.5, what="weights")})
    layers = [layer for _, layer in masked_layers(model)]
    assert [layer.rounding for layer in layers] == [(0.0, 1.0)] * len(layers)
    plain_loop(model, optimizer, schedule, last=2)
    assert [layer.rounding for layer in layers] == [(0.5, 1.0)] * len(layers)
    plain_loop(model, optimizer, schedule, first=2, last=4)
    assert [layer.rounding for layer in layers] == [(1.0, 1.0)] * len(layers)
    one_by_one = Rounding(0.8, shape="layers")
    assert [one_by_one.share(0.4, i, 5) for i in range(5)] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [one_by_one.share(0.5, i, 5) for i in range(5)] == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 1.5}, "end=1.5 is not a share of training"),
        ({"end": 0.5, "start": 0.5}, "start=0.5 must be 0 or more, and lie before end=0.5"),
        ({"end": 0.5, "shape": "rows"}, "shape='rows' is not one of 'all', 'layers'"),
        ({"what": "biases"}, "what='biases' is not one of"),
    ],
)
def test_a_warm_up_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Rounding(**options)
