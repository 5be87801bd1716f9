import math
from types import SimpleNamespace

import pytest
import torch

import sbn_lightning
from sbn_lightning import SparseBitNet
from sbn_lightning.core.errors import ConfigError
from sbn_lightning.distributed.optimizer_states import name_optimizer_states
from sbn_lightning.training.module import Perplexity, learning_rate_factor
from sbn_lightning.training.parameter_groups import LearningRateRule, parameter_groups, scale_learning_rates
from tests.helpers import ForeignModule, quiet_trainer, small_config, small_module, token_loader


def test_public_names():
    names = [
        *("NMPattern", "SparseBitLinear", "SparseLinear", "TernaryTransformer", "TransformerConfig", "SparseBitNet"),
        *("TokenDataModule", "TernarySparseConversion", "MaskRefresh", "DenseToSparseRamp", "SparsityPatternLogger"),
        "WeightDecaySchedule",
    ]
    assert set(names) <= set(sbn_lightning.__all__)
    for name in sbn_lightning.__all__:
        vars(sbn_lightning).pop(name, None)  # another test may have imported the old module of that name
        assert getattr(sbn_lightning, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = sbn_lightning.Nonsense


def test_only_matrices_decay():
    module = small_module(qkv_bias=True, tie_embeddings=False, learnable_scales=True)
    decay, rest = module.parameter_groups()
    names = {id(p): name for name, p in module.model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    others = {names[id(p)] for p in rest["params"]}
    assert rest["weight_decay"] == 0.0
    assert decayed | others == set(names.values())
    assert "lm_head.weight" in decayed
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"embed.weight", "norm.weight", "blocks.0.attention.qkv.bias", "blocks.0.mlp.down.log_scale"} <= others


def test_rules_give_parameters_a_learning_rate_and_a_weight_decay():
    rules = [
        LearningRateRule("embed.*", 0.1),
        LearningRateRule("blocks.0.*", 0.5, weight_decay=0.02),
        LearningRateRule("*norm*", 2.0),
    ]
    module = small_module()
    module.learning_rates = rules
    module.trainer = SimpleNamespace(max_steps=10)
    module.hparams["warmup_steps"] = 0
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(p): name for name, p in module.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    base, decay = optimizer.defaults["lr"], optimizer.defaults["weight_decay"]
    assert found.keys() == set(names.values())
    assert found["embed.weight"] == pytest.approx((0.1 * base, 0))
    assert found["blocks.0.mlp.down.weight"] == pytest.approx((0.5 * base, 0.02))
    assert found["blocks.0.mlp_norm.weight"] == pytest.approx((2 * base, 0))
    assert found["blocks.1.mlp.down.weight"] == pytest.approx((base, decay))
    with pytest.raises(ConfigError, match="'block' matches no parameter"):
        parameter_groups(module.model, [LearningRateRule("block")])
    with pytest.raises(ConfigError, match=r"'embed\.\*' matches no parameter: the model trains none"):
        parameter_groups(small_module().model.requires_grad_(False), [LearningRateRule("embed.*")])
    with pytest.raises(ConfigError, match=r"scale=-1 of '\*' must be 0 or more"):
        LearningRateRule("*", -1)


def test_rules_scale_a_learning_rate_that_is_a_tensor():
    rules = [LearningRateRule("embed.*", 0.5), LearningRateRule("blocks.0.*", 0.25)]
    optimizer = torch.optim.AdamW(parameter_groups(small_module().model, rules), lr=torch.tensor(0.5))
    scale_learning_rates(optimizer)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.5, 0.25, 0.125}
    assert float(optimizer.defaults["lr"]) == 0.5


def test_learning_rate_factor():
    def rates(schedule):
        options = {"schedule": schedule, "warmup_steps": 4, "max_steps": 12, "floor": 0.1}
        return [learning_rate_factor(step, **options) for step in (0, 3, 4, 8, 12, 20)]

    assert rates("cosine") == pytest.approx([0.25, 1, 1, 0.55, 0.1, 0.1])
    assert rates("linear") == pytest.approx([0.25, 1, 1, 0.55, 0.1, 0.1])
    assert rates("two_stage") == pytest.approx([0.25, 1, 1, 0.1 + 0.9 * 0.5 * 2 / 3, 0.1, 0.1])
    assert rates("constant") == [0.25, 1, 1, 1, 1, 1]


def test_perplexity_weighs_batches_by_tokens():
    metric = Perplexity()
    metric.update(torch.tensor(1.0), 30)
    metric.update(torch.tensor(3.0), 10)
    assert metric.compute().item() == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize("linear", ["ternary", "masked", "dense"])
def test_training_learns(linear):
    module = small_module(linear=linear)
    loader = token_loader(batches=1)
    trainer = quiet_trainer(max_steps=40)
    before = module.model.loss(*_shifted(loader)).item()
    trainer.fit(module, loader)
    assert module.model.loss(*_shifted(loader)).item() < before - 1.5


def _shifted(loader):
    batch = next(iter(loader))
    return batch[:, :-1], batch[:, 1:]


def test_validate_test_predict():
    module, loader = small_module(), token_loader(batches=2)
    trainer = quiet_trainer()
    validation = trainer.validate(module, loader, verbose=False)[0]
    test = trainer.test(module, loader, verbose=False)[0]
    assert validation["val/perplexity"] == pytest.approx(math.exp(validation["val/loss"]), rel=1e-5)
    assert test["test/perplexity"] == pytest.approx(validation["val/perplexity"])
    log_likelihood = torch.cat(trainer.predict(module, loader))
    assert log_likelihood.shape == (8, 16)
    assert -log_likelihood.mean().item() == pytest.approx(validation["val/loss"], rel=1e-4)


def test_checkpoint_loads_with_weights_only():
    module = small_module(pattern="2:4", qkv_bias=True)
    trainer = quiet_trainer(max_steps=3)
    trainer.fit(module, token_loader())
    trainer.save_checkpoint("model.ckpt")
    assert torch.load("model.ckpt", weights_only=True)["hyper_parameters"]["config"]["pattern"] == "2:4"
    loaded = SparseBitNet.load_from_checkpoint("model.ckpt")
    tokens = torch.randint(320, (2, 9))
    assert torch.equal(loaded(tokens), module(tokens))


def test_a_schedule_without_an_end_is_an_error():
    with pytest.raises(ConfigError, match="max_steps"):
        quiet_trainer(max_steps=-1, max_epochs=1).fit(SparseBitNet(small_config()), token_loader())


def test_gradient_accumulation_equals_a_large_batch():
    losses = []
    for accumulate, batch_size in ((1, 8), (4, 2)):
        module = small_module()
        trainer = quiet_trainer(max_steps=4, accumulate_grad_batches=accumulate)
        trainer.fit(module, token_loader(batches=4 * accumulate, batch_size=batch_size))
        losses.append(module.model.loss(*_shifted(token_loader(batches=4))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_optimiser_states_have_names_and_old_checkpoints_without_still_load():
    def run(steps, checkpoint=None):
        module = small_module()
        trainer = quiet_trainer(max_steps=steps)
        trainer.fit(module, token_loader(batches=2), ckpt_path=checkpoint)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return module.state_dict(), trainer.optimizers[0]

    _, optimizer = run(2)
    saved = torch.load("2.ckpt", weights_only=True)
    names = dict(small_module().named_parameters())
    (named,) = saved["optimizer_states"]
    assert set(named["state"]) == set(names)
    assert all(named["state"][name]["exp_avg"].shape == parameter.shape for name, parameter in names.items())
    saved["optimizer_states"] = [optimizer.state_dict()]
    assert 0 in saved["optimizer_states"][0]["state"]
    torch.save(saved, "old.ckpt")
    (expected, _), (got, _) = run(4, "2.ckpt"), run(4, "old.ckpt")
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_states_are_named_by_whoever_numbered_them(sharded):
    """States are numbered by parameter group, or under ModelParallelStrategy by sorted place in the model."""
    module = ForeignModule()
    weights, biases = [module.net[0].weight, module.net[2].weight], [module.net[2].bias, module.net[0].bias]
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights}])
    (module.net(torch.randn(4, 16)) ** 2).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    if sharded:
        module._device_mesh = object()
        places = {parameter: place for place, parameter in enumerate(module.parameters())}
        state["state"] = {places[parameter]: dict(values) for parameter, values in optimizer.state.items()}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            saved["params"] = sorted(places[parameter] for parameter in group["params"])
    name_optimizer_states([state], module, [optimizer])
    assert [group["params"] for group in state["param_groups"]] == [
        ["net.2.bias", "net.0.bias"],
        ["net.0.weight", "net.2.weight"],
    ]
    for name, parameter in module.named_parameters():
        assert torch.equal(state["state"][name]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    before = {name: values["exp_avg"].clone() for name, values in state["state"].items()}
    optimizer.load_state_dict(state)
    name_optimizer_states([state], module, [optimizer])  # the states have names already
    for name, parameter in module.named_parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before[name])
