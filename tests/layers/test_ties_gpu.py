"""A GPU draws the noise of a CPU, in a run that starts from weights of few bits and for weights on the GPU."""

from functools import partial

import pytest
import torch
from torch import nn

from sbn_lightning import SparseBitNet, break_ties, convert_linears
from sbn_lightning.layers.ties import find_ties
from tests.formats.models import make_model, save
from tests.helpers import quiet_trainer, small_config, token_loader
from tests.layers.test_ties import round_weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_run_on_a_gpu_starts_from_the_weights_of_a_run_on_a_cpu(tmp_path):
    source = make_model(linear="dense")
    round_weights(source)
    path = str(save(source, tmp_path / "dense.ckpt"))
    found = []
    for accelerator in ("cpu", "gpu"):
        module = SparseBitNet(small_config(pattern="2:4"), partial(torch.optim.SGD, lr=0.0), init_from=path)
        quiet_trainer(accelerator=accelerator, devices=1, max_steps=1).fit(module, token_loader())
        assert not find_ties(module)
        found.append([weight.detach().cpu() for weight in module.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:.*call break_ties")
def test_weights_on_a_gpu():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(256, 512)), nn.Sequential(nn.Linear(256, 512)).cuda()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        round_weights(model)
        convert_linears(model, "2:4")
        assert list(break_ties(model)) == ["0"]
    # The deviations of the weights are sums in other orders.
    torch.testing.assert_close(models[1][0].weight.cpu(), models[0][0].weight, rtol=1e-5, atol=1e-7)
