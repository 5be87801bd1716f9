"""``TernarySparseConversion`` in training runs of modules that do not mention it."""

import pytest
import torch
from lightning.fabric import Fabric

from sbn_lightning import MaskRefresh, SparseBitLinear, TernarySparseConversion, convert_linears
from sbn_lightning.core.errors import ConfigError, SBNError
from sbn_lightning.fabric.run import FabricRun
from sbn_lightning.sparsity.pattern import NMPattern, top_n_mask
from tests.helpers import ForeignModule, quiet_trainer, regression_loader
from tests.preloaded import Preloaded


@pytest.mark.parametrize(
    ("options", "skipped"),
    [({"exclude": "*.0"}, {"net.0": "excluded by name"}), ({"include": "*.0"}, {"net.2": "include does not name it"})],
)
def test_one_name_is_a_pattern_too(options, skipped):
    conversion = TernarySparseConversion("2:4", **options)
    quiet_trainer([conversion], max_steps=1).fit(ForeignModule(), regression_loader())
    assert conversion.report.skipped == skipped


@pytest.mark.parametrize("in_configure_model", [False, True])
def test_conversion_of_a_foreign_module(in_configure_model):
    module = ForeignModule(in_configure_model)
    conversion = TernarySparseConversion("2:4", exclude=("net.2",))
    trainer = quiet_trainer([conversion, MaskRefresh()], max_steps=20)
    trainer.fit(module, regression_loader())
    assert conversion.report.converted == ["net.0"]
    assert conversion.report.skipped == {"net.2": "excluded by name"}
    assert type(module.net[0]) is SparseBitLinear
    assert module._ddp_params_and_buffers_to_ignore == ["net.0.mask_bits"]
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters()} == optimised
    assert torch.equal(module.net[0].mask, top_n_mask(module.net[0].weight, NMPattern(2, 4)))


@pytest.mark.parametrize("in_configure_model", [False, True])
def test_a_converted_module_resumes(in_configure_model):
    def run(steps, ckpt_path=None):
        module = ForeignModule(in_configure_model)
        trainer = quiet_trainer([TernarySparseConversion("2:4"), MaskRefresh(interval=4)], max_steps=steps)
        trainer.fit(module, regression_loader(batch_size=64), ckpt_path=ckpt_path)
        trainer.save_checkpoint(f"{steps}.ckpt")
        return module.state_dict()

    expected = run(14)
    run(6)
    resumed = run(14, "6.ckpt")
    assert sorted(expected) == sorted(resumed)
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def train_in_a_fork():
    module = ForeignModule()
    options = {"strategy": "ddp_fork", "devices": 1, "max_steps": 2, "enable_checkpointing": True}
    trainer = quiet_trainer([TernarySparseConversion("2:4")], **options)
    trainer.fit(module, regression_loader())
    convert_linears(module, "2:4")
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=False)["state_dict"]
    print("same", all(torch.equal(value, saved[name]) for name, value in module.state_dict().items()), flush=True)


def test_training_in_a_forked_process_says_what_the_model_here_is(tmp_path):
    """It keeps plain layers with the trained weights; converted as told it is the model of the checkpoint.

    In a process of its own: once autograd has threads a process cannot be forked any more.
    """
    output = tmp_path / "output.txt"
    assert Preloaded(train_in_a_fork, [], tmp_path, output).wait(200) == 0, output.read_text()
    printed = output.read_text()
    assert "call convert_linears on it with the same options" in printed
    assert "same True" in printed


def test_a_conversion_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match=r"include fits no linear layer of the model: encoder; .* net\.0, net\.2"):
        quiet_trainer([TernarySparseConversion(include=("encoder",))]).fit(ForeignModule(), regression_loader())


def test_a_plain_module_is_converted_in_a_fabric_loop():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
    conversion = TernarySparseConversion("2:4")
    fabric = Fabric(accelerator="cpu", callbacks=[conversion, MaskRefresh()])
    run = FabricRun(fabric, max_steps=2, module=model)
    run.call("setup", stage="fit")
    assert conversion.report.converted == ["0", "1"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.optimizers = [optimizer]
    fitted, optimizer = fabric.setup(model, optimizer)
    run.call("on_train_start")
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(fitted(torch.randn(8, 16)).square().mean())
        optimizer.step()
        run.global_step += 1
        run.call("on_train_batch_end")
    run.call("on_train_end")
    assert torch.equal(model[0].mask, top_n_mask(model[0].weight, NMPattern(2, 4)))


def test_a_checkpoint_of_a_converted_module_loads_into_plain_layers():
    module = ForeignModule()
    trainer = quiet_trainer([TernarySparseConversion("2:4", activation_bits=4)], max_steps=2)
    trainer.fit(module, regression_loader())
    trainer.save_checkpoint("converted.ckpt")
    other = ForeignModule()
    assert TernarySparseConversion.load(other, "converted.ckpt") == ["net.0", "net.2"]
    assert other.net[0].sparsity == module.net[0].sparsity
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(ConfigError, match="converted already: use its load_state_dict"):
        TernarySparseConversion.load(other, "converted.ckpt")
    # The state dict of a sharded model carries no metadata.
    saved = torch.load("converted.ckpt", weights_only=True)
    saved["state_dict"] = dict(saved["state_dict"])
    torch.save(saved, "sharded.ckpt")
    other = ForeignModule()
    assert TernarySparseConversion.load(other, "sharded.ckpt") == ["net.0", "net.2"]
    assert other.net[0].sparsity == module.net[0].sparsity
    torch.save({"state_dict": saved["state_dict"]}, "bare.ckpt")
    with pytest.raises(ConfigError, match=r'give the options of the training, for example pattern="2:4"'):
        TernarySparseConversion.load(ForeignModule(), "bare.ckpt")
    assert TernarySparseConversion.load(ForeignModule(), "bare.ckpt", "2:4", activation_bits=4) == ["net.0", "net.2"]


class OtherWidth(ForeignModule):
    def __init__(self):
        super().__init__()
        self.net[2] = torch.nn.Linear(32, 24)


class OtherName(ForeignModule):
    def __init__(self):
        super().__init__()
        self.more = torch.nn.Linear(4, 4)


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_module_plain(tmp_path):
    module = ForeignModule()
    convert_linears(module, "2:4")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "good.ckpt")
    torch.save({"weights": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for other, file, message in [
        (ForeignModule(in_configure_model=True), "good", r"lacks; if .* call module\.configure_model\(\) first"),
        (OtherWidth(), "good", r"net\.2\.weight has the shape \(\d+, 32\) there and \(24, 32\) in the module"),
        (OtherName(), "good", r"it lacks more\.weight, more\.bias"),
        (ForeignModule(), "empty", "holds no state_dict"),
        (ForeignModule(), "text", "is no checkpoint"),
        (ForeignModule(), "absent", "No such file"),
    ]:
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(SBNError, match=message):
            TernarySparseConversion.load(other, tmp_path / f"{file}.ckpt")
        assert other.net is None or type(other.net[0]) is torch.nn.Linear
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
