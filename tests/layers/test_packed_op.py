"""A packed layer as one operator, as a server compiles and calls it."""

import pytest
import torch

from sbn_lightning import SparseBitLinear
from sbn_lightning.layers.packed import PackedTernaryLinear, packed_layer
from sbn_lightning.layers.packed_op import run_packed
from sbn_lightning.sparsity.ternary import token_magnitude

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible to torch")


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("bits", [8, 4])
def test_slices_of_tokens_add_up_with_the_scale_of_whole_tokens(device, bits):
    torch.manual_seed(0)
    whole = packed_layer(SparseBitLinear(96, 64, bias=False, pattern="2:4", activation_bits=bits)).to(device)
    x = torch.randn(5, 96, device=device)
    magnitude = token_magnitude(x, bits)

    def sum_of_slices(magnitude):
        total = torch.zeros(5, 64, device=device)
        for codes, part in zip(whole.codes.chunk(2, dim=1), x.chunk(2, dim=1), strict=True):
            own = PackedTernaryLinear(codes.contiguous(), whole.gamma, pattern="2:4", activation_bits=bits)
            own(part)  # chooses the kernel
            total += run_packed(own, part, magnitude)
        return total

    wanted = whole(x)
    assert (sum_of_slices(magnitude) - wanted).abs().max() < 2e-6 * wanted.abs().max()
    assert (sum_of_slices(None) - wanted).abs().max() > 1e-3 * wanted.abs().max()  # each slice by its own scale


@NEEDS_GPU
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
