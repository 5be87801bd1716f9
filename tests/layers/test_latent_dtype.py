"""Latent weights in 16 bits: one warning, where training is meant."""

import warnings

import pytest
import torch
from torch import nn

from sbn_lightning.layers.conversion import convert_linears, convert_quietly
from sbn_lightning.layers.packed import pack_layers

LOST = r"the latent weights are bfloat16, in which most updates.*dtype=torch.float32.*bf16-mixed"


def net():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def train(model, steps=2, **options):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, **options)
    for _ in range(steps):
        model(torch.randn(4, 16, dtype=weights[0].dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def told(recorded):
    return [str(one.message) for one in recorded if "most updates" in str(one.message)]


def test_a_conversion_of_16_bit_weights_warns_once_and_the_optimiser_does_not():
    model = net().bfloat16()
    with pytest.warns(UserWarning, match=LOST):
        report = convert_linears(model, "2:4")
    assert report.narrow is torch.bfloat16
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        train(model)
    assert told(recorded) == []
    with pytest.warns(UserWarning, match="the latent weights are float16"):
        convert_linears(net().half(), "2:4")


def test_what_the_warning_says_is_so():
    # The same small steps move float32 weights and leave most bfloat16 weights as they are.
    share = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = net().to(dtype)
        convert_quietly(model, "2:4")
        before = model[0].weight.detach().clone()
        train(model, steps=10, lr=2e-5)
        share[dtype] = (model[0].weight == before).float().mean()
    assert share[torch.float32] < 0.05
    assert share[torch.bfloat16] > 0.5


def test_a_cast_after_the_conversion_is_told_by_the_first_step_once():
    model = net()
    convert_linears(model, "2:4")
    model.bfloat16()
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        train(model)
        train(model)
    assert len(told(recorded)) == 1


def test_a_model_that_was_converted_without_a_word_is_told_by_the_first_step():
    model = net().bfloat16()
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        convert_quietly(model, "2:4", shown=False)
        assert told(recorded) == []
        train(model)
    assert len(told(recorded)) == 1


@pytest.mark.parametrize("case", ["float32", "frozen", "run only", "packed", "other layers"])
def test_no_warning_where_nothing_is_lost(case):
    model = net() if case == "float32" else net().bfloat16()
    if case == "other layers":
        model = nn.Sequential(net(), nn.Linear(16, 16).bfloat16())
        model.forward = lambda x: model[1](model[0](x.float()).bfloat16())
    if case in ("frozen", "packed"):
        model.requires_grad_(False)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        convert_quietly(model, "2:4", exclude=("1",) if case == "other layers" else (), shown=False)
        if case == "packed":
            pack_layers(model)
        if case in ("float32", "other layers"):
            train(model)
        else:
            model.append(nn.Linear(16, 16).bfloat16())
            model(torch.randn(4, 16).bfloat16())
            optimizer = torch.optim.SGD(model[-1].parameters())
            model[-1].weight.grad = torch.ones_like(model[-1].weight)
            optimizer.step()
    assert told(recorded) == []
    assert convert_quietly(net().bfloat16().requires_grad_(False), "2:4").narrow is None


def test_experts_in_16_bits():
    pytest.importorskip("transformers", minversion="5")
    from tests.integrations.families import build

    model = build("mixtral").bfloat16()
    with pytest.warns(UserWarning, match=LOST):
        convert_linears(model, "2:4", include=("experts",))


def test_bf16_true_of_lightning_is_told(tmp_path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from sbn_lightning import MaskRefresh, TernarySparseConversion

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(precision):
        trainer = Trainer(
            callbacks=[TernarySparseConversion("2:4"), MaskRefresh()],
            precision=precision,
            **{"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path},
        )
        with warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4))
        return told(recorded)

    assert len(fit("bf16-true")) == 1
    assert fit("bf16-mixed") == fit("32-true") == []
