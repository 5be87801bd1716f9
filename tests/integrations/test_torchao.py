"""The two steps of torchao's own convention: prepare and convert."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from torchao.quantization import quantize_

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.integrations.torchao import TernarySparseConfig, linear_except
from sbn_lightning.layers.packed import PackedTernaryLinear
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


def test_prepare_train_convert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize_(model, TernarySparseConfig("2:4"), filter_fn=linear_except("2"))
    assert [type(layer) for layer in model] == [SparseBitLinear, nn.ReLU, nn.Linear]
    x = torch.randn(8, 16)
    before = model[0].weight.detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    expected = model.eval()(x)
    quantize_(model, TernarySparseConfig(step="convert"))
    assert [type(layer) for layer in model] == [PackedTernaryLinear, nn.ReLU, nn.Linear]
    assert torch.equal(model(x), expected)


def test_what_does_not_work_is_named():
    with pytest.raises(ConfigError, match="step='train' is not"):
        TernarySparseConfig(step="train")
    with pytest.raises(ConfigError, match=r"in_features=18 is not a multiple of M=4"):
        quantize_(nn.Sequential(nn.Linear(18, 4)), TernarySparseConfig("2:4"))
