"""On a GPU: q, k and v as one product, and gate and up as another, in a compiled model of transformers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sbn_lightning import SparseTernaryPrecision
from sbn_lightning.backends.integer import Gradients, KernelBackend
from sbn_lightning.backends.selection import engines
from sbn_lightning.layers.conversion import convert_linears

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gradients_of(model: nn.Module, gradients: Gradients) -> tuple[float, dict[str, torch.Tensor]]:
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    plugin = SparseTernaryPrecision("sparse", gradients, tokens=512)
    plugin.convert_module(model)
    for block in model.model.layers:
        block.compile(fullgraph=True)
    ids = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(1)).cuda()
    with plugin.forward_context():
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def distances(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[float]:
    return [float((one[name] - other[name]).norm() / other[name].norm()) for name in other]


def test_joined_layers_compute_what_single_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    if "sparse" not in engines(torch.device("cuda"))[0]:
        pytest.skip("sparse does not run on this GPU")
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).cuda()
    convert_linears(model, "2:4")
    loss, exact = gradients_of(model, "bf16")
    rounded_loss, rounded = gradients_of(model, "int8")
    monkeypatch.setattr(KernelBackend, "_join", lambda *given: None)
    single_loss, single = gradients_of(model, "bf16")
    assert loss == rounded_loss == single_loss
    assert 0 < max(distances(exact, single)) < 0.02  # bfloat16 rounds sums of another order
    assert max(distances(rounded, single)) < 0.1
