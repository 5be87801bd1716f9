"""A packed layer as one operator, as a server compiles and calls it."""

import pytest
import torch

from sbn_lightning import SparseBitLinear
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.layers.packed_op import run_packed


def layer_and_arguments(bits=8, tokens=5, dtype=torch.float32):
    torch.manual_seed(0)
    layer = packed_layer(SparseBitLinear(32, 24, bias=False, pattern="2:4", split_sizes=(16, 8), activation_bits=bits))
    x = torch.randn(tokens, 32, dtype=dtype)
    layer(x)  # chooses the kernel
    arguments = (x, layer.codes, layer.gamma, layer.row_scale, layer._packed, layer._layout, layer._kernel, bits)
    return layer, arguments


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_equals_the_layer(bits, dtype):
    layer, (x, *_) = layer_and_arguments(bits, dtype=dtype)
    for tokens in (x, x[:1], x.view(1, 5, 32)):
        assert torch.equal(run_packed(layer, tokens), layer(tokens))


@pytest.mark.parametrize("bits", [8, None])
def test_torch_accepts_the_operator(bits):
    _, arguments = layer_and_arguments(bits)
    torch.library.opcheck(torch.ops.sbn_lightning.packed_linear, arguments)


def test_one_compiled_graph_serves_every_number_of_tokens():
    layer, (x, *_) = layer_and_arguments()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda tokens: run_packed(layer, tokens) + 1, backend=count, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 5, 64):
        x = torch.randn(tokens, 32)
        assert torch.equal(compiled(x), layer(x) + 1)
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to torch")
@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
def test_a_cuda_graph_of_the_compiled_operator_replays(tokens):
    torch.manual_seed(0)
    source = SparseBitLinear(256, 384, bias=False, pattern="2:4", split_sizes=(256, 64, 64))
    layer = packed_layer(source).cuda()
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    layer(x)
    assert layer._kernel is not None
    compiled = torch.compile(lambda given: run_packed(layer, given) * 2, fullgraph=True, dynamic=True)
    compiled(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = compiled(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, layer(x) * 2)
